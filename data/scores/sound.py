"""Scores of the sound that need no network."""

import math

import torch
from torch import Tensor

from data.decode import SAMPLE_RATE
from data.scores import Decoded

FRAME, STEP = 400, 160  # samples: 25 ms every 10 ms
SPECTRUM = 1024  # samples of a spectrum: lines of 15.6 Hz
FLOOR = 1e-5  # root mean square below which there is no sound at all (-100 dB)


class SilenceRatio:
    """`silence_ratio`: share of 25 ms parts whose level is below a threshold; 1 = nothing but silence."""

    name, version, columns = "silence", 1, ("silence_ratio",)

    def __init__(self, threshold_db: float):
        self.threshold_db = threshold_db

    def __call__(self, decoded: Decoded) -> dict[str, float]:
        waveform = decoded.waveform
        return {"silence_ratio": math.nan if waveform is None else silence_ratio(waveform, self.threshold_db)}


class Bandwidth:
    """`bandwidth`: highest frequency in Hz whose mean power is within `range_db` of the strongest one.

    At most 8,000, since all sound is decoded to 16 kHz. 0 when there is nothing to be heard.
    """

    name, version, columns = "bandwidth", 1, ("bandwidth",)

    def __init__(self, range_db: float):
        self.range_db = range_db

    def __call__(self, decoded: Decoded) -> dict[str, float]:
        waveform = decoded.waveform
        return {"bandwidth": math.nan if waveform is None else bandwidth(waveform, self.range_db)}


def silence_ratio(waveform: Tensor, threshold_db: float) -> float:
    """Of [samples] at 16 kHz; see SilenceRatio. NaN for less than 25 ms."""
    if len(waveform) < FRAME:
        return math.nan
    power = waveform.unfold(0, FRAME, STEP).square().mean(dim=1)
    return float((power < 10 ** (threshold_db / 10)).float().mean())


def bandwidth(waveform: Tensor, range_db: float) -> float:
    """Of [samples] at 16 kHz; see Bandwidth. NaN for less than a spectrum's 64 ms."""
    if len(waveform) < SPECTRUM:
        return math.nan
    if float(waveform.square().mean().sqrt()) < FLOOR:
        return 0.0
    parts = waveform.unfold(0, SPECTRUM, SPECTRUM // 2) * torch.hann_window(SPECTRUM)
    power = torch.fft.rfft(parts).abs().square().mean(dim=0)[1:]  # without the constant
    smooth = torch.nn.functional.avg_pool1d(power[None], 5, stride=1, padding=2, count_include_pad=False)[0]
    audible = (smooth >= smooth.max() * 10 ** (-range_db / 10)).nonzero()
    return float(audible[-1] + 1) * SAMPLE_RATE / SPECTRUM
