"""Rotary position tables: computed once in float64, kept in float32, cached by geometry.

A `Rotary` is a plain object, not a buffer: `.to(bfloat16)` on the model, FSDP's casts and checkpoints never touch it.
Two layouts exist in the reference: the towers turn adjacent channels (2j, 2j+1), the Bridge turns channel j with
j + D/2 (rotate-half).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from model.fused import turn_pairs

THETA = 10000.0
VIDEO_STRIDE = 4  # pixel frames a latent frame, after the first, which stands alone
# The legacy "oobleck" audio tower counts position in seconds of a 44.1 kHz, hop 2048 codec, scaled by 4.
OOBLECK_STEP = 4.0 / (44100.0 / 2048.0)


@dataclass(frozen=True)
class Rotary:
    """cos and sin [L, R/2] float32 for L positions; the first R channels of a head are turned, the others stay."""

    cos: Tensor
    sin: Tensor
    interleaved: bool  # True: pairs (2j, 2j+1); False: pairs (j, j + R/2)

    def turn(self, x: Tensor) -> Tensor:
        """Rotate x [B, L, H, D] by position; computed in at least float32, returned in x's dtype."""
        return turn_pairs(x, self.cos, self.sin, self.interleaved)

    def rows(self, part: slice) -> Rotary:
        """The rows of some of the positions."""
        return replace(self, cos=self.cos[part], sin=self.sin[part])


@lru_cache(maxsize=32)
def video_rotary(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Rotary:
    """Tower table for video tokens [frame, row, column], T·H·W rows.

    The head splits into d - 2(d//3) channels for the frame and d//3 each for row and column (44/42/42 of 128), each
    with theta 10000 over its own width. ValueError when a part is odd (head_dim 64, say): pairs cannot be formed.
    """
    parts = split_head(head_dim)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * _frequencies(width) for axis, width in zip(axes, parts, strict=True)]
    return _table(torch.cat(angles, dim=1), True, device)


@lru_cache(maxsize=32)
def audio_rotary(steps: int, head_dim: int, form: str, device: torch.device) -> Rotary:
    """Tower table for audio tokens, `steps` rows.

    form "dac": the whole head turns, position = latent step. form "oobleck": only the first d - 2(d//3) channels turn,
    position = step · 4/(44100/2048).
    """
    position = torch.arange(steps, dtype=torch.float64)[:, None]
    if form == "oobleck":
        return _table(position * OOBLECK_STEP * _frequencies(split_head(head_dim)[0]), True, device)
    return _table(position * _frequencies(head_dim), True, device)


@lru_cache(maxsize=32)
def bridge_rotary(
    grid: tuple[int, int, int],
    steps: int,
    head_dim: int,
    fps: float,
    audio_fps: float,
    first_frame_bias: bool,
    device: torch.device,
    patches: tuple[int, int] = (1, 1),
) -> tuple[Rotary, Rotary]:
    """Bridge tables on a common clock of audio steps: (video, one row per token of `grid`; audio, one row for each of
    `steps` tokens).

    All tokens of a frame share its position. Latent frame i is at i·audio_fps·4/fps; with first_frame_bias frame 0
    lasts one pixel frame only, so frame i >= 1 is at audio_fps·(1 + 4(i-1))/fps. `patches`: latent frames, and
    latent steps of sound, that one token holds; its position is that of the first one.
    """
    frames, rows, columns = grid
    frame = patches[0] * torch.arange(frames, dtype=torch.float64).repeat_interleave(rows * columns)
    pixel_frame = VIDEO_STRIDE * frame
    if first_frame_bias:
        pixel_frame = (pixel_frame - (VIDEO_STRIDE - 1)).clamp(min=0.0)
    video = pixel_frame[:, None] * (audio_fps / fps) * _frequencies(head_dim)
    audio = patches[1] * torch.arange(steps, dtype=torch.float64)[:, None] * _frequencies(head_dim)
    return _table(video, False, device), _table(audio, False, device)


def split_head(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head for (frame, row, column). ValueError when one is odd."""
    third = head_dim // 3
    parts = (head_dim - 2 * third, third, third)
    if any(width % 2 for width in parts):
        raise ValueError(f"head width {head_dim} splits into {parts}; RoPE needs even parts: use 32, 48, 96 or 128")
    return parts


def _frequencies(width: int) -> Tensor:
    return THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def _table(angles: Tensor, interleaved: bool, device: torch.device) -> Rotary:
    tables = [f(angles).to(torch.float32) for f in (torch.cos, torch.sin)]
    if device.type == "cuda":  # from page-locked memory: a copy from any other makes the host wait for the device
        tables = [table.pin_memory() for table in tables]
    cos, sin = (table.to(device, non_blocking=True) for table in tables)
    return Rotary(cos, sin, interleaved)
