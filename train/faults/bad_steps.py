"""Detects bad steps: a loss or gradient that is not finite, or far above its usual size.

All ranks see the same sums (train/parallel/step_sums.py) and reach the same verdict, without communication. Steps of
each kind (`kind_of`) are judged separately: experts have different noise levels, clips without sound or picture
different terms in their loss, and so different usual losses and gradients.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data.clip import Bucket
from data.loader.stream import Stream
from train.faults.config import GuardConfig
from train.monitor.log import Monitor
from train.objective.objective import StepLosses
from train.parallel.collectives import gather
from train.parallel.step_sums import KNOWN, StepSums

ENOUGH = 20  # steps of a kind before any step counts as unusual
MODALITIES = 3  # both, picture alone, sound alone: each has its kinds of steps
NARROWEST = 0.1  # a deviation is at least this part of the median: an almost flat curve is not full of spikes


def kind_of(expert: str, bucket: Bucket) -> str:
    """The kind of a step: it is compared with others of its expert whose clips have the same modalities."""
    if not bucket.has_video:
        return "no picture"  # no expert takes part
    return expert if bucket.has_audio else f"{expert}, no sound"


@dataclass(frozen=True)
class Verdict:
    """The verdict on one step. `spikes`: "loss", "grad_norm" or both; `skipped`: its gradient was above the limit."""

    step: int
    finite: bool
    spikes: list[str] = field(default_factory=list)
    skipped: bool = False

    @property
    def bad(self) -> bool:
        """Whether there is anything to record."""
        return not self.finite or bool(self.spikes)


class SpikeDetector:
    """Judges every step once, in order. `history`: [step, kind, loss, norm] of the last ordinary steps, kept up to
    date in place; it belongs to the checkpoint, since what is skipped depends on it. `warmup`: steps whose learning
    rate still rises: losses and gradients have no usual size yet, so they are neither judged nor compared with."""

    def __init__(self, config: GuardConfig, experts: Sequence[str], history: list[list[Any]], warmup: int = 0) -> None:
        self.config = config
        self._warmup = warmup
        self.in_a_row: list[int] = []  # the steps without a finite loss or gradient up to the last one
        self.history = history
        self._experts = experts

    def limit(self, step: int, kind: str) -> float:
        """The gradient norm above which step `step` must not be applied; known before the step."""
        return self._limit(step, kind, 3) if self.config.skip_spikes else math.inf

    def look(self, sums: StepSums, kind: str) -> Verdict:
        """Judge a step by its sums."""
        if not sums.finite:
            self.in_a_row.append(sums.step)
            return Verdict(sums.step, False)
        self.in_a_row = []
        values = {"loss": sums.loss, "grad_norm": sums.grad_norm}
        limits = [self._limit(sums.step, kind, column) for column in (2, 3)]
        spikes = [name for (name, value), limit in zip(values.items(), limits, strict=True) if value > limit]
        skipped = self.config.skip_spikes and "grad_norm" in spikes
        if not skipped:  # else a plateau of spikes would raise its own limit
            self.history.append([sums.step, kind, sums.loss, sums.grad_norm])
            del self.history[: -MODALITIES * len(self._experts) * (self.config.spike_window + KNOWN)]
        return Verdict(sums.step, True, spikes, skipped)

    def _limit(self, step: int, kind: str, column: int) -> float:
        """Median and robust deviation over what is known when `step` updates, whenever that is asked."""
        if not self.config.spike_factor or step < self._warmup:
            return math.inf
        known = [entry for entry in self.history if entry[1] == kind and self._warmup <= entry[0] <= step - KNOWN]
        values = [entry[column] for entry in known]
        values = values[-self.config.spike_window :]
        if len(values) < ENOUGH:
            return math.inf
        median = statistics.median(values)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in values)
        number: float = median + self.config.spike_factor * max(deviation, NARROWEST * abs(median))
        return number


def report(verdict: Verdict, sums: StepSums, losses: StepLosses, stream: Stream[Any], monitor: Monitor) -> None:
    """Name the samples of a bad step, in bad_steps.jsonl and to the user. All ranks call it for the same step."""
    values = {name: getattr(sums, name) for name in ("loss", "loss_video", "loss_audio", "grad_norm")}
    damaged = sorted(set(gather(losses.damaged()))) if not verdict.finite else []
    samples = sorted(set(gather([key for keys, _ in losses.inputs for key in keys])))
    what = "skipped" if verdict.skipped else "spike" if verdict.finite else "not finite"
    record = {"what": what, "spikes": verdict.spikes, "samples": samples, "damaged": damaged}
    monitor.bad_step(verdict.step, {**values, **record})
    if verdict.finite:
        shown = ", ".join(f"{name} {values[name]:.4g}" for name in verdict.spikes)
        ending = "; its update was suppressed" if verdict.skipped else ""
        monitor.event("spike", verdict.step, f"step {verdict.step}: far above the usual size: {shown}{ending}")
        return
    text = f"step {verdict.step}: loss or gradient is not finite; its update was suppressed"
    monitor.event("not finite", verdict.step, text, damaged=damaged)
    for key in damaged:
        monitor.say(f"  sample {key} holds NaN or inf; it has weight 0 from now on")
        stream.report_damage(key, "NaN or inf on the device", verdict.step)
