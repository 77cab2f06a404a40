"""Impacts of synthetic clips, found in decoded pixels and in decoded sound alone, and how well they agree.

    seen, heard = impacts_seen(pixels, fps), impacts_heard(waveform)
    score = agreement([seen, ...], [heard, ...])            # F1 of impacts matched one to one within 0.1 s

With `voices` every object is told by its colour and every sound by its pitch, and only impacts of one voice match.
Thresholds were set on clips of `data.synthesize` that went through the codecs, before any generated clip was scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from data.sync.inputs import SAMPLE_RATE
from data.synthesize import BACKGROUND, VOICES

TOLERANCE = 0.1  # s
CONTRAST = 0.05  # of brightness (0..1) to the background, from which a pixel belongs to an object
FLOOR = 4  # rows of 64 at the bottom that are not looked at
COLOURED = 0.2  # saturation (largest minus smallest of RGB, of 0..1) from which a pixel has a colour
LEAST_AREA = 20  # pixels of an object; with fewer it is not seen
PROMINENCE = 4.0  # px by which an object comes up on both sides of an impact
HOP = 80  # samples (5 ms) between values of an envelope
SPAN = 640  # samples (40 ms) that a value looks at
LOUD = 0.05  # least amplitude after an impact
RISE = 2.0  # least ratio of the amplitudes after and before one
SPACING = 0.2  # s, least distance of two impacts


class Impact(NamedTuple):
    """An event: when (seconds), and the voice of what caused it (0 where voices are not told apart)."""

    time: float
    voice: int = 0


def impacts_seen(pixels: Tensor, fps: float, voices: bool = False) -> list[Impact]:
    """When the coloured objects turn at the bottom of their way. pixels [3, F, H, W] in -1..1."""
    picture = (pixels.float().numpy() + 1) / 2
    # Brightness keeps its motion through the codec, colour is constant over the four frames of a block.
    bright = np.abs(picture.mean(0) - BACKGROUND.mean() / 255) - CONTRAST  # [F, H, W]
    weight = np.clip(bright / CONTRAST, 0, 1)
    floor = round(FLOOR * weight.shape[1] / 64)
    weight[:, weight.shape[1] - floor :] = 0
    if not voices:
        return [Impact(time) for time in _turns(weight, fps)]
    owner = _columns(picture)
    found = [Impact(t, v) for v in range(len(VOICES)) for t in _turns(weight * (owner == v), fps)]
    return sorted(found)


def impacts_heard(waveform: Tensor, voices: bool = False) -> list[Impact]:
    """When sounds begin. waveform [samples], mono at 16 kHz."""
    sound = waveform.double().numpy()
    if not voices:
        return [Impact(time) for time in _onsets(_envelope(sound, None), LOUD)]
    loud = LOUD / 2  # the objects of a clip with several are half as loud
    found = [Impact(t, v) for v, (_, _, pitch) in enumerate(VOICES) for t in _onsets(_envelope(sound, pitch), loud)]
    return sorted(found)


@dataclass(frozen=True)
class Agreement:
    """Over some clips: impacts seen and heard, those matched, and the F1 that shuffled pairs of the same clips get."""

    seen: int
    heard: int
    matched: int
    chance: float
    offset: float  # s, median of heard minus seen of the matched ones (nan: none)

    @property
    def f1(self) -> float:
        """2·matched / (seen + heard); 0 when nothing is seen or heard."""
        return 2 * self.matched / (self.seen + self.heard) if self.seen and self.heard else 0.0


def agreement(seen: Sequence[Sequence[Impact]], heard: Sequence[Sequence[Impact]]) -> Agreement:
    """Clip by clip. Chance: the mean over all ways to pair each clip's picture with the sound of the k-th clip on."""
    clips = len(seen)
    total_seen, total_heard = sum(map(len, seen)), sum(map(len, heard))
    offsets = [b - a for s, h in zip(seen, heard, strict=True) for a, b in match(s, h)]
    others = [len(match(seen[i], heard[(i + k) % clips])) for k in range(1, clips) for i in range(clips)]
    chance = 0.0
    if others and total_seen and total_heard:
        chance = 2 * (sum(others) / (clips - 1)) / (total_seen + total_heard)
    median = float(np.median(offsets)) if offsets else math.nan
    return Agreement(total_seen, total_heard, len(offsets), chance, median)


