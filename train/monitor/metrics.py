"""All metrics of a step, from sums on the device, under the names used in metrics.jsonl, W&B and the report.

train/ (what is learned), perf/ (how fast), data/ (how far); validation adds valid/. docs/monitoring.md has the list.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from data.loader.state import Seen
from model.joint import JointConfig
from train.engine.engine import Engine
from train.monitor.bridge_probe import BridgeProbe
from train.monitor.log import MonitorConfig
from train.monitor.throughput import Throughput, memory
from train.objective.noise import Prepared
from train.objective.objective import NOISE_BINS, StepLosses
from train.parallel.mesh import Layout
from train.parallel.parts import ALL, GROUPS
from train.parallel.step_sums import StepSums


class Metrics:
    """Measures the steps of one run. All ranks make the same calls; values of other ranks come from the step's sums."""

    def __init__(
        self,
        config: MonitorConfig,
        model: JointConfig,
        engine: Engine,
        layout: Layout,
        recomputed: Counter[tuple[str, str]],
        epoch_samples: int,
        trained: Collection[str] = ALL,
        planned: Mapping[str, float] | None = None,
    ) -> None:
        """`planned`: what stands beside the measured values, the same at every step (train/monitor/planned.py)."""
        self._planned = dict(planned or {})
        self._every, self._engine, self._device = config.every, engine, layout.device
        self._probe = BridgeProbe(engine.network.dual_tower_bridge, layout.device)
        self._pace = Throughput(model, layout, recomputed, config.peak_tflops, epoch_samples, trained)
        self._stalls: dict[str, float] = {}

    def begin(self, step: int) -> None:
        """Before the forward of step `step`."""
        self._probe.active = self._due(step)

    def sums(self, step: int, losses: StepLosses) -> dict[str, Tensor]:
        """After the update: this rank's part of sums over all ranks, [n] each, for StepSignals."""
        found = {"noise": losses.noise.flatten()}
        if self._due(step):
            found |= {"bridge": self._probe.take(), **self._engine.group_squares()}
        return found

    def _due(self, step: int) -> bool:
        return self._every > 0 and step % self._every == 0

    def stall(self, what: str, seconds: float) -> None:
        """Record a pause between two steps, which the next step's time includes."""
        self._stalls[f"perf/{what}_stall"] = self._stalls.get(f"perf/{what}_stall", 0.0) + seconds

    def host(self, step: int, micro_batches: list[Prepared], seconds: float, seen: Seen) -> dict[str, float]:
        """The metrics of a finished step that the host knows."""
        found = self._pace.metrics(micro_batches[0].batch, seconds, seen) | self._stalls
        self._stalls = {}
        return found | (memory(self._device) | self._planned if self._due(step) else {})

    def read(self, sums: StepSums, expert: str) -> dict[str, float]:
        """The metrics in a step's sums."""
        found = {"train/loss": sums.loss, "train/grad_norm": sums.grad_norm}
        for modality, loss in (("video", sums.loss_video), ("audio", sums.loss_audio)):
            found[f"train/loss_{modality}"] = loss
            found[f"train/loss_{modality}_{expert}"] = loss
        found |= _noise(sums.extra["noise"])
        if "bridge" in sums.extra:
            video, video_stream, audio, audio_stream = sums.extra["bridge"]
            if video_stream and audio_stream:  # else the Bridge did not run
                found["train/bridge_video"] = math.sqrt(video / video_stream)
                found["train/bridge_audio"] = math.sqrt(audio / audio_stream)
            found |= _norms(sums.extra)
        return found


def _norms(extra: Mapping[str, list[float]]) -> dict[str, float]:
    found = {}
    for index, group in enumerate(GROUPS.values()):
        weights = math.sqrt(extra["param"][index])
        if weights == 0:
            continue  # a model with one expert
        found[f"train/param_norm_{group}"] = weights
        if extra["grad"][index] == 0:
            continue  # it took no part: the idle expert, the tower of a modality that the step's samples lack
        found[f"train/grad_norm_{group}"] = _root(extra["grad"][index])
        if extra["update"][index] > 0:
            found[f"train/update_ratio_{group}"] = _root(extra["update"][index]) / weights
    return found


def _root(square: float) -> float:
    return math.sqrt(square) if math.isfinite(square) else math.nan


def _noise(sums: list[float]) -> dict[str, float]:
    found = {}
    values = torch.tensor(sums, dtype=torch.float64).view(2, NOISE_BINS, 2).tolist()
    for modality, bins in zip(("video", "audio"), values, strict=True):
        for index, (error, weight) in enumerate(bins):
            if weight > 0:
                found[f"train/loss_{modality}_noise_{index / NOISE_BINS:.1f}"] = error / weight
    return found
