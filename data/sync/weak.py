"""A weak baseline: does the picture move when the sound begins? Not good enough to filter by.

Normalised cross-correlation of the amount of motion with the onsets of the sound, at 100 Hz. Measured on natural clips
with known shifts, variants of this (whole picture, blocks, mouth) found the lag within 0.1 s in 3 to 5 of 77 cases on
the development clips and in 26 to 30 % on others, chance being 8 %; the area under the curve against shifted sound was
0.37 to 0.52 and 0.67 to 0.83, chance being 0.5. It is here to compare with, and because it needs no training.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from data.sync.inputs import SAMPLE_RATE, check_window, is_silent, luma

RATE = 100  # Hz of both curves
REACH = 1.3  # s of lags that are tried
OVERLAP = 0.7  # s that both curves must share at a lag
NEAR = 0.1  # s: lags up to that count as in step
SIZE = 32  # pixels a side for the motion


class WeakScorer:
    """weak_sync: the largest correlation (-1..1) within 0.1 s of no lag; weak_lag: the lag (s) of the largest one."""

    name = "weak"
    keys: tuple[str, ...] = ("weak_sync", "weak_lag")
    colour = False
    fingerprint = f"weak-1-{RATE}-{REACH}-{OVERLAP}-{NEAR}-{SIZE}"

    def score(self, frames: Tensor, waveform: Tensor, fps: float) -> dict[str, float]:
        """See SyncScorer. NaN when nothing sounds, nothing moves, or the window is too short."""
        check_window(frames, waveform, fps)
        nothing = dict.fromkeys(self.keys, math.nan)
        if is_silent(waveform) or len(frames) < 3:
            return nothing
        seen, heard = motion_curve(frames, fps), onset_curve(waveform)
        lags, values = correlate(seen, heard)
        if len(lags) == 0 or not bool(torch.isfinite(values).any()):
            return nothing
        near = values[lags.abs() <= NEAR + 1e-6]
        best = int(torch.where(torch.isfinite(values), values, -2.0).argmax())
        near = near[torch.isfinite(near)]
        return {"weak_sync": float(near.max()) if len(near) else math.nan, "weak_lag": float(lags[best])}


def motion_curve(frames: Tensor, fps: float) -> Tensor:
    """[samples at RATE] mean change of brightness; the change between frames i-1 and i happens at time i/fps."""
    small = interpolate(luma(frames)[:, None], (SIZE, SIZE), mode="area")[:, 0]
    change = (small[1:] - small[:-1]).abs().mean((1, 2))
    times = torch.arange(int(len(frames) / fps * RATE)) / RATE * fps - 1  # in steps of `change`
    low = times.floor().clamp(0, len(change) - 1).long()
    high = (low + 1).clamp(max=len(change) - 1)
    part = (times - low).clamp(0, 1)
    return change[low] * (1 - part) + change[high] * part


def onset_curve(waveform: Tensor) -> Tensor:
    """[samples at RATE] rise of the sound's level in dB over 10 ms, 0 where it falls."""
    hop = SAMPLE_RATE // RATE
    blocks = waveform[: len(waveform) // hop * hop].reshape(-1, hop)
    level = 10 * torch.log10(blocks.square().mean(1) + 1e-8)
    rise = (level[1:] - level[:-1]).clamp(min=0)
    return torch.cat([torch.zeros(min(1, len(level))), rise])


def correlate(seen: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
    """(lags in s, correlation at each, NaN where a side is constant); a positive lag: the sound is late."""
    reach, lags, values = round(REACH * RATE), [], []
    for lag in range(-reach, reach + 1):
        begin, end = max(0, -lag), min(len(seen), len(heard) - lag)
        if end - begin < OVERLAP * RATE:
            continue
        x, y = seen[begin:end], heard[begin + lag : end + lag]
        x, y = x - x.mean(), y - y.mean()
        scale = float(x.norm() * y.norm())
        lags.append(lag / RATE)
        values.append(float(x @ y) / scale if scale > 1e-8 else math.nan)
    return torch.tensor(lags), torch.tensor(values)
