"""Where a file is cut into windows: one after another, or by the rule of MOVA's paper (speech and scene cuts)."""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.clip import Bucket
from data.codec import audio
from data.decode import SAMPLE_RATE, Media
from data.errors import DataError

HALF_WINDOW = 4.025  # s before the speech at which a window of 8.05 s may begin (paper)
SCENE_CHUNK = 48  # frames decoded at a time while looking for cuts
SCENE_HEIGHT = 72  # rows of the pictures that are compared; scenedetect's own downscaling goes nearly as far


@dataclass(frozen=True)
class Geometry:
    """A window: frames (1 + 4k), frames per second, height and width in pixels."""

    frames: int
    fps: float
    height: int
    width: int

    @property
    def seconds(self) -> float:
        """Length of a window."""
        return self.frames / self.fps

    @property
    def samples(self) -> int:
        """Length of a window in sound samples."""
        return round(self.seconds * SAMPLE_RATE)

    def bucket(self, has_video: bool, has_audio: bool) -> Bucket:
        """The latent geometry of a window."""
        return Bucket(
            frames=1 + (self.frames - 1) // 4,
            height=self.height // 8,
            width=self.width // 8,
            audio_steps=audio.steps(self.samples),
            fps=float(self.fps),
            has_video=has_video,
            has_audio=has_audio,
        )


@dataclass
class WindowConfig:
    """How files are cut."""

    rule: str = "fixed"  # fixed: one window after another; mova: windows begin shortly before speech
    shots: str = "both"  # mova: single (no scene cut inside), multi (at least one), or both
    non_speech: bool = False  # mova: also windows without speech, in the gaps between
    lookback: float = HALF_WINDOW  # mova: seconds before the speech at which a window may begin
    cut_threshold: float = 27.0  # mova: of scenedetect's ContentDetector
    seed: int = 0  # mova: of the drawn starts


@dataclass(frozen=True)
class Window:
    """One window to be. kind: "" or single/multi and speech/non-speech."""

    start: float
    geometry: Geometry
    kind: str = ""


@dataclass
class Cut:
    """What a file was cut into. rest_seconds: what no window covers."""

    windows: list[Window] = field(default_factory=list)
    rest_seconds: float = 0.0


class WindowStage:
    """Chooses the bucket by the file's aspect ratio and cuts the file."""

    name, version = "window", 2

    def __init__(self, config: WindowConfig, buckets: list[Geometry]):
        if config.rule not in ("fixed", "mova"):
            raise DataError(f"window.rule={config.rule} must be fixed or mova")
        if config.shots not in ("single", "multi", "both"):
            raise DataError(f"window.shots={config.shots} must be single, multi or both")
        if not config.lookback >= 0:
            raise DataError(f"window.lookback={config.lookback} must be at least 0 seconds")
        if config.rule == "mova":
            need("window.rule=mova", "silero_vad", "onnxruntime", "scenedetect", "cv2")
        self.config, self.buckets = config, buckets

    def __call__(self, media: Media, sha256: str) -> Cut:
        """The windows of an open file; sha256 of its content seeds the draws."""
        geometries = choose_buckets(self.buckets, media)
        start, end = media.span
        if self.config.rule == "fixed":
            return fixed_windows(start, end, geometries)
        speech = speech_of(media)
        cuts = scene_cuts(media, geometries[0].fps, self.config.cut_threshold)
        generator = np.random.Generator(np.random.Philox(key=[int(sha256[:16], 16), self.config.seed]))
        found = mova_windows(
            speech, cuts, (start, end), geometries[0].seconds, generator, self.config.lookback, self.config.shots
        )
        if self.config.non_speech:
            found = sorted(
                found + gap_windows(speech, cuts, (start, end), geometries[0].seconds, found, self.config.shots)
            )
        windows = [Window(begin, geometries[0], kind) for begin, kind in found]
        return Cut(windows, max(0.0, end - start - len(windows) * geometries[0].seconds))


def choose_buckets(buckets: list[Geometry], media: Media) -> list[Geometry]:
    """The buckets of the aspect ratio nearest to the file's (without a picture: the first one's), longest first."""
    if media.frame_times is None:
        nearest = buckets[0]
    else:
        height, width = media.size
        aspect = math.log(width * media.pixel_aspect / height)
        nearest = min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height) - aspect))
    size = (nearest.height, nearest.width)
    return sorted((bucket for bucket in buckets if (bucket.height, bucket.width) == size), key=lambda one: -one.frames)


def fixed_windows(start: float, end: float, geometries: list[Geometry]) -> Cut:
    """As many of the longest windows as fit, then of the next shorter in the rest, and so on."""
    cut = Cut()
    covered = 0
    for geometry in geometries:
        # half a frame of tolerance: a last frame without declared duration is that much uncertain
        count = max(0, math.floor(((end - start) * geometry.fps + 0.5 - covered) / geometry.frames))
        first = start + covered / geometry.fps
        cut.windows += [Window(first + number * geometry.seconds, geometry) for number in range(count)]
        covered += count * geometry.frames
    cut.rest_seconds = max(0.0, end - start - covered / geometries[0].fps)
    return cut


