"""Collects Python's garbage between chosen steps, on all ranks at once.

By default the collector starts at a different moment on each rank, scans all objects of a large model, and every rank
waits for that one. Here it is off while a run starts and trains: objects from before the first step are never scanned
again, the others between steps that are the same on all ranks.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For work that creates a million long-lived objects, which the collector would scan again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """For the imports of a program: without the collector, which takes a fifth of their time, and what they make is
    never scanned later."""
    with without_garbage_collection():
        yield
        gc.freeze()


class Garbage:
    """While entered, garbage is collected every `every` steps (0: whenever Python decides)."""

    def __init__(self, every: int) -> None:
        self._every = every

    def __enter__(self) -> Garbage:
        self._was_on = gc.isenabled()
        if self._every:
            gc.disable()
        return self

    def started(self) -> None:
        """Called when everything is there that the steps work with."""
        if self._every:
            gc.collect()
            gc.freeze()

    def after(self, step: int) -> bool:
        """Called after `step` steps: collect if it is due. Returns whether it was."""
        due = self._every > 0 and step % self._every == 0
        if due:
            gc.collect()
        return due

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._every:
            gc.unfreeze()
            if self._was_on:
                gc.enable()
