"""Random numbers of a training sample: a pure function of (seed, purpose, global sample number).

Counter-based (numpy's Philox), so the numbers are the same on every machine and under every layout, no two samples
share them, and a step neither reads nor advances a global generator (invariants 4 and 13).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from data.chance import philox
from train.objective.objective import Draws, Objective


def generator(seed: int, purpose: str, sample: int) -> np.random.Generator:
    """The stream of one purpose of one sample."""
    return np.random.Generator(philox(seed, purpose, sample))


def draw(batch: Batch, objective: Objective, seed: int) -> Draws:
    """Timesteps, noise and dropouts for a micro-batch; runs off the training thread."""
    expert = objective.expert(batch.step)
    uniforms = np.array([generator(seed, "scalars", int(n)).random(6) for n in batch.sample_numbers])  # [B, 6]
    config = objective.config
    chance = [config.text_dropout, config.image_dropout, config.bridge_dropout]
    keep = torch.from_numpy((uniforms[:, 2:5] >= chance).astype(np.float32))  # [B, 3]
    u_video, u_audio, u_kind = torch.from_numpy(uniforms[:, [0, 1, 5]].T)
    # Nothing is given if a sample lacks a modality: what it has is all there is to learn.
    alone = (batch.video_weight == 0) | (batch.audio_weight == 0)
    held = u_kind < config.clean_video_prob + config.clean_audio_prob
    t_video, t_audio = objective.timesteps(u_video, u_audio, u_kind.masked_fill(alone & held, 1.0), expert)
    return Draws(
        t_video=t_video,
        t_audio=t_audio,
        noise_video=_normal(seed, "noise_video", batch.sample_numbers, batch.video.shape[1:]),
        noise_audio=_normal(seed, "noise_audio", batch.sample_numbers, batch.audio.shape[1:]),
        keep_text=keep[:, 0],
        keep_image=keep[:, 1],
        keep_bridge=keep[:, 2],
    )


def _normal(seed: int, purpose: str, samples: np.ndarray, shape: torch.Size) -> Tensor:
    out = np.empty((len(samples), *shape), dtype=np.float32)
    for row, sample in zip(out, samples, strict=True):
        generator(seed, purpose, int(sample)).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(out)


P = TypeVar("P", Batch, Draws)


@dataclass
class Prepared:
    """One micro-batch with its random draws."""

    batch: Batch
    draws: Draws

    def page_locked(self, device: torch.device) -> Prepared:
        """The same in page-locked memory, for a GPU: copies from pageable memory may make the host wait for the
        device."""
        if device.type != "cuda":
            return self
        with torch.cuda.device(device):  # a thread begins on the first one, whatever the rank's is
            return Prepared(_page_locked(self.batch), _page_locked(self.draws))


def _page_locked(part: P) -> P:
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    locked: dict[str, Any] = {name: v.pin_memory() for name, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(part, **locked)
