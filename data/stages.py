"""The stages that a file and its windows go through, beside cutting (data.window) and filtering (data.filter).

Each has a `name` and a `version`, raised whenever the same input gives another output: a dataset records them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data.clip import EncodedClip
from data.codec import audio, text, video
from data.decode import SAMPLE_RATE, Media, open_media
from data.errors import DataError
from data.scores import Decoded, Score
from data.source import Source
from data.window import Window

MAX_GAIN_DB = 30.0  # of the loudness normalisation: beyond it is noise that would be raised
PEAK = 0.99  # no gain drives a sample beyond it


class Probe:
    """Opens a file: timestamps, sound, and whether it is whole."""

    name, version = "probe", 1

    def __call__(self, source: Source) -> Media:
        """DataError when the file can't be used."""
        return open_media(source.path)


class Decode:
    """Frames by timestamps, cropped and resized to the bucket; the sound of the same time."""

    name, version = "decode", 1

    def __call__(self, media: Media, window: Window) -> Decoded:
        """DataError when a frame can't be decoded or the window holds neither picture nor sound."""
        geometry = window.geometry
        frames = waveform = None
        if media.frame_times is not None:
            frames = media.frames(window.start, geometry.frames, geometry.fps, geometry.height, geometry.width)
        if media.audio is not None and overlaps(media, window.start, geometry.seconds):
            waveform = media.sound(window.start, geometry.samples)
        if frames is None and waveform is None:
            raise DataError("neither picture nor sound in this window")
        return Decoded(frames, waveform, geometry.fps)


class Measure:
    """All scores of a window."""

    name, version = "score", 1

    def __init__(self, scores: Sequence[Score]):
        self.scores = scores

    def one(self, score: Score, decoded: Decoded) -> dict[str, float]:
        """One score's columns, rounded to what is stored. DataError when it fails on this window."""
        try:
            values = score(decoded)
        except (ValueError, RuntimeError, IndexError) as error:  # odd content must cost its window, not the run
            raise DataError(f"the score {score.name} failed ({type(error).__name__}: {error})") from error
        return {column: rounded(values[column]) for column in score.columns}


class Encode:
    """Latents of picture, condition and sound. loudness: target in LUFS, None leaves the sound as it is."""

    name, version = "encode", 2

    def __init__(self, loudness: float | None):
        if loudness is not None and not -70 <= loudness <= 0:
            raise DataError(f"loudness={loudness} must lie between -70 and 0 LUFS, for example -23")
        self.loudness = loudness

    def __call__(
        self, source: Source, media: Media, window: Window, decoded: Decoded, key: str, scores: dict[str, float]
    ) -> EncodedClip:
        """DataError for NaN or inf in the latents."""
        geometry = window.geometry
        latents = condition = sound = None
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
            "scores": {column: value for column, value in scores.items() if not math.isnan(value)},
            "loudness": None,  # root mean square of the stored sound in dB of full scale
            "encoders": {"video": video.fingerprint, "audio": audio.fingerprint, "text": text.fingerprint},
        }
        if window.kind:
            meta["kind"] = window.kind
        if decoded.frames is not None:
            latents = video.encode(decoded.frames).bfloat16()
            condition = encode_condition(decoded.frames[:, 0], geometry.frames).bfloat16()
        if (waveform := decoded.waveform) is not None:
            if self.loudness is not None:
                before = lufs(waveform)
                gain = gain_db(waveform, before, self.loudness)
                waveform = waveform * 10 ** (gain / 20)
                meta |= {"lufs": before if math.isfinite(before) else None, "gain_db": round(gain, 3)}
            sound = audio.encode(waveform).bfloat16()
            power = float(waveform.square().mean())
            meta["loudness"] = round(10 * math.log10(power), 2) if power > 0 else None
        meta["bucket"] = geometry.bucket(latents is not None, sound is not None).to_dict()
        clip = EncodedClip(key, latents, sound, condition, meta)
        if name := clip.not_finite():
            raise DataError(f"NaN or inf in the latents of {name}")
        return clip


def encode_condition(first_frame: Tensor, frames: int) -> Tensor:
    """Latents [16, 1 + (frames - 1) / 4, h, w] of a first frame [3, H, W] followed by zero frames.

    The codec works block by block in time and zeros stay zeros in any sum: one block of zero frames stands for all.
    """
    pixels = torch.zeros(3, min(frames, 5), *first_frame.shape[1:])
    pixels[:, 0] = first_frame
    latents = video.encode(pixels)
    return torch.cat([latents, latents[:, -1:].expand(-1, (frames - 1) // 4 - latents.shape[1] + 1, -1, -1)], dim=1)


def lufs(waveform: Tensor) -> float:
    """Integrated loudness (ITU-R BS.1770) of [samples] at 16 kHz; -inf for silence and for less than 0.4 s."""
    from torchaudio.functional import loudness

    if len(waveform) < 0.4 * SAMPLE_RATE:
        return -math.inf
    value = float(loudness(waveform[None], SAMPLE_RATE))
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
    assert media.audio is not None
    return start < media.audio_start + len(media.audio) / SAMPLE_RATE and media.audio_start < start + seconds


def rounded(value: float) -> float:
    """To 6 significant digits: enough for any threshold, and equal on machines whose sums differ in the last bits."""
    return float(f"{value:.6g}")
