"""Which line of the project runs a kernel, for counts of a step (train/plan/count.py).

Of an operator that Python calls, the innermost line of the project; of one that autograd's engine calls, the line of
the forward that made its function. Autograd numbers its functions in the order in which they are made, just before
their operators run: the line is kept by that number. A function that is written in the project (an autograd.Function)
has a backward of its own, whose lines stand for themselves. Sums of gradients stand at the function that gave the last
of them, a gradient's sum to a smaller shape at the function that made it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple, Protocol, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = tuple(f"{ROOT / name}/" for name in ("model", "train", "data"))
COUNTING = f"{Path(__file__).resolve().parent}/"  # what stands in for kernels of a GPU is called from the true line
UNKNOWN = ("unknown", "")
Kernel = TypeVar("Kernel")


class SourceLine(NamedTuple):
    """A place of the program that runs kernels.

    place: "model/rope.py:37"; function: its qualified name; phase: "forward", "again" (a forward that backward computes
    again) or "backward"; operator: aten's name; made_by: the function of autograd that ran it ("" outside of backward).
    """

    place: str
    function: str
    phase: str
    operator: str
    made_by: str


class Finder(Protocol):
    """Tells the line of each operator."""

    def find(self, operator: str) -> SourceLine:
        """Of the one that runs now."""


class LineFinder:
    """Tells the line of each operator; to be asked at every one of them, views too, in the order in which they run."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[str, str]] = {}  # place and function by the number of autograd's function
        self._parts: dict[CodeType, str] = {}

    def find(self, operator: str) -> SourceLine:
        """The line that runs this operator now; called from within a dispatch mode."""
        place, phase = self._called(sys._getframe(1))
        node = torch._C._current_autograd_node()
        if node is None or phase != "backward":
            self._made.setdefault(torch.autograd._get_sequence_nr() - 1, place or UNKNOWN)
            made_by = ""
        else:
            made_by = str(node.name())
            place = place or self._made.get(node._sequence_nr())
        return SourceLine(*(place or UNKNOWN), phase, operator, made_by)

    def _called(self, frame: FrameType | None) -> tuple[tuple[str, str] | None, str]:
        """(innermost line of the project that autograd's engine has not called through, phase)."""
        place, again = None, False
        while frame is not None:
            part = self._part(frame.f_code)
            if part == "engine":
                return place, "again" if again else "backward"
            again = again or part == "checkpoint"
            if part and part not in ("engine", "checkpoint") and place is None:
                place = (f"{part}:{frame.f_lineno}", frame.f_code.co_qualname)
            frame = frame.f_back
        return place, "forward"

    def _part(self, code: CodeType) -> str:
        """The file of the project, or what code of torch's it is that tells the phase; "" of any other."""
        if (part := self._parts.get(code)) is None:
            file = code.co_filename
            if file.startswith(FOLDERS) and not file.startswith(COUNTING):
                part = str(Path(file).relative_to(ROOT))
            elif code.co_name == "_engine_run_backward":
                part = "engine"
            else:
                part = "checkpoint" if file.endswith("torch/utils/checkpoint.py") else ""
            self._parts[code] = part
        return part


def left_over(
    whole: Counter[tuple[SourceLine, Kernel]], parts: Iterable[Counter[tuple[SourceLine, Kernel]]]
) -> Counter[tuple[SourceLine, Kernel]]:
    """Kernels of the whole without those of its parts, by line. A part that runs alone may have a kernel at another
    line than in the whole (a sum of gradients): what it has too many there is taken from equal ones at other lines."""
    left = Counter(whole)
    for part in parts:
        left.subtract(part)
    missing: Counter[Kernel] = Counter()
    for (_, kernel), times in left.items():
        missing[kernel] -= min(times, 0)
    found: Counter[tuple[SourceLine, Kernel]] = Counter()
    for (line, kernel), times in left.items():
        taken = min(max(times, 0), missing[kernel])
        missing[kernel] -= taken
        if times > taken:
            found[line, kernel] = times - taken
    return found
