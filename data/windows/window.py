"""Cuts a file into windows: one after another, or by the rule of MOVA's paper (speech and scene cuts)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from core.ranges import bounded, seed_field
from data.clip import Bucket
from data.codec import STEPS
from data.errors import DataError
from data.media import SAMPLE_RATE, Media

HALF_WINDOW = 4.025  # s before the speech at which a window of 8.05 s may begin (paper)
SLACK = 0.5  # part of a frame by which a window may go beyond a file's end: how long its last frame lasts is not sure
SCENE_HEIGHT = 72  # rows of the pictures that are compared; scenedetect's own downscaling goes nearly as far
SHORTEST_SCENE = 0.5  # s; cuts that follow each other faster are merged
SOUND_BLOCK = 16.384  # s of sound that speech is looked for in at a time: 512 of silero-vad's frames
SPEECH_FRAME = 512  # samples that silero-vad judges at a time (32 ms)
SPEECH_CONTEXT = 64  # samples before them that it sees too


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
        """Length of a window in sound samples at SAMPLE_RATE."""
        return self.samples_at(SAMPLE_RATE)

    def samples_at(self, rate: int) -> int:
        """Length of a window in sound samples at `rate` Hz."""
        return round(self.seconds * rate)

    def bucket(self, has_video: bool, has_audio: bool) -> Bucket:
        """The latent geometry of a window."""
        return Bucket(
            frames=1 + (self.frames - 1) // 4,
            height=self.height // 8,
            width=self.width // 8,
            audio_steps=-(-self.samples // (SAMPLE_RATE // STEPS)),
            fps=float(self.fps),
            has_video=has_video,
            has_audio=has_audio,
        )


@dataclass
class WindowConfig:
    """How files are cut into windows.

    rule: fixed: one window after another; mova: windows begin shortly before speech
    shots: of mova: single (no scene cut inside), multi (at least one), or both
    non_speech: of mova: also windows without speech, in the gaps between
    lookback: of mova: seconds before the speech at which a window may begin
    cut_threshold: of mova: of scenedetect's ContentDetector
    seed: of mova: of the drawn starts
    """

    rule: str = "fixed"
    shots: str = "both"
    non_speech: bool = False
    lookback: float = bounded(HALF_WINDOW, "[0, inf)")
    cut_threshold: float = bounded(27.0, "(0, inf)")  # mova: of scenedetect's ContentDetector
    seed: int = seed_field()


@dataclass(frozen=True)
class Window:
    """One window to be. kind: "" or single/multi and speech/non-speech."""

    start: float
    geometry: Geometry
    kind: str = ""


@dataclass(frozen=True)
class SpeechAndCuts:
    """Input of MOVA's rule for a file. speech: segments (start, end), rising; cuts: times of scene cuts; seconds."""

    speech: list[tuple[float, float]]
    cuts: list[float]


@dataclass
class Cut:
    """What a file, or a segment of it, was cut into. span: its seconds; rest_seconds: what no window covers."""

    windows: list[Window] = field(default_factory=list)
    span: float = 0.0
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
        self._contents: WeakKeyDictionary[Media, SpeechAndCuts] = WeakKeyDictionary()

    def __call__(self, media: Media, sha256: str, segment: tuple[float, float] | None = None) -> Cut:
        """The windows of an open file, or of its segment (start, end) in seconds; sha256 of its content seeds the
        draws. A segment that the file does not hold gives none."""
        geometries = choose_buckets(self.buckets, media)
        start, end = media.span
        slack = SLACK
        if segment is not None:
            slack = SLACK if segment[1] >= end else 0.0
            start, end = max(start, segment[0]), min(end, segment[1])
        if self.config.rule == "fixed":
            return fixed_windows(start, end, geometries, slack)
        content = self._content(media)
        speech, cuts = content.speech, content.cuts
        first = 0 if segment is None else round(max(0.0, start) * 1e6)  # segments of a file draw other numbers
        key = [int(sha256[:16], 16), self.config.seed]
        generator = np.random.Generator(np.random.Philox(key=key, counter=first))
        found = mova_windows(
            speech, cuts, (start, end), geometries[0].seconds, generator, self.config.lookback, self.config.shots
        )
        if self.config.non_speech:
            found = sorted(
                found + gap_windows(speech, cuts, (start, end), geometries[0].seconds, found, self.config.shots)
            )
        windows = [Window(begin, geometries[0], kind) for begin, kind in found]
        return Cut(windows, max(0.0, end - start), max(0.0, end - start - len(windows) * geometries[0].seconds))

    def _content(self, media: Media) -> SpeechAndCuts:
        """Speech and cuts of an open file, looked for once however many segments of it are cut."""
        if media not in self._contents:
            cuts = scene_cuts(media, self.buckets[0].fps, self.config.cut_threshold)
            self._contents[media] = SpeechAndCuts(speech_of(media), cuts)
        return self._contents[media]


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


def fixed_windows(start: float, end: float, geometries: list[Geometry], slack: float = SLACK) -> Cut:
    """As many of the longest windows as fit, then of the next shorter in the rest, and so on.

    slack: part of a frame by which a window may go beyond the end.
    """
    cut = Cut(span=max(0.0, end - start))
    covered = 0
    for geometry in geometries:
        count = max(0, math.floor(((end - start) * geometry.fps + max(slack, 1e-6) - covered) / geometry.frames))
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
    if media.sound_span is None:
        return []
    first = media.sound_span[0]
    return [(first + start, first + end) for start, end in _speech_in(media.sound_blocks(SOUND_BLOCK))]


