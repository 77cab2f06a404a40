"""Printing that works on every terminal and into every file."""

import io
import math
import sys
from contextlib import suppress
from typing import Any


def escape_letters() -> None:
    """Escape characters that the terminal's encoding lacks (in file names, captions) instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_without_fail(*names: str) -> None:
    """Discard what cannot be printed on these streams ("stdout", "stderr") instead of failing: the log's disk is full,
    the terminal is gone, the pipe has no reader any more."""
    for name in names:
        stream = getattr(sys, name)
        if stream is None:  # it was closed when the program began
            continue
        with suppress(OSError):  # what was printed before: a process that ends by os._exit would lose it
            stream.flush()
        raw = _Outlet(stream.fileno(), "wb", closefd=False)
        lasting = io.TextIOWrapper(
            io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=True, write_through=True
        )
        setattr(sys, name, lasting)


class _Outlet(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def clock(seconds: float) -> str:
    """A duration for people: "3 d 4 h", "2 h 05 min", "40 s"; "?" if unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
