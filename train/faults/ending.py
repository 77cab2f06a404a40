"""Bounds the end of a process: work after the last save has limited time, and no child process survives."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator

import psutil

from core.errors import EXIT_OK

CLOSING = 10.0  # seconds for everything without a budget of its own: data threads, files, the process group
REAPING = 1.0  # seconds for killed children to be gone; one that waits for a dead disk is not waited for


@contextlib.contextmanager
def end_within(seconds: float, last_words: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Limit the time of the enclosed code: then this process prints `last_words` and ends its children and itself, with
    status 0, since everything that matters is saved."""

    def end() -> None:
        print(f"work after the last save took more than {seconds:.0f} s and was abandoned", file=sys.stderr)
        with contextlib.suppress(Exception):
            last_words()
        leave()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join(1.0)  # a thread that the interpreter's end meets half way may abort the process


def leave() -> None:
    """End this process with status 0 immediately, and its children: no thread or exit handler of the interpreter
    runs."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    with contextlib.suppress(Exception):
        end_children(0.0)
    os._exit(EXIT_OK)


def end_children(grace: float, spared: Collection[psutil.Process] = ()) -> None:
    """Kill all child processes, and theirs, that have not ended `grace` seconds from now. `spared`: children that were
    there before what is ended, and belong to others in this process."""
    mine = [child for child in psutil.Process().children() if child not in spared]
    for child in tuple(mine):
        with contextlib.suppress(psutil.Error):
            mine += child.children(recursive=True)
    _, alive = psutil.wait_procs(mine, timeout=grace)
    for child in alive:
        with contextlib.suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(alive, timeout=REAPING)
