"""Validation: the loss of held-out samples at fixed noise and a fixed grid of noise levels.

The noise of a sample is a function of its row alone, so two checkpoints compare with low variance, and any number of
ranks gives the same number (up to the rounding of a sum).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from core.ranges import bounded
from data.batch import Sample, assemble
from data.dataset.index import DatasetIndex
from model.joint import JointTransformer
from train.objective.noise import generator
from train.objective.objective import Draws, Objective, loss_share
from train.parallel.mesh import Layout

if TYPE_CHECKING:  # engines import FSDP2; a launcher, which reads the config alone, starts without it
    from train.engine.engine import Engine

NOISE_SEED = 20_260_101  # of the fixed validation noise; changing it makes curves incomparable


@dataclass
class ValidationConfig:
    """The loss on held-out samples at fixed noise: before the first step, after the last, and in between.

    every: steps between validations (0: none at all)
    samples: number of held-out samples, the first ones
    sigmas: noise levels, the same for both modalities; each is served by the expert whose range it lies in
    """

    every: int = bounded(100, "[0, inf)")
    samples: int = bounded(16, "[1, inf)")
    sigmas: list[float] = bounded([0.1, 0.3, 0.5, 0.7, 0.85, 0.95], "(0, 1]")


class Validator:
    """Validates a run; holds its validation set open."""

    def __init__(
        self,
        index: DatasetIndex,
        config: ValidationConfig,
        objective: Objective,
        layout: Layout,
        text_length: int,
    ) -> None:
        self._index, self._objective, self._layout = index, objective, layout
        self._text_length = text_length
        self._empty_text = index.empty_text()
        self._rows = _alike(index, min(config.samples, len(index)))
        levels = [1000.0 * sigma for sigma in config.sigmas]
        self._levels = {expert: [t for t in levels if objective.expert_at(t) == expert] for expert in objective.experts}

    def run_all(self, engine: Engine, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """As `run`, and the same of the averaged weights under "ema/..." where the engine keeps them."""
        losses = self.run(engine.model, stop)
        if losses is None or not engine.average_counts():
            return losses
        with engine.averaged():
            averaged = self.run(engine.model, stop)
        return averaged and losses | {f"ema/{name}": loss for name, loss in averaged.items()}

    @torch.no_grad()
    def run(self, model: JointTransformer, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """{"loss", "video", "audio"}: means over samples and noise levels; "loss" weighs modalities as training does.
        {"video_high", "audio_low", ...}: over the noise levels of one expert. A modality that no sample has is left
        out, of "loss" too.

        All ranks call it; each does every n-th sample of those with the same modalities, and as many forwards through
        the same towers as the others (FSDP gathers together). `stop` is asked before every sample; None, on all ranks
        at the same sample, if it is true on any.
        """
        served = [expert for expert, levels in self._levels.items() if levels]
        # By expert: video, weight, audio, weight.
        sums = torch.zeros(len(served), 4, dtype=torch.float64, device=self._layout.device)
        world, rank = self._layout.dp_world, self._layout.dp_rank
        for rows in self._rows:
            for first in range(0, len(rows), world):
                if self._any(stop()):
                    return None
                mine = first + rank
                for index, expert in enumerate(served):
                    parts = self._row(model, rows[min(mine, len(rows) - 1)], expert, self._levels[expert])
                    sums[index] += parts * (mine < len(rows))
        dist.all_reduce(sums)
        means, config = _means(sums.sum(0)), self._objective.config
        weights = {"video": config.video_weight, "audio": config.audio_weight}
        found = {"loss": sum(weights[modality] * mean for modality, mean in means.items()), **means}
        for index, expert in enumerate(served):
            found |= {f"{modality}_{expert}": mean for modality, mean in _means(sums[index]).items()}
        return found

    def _any(self, mine: bool) -> bool:
        """Whether it is true on any rank. Waits for the device, so that samples are timed."""
        going_on = torch.full((), float(not mine), device=self._layout.device)
        dist.all_reduce(going_on, dist.ReduceOp.MIN)
        return going_on.item() == 0

    def _row(self, model: JointTransformer, row: int, expert: str, levels: list[float]) -> torch.Tensor:
        """One sample at all noise levels of one expert, as one batch."""
        count, device = len(levels), self._layout.device
        clip, text = self._index.read_clip(row), self._index.read_text(row, self._index.captioners[0])
        bucket = self._index.bucket_of(row)
        samples = [Sample(self._index.key(row), row, 1.0, clip, text)] * count
        batch = assemble(0, bucket, samples, self._empty_text, self._text_length, float(count))
        batch = self._objective.alone(batch).to(device)
        noises = []
        for purpose, latents in (("video", batch.video), ("audio", batch.audio)):
            noise = generator(NOISE_SEED, f"validation/{purpose}", row).standard_normal(
                latents.shape[1:], dtype="float32"
            )
            noises.append(torch.from_numpy(noise).to(device).expand(latents.shape))
        t, keep = torch.tensor(levels, device=device), torch.ones(count, device=device)
        draws = Draws(t, t, noises[0], noises[1], keep, keep, keep)
        ranks = self._layout.sequence.size
        parts = loss_share(model, batch, draws, self._objective.config, expert, ranks)
        sums = []
        for mse, weight in ((parts.video, batch.video_weight), (parts.audio, batch.audio_weight)):
            sums += [(mse * weight).sum(), weight.sum() / ranks]
        return torch.stack(sums).double()


def _alike(index: DatasetIndex, samples: int) -> list[list[int]]:
    """The first `samples` rows, grouped by their modalities."""
    found: dict[tuple[bool, bool], list[int]] = {}
    for row in range(samples):
        bucket = index.bucket_of(row)
        found.setdefault((bucket.has_video, bucket.has_audio), []).append(row)
    return list(found.values())


def _means(sums: torch.Tensor) -> dict[str, float]:
    """{"video", "audio"} of [4], where anything has the modality."""
    video, video_weight, audio, audio_weight = sums.tolist()
    found = {"video": (video, video_weight), "audio": (audio, audio_weight)}
    return {modality: error / weight for modality, (error, weight) in found.items() if weight > 0}
