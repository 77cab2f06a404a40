"""Start the processes of a training run, here or on a SLURM cluster.

    python -m launch cluster.processes=2 run.id=try1 data.path=shards/train data.valid_path=shards/valid steps=200
    python -m launch cluster=slurm cluster.nodes=4 cluster.gpus=8 cluster.time=1-00:00:00 run.id=big data.path=...
    python -m launch cluster=slurm ... launch.dry_run=true      # print the script (launch.test_only=true: ask SLURM)
    python -m launch cluster=slurm phases=mova run.id=big ...   # three phases, each from the last one's weights
    python -m launch cluster=slurm job=prepare launch.units=64 source=raw output=shards     # data.prepare as an array
    python -m launch.status runs/try1

`cluster`, `launch`, `phases` and `job` say where and how the processes live (conf/launch.yaml, docs/launching.md);
every other key is one of `python -m train` (conf/train.yaml), or of `python -m data.prepare`, and is checked before
anything starts. What runs is a copy of the code in the run's folder. The same run.id again resumes. SIGTERM or Ctrl-C:
the workers save a checkpoint, then all ends. The exit status is 0 when the run finished, was stopped as asked or was
submitted, else 1.
"""

from __future__ import annotations

import sys
import time

from launch import slurm, snapshot
from launch.compose import Launch, compose_launch, compose_own, split
from launch.local import LocalConfig, run_local
from launch.slurm import SlurmConfig
from train.errors import RunError


def main(arguments: list[str]) -> int:
    """Run the launch that the arguments describe; returns the exit status."""
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return 0
    try:
        own = compose_own(split(arguments)[0])
        launch = compose_launch(arguments)
        if isinstance(launch.cluster, SlurmConfig):
            submit(launch)
            return 0
        assert isinstance(own.cluster, LocalConfig)
        return train_here(launch, own.cluster)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def train_here(launch: Launch, cluster: LocalConfig) -> int:
    """Run on this machine until it ends; returns the exit status."""
    if launch.submit.dry_run or launch.submit.test_only:
        raise RunError("launch.dry_run and launch.test_only are of cluster=slurm; here nothing is submitted")
    run = launch.run_dir
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


def submit(launch: Launch, after: str | None = None) -> str | None:
    """Give the run to SLURM, or show what would be given. Returns the number of its last job.

    after: number of the job that must have ended well before.
    """
    cluster, run = launch.cluster, launch.run_dir
    assert isinstance(cluster, SlurmConfig)
    code = snapshot.look()
    script = slurm.render(cluster, run, code.folder(run.root), launch.overrides, time.time())
    if launch.submit.dry_run:
        print(script, end="")
        return None
    if launch.submit.test_only:
        print(slurm.sbatch(["--test-only"], script))
        return None
    slurm.check_free(run)
    code.write(run.root)
    run.open(launch.resolved)
    jobs = slurm.submit(cluster, run, script, after)
    print(f"run {run.root}: job {', then '.join(jobs)}; script {run.root / slurm.SCRIPT}, logs {run.logs}")
    print(f"how it stands: python -m launch.status {run.root}")
    return jobs[-1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
