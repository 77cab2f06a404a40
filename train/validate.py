"""Validation: the loss of held-out samples at fixed noise and a fixed grid of noise levels.

The noise of a sample is a function of its row alone, so two checkpoints compare with low variance, and any number of
ranks gives the same number (up to the rounding of a sum).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from data.batch import Sample, assemble
from data.index import DatasetIndex
from model.joint import JointTransformer
from train.engine import Engine
from train.mesh import Layout
from train.noise import generator
from train.objective import Draws, Objective, loss_share

NOISE_SEED = 20_260_101  # of the fixed validation noise; changing it makes curves incomparable


@dataclass
class ValidationConfig:
    """Every `every` steps (0: never), and before the first and after the last, on the first `samples` samples.

    `sigmas`: noise levels, the same for both modalities; each is served by the expert whose range it lies in.
    """

    every: int = 100
    samples: int = 16
    sigmas: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.85, 0.95])


class Validator:
    """Holds the validation set open for one run."""

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
        self._samples = min(config.samples, len(index))
        levels = [1000.0 * sigma for sigma in config.sigmas]
        self._levels = {expert: [t for t in levels if objective.expert_at(t) == expert] for expert in objective.experts}

    def run_all(self, engine: Engine) -> dict[str, float]:
        """As `run`, and the same of the averaged weights under "ema/..." where the engine keeps them."""
        losses = self.run(engine.model)
        if engine.average_counts():
            with engine.averaged():
                losses |= {f"ema/{name}": loss for name, loss in self.run(engine.model).items()}
        return losses

    @torch.no_grad()
    def run(self, model: JointTransformer) -> dict[str, float]:
        """{"loss", "video", "audio"}: means over samples and noise levels; "loss" weighs modalities as training does.
        {"video_high", "audio_low", ...}: over the noise levels of one expert.

        All ranks call it; each does every n-th sample, and as many forwards as the others (FSDP gathers together).
        """
        served = [expert for expert, levels in self._levels.items() if levels]
        # By expert: video, weight, audio, weight.
        sums = torch.zeros(len(served), 4, dtype=torch.float64, device=self._layout.device)
        world, rank = self._layout.dp_world, self._layout.dp_rank
        for first in range(0, self._samples, world):
            row = first + rank
            for place, expert in enumerate(served):
                parts = self._row(model, min(row, self._samples - 1), expert, self._levels[expert])
                sums[place] += parts * (row < self._samples)
        dist.all_reduce(sums)
        video, audio = _means(sums.sum(0))
        config = self._objective.config
        found = {"loss": config.video_weight * video + config.audio_weight * audio, "video": video, "audio": audio}
        for place, expert in enumerate(served):
            found[f"video_{expert}"], found[f"audio_{expert}"] = _means(sums[place])
        return found

    def _row(self, model: JointTransformer, row: int, expert: str, levels: list[float]) -> torch.Tensor:
        """One sample at all noise levels of one expert, as one batch."""
        count, device = len(levels), self._layout.device
        clip, text = self._index.read_clip(row), self._index.read_text(row, self._index.captioners[0])
        bucket = self._index.bucket_of(row)
        samples = [Sample(self._index.key(row), row, 1.0, clip, text)] * count
        batch = assemble(0, bucket, samples, self._empty_text, self._text_length, float(count)).to(device)
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


def _means(sums: torch.Tensor) -> tuple[float, float]:
    """Video and audio of [4]; 0 where nothing has the modality."""
    video, video_weight, audio, audio_weight = sums.tolist()
    return video / max(video_weight, 1.0), audio / max(audio_weight, 1.0)
