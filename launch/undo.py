"""Undoes what a launch has written if nothing runs in the end: refused, disk full, Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from core.durable import write_atomically
from core.run_dir import RunDir

logger = logging.getLogger(__name__)


class Before:
    """A run's folder as it is now. `new`: it is there for this launch only; `files`: that the launch may change."""

    def __init__(self, run: RunDir, new: bool, files: Sequence[Path]) -> None:
        self.root, self.new = run.root, new
        self.earlier = {path: path.read_bytes() if path.exists() else None for path in files}

    def restore(self) -> None:
        """Put it back; a copy of the code may stay in a folder that was there. What a full disk forbids is logged."""
        if self.new:
            shutil.rmtree(self.root, ignore_errors=True)
            return
        for path, content in self.earlier.items():
            try:
                if content is None:
                    path.unlink(missing_ok=True)
                elif not path.exists() or path.read_bytes() != content:
                    write_atomically(path, content)
            except OSError as error:
                logger.warning("%s can't be put back as it was: %s", path, error.strerror)


@contextlib.contextmanager
def undone_on_failure(run: RunDir, new: bool) -> Iterator[None]:
    """What the block writes into a run's folder is taken back when it fails or is interrupted."""
    before = Before(run, new, [run.config])
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextlib.contextmanager
def ctrl_c_at_the_end(what: str) -> Iterator[None]:
    """Ctrl-C within the block is a KeyboardInterrupt at its end; a second one is one at once. `what` is waited for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    presses = 0

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt
        print(f"stopping: waiting for {what} (Ctrl-C again: without)", file=sys.stderr, flush=True)

    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:  # a shell's background
        yield
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if presses:
        raise KeyboardInterrupt
