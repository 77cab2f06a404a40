"""Sound, mono at 16 kHz, <-> latents [La, 128] at 50 a second, by a truncated MDCT.

Hop 320 (20 ms), sine window; kept are the lowest 128 of 320 coefficients (0 to 3.2 kHz). The window has hard edges at
sample 0 and at the end: La blocks then hold La·320 samples exactly, with time-domain alias cancellation at every inner
boundary, and untruncated the transform is orthonormal. Coefficients are companded by asinh(c / KNEE), so that quiet
sounds count, and divided by constants measured over synthetic and natural clips in equal parts: the square root of
(a band's deviation times the largest), since full whitening would blow up the nearly empty high bands, and one
factor that brings the variance over all channels to 1.
"""

import hashlib
import json
import math
from functools import lru_cache

import torch
from torch import Tensor

SAMPLE_RATE = 16000
HOP = 320
CHANNELS = 128
KNEE = 0.1
BAND = 8  # channels that share a constant
SCALE: tuple[float, ...] = (
    0.4643,
    0.4142,
    0.3959,
    0.3421,
    0.2929,
    0.2486,
    0.2269,
    0.222,
    0.2182,
    0.1907,
    0.1869,
    0.1934,
    0.1949,
    0.1913,
    0.1988,
    0.1765,
)

fingerprint = f"mdct-audio-1-{hashlib.sha256(json.dumps([HOP, CHANNELS, KNEE, BAND, SCALE]).encode()).hexdigest()[:12]}"


def steps(samples: int) -> int:
    """Latent steps La of so many samples: a part of a step counts as one."""
    return -(-samples // HOP)


def encode(waveform: Tensor) -> Tensor:
    """[samples] mono in [-1, 1] at 16 kHz -> float32 latents [La, 128]; the last step is filled with silence."""
    if waveform.ndim != 1 or len(waveform) == 0:
        raise ValueError(f"waveform is {tuple(waveform.shape)}; expected [samples], at least one")
    length = steps(len(waveform)) * HOP
    padded = torch.nn.functional.pad(waveform.float(), (0, length - len(waveform)))
    return torch.asinh(analyse(padded)[:, :CHANNELS] / KNEE) / _scale()


def decode(latents: Tensor, samples: int | None = None) -> Tensor:
    """[La, 128] -> waveform [La·320], cut to `samples` where given."""
    if latents.ndim != 2 or latents.shape[1] != CHANNELS:
        raise ValueError(f"latents are {tuple(latents.shape)}; expected [La, {CHANNELS}]")
    kept = KNEE * torch.sinh((latents.float() * _scale()).clamp(-20, 20))
    return synthesise(torch.nn.functional.pad(kept, (0, HOP - CHANNELS)))[:samples]


def analyse(waveform: Tensor) -> Tensor:
    """[La·320] -> all MDCT coefficients [La, 320]; orthonormal, float64 stays float64."""
    blocks = waveform.reshape(-1, HOP).clone()
    return _fold(blocks, 1) @ _dct4().to(blocks.dtype)


def synthesise(coefficients: Tensor) -> Tensor:
    """Inverse of analyse."""
    return _fold(coefficients @ _dct4().to(coefficients.dtype), -1).reshape(-1)


def _fold(blocks: Tensor, direction: int) -> Tensor:
    """Rotate each pair of samples that mirror each other at an inner boundary (-1: back). The window is the angle."""
    half = HOP // 2
    angle = math.pi / 4 * (1 - (torch.arange(half, dtype=torch.float64) + 0.5) / half)
    cosine, sine = torch.cos(angle).to(blocks.dtype), direction * torch.sin(angle).to(blocks.dtype)
    before, after = blocks[:-1, half:].flip(1), blocks[1:, :half]  # counted from the boundary outwards
    out = blocks.clone()
    out[:-1, half:] = (cosine * before - sine * after).flip(1)
    out[1:, :half] = cosine * after + sine * before
    return out


@lru_cache
def _dct4() -> Tensor:
    """Orthonormal, symmetric and its own inverse: [320, 320] float64."""
    n = torch.arange(HOP, dtype=torch.float64) + 0.5
    return torch.cos(math.pi / HOP * n[:, None] * n[None]) * math.sqrt(2 / HOP)


@lru_cache
def _scale() -> Tensor:
    return torch.tensor(SCALE).repeat_interleave(BAND)
