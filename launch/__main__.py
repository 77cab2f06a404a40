"""Start the processes of a training run, here or on a SLURM cluster.

    mova launch cluster.processes=2 run.id=try1 data.path=shards/train data.valid_path=shards/valid steps=200
    mova launch cluster=slurm cluster.nodes=4 cluster.gpus=8 cluster.time=1-00:00:00 run.id=big data.path=...
    mova launch cluster=slurm ... launch.dry_run=true      # print the script (launch.test_only=true: ask SLURM)
    mova launch cluster=slurm ... launch.plan=true launch.gpu=h100   # refuse what does not fit, before it is submitted
    mova launch cluster=slurm phases=mova run.id=big ...   # three phases, each from the last one's weights
    mova launch cluster=slurm job=prepare launch.units=64 source=raw output=shards     # data.prepare as an array
    mova launch cluster=slurm watch.enabled=true ...       # and a job that makes clips of the checkpoints
    mova status runs/try1

`cluster`, `launch`, `phases`, `job` and `watch` set where and how processes run (conf/launch.yaml, docs/launching.md);
every other key is one of `mova train` (conf/train.yaml), or of `mova prepare`, and is checked before
anything starts. The processes run a copy of the code in the run's folder. The same run.id again resumes. On SIGTERM or
Ctrl-C the workers save a checkpoint, then everything ends. A run whose folder cannot be written (disk full, read-only,
not mounted) waits, at most cluster.disk_wait_hours. The exit status is 0 if the run finished, was stopped on request or
was submitted, 130 after a Ctrl-C before anything runs, else 1.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from dataclasses import replace

from core.child import command, environment
from core.durable import write_atomically
from core.errors import EXIT_FAILED, EXIT_OK, RunError
from core.program import Command
from core.terminal import print_without_fail
from launch import snapshot
from launch.attempts import is_finished
from launch.compose import SCHEMA, Launch, LaunchConfig, SubmitConfig, compose_own, compose_phases, split
from launch.local.local import LocalConfig, run_local
from launch.planned import plan_launch
from launch.slurm import slurm, watch
from launch.slurm.slurm import SlurmConfig
from launch.undo import ctrl_c_at_the_end, undone_on_failure
from train.checkpoint.resume import open_run
from train.config import default_values
from train.engine.schedule import misfit


def main(arguments: list[str]) -> int:
    """Run the launch that the arguments describe; returns the exit status."""
    try:
        mine, others = split(arguments)
        own = compose_own(mine)
        if own.job == "prepare":
            return prepare_data(own, others)
        launches = compose_phases(arguments, own)
        if own.launch.plan:
            launches = [replace(launch, planned=plan_launch(launch)) for launch in launches]
        if isinstance(own.cluster, SlurmConfig):
            submit(launches)
            return EXIT_OK
        for launch in launches:
            status = train_here(launch)
            if status or not is_finished(launch.run_dir):
                return status
        return EXIT_OK
    except OSError as error:
        place = error.filename or "a file of the launch"
        raise RunError(f"{place}: {error.strerror or error}; nothing runs") from error


def prepare_data(own: LaunchConfig, overrides: list[str]) -> int:
    """Run data.prepare here or as a job array; returns the exit status."""
    from launch import prepare  # PyAV and torchaudio, which a launch of training does without: 0.2 s to import

    config = prepare.check(overrides)
    if isinstance(own.cluster, SlurmConfig):
        prepare.submit_array(own.cluster, config, own.launch, snapshot.look(), overrides)
        return 0
    _nothing_submitted(own.launch)
    units = [f"units={own.launch.units}"] if own.launch.units else []
    return subprocess.run(command("data.prepare", more=[*overrides, *units]), env=environment()).returncode


def _nothing_submitted(submit: SubmitConfig) -> None:
    if submit.dry_run or submit.test_only:
        raise RunError("launch.dry_run and launch.test_only need cluster=slurm; nothing is submitted here")


def train_here(launch: Launch) -> int:
    """Run on this machine until it ends; returns the exit status."""
    _nothing_submitted(launch.submit)
    cluster, run = launch.cluster, launch.run_dir
    assert isinstance(cluster, LocalConfig)
    if launch.watch.enabled:
        raise RunError(f"watch.enabled needs cluster=slurm; here start it beside the run: mova watch {run.root}")
    new = not run.root.exists()
    with run.lock("launch.lock"):  # from here to its end no other launch writes into the run's folder
        if (holder := run.holder()) is not None:
            raise RunError(f"run {run.root.name!r} is already being trained by {holder}; wait for it, or stop it")
        with undone_on_failure(run, new):
            code = snapshot.look().write(run.root)
            open_run(run, launch.resolved, default_values())
            _write_plan(launch)
        ending = run_local(cluster, run, code, launch.overrides)
    if ending.failure is None:
        return 0
    if ending.early:
        print(f"stopped before run {run.root} went on; nothing was lost", file=sys.stderr)
        return 0
    print(f"error: run {run.root} failed: {ending.failure}; details are above and in {run.status}",
          file=sys.stderr)  # fmt: skip
    return 1


def submit(launches: list[Launch]) -> None:
    """Submit the runs to SLURM, each after the previous one has finished; or print what would be submitted."""
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
            print(slurm.sbatch(["--test-only"], scripts[-1], cluster))
    if launches[0].submit.dry_run:
        print("\n".join([*scripts, *watchers]), end="")
    if launches[0].submit.dry_run or launches[0].submit.test_only:
        return
    for launch in launches:
        slurm.check_free(launch.run_dir)
    jobs: list[str] = []
    try:
        _submit_all(launches, code, scripts, watchers, jobs)
    except KeyboardInterrupt:
        if not jobs:
            raise
        raise RunError(f"stopped; what was submitted is in the queue: scancel {' '.join(jobs)} ends it") from None
    print(f"how it stands: mova status {' '.join(str(launch.run_dir.root) for launch in launches)}")


def _submit_all(
    launches: list[Launch], code: snapshot.Snapshot, scripts: list[str], watchers: list[str], submitted: list[str]
) -> None:
    """Give the scripts to SLURM one after the other; adds the numbers of the jobs to `submitted`."""
    after = None
    for launch, script in zip(launches, scripts, strict=True):
        cluster, run = launch.cluster, launch.run_dir
        assert isinstance(cluster, SlurmConfig)
        for line in slurm.defaults_taken(cluster):
            print(line)
        if warning := misfit(launch.train.optim, launch.train.steps):
            print(f"warning: run {run.root}: {warning}", file=sys.stderr)
        jobs = slurm.submit(cluster, run, script, after, functools.partial(_fill, code, launch))
        after = jobs[-1]
        submitted += jobs
        print(f"run {run.root}: job {', then '.join(jobs)}; script {run.root / slurm.SCRIPT}, logs {run.logs}")
        if launch.watch.enabled:
            with ctrl_c_at_the_end("sbatch's answer"):
                submitted.append(watch.submit(cluster, watchers.pop(0), run, jobs[0]))
            clips = f"script {run.root / watch.SCRIPT}, clips {run.root / 'samples'}"
            print(f"clips of run {run.root}: job {submitted[-1]}; {clips}")


def _fill(code: snapshot.Snapshot, launch: Launch) -> None:
    """Write what a job of the run needs."""
    code.write(launch.run_dir.root)
    open_run(launch.run_dir, launch.resolved, default_values())
    _write_plan(launch)


def _write_plan(launch: Launch) -> None:
    if launch.planned is not None:
        write_atomically(launch.run_dir.plan, launch.planned)


INTERRUPTED = "stopped before anything ran"  # before the workers are there, or SLURM was asked


def _begin() -> None:
    print_without_fail("stderr")  # a full log disk never ends the launcher of workers that train


PROGRAM = Command("launch", __doc__, main, before=_begin, schema=SCHEMA, failed=EXIT_FAILED, interrupted=INTERRUPTED)

if __name__ == "__main__":
    PROGRAM.start()
