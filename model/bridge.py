"""The Bridge: before a block, each tower attends to the other's states as they were before the Bridge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, silu

from core.ranges import bounded
from model.attention import Attention, DenseCore
from model.backends.interface import Backend
from model.fused import LayerNorm, add_gated, modulate
from model.rope import Rotary

NORM_EPS = 1e-6
ADALN_EPS = 1e-5
STRATEGIES = ("full", "shallow_focus", "distributed", "progressive", "custom")
CUSTOM_LAYERS = (0, 2, 4, 6, 8, 12, 16, 20)


@dataclass
class BridgeConfig:
    """Which blocks of the towers interact, and how. The defaults are those of the released MOVA-360p.

    head_dim: width of an attention head of the Bridge
    strategy: which blocks interact: full, shallow_focus, distributed, progressive or custom, as in the reference
    audio_fps: latent steps of sound per second
    cross_rope: rotary positions on one clock, so that picture and sound of the same time attend to each other
    first_frame_bias: on that clock the first latent frame lasts one frame of pixels, the others four each
    pooled_adaln: the picture, pooled by frame, also modulates the audio side's queries
    trainable_condition_scale: a learned factor of what the Bridge adds
    clock_bias: initial value of the biases of q and k in the half of a head's channels that rotates fastest (0, as in
        the reference: none); above 0, picture and sound of the same time attend to each other from the first step

    ValueError for an unknown strategy.
    """

    head_dim: int = bounded(128, "[2, inf)")
    strategy: str = "full"
    audio_fps: float = bounded(50.0, "(0, inf)")
    cross_rope: bool = True
    first_frame_bias: bool = False
    pooled_adaln: bool = False
    trainable_condition_scale: bool = False
    clock_bias: float = bounded(0.0, "[0, inf)")

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"bridge strategy {self.strategy!r} is not one of {', '.join(STRATEGIES)}")
        if self.head_dim % 2:
            raise ValueError(f"bridge head width {self.head_dim} is odd; its RoPE turns halves")


def interacting_layers(strategy: str, depth: int) -> list[int]:
    """Blocks before which the Bridge acts; depth is that of the shorter tower."""
    if strategy == "full":
        return list(range(depth))
    if strategy == "shallow_focus":
        return list(range(min(10, depth // 3)))
    if strategy == "distributed":
        return list(range(0, depth, 3))
    if strategy == "progressive":
        return [i for i in range(depth) if i < 8 or (i - 8) % 3 == 0]
    if strategy == "custom":
        return [i for i in CUSTOM_LAYERS if i < depth]
    raise ValueError(f"bridge strategy {strategy!r} is not one of {', '.join(STRATEGIES)}")


class FrameCore(Protocol):
    """Attention of one query over each frame's tokens: the seam that sequence parallelism replaces here."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
        """q [1, 1, H, D]; k, v [B, L, H, D] (all tokens, or this rank's part) -> [B, frames, H, D]."""
        ...


class DenseFrameCore:
    """For a process that holds all tokens of all frames."""

    def __init__(self, backend: Backend | None = None) -> None:
        self.core = DenseCore(backend)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
        k, v = (x.unflatten(1, (frames, -1)).flatten(0, 1) for x in (k, v))  # [B·T, S, H, D]
        out: Tensor = self.core(q.expand(k.shape[0], -1, -1, -1), k, v).unflatten(0, (-1, frames)).squeeze(2)
        return out


class ProbeAttention(nn.Module):
    """Has the parameter names of torch's MultiheadAttention; one query per frame."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"pooled AdaLN: video width {dim} does not split into the audio tower's {num_heads} heads")
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        self.core: FrameCore = DenseFrameCore()
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, probe: Tensor, tokens: Tensor, frames: int) -> Tensor:
        """probe [1, 1, d], tokens [B, L, d] -> [B, frames, d]."""
        tokens = tokens.to(probe.dtype)
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            linear(x, w, b).unflatten(-1, (self.num_heads, -1))
            for x, w, b in zip((probe, tokens, tokens), weights, biases, strict=True)
        )
        out: Tensor = self.out_proj(self.core(q, k, v, frames).flatten(2))
        return out


class FramePooling(nn.Module):
    """One learned query pools the tokens of each latent frame."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, dim))
        self.attention = ProbeAttention(dim, num_heads)
        self.layernorm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, tokens: Tensor, frames: int) -> Tensor:
        """tokens [B, L, d] -> [B, frames, d]."""
        out: Tensor = self.layernorm(self.attention(self.probe, tokens, frames))
        return out


