"""Finds ranks that slow the others down.

In a step all ranks wait for the slowest, so their step times are equal and tell nothing. Two times are specific to a
rank: that of a fixed computation on its device, and that of waiting for its data.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from train.monitor.log import Monitor
from train.parallel.collectives import gather

SIDE = {"cpu": 192, "cuda": 4096}  # of the matrices that are multiplied: a few milliseconds
REPEATS = 5  # the fastest counts: a hiccup is not a lag
WAIT = 0.1  # data waits below this fraction of a step delay nothing


@dataclass(frozen=True)
class SlowRank:
    """A rank that was slower than the median. `what`: "compute" or "data"."""

    rank: int
    what: str
    ratio: float
    seconds: float


class StragglerProbe:
    """Compares ranks; all of them call `compare` at the same step boundary."""

    def __init__(self, device: torch.device, ratio: float) -> None:
        side = SIDE[device.type]
        self._device, self._ratio = device, ratio
        self._matrix = torch.full((side, side), 1.0 / side, device=device)
        self._waited, self._stepped, self._steps = 0.0, 0.0, 0

    def add(self, data_wait: float, step_time: float) -> None:
        """Record a step of this rank."""
        self._waited, self._stepped, self._steps = self._waited + data_wait, self._stepped + step_time, self._steps + 1

    def compare(self) -> list[SlowRank]:
        """The slow ranks since the last call, the same on all ranks."""
        steps = max(1, self._steps)
        mine = [(min(self._multiply() for _ in range(REPEATS)), self._waited / steps, self._stepped / steps)]
        self._waited, self._stepped, self._steps = 0.0, 0.0, 0
        compute, waits, times = zip(*gather(mine), strict=True)
        usual = statistics.median_low(compute)
        slow = [
            SlowRank(rank, "compute", value / usual, value)
            for rank, value in enumerate(compute)
            if value > self._ratio * usual
        ]
        least = statistics.median_low(waits)
        for rank, (wait, step) in enumerate(zip(waits, times, strict=True)):
            if wait > max(WAIT * step, self._ratio * least):
                slow.append(SlowRank(rank, "data", wait / max(step, 1e-9), wait))
        return slow

    def _multiply(self) -> float:
        begin = self._now()
        product = self._matrix
        for _ in range(8):
            product = product @ self._matrix
        return self._now() - begin

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def tell(slow: list[SlowRank], step: int, monitor: Monitor) -> dict[str, float | str]:
    """Report slow ranks; returns their metrics."""
    for rank in slow:
        if rank.what == "compute":
            text = f"rank {rank.rank} is slow: the probe takes {rank.ratio:.1f} times as long as on the median rank"
        else:
            text = f"rank {rank.rank} waits {rank.seconds:.3f} s for data in each step"
        monitor.event("slow rank", step, text, rank=rank.rank, what=rank.what, ratio=round(rank.ratio, 2))
    return {"perf/slow_ranks": ",".join(sorted({str(rank.rank) for rank in slow}))} if slow else {}
