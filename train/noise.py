"""Random numbers of a training sample: a pure function of (seed, purpose, global sample number).

Counter-based (numpy's Philox), so the numbers are the same on every machine and under every layout, no two samples
share them, and a step neither reads nor advances a global generator (invariants 4 and 13).
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from data.batch import Batch
from train.objective import Draws, Objective


def generator(seed: int, purpose: str, sample: int) -> np.random.Generator:
    """The stream of one purpose of one sample. Key: hash of (seed, purpose); counter: the sample number on top."""
    key = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:16]
    # The low three words of the 256-bit counter are left for the numbers drawn: samples cannot run into each other.
    counter = np.array([0, 0, 0, sample], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"), counter=counter))


def draw(batch: Batch, objective: Objective, seed: int) -> Draws:
    """Timesteps, noise and dropouts for a micro-batch; runs off the training thread."""
    expert = objective.expert(batch.step)
    uniforms = np.array([generator(seed, "scalars", int(n)).random(6) for n in batch.sample_numbers])  # [B, 6]
    config = objective.config
    chance = [config.text_dropout, config.image_dropout, config.bridge_dropout]
    keep = torch.from_numpy((uniforms[:, 2:5] >= chance).astype(np.float32))  # [B, 3]
    u_video, u_audio, u_kind = torch.from_numpy(uniforms[:, [0, 1, 5]].T)
    t_video, t_audio = objective.timesteps(u_video, u_audio, u_kind, expert)
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
