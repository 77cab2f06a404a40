"""Says where every rank stands when the run stands still, and ends a process that nothing else ends.

Each rank watches itself: a rank that waits for another one writes its stack as well, and the stacks side by side show
who waits for whom. A file `dump-stacks` in the run directory asks for the same at any time.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

import torch

from train.bad_steps import GuardConfig
from train.errors import EXIT_RETRY
from train.run_dir import RunDir

REQUEST = "dump-stacks"


def record_nccl(run: RunDir) -> None:
    """Let NCCL keep its last collectives and write them into the logs when one times out. Before the process group."""
    if torch.cuda.is_available():
        logs = run.root / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(logs / "nccl-rank"))


class Watchdog:
    """A thread that expects `beat` at every step, from the first one on (start-up may take as long as it takes)."""

    def __init__(self, run: RunDir, config: GuardConfig, rank: int) -> None:
        self._run, self._rank = run, rank
        self._file = run.root / "logs" / f"stacks-rank{rank}.txt"
        self._patience = config.watchdog_seconds
        # By then every collective should have failed by itself: what still stands here does not wait for one.
        self._end = config.watchdog_seconds + 60 * config.timeout_minutes
        self._beat: tuple[float, str] | None = None
        self._asked = time.time()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, doing: str) -> None:
        """The run has moved on; `doing`: what comes next."""
        self._beat = (time.monotonic(), doing)

    def close(self) -> None:
        """No longer watch."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        said: tuple[float, str] | None = None
        while not self._ended.wait(min(1.0, self._patience / 4)):
            try:
                asked = (self._run.root / REQUEST).stat().st_mtime
            except OSError:
                asked = 0.0
            if asked > self._asked:
                self._asked = asked
                self.dump("asked for")
            beat = self._beat
            if beat is None:
                continue
            waited = time.monotonic() - beat[0]
            if waited > self._patience and beat != said:
                said = beat
                self.dump(f"nothing has moved for {waited:.0f} s: {beat[1]}")
            if waited > self._end:
                message = f"rank {self._rank} stood still for {waited:.0f} s: {beat[1]}; stacks in {self._file}"
                print(f"error: {message}", file=sys.stderr, flush=True)
                self._run.write_status("failed", error=message, exit_status=EXIT_RETRY)
                os._exit(EXIT_RETRY)

    def dump(self, why: str) -> None:
        """Write the stacks of all threads of this rank into the logs."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with open(self._file, "a") as file:
                file.write(f"\n{time.strftime('%Y-%m-%dT%H:%M:%S%z')} rank {self._rank}: {why}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"rank {self._rank}: stacks can't be written: {error}", file=sys.stderr, flush=True)
            return
        print(f"rank {self._rank}: {why}; stacks in {self._file}", file=sys.stderr, flush=True)
