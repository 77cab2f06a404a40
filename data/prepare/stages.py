"""The stages that a file and its windows go through, beside cutting (data.window) and filtering (data.windows.filter).

Each has a `name` and a `version`, raised whenever the same input gives another output: a dataset records them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.clip import EncodedClip
from data.codec import Codecs
from data.errors import DataError
from data.media import SAMPLE_RATE, Media, open_media
from data.scores import BLIND, DEAF, DEAR, OF_SPEECH, Score
from data.scores.decoded import DecodedWindow
from data.sources import SourceFile
from data.windows.filter import Filter
from data.windows.window import Window

MAX_GAIN_DB = 30.0  # of the loudness normalisation: beyond it is noise that would be raised
PEAK = 0.99  # no gain drives a sample beyond it


class Probe:
    """Opens a file: timestamps, sound, and whether it is whole. rates: Hz at which its sound will be read."""

    name, version = "probe", 2

    def __init__(self, rates: Sequence[int] = ()):
        self.rates = rates

    def __call__(self, source: SourceFile) -> Media:
        """DataError when the file can't be used."""
        return open_media(source.path, self.rates)


class Decode:
    """Frames by timestamps, cropped and resized to the bucket; the sound of the same time at all rates."""

    name, version = "decode", 2

    def __call__(self, media: Media, window: Window) -> DecodedWindow:
        """DataError when a frame can't be decoded or the window holds neither picture nor sound."""
        geometry = window.geometry
        frames = waveform = None
        sounds = {}
        if media.frame_times is not None:
            frames = media.frames(window.start, geometry.frames, geometry.fps, geometry.height, geometry.width)
        if media.sound_span is not None and overlaps(media, window.start, geometry.seconds):
            waveform = media.sound(window.start, geometry.samples)
            wider = [rate for rate in media.rates if rate != SAMPLE_RATE]
            sounds = {rate: media.sound(window.start, geometry.samples_at(rate), rate) for rate in wider}
        if frames is None and waveform is None:
            raise DataError("neither picture nor sound in this window")
        return DecodedWindow(frames, waveform, geometry.fps, sounds)


class Measure:
    """All scores of a window, the expensive ones last: the others decide whether those are worth their time.

    min_speech, skip_failed: see ScoreConfig. DataError for a min_speech that is no share.
    """

    name, version = "score", 2

    def __init__(self, scores: Sequence[Score], min_speech: float = 0.0, skip_failed: bool = False):
        if not 0 <= min_speech <= 1:
            raise DataError(f"score.min_speech={min_speech} must lie between 0 and 1")
        self.scores, self.min_speech, self.skip_failed = scores, min_speech, skip_failed
        rank = {name: number for number, name in enumerate(DEAR, 1)}
        self._in_order = sorted(scores, key=lambda score: rank.get(score.name, 0))

    def __call__(
        self,
        decoded: DecodedWindow,
        scores: dict[str, float],
        dropping: Filter | None,
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> tuple[str, set[str]]:
        """Put all columns into `scores`, which holds those from elsewhere; NaN where one is not measured.

        dropping: the filter, None where it drops no windows; timed: counts the time of a stage.
        Returns why scores were not measured, in words, and the columns that `skip_failed` has spared.
        """
        spares = dropping if self.skip_failed else None
        why: dict[str, list[str]] = {}
        pending = {column for score in self.scores if score.name in DEAR for column in score.columns}
        for score in self._in_order:
            scores |= dict.fromkeys(score.columns, math.nan)
            if spares and score.name in DEAR and (failures := spares.failures(scores, pending)):
                why.setdefault(f"skipped, as the window fails {failures[0]}", []).append(score.name)
                continue
            pending -= set(score.columns)
            reason = self._gate(score, scores)
            if not reason:
                with timed(f"score/{score.name}"):
                    scores |= self.one(score, decoded)
                if all(math.isnan(scores[column]) for column in score.columns):
                    reason = _not_there(score, decoded)
            if reason:
                why.setdefault(reason, []).append(score.name)
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why.items()), pending

    def _gate(self, score: Score, scores: dict[str, float]) -> str:
        """Why a score is not worth measuring, given the cheaper ones; "" if it is."""
        spoken = scores.get("speech_fraction", math.nan)
        if score.name in OF_SPEECH and spoken < self.min_speech:
            return f"speech_fraction {spoken:g} is below score.min_speech={self.min_speech:g}"
        return ""

    def one(self, score: Score, decoded: DecodedWindow) -> dict[str, float]:
        """One score's columns, rounded to what is stored. DataError when it fails on this window."""
        try:
            values = score(decoded)
        except (ValueError, RuntimeError, IndexError) as error:  # odd content must cost its window, not the run
            raise DataError(f"the score {score.name} failed ({type(error).__name__}: {error})") from error
        return {column: rounded(values[column]) for column in score.columns}


@dataclass
class EncodeJob:
    """A decoded window on its way into latents; treatment: what was done to its file."""

    source: SourceFile
    media: Media
    window: Window
    decoded: DecodedWindow
    key: str
    scores: dict[str, float]
    treatment: dict[str, Any]