def find_speech(waveform: Tensor) -> list[tuple[float, float]]:
    """Speech (start, end) in seconds from the start of a waveform [samples] at 16 kHz, by silero-vad."""
    return _speech_in(waveform.split(round(SOUND_BLOCK * SAMPLE_RATE)))


def _speech_in(blocks: Iterable[Tensor]) -> list[tuple[float, float]]:
    detector = SpeechDetector()
    for block in blocks:
        detector.add(block)
    return detector.segments()


class SpeechDetector:
    """silero-vad over sound that comes in blocks: the segments of `get_speech_timestamps` over the whole of it.

    Kept are 4 bytes for every 32 ms of sound, and less than 32 ms of sound that do not fill a frame yet.
    """

    def __init__(self) -> None:
        self._hidden = self._cell = np.zeros((1, 1, 128), np.float32)
        self._context = np.zeros(SPEECH_CONTEXT, np.float32)
        self._rest = np.zeros(0, np.float32)
        self._chances: list[np.ndarray] = []
        self._samples = 0

    def add(self, waveform: Tensor) -> None:
        """waveform [samples] at 16 kHz, following that of the call before."""
        self._samples += len(waveform)
        sound = np.concatenate([self._rest, waveform.numpy()])
        whole = len(sound) // SPEECH_FRAME * SPEECH_FRAME
        self._rest = sound[whole:].copy()
        self._judge(sound[:whole])

    def segments(self) -> list[tuple[float, float]]:
        """Speech (start, end) in seconds from the start of all that was added; nothing can be added afterwards."""
        from silero_vad import get_speech_timestamps_from_probs

        if len(self._rest):
            self._judge(np.pad(self._rest, (0, SPEECH_FRAME - len(self._rest))))
        chances = np.concatenate(self._chances).tolist() if self._chances else []
        found = get_speech_timestamps_from_probs(chances, sampling_rate=SAMPLE_RATE, audio_length_samples=self._samples)
        return [(entry["start"] / SAMPLE_RATE, entry["end"] / SAMPLE_RATE) for entry in found]

    def _judge(self, sound: np.ndarray) -> None:
        """sound: whole frames. The library's own loop over blocks starts anew with every call, this one goes on."""
        if len(sound) == 0:
            return
        frames = sound.reshape(-1, SPEECH_FRAME)
        contexts = np.concatenate([self._context[None], frames[:-1, -SPEECH_CONTEXT:]])
        chances, self._hidden, self._cell = speech_model().session.run(
            ["speech_probs", "hn", "cn"],
            {"input": np.concatenate([contexts, frames], axis=1), "h": self._hidden, "c": self._cell},
        )
        self._context = frames[-1, -SPEECH_CONTEXT:].copy()
        self._chances.append(chances.reshape(-1))


def scene_cuts(media: Media, fps: float, threshold: float) -> list[float]:
    """Times in seconds at which a new scene begins, by scenedetect, from the frames at `fps` on the file's clock."""
    if media.frame_times is None:
        return []
    detector = SceneDetector(fps, threshold)
    for pictures in media.scan_frames(fps, SCENE_HEIGHT):
        detector.add(pictures)
    return [media.span[0] + frame / fps for frame in detector.cuts]


class SceneDetector:
    """Cuts where scenedetect's ContentDetector finds them, over pictures that come in blocks, numbered from 0.

    The change between two pictures is the mean difference of hue, saturation and value; `threshold` and more is a cut.
    scenedetect's filter merges those that are too near; its detector would take twice as long for the same sums.
    """

    def __init__(self, fps: float, threshold: float):
        from scenedetect.detector import FlashFilter

        self._filter = FlashFilter(FlashFilter.Mode.MERGE, round(SHORTEST_SCENE * fps))
        self._threshold, self._fps, self._count = threshold, float(fps), 0
        self._last: np.ndarray | None = None
        self.cuts: list[int] = []

    def add(self, pictures: np.ndarray) -> None:
        """pictures: uint8 RGB [n, H, W, 3], following those of the call before."""
        import cv2
        from scenedetect import FrameTimecode

        count, height, width, _ = pictures.shape
        tall = np.ascontiguousarray(pictures).reshape(count * height, width, 3)  # one call for all
        for picture in cv2.cvtColor(tall, cv2.COLOR_RGB2HSV).reshape(pictures.shape):
            change = 0.0 if self._last is None else cv2.norm(picture, self._last, cv2.NORM_L1) / picture.size
            time = FrameTimecode(self._count, self._fps)
            self.cuts += [cut.frame_num for cut in self._filter.filter(time, change >= self._threshold)]
            self._last, self._count = picture, self._count + 1


@lru_cache(maxsize=1)
def speech_model() -> Any:
    """silero-vad's network for many frames a call, once a process: bit for bit the values of the one for one frame."""
    from silero_vad import load_silero_vad

    return load_silero_vad(sequence=True)


def need(what: str, *modules: str) -> None:
    """DataError, with what to install, when a module that is imported later is not there."""
    packages = {"silero_vad": "silero-vad", "scenedetect": "scenedetect-headless", "cv2": "opencv-python-headless"}
    if missing := [packages.get(module, module) for module in modules if find_spec(module) is None]:
        raise DataError(f"{what} needs a package that is not installed: pip install {' '.join(missing)}")
