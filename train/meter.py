"""All metrics of a step: what the device adds up, under the names that metrics.jsonl, W&B and the report have.

train/ (what is learned), perf/ (how fast), data/ (how far); validation adds valid/. docs/monitoring.md has the list.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from model.joint import JointConfig
from train.engine import Engine
from train.feed import Prepared
from train.guard import StepSums
from train.mesh import Layout
from train.monitor import MonitorConfig
from train.pace import Pace, Seen, memory
from train.probes import GROUPS, NOISE_BINS, BridgeProbe
from train.step import StepLosses


class Meter:
    """Measures the steps of one run. All ranks call it alike; what it needs of others is in the step's sums."""

    def __init__(
        self,
        config: MonitorConfig,
        model: JointConfig,
        engine: Engine,
        layout: Layout,
        recomputed: Counter[tuple[str, str]],
        epoch_samples: int,
    ) -> None:
        self._every, self._engine, self._device = config.every, engine, layout.device
        self._probe = BridgeProbe(engine.network.dual_tower_bridge, layout.device)
        self._pace = Pace(model, layout, recomputed, config.peak_tflops, epoch_samples)
        self._towers = {expert: tower for tower, expert in zip(GROUPS, model.experts, strict=False)}
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
        """Training stood still between two steps; the next step's time holds it."""
        self._stalls[f"perf/{what}_stall"] = self._stalls.get(f"perf/{what}_stall", 0.0) + seconds

    def host(self, step: int, micro_batches: list[Prepared], seconds: float, seen: Seen) -> dict[str, float]:
        """What the host knows of a step that has ended."""
        found = self._pace.metrics(micro_batches[0].batch, seconds, seen) | self._stalls
        self._stalls = {}
        return found | (memory(self._device) if self._due(step) else {})

    def read(self, sums: StepSums, expert: str) -> dict[str, float]:
        """The metrics in a step's sums."""
        found = {"train/loss": sums.loss, "train/grad_norm": sums.grad_norm}
        for modality, loss in (("video", sums.loss_video), ("audio", sums.loss_audio)):
            found[f"train/loss_{modality}"] = loss
            found[f"train/loss_{modality}_{expert}"] = loss
        found |= _noise(sums.extra["noise"])
        if "bridge" in sums.extra:
            video, video_stream, audio, audio_stream = sums.extra["bridge"]
            found["train/bridge_video"] = math.sqrt(video / video_stream) if video_stream else math.nan
            found["train/bridge_audio"] = math.sqrt(audio / audio_stream) if audio_stream else math.nan
            found |= self._norms(sums.extra, expert)
        return found

    def _norms(self, extra: Mapping[str, list[float]], expert: str) -> dict[str, float]:
        found = {}
        for place, (tower, group) in enumerate(GROUPS.items()):
            weights = math.sqrt(extra["param"][place])
            if weights == 0:
                continue  # a model with one expert
            found[f"train/param_norm_{group}"] = weights
            if tower in self._towers.values() and tower != self._towers[expert]:
                continue  # the idle expert
            found[f"train/grad_norm_{group}"] = _root(extra["grad"][place])
            if extra["update"][place] > 0:
                found[f"train/update_ratio_{group}"] = _root(extra["update"][place]) / weights
        return found


def _root(square: float) -> float:
    return math.sqrt(square) if math.isfinite(square) else math.nan


def _noise(sums: list[float]) -> dict[str, float]:
    found = {}
    values = torch.tensor(sums, dtype=torch.float64).view(2, NOISE_BINS, 2).tolist()
    for modality, bins in zip(("video", "audio"), values, strict=True):
        for place, (error, weight) in enumerate(bins):
            if weight > 0:
                found[f"train/loss_{modality}_noise_{place / NOISE_BINS:.1f}"] = error / weight
    return found
