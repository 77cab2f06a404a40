"""Model FLOPs of a clip: 2 a multiply-add, recomputation not counted, attention not causal (4·Lq·Lk·d a layer).

forward = forward_flops(config, grid=(49, 44, 80), audio_steps=403)     # latents of a MOVA-360p clip
step = 3 * forward                                                      # backward counts twice forward
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.bridge import interacting_layers
from model.joint import JointConfig
from model.tower import TowerConfig


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one clip by part; `attention` is the share of video self-attention's two products."""

    video: int
    audio: int
    bridge: int
    attention: int

    @property
    def total(self) -> int:
        """All parts."""
        return self.video + self.audio + self.bridge


def forward_flops(config: JointConfig, grid: tuple[int, int, int], audio_steps: int) -> Flops:
    """Forward FLOPs of one clip with latents of `grid` (frames, rows, columns) and `audio_steps` of sound.

    One video expert, the audio tower and the Bridge: what a step runs for a clip.
    """
    video, audio = config.video, config.audio
    tokens_v = math.prod(grid) // math.prod(video.patch_size)
    tokens_a = audio_steps // audio.patch_size[0]
    layers = len(interacting_layers(config.bridge.strategy, audio.num_layers))
    bridge = sum(bridge_flops(tokens_v, video.dim, tokens_a, audio.dim))
    bridge += sum(bridge_flops(tokens_a, audio.dim, tokens_v, video.dim))
    if config.bridge.pooled_adaln:
        frames = grid[0] // video.patch_size[0]
        bridge += 4 * tokens_v * video.dim**2 + 2 * (frames + 1) * video.dim**2 + 4 * tokens_v * video.dim
        bridge += 4 * tokens_a * video.dim * audio.dim
    return Flops(
        video=_tower(video, tokens_v, config.text_length),
        audio=_tower(audio, tokens_a, config.text_length),
        bridge=layers * bridge,
        attention=video.num_layers * 4 * tokens_v**2 * video.dim,
    )


def block_flops(config: TowerConfig, tokens: int, keys: int, text: int) -> tuple[int, int]:
    """(matrix products, attention) of one tower block's forward over `tokens` of the `keys` that a clip has."""
    d = config.dim
    products = 8 * tokens * d**2 + 4 * tokens * d**2 + 4 * text * d**2 + 4 * tokens * d * config.ffn_dim
    return products, 4 * tokens * keys * d + 4 * tokens * text * d


def bridge_flops(queries: int, dim: int, keys: int, kv_dim: int) -> tuple[int, int]:
    """(matrix products, attention) of one Bridge direction's forward at one block."""
    return 4 * queries * dim**2 + 4 * keys * kv_dim * dim, 4 * queries * keys * dim


def _tower(config: TowerConfig, tokens: int, text: int) -> int:
    d, patch = config.dim, math.prod(config.patch_size)
    stem = 2 * tokens * config.in_dim * patch * d + 2 * text * (config.text_dim * d + d**2)
    time = 2 * (config.freq_dim * d + d**2 + 6 * d**2)
    blocks = config.num_layers * sum(block_flops(config, tokens, tokens, text))
    return stem + time + blocks + 2 * tokens * d * config.out_dim * patch
