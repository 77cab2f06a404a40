"""Start the processes of a training run.

    python -m launch cluster.processes=2 run.id=try1 data.path=shards/train data.valid_path=shards/valid steps=200

`cluster` and `cluster.*` say where the processes live (conf/cluster/); every other key is one of `python -m train`
(conf/train.yaml) and is checked before any process starts. The same run.id again resumes. SIGTERM or Ctrl-C: the
workers save a checkpoint, then all ends. The exit status is 0 when the run finished or was stopped as asked, else 1.
"""

from __future__ import annotations

import sys

from launch.compose import compose_launch
from launch.local import run_local
from train.errors import RunError


def main(arguments: list[str]) -> int:
    """Run the launch that the arguments describe; returns the exit status."""
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return 0
    try:
        launch = compose_launch(arguments)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    run_dir = launch.run_dir
    ending = run_local(launch.cluster, launch.train.run.id, launch.overrides)
    if ending.failure is None:
        return 0
    if ending.early:
        print(f"stopped before run {run_dir.root} went on; nothing was lost", file=sys.stderr)
        return 0
    print(f"error: run {run_dir.root} failed: {ending.failure}; its own words are above and in {run_dir.status}",
          file=sys.stderr)  # fmt: skip
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