def match(seen: Sequence[Impact], heard: Sequence[Impact]) -> list[tuple[float, float]]:
    """Pairs of times within TOLERANCE, one to one and of one voice; as many as there can be."""
    pairs = []
    for voice in {impact.voice for impact in seen}:
        first, second = (sorted(i.time for i in impacts if i.voice == voice) for impacts in (seen, heard))
        a = b = 0
        while a < len(first) and b < len(second):  # earliest first is optimal for intervals of one length
            if abs(first[a] - second[b]) <= TOLERANCE:
                pairs.append((first[a], second[b]))
                a, b = a + 1, b + 1
            elif first[a] < second[b]:
                a += 1
            else:
                b += 1
    return pairs


def _turns(weight: np.ndarray, fps: float) -> list[float]:
    """weight [F, H, W] of one object in each pixel -> seconds at which its centre is lowest in the picture."""
    area = weight.sum((1, 2))
    frames = np.flatnonzero(area >= LEAST_AREA)
    if len(frames) < 3:
        return []
    rows = np.arange(weight.shape[1]) + 0.5
    height = (weight.sum(2)[frames] @ rows) / area[frames]
    track = np.interp(np.arange(len(weight)), frames, height)
    peaks = [peak for peak in _summits(track) if 0 < peak < len(track) - 1]
    return [(peak + _vertex(track[peak - 1 : peak + 2])) / fps for peak in peaks]


def _summits(track: np.ndarray) -> list[int]:
    """Where a track was PROMINENCE lower before, since the last summit, and is PROMINENCE lower after."""
    summits: list[int] = []
    low, high, rising = track[0], 0, False
    for i, value in enumerate(track):
        if not rising:
            low = min(low, value)
            if value >= low + PROMINENCE:
                rising, high = True, i
        elif value > track[high]:
            high = i
        elif value <= track[high] - PROMINENCE:
            summits.append(high)
            low, rising = value, False
    return summits


def _vertex(values: np.ndarray) -> float:
    """Where two lines of opposite slope through three values meet, from the middle one on (-0.5..0.5).

    A ball falls as fast as it then rises: the steeper side is the one without the turn.
    """
    left, right = values[1] - values[0], values[1] - values[2]
    steep = max(left, right)
    return 0.0 if steep <= 0 else float(np.clip((left - right) / (2 * steep), -0.5, 0.5))


def _columns(picture: np.ndarray) -> np.ndarray:
    """[3, F, H, W] in 0..1 -> [W]: the voice whose colour a column of pixels shows most over the clip, -1 for none."""
    top, bottom = picture.max(0), picture.min(0)  # [F, H, W]
    coloured = np.clip((top - bottom - COLOURED) / COLOURED, 0, 1)
    red, green, blue = picture
    spread = np.maximum(top - bottom, 1e-6)
    green_or_blue = np.where(top == green, 2 + (blue - red) / spread, 4 + (red - green) / spread)
    hue = np.where(top == red, (green - blue) / spread, green_or_blue) / 6 % 1
    nearest = np.argmin([np.abs((hue - voice + 0.5) % 1 - 0.5) for voice, _, _ in VOICES], axis=0)
    mass = np.stack([(coloured * (nearest == voice)).sum((0, 1)) for voice in range(len(VOICES))])  # [V, W]
    there = mass.sum(1, keepdims=True) >= LEAST_AREA * len(coloured[:, 0, 0])
    mass = np.where(there, mass, 0.0)
    return np.where(mass.max(0) > 0, mass.argmax(0), -1)


def _envelope(sound: np.ndarray, pitch: float | None) -> np.ndarray:
    """Amplitude every HOP samples, smoothed over SPAN; of the tone of this pitch where one is given."""
    window = np.hanning(SPAN + 1)
    window /= window.sum()
    if pitch is None:
        smooth = np.convolve(sound**2, window, "same")
        values: np.ndarray = np.sqrt(2 * np.maximum(smooth, 0))[::HOP]
        return values
    carrier = np.exp(-2j * np.pi * pitch / SAMPLE_RATE * np.arange(len(sound)))
    return 2 * np.abs(np.convolve(sound * carrier, window, "same"))[::HOP]


def _onsets(envelope: np.ndarray, loud: float) -> list[float]:
    """Seconds at which an envelope rises steeply to a loud value."""
    reach = SPAN // HOP // 2  # values on either side that see the same samples
    padded = np.pad(envelope, reach, mode="edge")
    before, after = padded[: len(envelope)], padded[2 * reach :]
    slope = np.where((after >= loud) & (after >= RISE * before), after - before, 0.0)
    found: list[float] = []
    for peak in np.argsort(-slope, kind="stable"):  # the steepest ones first
        time = float(peak * HOP / SAMPLE_RATE)
        if slope[peak] < loud / 2:
            break
        if all(abs(time - other) >= SPACING for other in found):
            found.append(time)
    return sorted(found)