def mova_windows(
    speech: list[tuple[float, float]],
    cuts: list[float],
    span: tuple[float, float],
    seconds: float,
    generator: np.random.Generator,
    lookback: float = HALF_WINDOW,
    shots: str = "both",
) -> list[tuple[float, str]]:
    """(start, kind) of MOVA's windows (paper, data section, stage 1); all times in seconds.

    speech: segments (start, end), rising; cuts: times of scene cuts, rising; span: of the file. A window's start is
    drawn uniformly from [lo, start of its segment], lo = the latest of: end of the speech before, scene's start,
    segment's start less `lookback`. The first segment's window starts with it. The next window belongs to the first
    segment that begins after the window's end, so that none overlap. A window with a cut inside is multi-shot, one that
    lies wholly in its scene single-shot; those of another kind than `shots` are left out.
    """
    windows: list[tuple[float, str]] = []
    free = -math.inf  # end of the last window
    for number, (begin, _) in enumerate(speech):
        if begin < free or begin < span[0]:
            continue
        if number == 0:
            start = begin
        else:
            scene = max([cut for cut in cuts if cut <= begin], default=span[0])
            lowest = max(speech[number - 1][1], scene, begin - lookback, free, span[0])
            start = float(generator.uniform(lowest, begin)) if lowest < begin else begin
        kind = shot_kind(cuts, start, seconds)
        if start + seconds <= span[1] and shots in ("both", kind):
            windows.append((start, f"{kind} speech"))
            free = start + seconds
    return windows


def gap_windows(
    speech: list[tuple[float, float]],
    cuts: list[float],
    span: tuple[float, float],
    seconds: float,
    taken: list[tuple[float, str]],
    shots: str = "both",
) -> list[tuple[float, str]]:
    """Windows one after another where there is neither speech nor a window of `taken`."""
    busy = sorted([*speech, *((start, start + seconds) for start, _ in taken), (span[1], math.inf)])
    windows, free = [], span[0]
    for begin, end in busy:
        while free + seconds <= begin:
            kind = shot_kind(cuts, free, seconds)
            if shots in ("both", kind):
                windows.append((free, f"{kind} non-speech"))
            free += seconds
        free = max(free, end)
    return windows


def shot_kind(cuts: list[float], start: float, seconds: float) -> str:
    """multi when a cut lies inside the window, else single."""
    return "multi" if any(start < cut < start + seconds for cut in cuts) else "single"


def speech_of(media: Media) -> list[tuple[float, float]]:
    """Speech (start, end) in seconds on the file's clock, by silero-vad; [] without sound."""
    if media.audio is None:
        return []
    return [(media.audio_start + start, media.audio_start + end) for start, end in find_speech(media.audio)]


def find_speech(waveform: Tensor) -> list[tuple[float, float]]:
    """Speech (start, end) in seconds from the start of a waveform [samples] at 16 kHz, by silero-vad."""
    from silero_vad import get_speech_timestamps

    with torch.no_grad():
        found = get_speech_timestamps(waveform, speech_model(), sampling_rate=SAMPLE_RATE)
    return [(entry["start"] / SAMPLE_RATE, entry["end"] / SAMPLE_RATE) for entry in found]


def scene_cuts(media: Media, fps: float, threshold: float) -> list[float]:
    """Times in seconds at which a new scene begins, by scenedetect, from the frames at `fps` on the file's clock."""
    if media.frame_times is None:
        return []
    start, end = media.span
    height = min(SCENE_HEIGHT, media.size[0])
    width = max(16, round(height * media.size[1] * media.pixel_aspect / media.size[0]))
    detector = SceneDetector(fps, threshold)
    total = max(1, round((end - start) * fps))
    for first in range(0, total, SCENE_CHUNK):
        count = min(SCENE_CHUNK, total - first)
        detector.add(media.frames(start + first / fps, count, fps, height, width))
    return [start + frame / fps for frame in detector.cuts]


class SceneDetector:
    """scenedetect's ContentDetector over frames that are given to it, numbered from 0."""

    def __init__(self, fps: float, threshold: float):
        from scenedetect import ContentDetector

        self._detector = ContentDetector(threshold=threshold, min_scene_len=round(0.5 * fps))
        self._fps, self._count = float(fps), 0
        self.cuts: list[int] = []

    def add(self, frames: Tensor) -> None:
        """frames [3, n, H, W] in [-1, 1], following those of the call before."""
        from scenedetect import FrameTimecode

        pictures = ((frames.flip(0) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().numpy()
        for picture in pictures:  # BGR
            found: list[Any] = self._detector.process_frame(FrameTimecode(self._count, self._fps), picture)
            self.cuts += [cut.frame_num for cut in found]
            self._count += 1


@lru_cache(maxsize=1)
def speech_model() -> Any:
    """silero-vad's network, once a process (the ONNX one: it does not touch torch's number of threads)."""
    from silero_vad import load_silero_vad

    return load_silero_vad(onnx=True)


def need(what: str, *modules: str) -> None:
    """DataError, with what to install, when a module that is imported later is not there."""
    packages = {"silero_vad": "silero-vad", "scenedetect": "scenedetect-headless", "cv2": "opencv-python-headless"}
    if missing := [packages.get(module, module) for module in modules if find_spec(module) is None]:
        raise DataError(f"{what} needs a package that is not installed: pip install {' '.join(missing)}")
