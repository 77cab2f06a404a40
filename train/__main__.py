"""Train one run, on one process or under torchrun.

    mova train run.id=try1 data.path=shards/train data.valid_path=shards/valid steps=200
    torchrun --nproc-per-node 2 -m train run.id=try1 model=tiny data.path=shards/train

The same run.id again resumes. SIGTERM, Ctrl-C or a file `stop` in the run directory: save and end. The exit status is
0 if the run finished or was stopped on request, 1 if it failed, 75 if it failed and another attempt may succeed
(core/errors.py); status.json in the run directory tells which.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from core.compose import compose
from core.errors import RankError, UserError, describe, exit_status, gone, lost_peer
from core.program import Call, Program
from core.run_dir import RunDir
from core.secrets import without_secrets
from core.terminal import print_without_fail
from train.config import SCHEMA, TrainConfig, check_channels
from train.engine.deterministic import make_deterministic
from train.faults.ending import CLOSING, end_children, end_within, leave
from train.faults.garbage import importing
from train.faults.stop import StopRequest
from train.faults.watchdog import record_nccl
from train.parallel.descriptors import raise_limit
from train.parallel.host_memory import keep_freed_memory
from train.parallel.mesh import make_layout, start_process_group
from train.start.model import with_model


def main(call: Call[TrainConfig]) -> None:
    """Train on this rank; once training has begun, ends the process itself."""
    stop = StopRequest()  # first of all, so that a signal is not lost while the run starts
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.WARNING if first else logging.ERROR, format="%(message)s")
    raise_limit()
    try:
        with importing():  # FSDP2 and checkpoints, half a second: not for a help text, or a mistake in the config
            from train.loop import run
        typed, resolved = call.config, without_secrets(call.plain)
        check_channels(typed.model)
        if typed.parallel.deterministic:
            make_deterministic()
        record_nccl(RunDir.of(typed.run.root, typed.run.id))
        timeout = timedelta(minutes=typed.guard.timeout_minutes)
        device = start_process_group(timeout)
        if device.type == "cpu":
            keep_freed_memory()
        run(typed, resolved, make_layout(typed.parallel, device, timeout), stop)
        with end_within(CLOSING):
            dist.destroy_process_group()
        leave()
    except Exception as error:
        if isinstance(error, UserError) or gone(error):
            said = f"error: {describe(error)}" if first or isinstance(error, RankError) or gone(error) else ""
        elif lost_peer(error):
            line = str(error).strip().splitlines()[0]
            said = f"error: another rank died, hangs or is unreachable: {line}" if first else ""
        else:
            said = traceback.format_exc().rstrip()
        if said:
            print(said, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        with suppress(Exception):
            end_children(0.0)
        # Immediately: threads that wait for other ranks would abort the interpreter's shutdown, with another status.
        os._exit(exit_status(error))


def _begin() -> None:
    print_without_fail("stdout", "stderr")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))


@dataclass(frozen=True)
class TrainProgram(Program):
    """`mova train`. given: what `main` takes, where it was composed before this rank was forked."""

    given: Call[TrainConfig] | None = None

    def act(self, arguments: list[str]) -> int | None:
        """As Program, but if no model is chosen, with that of the weights that the run starts from."""
        return super().act(with_model(SCHEMA, arguments)) if self.given is None else self.main(self.given)

    def composed(self, arguments: Sequence[str]) -> TrainProgram:
        """The same with its config composed from these arguments; if they are wrong itself, so that it says so."""
        try:
            typed = with_model(SCHEMA, arguments)
            return replace(self, given=self.call(typed, typed, compose(SCHEMA, typed)))
        except UserError:
            return self


PROGRAM = TrainProgram("train", __doc__, main, schema=SCHEMA, before=_begin)

if __name__ == "__main__":
    PROGRAM.start()
