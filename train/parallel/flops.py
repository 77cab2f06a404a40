"""Model FLOPs of a clip: 2 per multiply-add, recomputation not counted, attention not causal (4·Lq·Lk·d per layer).

forward = forward_flops(config, grid=(49, 44, 80), audio_steps=403)     # latents of a MOVA-360p clip
step = step_flops(config, (49, 44, 80), 403)                            # 3 x forward where all parts train
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from model.bridge import interacting_layers
from model.joint import JointConfig
from model.tower import TowerConfig
from train.parallel.parts import ALL


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


def forward_flops(config: JointConfig, grid: tuple[int, int, int] | None, audio_steps: int | None) -> Flops:
    """Forward FLOPs of one clip with latents of `grid` (frames, rows, columns) and `audio_steps` of sound.

    One video expert, the audio tower and the Bridge: what a step runs for a clip. None: it has no picture, or no
    sound; then that tower and the Bridge do not run.
    """
    video, audio = config.video, config.audio
    tokens_v = math.prod(grid) // math.prod(video.patch_size) if grid is not None else 0
    tokens_a = audio_steps // audio.patch_size[0] if audio_steps is not None else 0
    bridge = 0
    if grid is not None and audio_steps is not None:
        bridge += sum(bridge_flops(tokens_v, video.dim, tokens_a, audio.dim))
        bridge += sum(bridge_flops(tokens_a, audio.dim, tokens_v, video.dim))
        if config.bridge.pooled_adaln:
            frames = grid[0] // video.patch_size[0]
            bridge += 4 * tokens_v * video.dim**2 + 2 * (frames + 1) * video.dim**2 + 4 * tokens_v * video.dim
            bridge += 4 * tokens_a * video.dim * audio.dim + 2 * frames * tokens_a * video.dim  # resampled in time
    return Flops(
        video=_tower(video, tokens_v, config.text_length) if grid is not None else 0,
        audio=_tower(audio, tokens_a, config.text_length) if audio_steps is not None else 0,
        bridge=len(interacting_layers(config.bridge.strategy, audio.num_layers)) * bridge,
        attention=video.num_layers * 4 * tokens_v**2 * video.dim,
    )


def step_flops(
    config: JointConfig,
    grid: tuple[int, int, int] | None,
    audio_steps: int | None,
    trained: Collection[str] = ALL,
) -> int:
    """FLOPs of one clip in a step: forward and backward, which counts twice forward in what is `trained`.

    `trained`: towers by their names in the model; either video expert stands for both. In a frozen part a backward that
    passes through (from the first Bridge layer on) has no products for the gradients of weights, and where none passes
    there is only the forward.
    """
    forward = forward_flops(config, grid, audio_steps)
    learns = {"video": bool({"video_dit", "video_dit_2"} & set(trained)), "audio": "audio_dit" in trained}
    bridged = "dual_tower_bridge" in trained
    if grid is None or audio_steps is None or not (bridged or any(learns.values())):
        return (
            (3 if learns["video"] else 1) * forward.video
            + (3 if learns["audio"] else 1) * forward.audio
            + (3 if bridged else 1) * forward.bridge
        )
    layers = interacting_layers(config.bridge.strategy, config.audio.num_layers)
    tokens = {
        "video": math.prod(grid) // math.prod(config.video.patch_size),
        "audio": audio_steps // config.audio.patch_size[0],
    }
    total = 3 * forward.bridge
    if not bridged:  # its attention has no weights, and costs as much as ever
        attended = 4 * tokens["video"] * tokens["audio"] * (config.video.dim + config.audio.dim)
        total = 2 * forward.bridge + len(layers) * attended
    for name, tower, whole in (("video", config.video, forward.video), ("audio", config.audio, forward.audio)):
        if learns[name] or not layers:
            total += (3 if learns[name] else 1) * whole
            continue
        products, attention = block_flops(tower, tokens[name], tokens[name], config.text_length)
        products -= 4 * config.text_length * tower.dim**2  # of keys and values of the text, which needs no gradient
        head = 2 * tokens[name] * tower.dim * tower.out_dim * math.prod(tower.patch_size)
        total += whole + (tower.num_layers - min(layers)) * (products + 2 * attention) + head
    return total


def block_flops(config: TowerConfig, tokens: int, keys: int, text: int) -> tuple[int, int]:
    """(matrix products, attention) of one tower block's forward over `tokens` of the `keys` that a clip has."""
    d = config.dim
    products = 8 * tokens * d**2 + 4 * tokens * d**2 + 4 * text * d**2 + 4 * tokens * d * config.ffn_dim
    return products, 4 * tokens * keys * d + 4 * tokens * text * d


def bridge_flops(queries: int, dim: int, keys: int, kv_dim: int) -> tuple[int, int]:
    """(matrix products, attention) of one Bridge direction's forward at one block."""
    return 4 * queries * dim**2 + 4 * keys * kv_dim * dim, 4 * queries * keys * dim


def block_outputs_flops(config: TowerConfig, tokens: int) -> int:
    """Of a block's products, the one whose output is narrower than its input: the feed-forward's second, usually."""
    return 2 * tokens * config.dim * config.ffn_dim if config.ffn_dim != config.dim else 0


def bridge_outputs_flops(dim: int, keys: int, kv_dim: int) -> int:
    """Of a Bridge direction's products, those whose output is narrower than their input: keys and values."""
    return 4 * keys * kv_dim * dim if kv_dim > dim else 0


def _tower(config: TowerConfig, tokens: int, text: int) -> int:
    d, patch = config.dim, math.prod(config.patch_size)
    stem = 2 * tokens * config.in_dim * patch * d + 2 * text * (config.text_dim * d + d**2)
    time = 2 * (config.freq_dim * d + d**2 + 6 * d**2)
    blocks = config.num_layers * sum(block_flops(config, tokens, tokens, text))
    return stem + time + blocks + 2 * tokens * d * config.out_dim * patch
