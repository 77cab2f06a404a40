"""Train one run, on one process or under torchrun.

    python -m train run.id=try1 data.path=shards/train data.valid_path=shards/valid steps=200
    torchrun --nproc-per-node 2 -m train run.id=try1 model=tiny data.path=shards/train

The same run.id again resumes. SIGTERM, Ctrl-C or a file `stop` in the run directory: save and end. The exit status is
0 when the run finished or was stopped as asked, 1 when it failed, 75 when it failed and another attempt may succeed
(train/errors.py); status.json in the run directory says which.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from datetime import timedelta

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig

from data.errors import DataError
from train.config import register, to_dataclass
from train.errors import RankError, RunError, exit_status, lost_peer
from train.guard import StopRequest
from train.loop import run
from train.mesh import make_layout, start_process_group
from train.run_dir import RunDir
from train.watchdog import record_nccl


@hydra.main(version_base=None, config_path="pkg://conf", config_name="train")
def main(config: DictConfig) -> None:
    """Entry point of `python -m train`."""
    stop = StopRequest()  # first of all, so that a signal is not lost while the run starts
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING if first else logging.ERROR, format="%(message)s")
    try:
        typed, resolved = to_dataclass(config)
        record_nccl(RunDir.of(typed.run.root, typed.run.id))
        device = start_process_group(timedelta(minutes=typed.guard.timeout_minutes))
        run(typed, resolved, make_layout(typed.parallel, device), stop)
        dist.destroy_process_group()
    except Exception as error:
        if isinstance(error, RunError | DataError):
            said = f"error: {error}" if first or isinstance(error, RankError) else ""
        elif lost_peer(error):
            line = str(error).strip().splitlines()[0]
            said = f"error: another rank is gone, hangs or is out of reach: {line}" if first else ""
        else:
            said = traceback.format_exc().rstrip()
        if said:
            print(said, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: threads that wait for other ranks would abort the interpreter's own end, with another status.
        os._exit(exit_status(error))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    register()
    main()
