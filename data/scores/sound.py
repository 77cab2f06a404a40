"""Scores of the sound that need no network."""

import math

import torch
from torch import Tensor

from data.scores.decoded import DecodedWindow

FRAME, STEP = 400, 160  # samples: 25 ms every 10 ms
SPECTRUM = 0.064  # s of a spectrum: lines of 15.6 Hz
WIDE = 48000  # Hz of the sound whose bandwidth is looked for
FLOOR = 1e-5  # root mean square below which there is no sound at all (-100 dB)


class SilenceRatio:
    """`silence_ratio`: share of 25 ms parts whose level is below a threshold; 1 = nothing but silence."""

    name, version, columns = "silence", 1, ("silence_ratio",)

    def __init__(self, threshold_db: float):
        self.threshold_db = threshold_db

    def __call__(self, decoded: DecodedWindow) -> dict[str, float]:
        waveform = decoded.waveform
        return {"silence_ratio": math.nan if waveform is None else silence_ratio(waveform, self.threshold_db)}


class Bandwidth:
    """`bandwidth`: highest frequency in Hz whose mean power is within `range_db` of the strongest one.

    At most 24,000, of sound at 48 kHz. 0 when there is nothing to be heard.
    """

    name, version, columns = "bandwidth", 2, ("bandwidth",)
    rate = WIDE

    def __init__(self, range_db: float):
        self.range_db = range_db

    def __call__(self, decoded: DecodedWindow) -> dict[str, float]:
        waveform = decoded.sound_at(self.rate)
        return {"bandwidth": math.nan if waveform is None else bandwidth(waveform, self.rate, self.range_db)}


def silence_ratio(waveform: Tensor, threshold_db: float) -> float:
    """Of [samples] at 16 kHz; see SilenceRatio. NaN for less than 25 ms."""
    if len(waveform) < FRAME:
        return math.nan
    power = waveform.unfold(0, FRAME, STEP).square().mean(dim=1)
    return float((power < 10 ** (threshold_db / 10)).float().mean())


def bandwidth(waveform: Tensor, rate: int, range_db: float) -> float:
    """Of [samples] at `rate` Hz; see Bandwidth. NaN for less than a spectrum's 64 ms."""
    size = round(SPECTRUM * rate)
    if len(waveform) < size:
        return math.nan
    if float(waveform.square().mean().sqrt()) < FLOOR:
        return 0.0
    parts = waveform.unfold(0, size, size // 2) * torch.hann_window(size)
    power = torch.fft.rfft(parts).abs().square().mean(dim=0)[1:]  # without the constant
    smooth = torch.nn.functional.avg_pool1d(power[None], 5, stride=1, padding=2, count_include_pad=False)[0]
    audible = (smooth >= smooth.max() * 10 ** (-range_db / 10)).nonzero()
    return float(audible[-1] + 1) * rate / size
