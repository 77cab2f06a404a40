"""One diffusion transformer: stem, blocks, head. Two video experts and the audio tower are instances of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from core.ranges import bounded, within
from model.block import Block
from model.fused import modulate
from model.rope import Rotary, audio_rotary, split_head, video_rotary

MAX_PERIOD = 10000.0
ROPE_FORMS = ("video", "dac", "oobleck")


@dataclass
class TowerConfig:
    """Sizes of one tower. The released values: facts of MOVA-360p (two video experts, one audio tower).

    dim: width of a token
    num_heads: attention heads; they divide `dim`
    num_layers: blocks
    ffn_dim: width of the feed-forward layer
    in_dim: channels of a latent position as given; video: 16 noisy, 20 of the condition
    out_dim: channels of a latent position as predicted
    text_dim: width of the encoded caption
    freq_dim: width of the timestep's sinusoids
    eps: of the normalization layers
    patch_size: latent positions that become one token: frame, row, column for video, one number for audio
    rope: positions of the rotary embedding: "video", "dac" or "oobleck" (the legacy audio form)

    ValueError when the sizes do not fit each other.
    """

    dim: int = field(metadata=within("[1, inf)"))
    num_heads: int = field(metadata=within("[1, inf)"))
    num_layers: int = field(metadata=within("[1, inf)"))
    ffn_dim: int = field(metadata=within("[1, inf)"))
    in_dim: int = field(metadata=within("[1, inf)"))
    out_dim: int = field(metadata=within("[1, inf)"))
    text_dim: int = field(metadata=within("[1, inf)"))
    freq_dim: int = bounded(256, "[2, inf)")
    eps: float = bounded(1e-6, "(0, inf)")
    patch_size: list[int] = bounded([1, 2, 2], "[1, inf)")
    rope: str = "video"

    def __post_init__(self) -> None:
        if self.rope not in ROPE_FORMS:
            raise ValueError(f"rope {self.rope!r} is not one of {', '.join(ROPE_FORMS)}")
        if len(self.patch_size) != (3 if self.rope == "video" else 1):
            raise ValueError(f"patch_size {self.patch_size} does not fit rope {self.rope!r}: video has 3, audio 1")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"width {self.dim} does not split into {self.num_heads} heads of even width")
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim {self.freq_dim} is odd; the sinusoid has a cosine and a sine half")
        if self.rope != "dac":
            split_head(self.head_dim)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.num_heads


class Float32Linear(nn.Linear):
    """A Linear that computes in at least float32, whatever its weights are kept in (the time path needs it)."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class PatchEmbedding3d(nn.Conv3d):
    """Video stem: a convolution whose kernel is its stride, computed as the linear map of patches that it is.

    Its input are patches [B, L, C·prod(patch)] (see `patchify`), any part of the tokens. It casts what comes in to its
    weights' dtype itself: only in here are FSDP's weights gathered.
    """

    def forward(self, patches: Tensor) -> Tensor:
        return linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PatchEmbedding1d(nn.Conv1d):
    """Audio stem; works as the video one."""

    def forward(self, patches: Tensor) -> Tensor:
        return linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class TextEmbedding(nn.Sequential):
    """Linear, tanh-GELU, Linear on text states; casts like the stems."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.to(next(self.parameters()).dtype))  # type: ignore[no-untyped-call]
        return out


class Head(nn.Module):
    """Last modulation and projection to patches. Reference: Head (MOVA), with time per sample done right."""

    def __init__(self, dim: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, d], time vector [B, d] -> [B, L, out_features]."""
        # The reference adds the time vector as [B, d], which mixes the samples of a batch; it needs its own axis.
        modulation = (self.modulation + time[:, None]).to(x.dtype).unsqueeze(2)  # [B, 2, 1, d]
        shift, scale = modulation.unbind(1)
        out: Tensor = self.head(modulate(x, shift, scale, self.eps, self.head.weight.dtype))
        return out