class Encode:
    """Latents of picture, condition and sound. loudness: target in LUFS, None leaves the sound as it is; fingerprints:
    of all codecs, the text's too."""

    name, version = "encode", 3

    def __init__(self, loudness: float | None, codecs: Codecs, fingerprints: Mapping[str, str]):
        if loudness is not None and not -70 <= loudness <= 0:
            raise DataError(f"loudness={loudness} must lie between -70 and 0 LUFS, for example -23")
        self.loudness, self.codecs, self.fingerprints = loudness, codecs, dict(fingerprints)

    @property
    def batch(self) -> int:
        """Windows that are to be given at once, as many as there are of one geometry."""
        return self.codecs.video.batch

    def __call__(self, jobs: Sequence["EncodeJob"]) -> list[EncodedClip]:
        """A clip of each; jobs: windows of one file and one geometry."""
        pictures = self._pictures([job.decoded.frames for job in jobs], jobs[0].window.geometry.frames)
        return [self._clip(job, *latents) for job, latents in zip(jobs, pictures, strict=True)]

    def _pictures(self, frames: Sequence[Tensor | None], count: int) -> list[tuple[Tensor | None, Tensor | None]]:
        """Latents and condition of each window, None for one without a picture."""
        there = [number for number, one in enumerate(frames) if one is not None]
        found: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(frames)
        if there:
            pixels = torch.stack([frames[number] for number in there])  # type: ignore[misc]
            latents = self.codecs.video.encode(pixels).bfloat16()
            conditions = self.codecs.video.encode_condition(pixels[:, :, 0], count).bfloat16()
            for place, number in enumerate(there):
                found[number] = latents[place], conditions[place]
        return found

    def _clip(self, job: "EncodeJob", latents: Tensor | None, condition: Tensor | None) -> EncodedClip:
        source, media, window, decoded, scores = job.source, job.media, job.window, job.decoded, job.scores
        geometry, sound = window.geometry, None
        meta = {
            "fps": float(geometry.fps),
            "frames": geometry.frames,
            "height": geometry.height,
            "width": geometry.width,
            "seconds": geometry.seconds,
            "source": source.name,
            "source_sha256": source.sha256,
            "source_height": media.size[0],
            "source_width": media.size[1],
            "start": window.start,
            "treatment": job.treatment,
            "scores": {column: value for column, value in scores.items() if not math.isnan(value)},
            "loudness": None,  # root mean square of the stored sound in dB of full scale
            "encoders": self.fingerprints,
        }
        if window.kind:
            meta["kind"] = window.kind
        rate = self.codecs.audio.sample_rate
        if (waveform := decoded.sound_at(rate)) is not None:
            if self.loudness is not None:
                before = lufs(waveform, rate)
                gain = gain_db(waveform, before, self.loudness)
                waveform = waveform * 10 ** (gain / 20)
                meta |= {"lufs": before if math.isfinite(before) else None, "gain_db": round(gain, 3)}
            sound = self.codecs.audio.encode(waveform[None])[0].bfloat16()
            power = float(waveform.square().mean())
            meta["loudness"] = round(10 * math.log10(power), 2) if power > 0 else None
        meta["bucket"] = geometry.bucket(latents is not None, sound is not None).to_dict()
        return EncodedClip(job.key, latents, sound, condition, meta)


def _not_there(score: Score, decoded: DecodedWindow) -> str:
    """Why a score has found nothing to measure."""
    if decoded.waveform is None and score.name not in DEAF:
        return "no sound"
    if decoded.frames is None and score.name not in BLIND:
        return "no picture"
    return "silent, still or too short"


def lufs(waveform: Tensor, rate: int) -> float:
    """Integrated loudness (ITU-R BS.1770) of [samples] at `rate` Hz; -inf for silence and for less than 0.4 s."""
    from torchaudio.functional import loudness

    if len(waveform) < 0.4 * rate:
        return -math.inf
    value = float(loudness(waveform[None], rate))
    return round(value, 3) if math.isfinite(value) else -math.inf


def gain_db(waveform: Tensor, measured: float, target: float) -> float:
    """Gain that brings a sound of `measured` LUFS to `target`, limited by MAX_GAIN_DB and the peak; 0 for silence."""
    peak = float(waveform.abs().max())
    if not math.isfinite(measured) or peak == 0:
        return 0.0
    gain = min(target - measured, MAX_GAIN_DB)
    return min(gain, 20 * math.log10(PEAK / peak)) if gain > 0 else gain


def overlaps(media: Media, start: float, seconds: float) -> bool:
    """Whether the file's sound covers any of the window: silence before a late start is true, hours of it are not."""
    assert media.sound_span is not None
    return start < media.sound_span[1] and media.sound_span[0] < start + seconds


def rounded(value: float) -> float:
    """To 6 significant digits: enough for any threshold, and equal on machines whose sums differ in the last bits."""
    return float(f"{value:.6g}")
