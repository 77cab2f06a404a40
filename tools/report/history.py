"""metrics.jsonl as curves: read once from front to end, thinned to pixels while it is read.

A run of millions of steps costs the memory of its pixels: for each pixel of the step axis the least, the mean and the
largest value are kept, so that a spike of one step is still seen.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 560  # pixels of the step axis
CHUNK = 4096  # values of a curve that are collected before they are added to its pixels
TAIL = 1 << 16  # bytes at the end of the file in which its last step is looked for
BY_EXPERT = "train/loss"  # each step trains one expert: a curve for each


@dataclass(frozen=True)
class Curve:
    """One metric. Each array [n], a number a pixel that holds values: mean step, and least, mean, largest value."""

    name: str
    steps: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray
    last: float
    count: int  # number of values behind it

    @property
    def thinned(self) -> bool:
        """Whether a pixel holds more than one value."""
        return self.count > len(self.steps)


@dataclass
class History:
    """The content of metrics.jsonl. `steps`: of the axis, the last step + 1; `done`: number of updates (a training
    record belongs to the update after its step, a validation record to those before); `not_finite`: {metric: nulls}."""

    curves: dict[str, Curve] = field(default_factory=dict)
    steps: int = 0
    done: int = 0
    records: int = 0
    unreadable: int = 0
    not_finite: Counter[str] = field(default_factory=Counter)


class _Pixels:
    """Adds up the values of one metric."""

    def __init__(self, width: int, steps: int) -> None:
        self._scale, self._width = width / max(steps, 1), width
        self._low, self._high = np.full(width, np.inf), np.full(width, -np.inf)
        self._sum, self._steps, self._count = np.zeros(width), np.zeros(width), np.zeros(width)
        self._waiting: list[tuple[float, float]] = []
        self._last = math.nan

    def add(self, step: float, value: float) -> None:
        self._waiting.append((step, value))
        if len(self._waiting) >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        steps, values = np.array(self._waiting, dtype=np.float64).T
        self._last = float(values[-1])
        positions = np.minimum((steps * self._scale).astype(np.int64), self._width - 1)
        np.minimum.at(self._low, positions, values)
        np.maximum.at(self._high, positions, values)
        self._sum += np.bincount(positions, values, self._width)
        self._steps += np.bincount(positions, steps, self._width)
        self._count += np.bincount(positions, minlength=self._width)
        self._waiting.clear()

    def curve(self, name: str) -> Curve:
        self._flush()
        there = self._count > 0
        count = self._count[there]
        return Curve(
            name, self._steps[there] / count, self._low[there], self._sum[there] / count, self._high[there],
            self._last, int(count.sum()),
        )  # fmt: skip


def read_history(path: Path, width: int = WIDTH) -> History:
    """The curves of a metrics.jsonl, each of at most `width` points; an empty History if there is no such file.

    A truncated line is counted as unreadable and skipped; null (a non-finite value) is counted by metric. Metrics
    that are text have no curve.
    """
    history = History()
    if not path.is_file():
        return history
    history.steps = _last_step(path) + 1
    pixels: dict[str, _Pixels] = {}
    with open(path, "rb") as file:
        for line in file:
            try:
                record = json.loads(line)
                step = record["step"]
                assert isinstance(step, int)
            except (ValueError, KeyError, TypeError, AssertionError):
                history.unreadable += 1
                continue
            history.records += 1
            history.done = max(history.done, step + any(name.startswith("train/") for name in record))
            for name, value in _curves_of(record):
                if value is None or not math.isfinite(value):
                    history.not_finite[name] += 1
                    continue
                if name not in pixels:
                    pixels[name] = _Pixels(width, history.steps)
                pixels[name].add(step, value)
    history.curves = {name: one.curve(name) for name, one in pixels.items()}
    return history


def _curves_of(record: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    """(name of the curve, value) of the numbers in a record."""
    expert = record.get("train/expert")
    for name, value in record.items():
        if name == "step" or f"{name}_{expert}" in record:  # the same value stands there
            continue
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            yield (f"{name} ({expert})" if expert is not None and name == BY_EXPERT else name), value


def _last_step(path: Path) -> int:
    """The largest step among the last lines, 0 if none can be read."""
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        lines = file.read().splitlines()
    steps = [0]
    for line in lines:
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue
    return max(steps)