class Tower(nn.Module):
    """Diffusion transformer over the tokens of one modality.

    The joint model calls its pieces one by one, since towers and Bridge interleave block by block:
    `embed` -> `blocks[i]` ... -> `project`. Parameter names are the reference's (WanModel, WanAudioModel).
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        patch = tuple(config.patch_size)
        stem: Any = PatchEmbedding3d if len(patch) == 3 else PatchEmbedding1d
        self.patch_embedding = stem(config.in_dim, config.dim, kernel_size=patch, stride=patch)
        self.text_embedding = TextEmbedding(config.text_dim, config.dim)
        self.time_embedding = nn.Sequential(
            Float32Linear(config.freq_dim, config.dim), nn.SiLU(), Float32Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(config.dim, 6 * config.dim))
        self.blocks = nn.ModuleList(
            Block(config.dim, config.num_heads, config.ffn_dim, config.eps) for _ in range(config.num_layers)
        )
        self.head = Head(config.dim, config.out_dim * math.prod(patch), config.eps)

    def embed(self, patches: Tensor) -> Tensor:
        """Patches [B, L, in_dim·prod(patch)] of any part of the tokens -> tokens [B, L, d]."""
        out: Tensor = self.patch_embedding(patches)
        return out

    def embed_text(self, text: Tensor) -> Tensor:
        """Text states [B, Lt, text_dim] -> [B, Lt, d]. Padding rows are embedded and attended like the rest."""
        out: Tensor = self.text_embedding(text)
        return out

    def embed_time(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps t [B] in 0..1000 -> (time vector [B, d], block modulation [B, 6, d]), at least float32."""
        vector = self.time_embedding(sinusoid(t, self.config.freq_dim))
        return vector, self.time_projection(vector).unflatten(1, (6, -1))

    def project(self, x: Tensor, time: Tensor) -> Tensor:
        """Tokens [B, L, d], time vector [B, d] -> velocity patches [B, L, prod(patch)·out_dim], at least float32."""
        patches = self.head(x, time)
        out: Tensor = patches.to(torch.promote_types(patches.dtype, torch.float32))
        return out

    def token_grid(self, latents: Tensor) -> tuple[int, ...]:
        """Tokens per axis for latents [B, C, *axes]. ValueError when an axis is not a multiple of its patch."""
        axes = latents.shape[2:]
        if len(axes) != len(self.config.patch_size) or any(n % p for n, p in zip(axes, self.config.patch_size)):
            raise ValueError(f"latents {tuple(latents.shape)} do not divide into patches of {self.config.patch_size}")
        return tuple(n // p for n, p in zip(axes, self.config.patch_size, strict=True))

    def rotary(self, grid: tuple[int, ...], device: torch.device) -> Rotary:
        """The tower's position table for a token grid, one row per token (cached)."""
        if self.config.rope == "video":
            frames, rows, columns = grid
            return video_rotary((frames, rows, columns), self.config.head_dim, device)
        return audio_rotary(grid[0], self.config.head_dim, self.config.rope, device)


def sinusoid(t: Tensor, freq_dim: int) -> Tensor:
    """[cos | sin] of t [B] at freq_dim/2 frequencies 10000^(-i/half), in float64: [B, freq_dim]."""
    half = freq_dim // 2
    frequencies = MAX_PERIOD ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angles = t.to(torch.float64)[:, None] * frequencies
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=1)


def patchify(latents: Tensor, patch_size: Sequence[int]) -> Tensor:
    """The input of the stem: [B, C, *axes] -> [B, L, C·prod(patch)], channels ordered (C, patch axes...).

    Tokens run over frame, then row, then column.
    """
    return _split(latents, patch_size, channels_last=False)


def velocity_patches(velocity: Tensor, patch_size: Sequence[int]) -> Tensor:
    """The output layout of the head: [B, C, *axes] -> [B, L, prod(patch)·C], channels ordered (patch axes..., C)."""
    return _split(velocity, patch_size, channels_last=True)


def unpatchify(patches: Tensor, grid: tuple[int, ...], patch_size: Sequence[int]) -> Tensor:
    """The inverse of `velocity_patches`: [B, L, prod(patch)·C] -> [B, C, *(grid·patch)]."""
    axes = len(grid)
    x = patches.unflatten(2, (*patch_size, -1)).unflatten(1, grid)  # [B, *grid, *patch, C]
    order = [0, 1 + 2 * axes] + [k for i in range(axes) for k in (1 + i, 1 + axes + i)]
    out: Tensor = x.permute(order).reshape(
        x.shape[0], x.shape[-1], *(n * p for n, p in zip(grid, patch_size, strict=True))
    )
    return out


def _split(x: Tensor, patch_size: Sequence[int], channels_last: bool) -> Tensor:
    axes = len(patch_size)
    for i, patch in enumerate(patch_size):  # [B, C, n1, p1, n2, p2, ...]
        x = x.unflatten(2 + 2 * i, (-1, patch))
    grid, patch_axes = [2 + 2 * i for i in range(axes)], [3 + 2 * i for i in range(axes)]
    order = [0, *grid, *patch_axes, 1] if channels_last else [0, *grid, 1, *patch_axes]
    return x.permute(order).flatten(1, axes).flatten(2)
