"""What to do about steps that went wrong: a loss or gradient that is not finite, or far above what is usual.

All ranks see the same sums (train/guard.py) and judge alike, so what they do needs no word between them. Experts are
judged apart: their noise levels differ, and with them their usual losses and gradients.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from train.guard import StepSums

ENOUGH = 20  # steps of an expert before anything counts as unusual
KNOWN = 2  # the sums of step k - 2 are at hand when step k updates, those of k - 1 are still under way
NARROWEST = 0.05  # a deviation is at least this part of the median: a curve that hardly moves is not full of spikes


@dataclass
class GuardConfig:
    """What a run does about bad steps, and about ranks that hang or lag.

    A step whose loss or gradient is not finite is never applied. After `max_nonfinite` in a row the run ends; with
    `rewind` it goes back to the last checkpoint before them instead, and on with the batches after them (`max_rewinds`
    times at most). A spike lies `spike_factor` robust deviations above the median of the expert's last `spike_window`
    steps (0: none are looked for); with `skip_spikes` the update of a gradient that is one is suppressed (FSDP2 only).

    `timeout_minutes`: what a collective may take before its peers are given up. `watchdog_seconds`: without a step for
    so long, every rank writes down where it stands (logs/stacks-rank*.txt). Every `lag_every` steps (0: never) ranks
    compare their speed; those `lag_ratio` times slower than the median are named. `stop_margin`: seconds, beside those
    of a save and a few steps, before a known time limit at which the run begins to stop.
    """

    max_nonfinite: int = 10
    rewind: bool = False
    max_rewinds: int = 3
    spike_factor: float = 20.0
    spike_window: int = 200
    skip_spikes: bool = False
    timeout_minutes: float = 10.0
    watchdog_seconds: float = 300.0
    lag_every: int = 200
    lag_ratio: float = 1.5
    stop_margin: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_nonfinite", "spike_window", "timeout_minutes", "watchdog_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"guard.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("max_rewinds", "spike_factor", "lag_every", "stop_margin"):
            if getattr(self, name) < 0:
                raise ValueError(f"guard.{name} is {getattr(self, name)}; it must not be below 0")
        if self.lag_ratio <= 1:
            raise ValueError(f"guard.lag_ratio is {self.lag_ratio}; a slow rank takes more than 1 times the median")
        if self.skip_spikes and self.spike_factor == 0:
            raise ValueError("guard.skip_spikes needs guard.spike_factor above 0")


@dataclass(frozen=True)
class Finding:
    """One step, judged. `spikes`: "loss", "grad_norm" or both; `skipped`: its gradient was above the limit."""

    step: int
    finite: bool
    spikes: list[str] = field(default_factory=list)
    skipped: bool = False

    @property
    def bad(self) -> bool:
        """Whether there is anything to record."""
        return not self.finite or bool(self.spikes)


class Judge:
    """Judges every step once, in order. `history`: [step, expert, loss, norm] of the last ordinary steps, kept up to
    date in place; it belongs to the checkpoint, since what is skipped depends on it."""

    def __init__(self, config: GuardConfig, experts: Sequence[str], history: list[list]) -> None:
        self.config = config
        self.in_a_row: list[int] = []  # the steps without a finite loss or gradient up to the last one
        self.history = history
        self._experts = experts

    def limit(self, step: int, expert: str) -> float:
        """The gradient norm above which step `step` is not to be applied; known before the step is done."""
        return self._limit(step, expert, 3) if self.config.skip_spikes else math.inf

    def look(self, sums: StepSums, expert: str) -> Finding:
        """Judge a step by its sums."""
        if not sums.finite:
            self.in_a_row.append(sums.step)
            return Finding(sums.step, False)
        self.in_a_row = []
        values = {"loss": sums.loss, "grad_norm": sums.grad_norm}
        limits = [self._limit(sums.step, expert, place) for place in (2, 3)]
        spikes = [name for (name, value), limit in zip(values.items(), limits, strict=True) if value > limit]
        skipped = self.config.skip_spikes and "grad_norm" in spikes
        if not skipped:  # else a plateau of spikes would raise its own limit
            self.history.append([sums.step, expert, sums.loss, sums.grad_norm])
            del self.history[: -len(self._experts) * (self.config.spike_window + KNOWN)]
        return Finding(sums.step, True, spikes, skipped)

    def _limit(self, step: int, expert: str, place: int) -> float:
        """Median and robust deviation over what is known when `step` updates, whenever that is asked."""
        if not self.config.spike_factor:
            return math.inf
        values = [entry[place] for entry in self.history if entry[1] == expert and entry[0] <= step - KNOWN]
        values = values[-self.config.spike_window :]
        if len(values) < ENOUGH:
            return math.inf
        median = statistics.median(values)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in values)
        return median + self.config.spike_factor * max(deviation, NARROWEST * abs(median))
