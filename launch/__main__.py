"""Start the processes of a training run, here or on a SLURM cluster.

    python -m launch cluster.processes=2 run.id=try1 data.path=shards/train data.valid_path=shards/valid steps=200
    python -m launch cluster=slurm cluster.nodes=4 cluster.gpus=8 cluster.time=1-00:00:00 run.id=big data.path=...
    python -m launch cluster=slurm ... launch.dry_run=true      # print the script (launch.test_only=true: ask SLURM)
    python -m launch cluster=slurm phases=mova run.id=big ...   # three phases, each from the last one's weights
    python -m launch cluster=slurm job=prepare launch.units=64 source=raw output=shards     # data.prepare as an array
    python -m launch cluster=slurm watch.enabled=true ...       # and a job that makes clips of the checkpoints
    python -m launch.status runs/try1

`cluster`, `launch`, `phases`, `job` and `watch` say where and how processes live (conf/launch.yaml, docs/launching.md);
every other key is one of `python -m train` (conf/train.yaml), or of `python -m data.prepare`, and is checked before
anything starts. What runs is a copy of the code in the run's folder. The same run.id again resumes. SIGTERM or Ctrl-C:
the workers save a checkpoint, then all ends. The exit status is 0 when the run finished, was stopped as asked or was
submitted, else 1.
"""

from __future__ import annotations

import subprocess
import sys
import time

from launch import prepare, slurm, snapshot, watch
from launch.attempts import is_finished
from launch.compose import Launch, LaunchConfig, SubmitConfig, compose_own, compose_phases, split
from launch.local import LocalConfig, run_local
from launch.slurm import SlurmConfig
from train.errors import RunError


def main(arguments: list[str]) -> int:
    """Run the launch that the arguments describe; returns the exit status."""
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return 0
    try:
        mine, others = split(arguments)
        own = compose_own(mine)
        if own.job == "prepare":
            return prepare_data(own, others)
        launches = compose_phases(arguments)
        if isinstance(own.cluster, SlurmConfig):
            submit(launches)
            return 0
        for launch in launches:
            status = train_here(launch)
            if status or not is_finished(launch.run_dir):
                return status
        return 0
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def prepare_data(own: LaunchConfig, overrides: list[str]) -> int:
    """Run data.prepare here or as a job array; returns the exit status."""
    config = prepare.check(overrides)
    if isinstance(own.cluster, SlurmConfig):
        prepare.submit_array(own.cluster, config, own.launch, snapshot.look(), overrides)
        return 0
    _nothing_submitted(own.launch)
    units = [f"units={own.launch.units}"] if own.launch.units else []
    return subprocess.run([sys.executable, "-m", "data.prepare", *overrides, *units]).returncode


def _nothing_submitted(submit: SubmitConfig) -> None:
    if submit.dry_run or submit.test_only:
        raise RunError("launch.dry_run and launch.test_only are of cluster=slurm; here nothing is submitted")


def train_here(launch: Launch) -> int:
    """Run on this machine until it ends; returns the exit status."""
    _nothing_submitted(launch.submit)
    cluster, run = launch.cluster, launch.run_dir
    assert isinstance(cluster, LocalConfig)
    if launch.watch.enabled:
        raise RunError(f"watch.enabled is of cluster=slurm; here, beside the run: python -m tools.watch {run.root}")
    code = snapshot.look().write(run.root)
    run.open(launch.resolved)
    ending = run_local(cluster, run, code, launch.overrides)
    if ending.failure is None:
        return 0
    if ending.early:
        print(f"stopped before run {run.root} went on; nothing was lost", file=sys.stderr)
        return 0
    print(f"error: run {run.root} failed: {ending.failure}; its own words are above and in {run.status}",
          file=sys.stderr)  # fmt: skip
    return 1


def submit(launches: list[Launch]) -> None:
    """Give the runs to SLURM, each after the one before has ended well; or show what would be given."""
    code = snapshot.look()
    if launches[0].watch.enabled:
        watch.check(launches[0].watch)
    scripts, watchers = [], []
    for launch in launches:
        cluster, run = launch.cluster, launch.run_dir
        assert isinstance(cluster, SlurmConfig)
        folder = code.folder(run.root)
        scripts.append(slurm.render(cluster, run, folder, launch.overrides, time.time(), launch.follows))
        if launch.watch.enabled:
            watchers.append(watch.render(launch.watch, cluster, run, folder))
        if launch.submit.test_only:
            print(slurm.sbatch(["--test-only"], scripts[-1]))
    if launches[0].submit.dry_run:
        print("\n".join([*scripts, *watchers]), end="")
    if launches[0].submit.dry_run or launches[0].submit.test_only:
        return
    for launch in launches:
        slurm.check_free(launch.run_dir)
    after = None
    for launch, script in zip(launches, scripts, strict=True):
        cluster, run = launch.cluster, launch.run_dir
        assert isinstance(cluster, SlurmConfig)
        code.write(run.root)
        run.open(launch.resolved)
        jobs = slurm.submit(cluster, run, script, after)
        after = jobs[-1]
        if launch.watch.enabled:
            job = watch.submit(watchers.pop(0), run, jobs[0])
            print(f"clips of run {run.root}: job {job}; script {run.root / watch.SCRIPT}, clips {run.root / 'samples'}")
        print(f"run {run.root}: job {', then '.join(jobs)}; script {run.root / slurm.SCRIPT}, logs {run.logs}")
    print(f"how it stands: python -m launch.status {' '.join(str(launch.run_dir.root) for launch in launches)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
