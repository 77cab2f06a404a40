"""Pixels [3, F, H, W] in [-1, 1] <-> latents [16, 1 + (F - 1) / 4, H / 8, W / 8], by a truncated space-time DCT.

The first frame stands alone (8x8 blocks), the others go in blocks of 4x8x8, as in the video VAE of MOVA. Colours are
rotated into one luma and two chroma axes; both steps are orthonormal, so that untruncated they are exact. Kept are the
12 luma and 4 chroma coefficients of most energy. They are shifted and divided by constants, measured over synthetic
clips (data.synthesize) and natural ones in equal parts, so that latents have about zero mean and unit variance.
"""

import hashlib
import json
import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import conv3d

CHANNELS = 16
STRIDE = (4, 8, 8)  # frames, rows, columns of a block

# (axis 0 luma, 1 and 2 chroma; frequency in time, rows, columns), mean, standard deviation: a line a channel
FIRST: tuple[tuple[tuple[int, int, int, int], float, float], ...] = (
    ((0, 0, 0, 0), -4.889, 5.857),
    ((0, 0, 0, 1), 0.012, 1.461),
    ((0, 0, 0, 2), 0.083, 0.807),
    ((0, 0, 0, 3), -0.005, 0.470),
    ((0, 0, 0, 6), -0.031, 0.223),
    ((0, 0, 1, 0), -0.019, 1.371),
    ((0, 0, 1, 1), -0.015, 0.624),
    ((0, 0, 1, 2), 0.003, 0.431),
    ((0, 0, 2, 0), 0.003, 0.638),
    ((0, 0, 2, 1), -0.001, 0.397),
    ((0, 0, 3, 0), 0.014, 0.395),
    ((0, 0, 4, 0), -0.028, 0.319),
    ((1, 0, 0, 0), 0.187, 1.654),
    ((1, 0, 0, 1), -0.012, 0.416),
    ((1, 0, 1, 0), -0.002, 0.391),
    ((2, 0, 0, 0), 0.105, 1.055),
)
REST: tuple[tuple[tuple[int, int, int, int], float, float], ...] = (
    ((0, 0, 0, 0), -9.529, 11.337),
    ((0, 0, 0, 1), 0.028, 2.834),
    ((0, 0, 0, 2), 0.154, 1.567),
    ((0, 0, 0, 3), -0.001, 0.871),
    ((0, 0, 1, 0), -0.031, 2.710),
    ((0, 0, 1, 1), -0.023, 1.185),
    ((0, 0, 2, 0), 0.038, 1.262),
    ((0, 0, 3, 0), 0.026, 0.781),
    ((0, 0, 4, 0), -0.053, 0.629),
    ((0, 1, 0, 0), -0.011, 1.135),
    ((0, 1, 0, 1), -0.002, 0.644),
    ((0, 1, 1, 0), 0.000, 0.542),
    ((1, 0, 0, 0), 0.391, 3.191),
    ((1, 0, 0, 1), -0.019, 0.759),
    ((1, 0, 1, 0), -0.007, 0.725),
    ((2, 0, 0, 0), 0.169, 2.056),
)


def _hash() -> str:
    return hashlib.sha256(json.dumps([STRIDE, FIRST, REST]).encode()).hexdigest()[:12]


fingerprint = f"dct-video-1-{_hash()}"


def encode(pixels: Tensor) -> Tensor:
    """[3, F, H, W] in [-1, 1] -> float32 latents [16, 1 + (F - 1) / 4, H / 8, W / 8].

    ValueError when F is not 1 + 4k or when H or W is no multiple of 8.
    """
    channels, frames, height, width = pixels.shape
    if channels != 3 or frames % 4 != 1 or height % 8 or width % 8:
        raise ValueError(f"pixels are {tuple(pixels.shape)}; expected [3, 1 + 4k, multiple of 8, multiple of 8]")
    parts = []
    for part, time in ((pixels[:, :1], 1), (pixels[:, 1:], STRIDE[0])):
        if part.shape[1]:
            kernels, bias = _kernels(time)
            parts.append(conv3d(part[None].float(), kernels, bias, stride=(time, *STRIDE[1:]))[0])
    return torch.cat(parts, dim=1)


def decode(latents: Tensor) -> Tensor:
    """[16, 1 + k, h, w] -> pixels [3, 1 + 4k, 8h, 8w] in [-1, 1]. ValueError for another number of channels."""
    if latents.ndim != 4 or latents.shape[0] != CHANNELS:
        raise ValueError(f"latents are {tuple(latents.shape)}; expected [{CHANNELS}, T, h, w]")
    grid = latents.float().permute(1, 2, 3, 0)
    parts = []
    for latent_part, time, table in ((grid[:1], 1, FIRST), (grid[1:], STRIDE[0], REST)):
        rows, mean, deviation = _table(table, time)
        parts.append(from_blocks((latent_part * deviation + mean) @ basis(time)[rows], time))
    return torch.cat(parts, dim=1).clamp(-1, 1)


@lru_cache
def _kernels(time: int) -> tuple[Tensor, Tensor]:
    """The kept rows of the basis, shifted and divided, as a convolution: [16, 3, time, 8, 8] and [16].

    A convolution whose stride is its kernel reads every pixel once, where it lies: no copy in blocks is made.
    """
    rows, mean, deviation = _table(FIRST if time == 1 else REST, time)
    kernels = basis(time)[rows].reshape(CHANNELS, 3, time, *STRIDE[1:])
    return kernels / deviation[:, None, None, None, None], -mean / deviation


def to_blocks(pixels: Tensor, time: int) -> Tensor:
    """[3, time·k, 8h, 8w] -> [k, h, w, 3·time·64]: the numbers of each block in a row."""
    _, frames, height, width = pixels.shape
    grid = pixels.reshape(3, frames // time, time, height // 8, 8, width // 8, 8)
    return grid.permute(1, 3, 5, 0, 2, 4, 6).reshape(frames // time, height // 8, width // 8, 3 * time * 64)


def from_blocks(blocks: Tensor, time: int) -> Tensor:
    """Inverse of to_blocks."""
    k, h, w, _ = blocks.shape
    return blocks.reshape(k, h, w, 3, time, 8, 8).permute(3, 0, 4, 1, 5, 2, 6).reshape(3, k * time, 8 * h, 8 * w)


@lru_cache
def basis(time: int) -> Tensor:
    """The whole orthonormal basis of a block of `time` frames: [3·time·64, 3·time·64], a row a coefficient.

    Rows: (colour axis, frequency in time, rows, columns); columns: (red/green/blue, frame, row, column).
    """
    colour = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    colour = colour / colour.norm(dim=1, keepdim=True)
    return torch.kron(colour, torch.kron(_dct(time), torch.kron(_dct(8), _dct(8)))).float()


def _dct(size: int) -> Tensor:
    """Orthonormal DCT-II, [size, size], a row a frequency."""
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (n[None] + 0.5) * n[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


def _table(
    table: tuple[tuple[tuple[int, int, int, int], float, float], ...], time: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers in the basis, means and deviations, [16] each."""
    rows = [((axis * time + t) * 8 + y) * 8 + x for (axis, t, y, x), _, _ in table]
    return torch.tensor(rows), torch.tensor([mean for _, mean, _ in table]), torch.tensor([std for _, _, std in table])