class PooledScaleShift(nn.Module):
    """(scale, shift) of the querying tower, step by step, from the pooled states of the other."""

    def __init__(self, kv_dim: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(kv_dim, 2 * dim)

    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:
        """x [B, L, d], pooled [B, L, kv_dim] -> LN(x)·(1 + scale) + shift, in the dtype of `pooled`."""
        scale, shift = self.linear(silu(pooled)).to(x.dtype).chunk(2, dim=-1)
        return modulate(x, shift, scale, ADALN_EPS, pooled.dtype)


def resample(steps: Tensor, count: int) -> Tensor:
    """[B, T, d] -> [B, count, d], linearly in time (torch's interpolate, align_corners=False).

    A product with the matrix of that map: interpolate's own backward on CUDA adds up in any order.
    """
    if steps.shape[1] == count:
        return steps
    wide = torch.promote_types(steps.dtype, torch.float32)
    unit = torch.eye(steps.shape[1], dtype=wide, device=steps.device)
    weights = interpolate(unit[None], size=count, mode="linear", align_corners=False)[0]  # [T, count]
    return (weights.T @ steps.to(wide)).to(steps.dtype)


class Conditioner(nn.Module):
    """One direction at one block: x gives queries (un-normed, unless pooled AdaLN), LN(y) keys and values. Returns the
    addition to x.

    Reference: ConditionalCrossAttentionBlock (MOVA, interactionv2).
    """

    def __init__(self, dim: int, kv_dim: int, num_heads: int, pooled_adaln: bool) -> None:
        super().__init__()
        self.y_norm = LayerNorm(kv_dim, eps=NORM_EPS)
        self.inner = Attention(dim, num_heads, NORM_EPS, kv_dim=kv_dim)
        self.per_frame_pooling = FramePooling(kv_dim, num_heads) if pooled_adaln else None
        self.adaln = PooledScaleShift(kv_dim, dim) if pooled_adaln else None

    def forward(self, x: Tensor, y: Tensor, rotary_x: Rotary | None, rotary_y: Rotary | None, frames: int) -> Tensor:
        """x [B, L, dim], y [B, Ly, kv_dim]; `frames` of y for pooled AdaLN. Returns [B, L, dim] in the dtype of the
        weights, which that of x and y may exceed."""
        if self.per_frame_pooling is not None and self.adaln is not None:
            x = self.adaln(x, resample(self.per_frame_pooling(y, frames), x.shape[1]))
        y = self.y_norm(y)
        out: Tensor = self.inner(x.to(y.dtype), y, rotary_x, rotary_y)
        return out


class Bridge(nn.Module):
    """Both directions for every interacting block. Parameter names are the reference's (DualTowerConditionalBridge)."""

    def __init__(self, config: BridgeConfig, video_dim: int, audio_dim: int, depth: int) -> None:
        super().__init__()
        for name, dim in (("video", video_dim), ("audio", audio_dim)):
            if dim % config.head_dim:
                raise ValueError(f"{name} width {dim} does not split into bridge heads of {config.head_dim}")
        self.config = config
        self.layers = interacting_layers(config.strategy, depth)
        video_heads, audio_heads = video_dim // config.head_dim, audio_dim // config.head_dim
        self.audio_to_video_conditioners = nn.ModuleDict(
            {str(i): Conditioner(video_dim, audio_dim, video_heads, False) for i in self.layers}
        )
        self.video_to_audio_conditioners = nn.ModuleDict(
            {str(i): Conditioner(audio_dim, video_dim, audio_heads, config.pooled_adaln) for i in self.layers}
        )
        self.condition_scale = nn.Parameter(torch.ones(1)) if config.trainable_condition_scale else None

    def forward(
        self,
        layer: int,
        video: Tensor,
        audio: Tensor,
        rotary_video: Rotary | None,
        rotary_audio: Rotary | None,
        frames: int,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Bridge before block `layer`: video [B, Lv, dv] and audio [B, La, da], both read from before the Bridge.

        `frames`: latent frames of the video; `scale` [B] multiplies what is added (None: 1).
        """
        to_video = self.audio_to_video_conditioners[str(layer)](video, audio, rotary_video, rotary_audio, frames)
        to_audio = self.video_to_audio_conditioners[str(layer)](audio, video, rotary_audio, rotary_video, frames)
        factors = [factor.view(-1, 1, 1) for factor in (self.condition_scale, scale) if factor is not None]
        if not factors:
            return video + to_video, audio + to_audio
        factor = math.prod(factors[1:], start=factors[0]).to(video.dtype)  # [B, 1, 1]
        return add_gated(video, factor, to_video), add_gated(audio, factor, to_audio)
