"""What all scorers check and do to a window before they look at it."""

from pathlib import Path

import torch
from torch import Tensor

from data.errors import DataError

SAMPLE_RATE = 16000  # Hz of every waveform here
SILENT = 1e-4  # peak below which a sound counts as silence: it can be neither in nor out of step


def check_window(frames: Tensor, waveform: Tensor, fps: float, colour: bool = False) -> None:
    """ValueError unless frames is [F, 3, H, W] (without `colour` also [F, 1, H, W]), waveform [n] and fps above 0."""
    channels = (3,) if colour else (1, 3)
    if frames.ndim != 4 or frames.shape[1] not in channels or len(frames) == 0:
        expected = " or ".join(f"[F, {count}, H, W]" for count in reversed(channels))
        raise ValueError(f"frames are {tuple(frames.shape)}; expected {expected}, at least one")
    if waveform.ndim != 1:
        raise ValueError(f"waveform is {tuple(waveform.shape)}; expected [samples], mono")
    if not fps > 0:
        raise ValueError(f"fps is {fps}; expected a number above 0")


def is_silent(waveform: Tensor) -> bool:
    """Whether there is nothing to hear (or nothing at all)."""
    return len(waveform) == 0 or float(waveform.abs().max()) < SILENT


def retime(frames: Tensor, fps: float, rate: float) -> Tensor:
    """[F, ...] at fps -> [floor(F·rate/fps), ...] at `rate`: the frame that is shown in the middle of each interval."""
    if fps == rate:
        return frames
    count = int(len(frames) * rate / fps + 1e-6)
    shown = (torch.arange(count, dtype=torch.float64) + 0.5) / rate * fps
    return frames[(shown + 1e-6).long().clamp(0, len(frames) - 1)]


def luma(frames: Tensor) -> Tensor:
    """[F, 3, H, W] RGB, or [F, 1, H, W] which is grey already -> [F, H, W] of the same range (BT.601 weights)."""
    if frames.shape[1] == 1:
        return frames[:, 0].float()
    return torch.einsum("fchw,c->fhw", frames.float(), torch.tensor([0.299, 0.587, 0.114], device=frames.device))


def need_file(weights: str | None, remedy: str) -> str:
    """`weights` when it is given and there; DataError with the remedy otherwise."""
    if weights is None:
        raise DataError(f"no weights file given; {remedy}")
    if not Path(weights).is_file():
        raise DataError(f"weights file {weights} does not exist; {remedy}")
    return weights
