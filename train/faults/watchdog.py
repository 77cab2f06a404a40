"""Writes the stacks of every rank when the run makes no progress, and ends a process that nothing else ends.

Each rank watches itself: a rank that waits for another one writes its stack as well, and the stacks side by side show
which rank waits for which. A file `dump-stacks` in the run directory requests the same at any time.

The watching thread needs the interpreter's lock. For a rank that never releases it (a loop in C code) there are two
timers that do not depend on Python, reset at each beat: faulthandler's, which writes the stacks, and the kernel's,
whose SIGALRM ends the process; after death by a signal, the run is restarted.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from typing import NamedTuple

import torch

from core.errors import EXIT_RETRY
from core.run_dir import RunDir
from train.faults.config import GuardConfig

REQUEST = "dump-stacks"
NCCL_RECORD = 60.0  # seconds that NCCL may take to notice a collective's time-out and write its record, on GPUs
LAST_WORDS = 3.0  # seconds from when the thread should have ended the process to the stacks, and from there to SIGALRM


class Deadlines(NamedTuple):
    """Seconds without a beat after which each measure is taken, in this order; defined only here."""

    told: float  # each rank writes its stacks: no progress for as long as the config allows
    given_up: float  # by now the last collective that may have started has timed out
    recorded: float  # and NCCL has written its record
    ended: float  # the thread ends the process
    stacks: float  # faulthandler writes the stacks, if the thread cannot run
    killed: float  # SIGALRM


def deadlines(patience: float, timeout: float, on_gpu: bool) -> Deadlines:
    """patience: the longest usual time without progress, in seconds; timeout: that of a collective."""
    given_up = patience + timeout
    recorded = given_up + (NCCL_RECORD if on_gpu else 0.0)
    return Deadlines(patience, given_up, recorded, recorded, recorded + LAST_WORDS, recorded + 2 * LAST_WORDS)


def record_nccl(run: RunDir) -> None:
    """Let NCCL record its last collectives and write them to the logs if one times out. Call before the process
    group."""
    if torch.cuda.is_available():
        logs = run.root / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(logs / "nccl-rank"))


class Watchdog:
    """A thread that expects `beat` at every step, and during start-up. Create it in the main thread."""

    def __init__(self, run: RunDir, config: GuardConfig, rank: int) -> None:
        self._run, self._rank = run, rank
        self._file = run.logs / f"stacks-rank{rank}.txt"
        self._config = config
        self._beat = (time.monotonic(), "in the start-up", 60 * config.startup_minutes)
        self._asked = time.time()
        self._ended = threading.Event()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._stacks = open(self._file, "a")  # noqa: SIM115  closed by close()
        self._arm()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, doing: str, starting: bool = False) -> None:
        """Report progress; `doing`: what comes next. `starting`: whether that still belongs to the start-up."""
        patience = 60 * self._config.startup_minutes if starting else self._config.watchdog_seconds
        self._beat = (time.monotonic(), doing, patience)
        self._arm()

    def close(self) -> None:
        """Stop watching."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        self._ended.set()
        self._thread.join()
        self._stacks.close()

    def _deadlines(self, patience: float) -> Deadlines:
        return deadlines(patience, 60 * self._config.timeout_minutes, torch.cuda.is_available())

    def _arm(self) -> None:
        ends = self._deadlines(self._beat[2])
        faulthandler.dump_traceback_later(ends.stacks, file=self._stacks)
        signal.setitimer(signal.ITIMER_REAL, ends.killed)

    def _watch(self) -> None:
        told: tuple[float, str, float] | None = None
        while not self._ended.wait(min(1.0, self._config.watchdog_seconds / 4)):
            try:
                asked = (self._run.root / REQUEST).stat().st_mtime
            except OSError:
                asked = 0.0
            if asked > self._asked:
                self._asked = asked
                self.dump("asked for")
            beat = self._beat
            waited, patience = time.monotonic() - beat[0], beat[2]
            if waited > patience and beat != told:
                told = beat
                self.dump(f"no progress for {waited:.0f} s: {beat[1]}")
            if waited > self._deadlines(patience).ended:
                message = f"rank {self._rank} made no progress for {waited:.0f} s: {beat[1]}; stacks in {self._file}"
                print(f"error: {message}", file=sys.stderr, flush=True)
                with contextlib.suppress(OSError):  # a full disk does not keep a dead run alive
                    self._run.write_status("failed", error=message, exit_status=EXIT_RETRY)
                os._exit(EXIT_RETRY)

    def dump(self, why: str) -> None:
        """Write the stacks of all threads of this rank into the logs."""
        try:
            self._stacks.write(f"\n{time.strftime('%Y-%m-%dT%H:%M:%S%z')} rank {self._rank}: {why}\n")
            self._stacks.flush()
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        except OSError as error:
            print(f"rank {self._rank}: stacks cannot be written: {error}", file=sys.stderr, flush=True)
            return
        print(f"rank {self._rank}: {why}; stacks in {self._file}", file=sys.stderr, flush=True)
