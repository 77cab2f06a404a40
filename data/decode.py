"""Frames and sound of one media file, on one clock.

Everything is placed by the timestamps of the file, in seconds from the container's time 0: a variable frame rate, a
late sound or an offset between the streams can't shift picture against sound. Frames come from decord (from PyAV where
decord has no wheel, or where it would not show the same frames), sound from PyAV: decord drops its start time.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torchaudio
from torch import Tensor

from data.errors import DataError

SAMPLE_RATE = 16000  # Hz of all sound that leaves this module
GAP = 0.05  # s; smaller differences between a timestamp and the samples so far are the container's rounding
TIE = 0.002  # s: at half the source's rate a middle falls on a frame's edge; rounding must not decide
SLACK = 0.15  # s by which decoded and declared length may differ: some muxers round to packets


class Media:
    """One open file. Make it with `open_media`; close it, or use it as a context manager.

    frame_times: [N] seconds at which each frame appears, rising, or None without a picture; video_end: when the last
    one goes; audio: [samples] mono at SAMPLE_RATE, or None without sound; audio_start: time of its first sample (may
    be negative); size: (height, width) of the picture in pixels as displayed;
    pixel_aspect: width of a pixel over its height.
    """

    def __init__(self, path: Path):
        self.path = path
        self.frame_times: np.ndarray | None = None
        self.video_end = 0.0
        self.size = (0, 0)
        self.audio: Tensor | None = None
        self.audio_start = 0.0
        self._pts = np.zeros(0, dtype=np.int64)
        self.pixel_aspect = 1.0  # width of a pixel over its height
        self._rotation = 0
        self._stream = 0  # index of the chosen video stream
        self._decord: Any = None
        self._container: Any = None  # PyAV, where decord can't be used

    def __enter__(self) -> "Media":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the decoders."""
        self._decord = None
        if self._container is not None:
            self._container.close()
            self._container = None

    @property
    def span(self) -> tuple[float, float]:
        """(start, end) in seconds of the picture; without one, of the sound."""
        if self.frame_times is not None:
            return float(self.frame_times[0]), self.video_end
        assert self.audio is not None
        return self.audio_start, self.audio_start + len(self.audio) / SAMPLE_RATE

    def frames(self, start: float, count: int, fps: float, height: int, width: int) -> Tensor:
        """[3, count, height, width] in [-1, 1]; frame i is what is shown at time start + (i + 1/2)/fps.

        The middle of the interval errs least when rates differ. The centre is cropped to the aspect asked for, then
        resized with antialiasing. DataError when a frame can't be decoded.
        """
        assert self.frame_times is not None, "no picture"
        middles = start + (np.arange(count) + 0.5) / fps + TIE
        indices = np.clip(np.searchsorted(self.frame_times, middles, side="right") - 1, 0, len(self.frame_times) - 1)
        needed, places = np.unique(indices, return_inverse=True)
        with _as_data_error(self.path):
            pictures = self._read_decord(needed) if self._decord is not None else self._read_av(needed)
        small = crop_resize(torch.from_numpy(pictures).permute(3, 0, 1, 2), height, width, self.pixel_aspect)
        return small[:, torch.from_numpy(places)]

    def sound(self, start: float, samples: int) -> Tensor:
        """[samples] at SAMPLE_RATE from time `start` on; silence where the file has no sound yet, or no more."""
        assert self.audio is not None, "no sound"
        first = round((start - self.audio_start) * SAMPLE_RATE)
        out = torch.zeros(samples)
        begin, end = max(first, 0), min(first + samples, len(self.audio))
        if begin < end:
            out[begin - first : end - first] = self.audio[begin:end]
        return out

    def _read_decord(self, indices: np.ndarray) -> np.ndarray:
        return self._decord.get_batch(indices.tolist()).asnumpy()  # [n, H, W, 3]

    def _read_av(self, indices: np.ndarray) -> np.ndarray:
        if self._container is None:
            self._container = av.open(str(self.path))
        stream = self._container.streams[self._stream]
        wanted = {int(self._pts[index]): position for position, index in enumerate(indices)}
        self._container.seek(int(self._pts[indices[0]]), stream=stream, backward=True)
        found: dict[int, np.ndarray] = {}
        for frame in self._container.decode(stream):
            if frame.pts in wanted:
                found[wanted[frame.pts]] = np.rot90(frame.to_ndarray(format="rgb24"), self._rotation // 90)
            if len(found) == len(wanted) or (frame.pts or 0) > max(wanted):
                break
        if len(found) < len(wanted):
            raise DataError(
                f"{self.path}: decoded {len(found)} of {len(wanted)} frames of a window; the file is damaged"
            )
        return np.stack([found[position] for position in range(len(wanted))])


def open_media(path: Path | str) -> Media:
    """Read timestamps and sound of a file and check that it is whole.

    With several streams of a kind the one flagged as default is taken, else the first. DataError when the file can't be
    parsed, has neither picture nor sound, or when less is there than it declares (it was truncated).
    """
    path = Path(path)
    media = Media(path)
    with _as_data_error(path), av.open(str(path)) as container:
        pictures = len(container.streams.video)
        covers = av.stream.Disposition.attached_pic
        videos = [stream for stream in container.streams.video if not stream.disposition & covers]
        audios = list(container.streams.audio)
        if not videos and not audios:
            raise DataError(f"{path} has neither picture nor sound")
        ends = []
        if videos:
            _read_timestamps(media, container, _choose(videos))
            ends.append(media.video_end)
        if audios:
            # opened anew: seeking back would end at the picture's first key frame, and lose the sound before it
            with av.open(str(path)) as again:
                _read_sound(media, again, again.streams[_choose(audios).index])
            if media.audio is not None:
                ends.append(media.audio_start + len(media.audio) / SAMPLE_RATE)
        if not ends:
            raise DataError(f"{path} has neither picture nor sound: its sound stream is empty")
        declared = container.duration / av.time_base if container.duration else None
        started = (container.start_time or 0) / av.time_base
        if (
            declared is not None and max(ends) - started < declared - 0.5
        ):  # for containers whose streams declare nothing
            raise _truncated(path, "file", f"{declared:.2f} s", f"{max(ends) - started:.2f} s")
    if videos:
        _open_decord(media, only_stream=pictures == 1)
    return media


def crop_resize(pictures: Tensor, height: int, width: int, pixel_aspect: float = 1.0) -> Tensor:
    """[3, n, H, W] uint8 -> [3, n, height, width] float in [-1, 1]: centre crop, then antialiased resize."""
    full_height, full_width = pictures.shape[-2:]
    aspect = width / height / pixel_aspect  # in source pixels
    crop_height = min(full_height, max(1, round(full_width / aspect)))
    crop_width = min(full_width, max(1, round(full_height * aspect)))
    top, left = (full_height - crop_height) // 2, (full_width - crop_width) // 2
    cropped = pictures[..., top : top + crop_height, left : left + crop_width]
    out = torch.empty(3, pictures.shape[1], height, width)
    for index in range(pictures.shape[1]):  # a frame at a time: a window of full-size float frames can take gigabytes
        frame = cropped[:, index].float()
        if (crop_height, crop_width) != (height, width):
            frame = torch.nn.functional.interpolate(frame[None], (height, width), mode="bicubic", antialias=True)[0]
        out[:, index] = frame
    return (out / 127.5 - 1).clamp(-1, 1)


def _choose(streams: Sequence[Any]) -> Any:
    default = av.stream.Disposition.default
    return next((stream for stream in streams if stream.disposition & default), streams[0])


def _read_timestamps(media: Media, container: Any, stream: Any) -> None:
    """Fill in the frames' times from the packets, without decoding any but the first."""
    pts, durations, packets = [], {}, 0
    for packet in container.demux(stream):
        if packet.size == 0:
            continue  # the flush packet at the end
        packets += 1
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None:
            raise DataError(f"{media.path}: a frame has no timestamp; remux the file, for example to mp4")
        if not packet.is_discard:  # an edit list hides it
            pts.append(time)
            durations[time] = packet.duration or 0
    base = float(stream.time_base)
    if not pts or stream.frames > packets + 1:
        raise _truncated(media.path, "picture", f"{stream.frames} frames", f"{packets}")
    media._pts = np.unique(np.array(pts, dtype=np.int64))
    media.frame_times = media._pts * base
    usual = (
        float(np.median(np.diff(media.frame_times))) if len(media._pts) > 1 else 1 / float(stream.average_rate or 24)
    )
    media.video_end = float(media.frame_times[-1]) + (durations[int(media._pts[-1])] * base or usual)
    declared = stream.duration * base if stream.duration else None
    length = media.video_end - float(media.frame_times[0])
    if declared is not None and length < declared - max(SLACK, 2 * usual):
        raise _truncated(media.path, "picture", f"{declared:.2f} s", f"{length:.2f} s")
    container.seek(int(media._pts[0]), stream=stream, backward=True)
    first = next(container.decode(stream), None)
    if first is None:
        raise DataError(f"{media.path}: no frame of the picture can be decoded; the file is damaged")
    media._stream, media._rotation = stream.index, int(first.rotation) % 360
    media.pixel_aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    media.size = (first.height, first.width)
    if media._rotation in (90, 270):
        media.size, media.pixel_aspect = (first.width, first.height), 1 / media.pixel_aspect


def _read_sound(media: Media, container: Any, stream: Any) -> None:
    """Decode all sound, place it by its timestamps, mix to mono, resample. An empty stream counts as no sound."""
    mix = None
    parts: list[np.ndarray] = []
    length, start, rate = 0, 0.0, 0
    for frame in _frames_until_damage(container, stream):
        if mix is None:
            rate = frame.sample_rate
            mix = av.AudioResampler(format="fltp", layout="mono", rate=rate)
            start = float(frame.pts * frame.time_base) if frame.pts is not None else 0.0
        samples = np.concatenate([part.to_ndarray()[0] for part in mix.resample(frame)] or [np.zeros(0, np.float32)])
        if frame.pts is not None:
            ahead = round((float(frame.pts * frame.time_base) - start) * rate) - length
            if ahead > GAP * rate:  # a hole in the sound
                parts.append(np.zeros(ahead, np.float32))
                length += ahead
            elif ahead < -GAP * rate:  # sound that is there twice: the first counts
                samples = samples[-ahead:]
        parts.append(samples)
        length += len(samples)
    if length == 0:
        if stream.frames or stream.duration:
            declared = f"{float((stream.duration or 0) * stream.time_base):.2f} s"
            raise _truncated(media.path, "sound", declared, "none")
        return
    declared_seconds = float(stream.duration * stream.time_base) if stream.duration else None
    if declared_seconds is not None and length / rate < declared_seconds - max(SLACK, 4096 / rate):
        raise _truncated(media.path, "sound", f"{declared_seconds:.2f} s", f"{length / rate:.2f} s")
    wave = torch.from_numpy(np.concatenate(parts))
    if not bool(torch.isfinite(wave).all()):
        raise DataError(f"{media.path}: NaN or inf in the sound")
    media.audio = torchaudio.functional.resample(wave, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else wave
    media.audio_start = start


def _frames_until_damage(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames; ends at a damaged one: the check against the declared length then says how much is there.

    FFmpegError when the file declares no length to check against.
    """
    try:
        yield from container.decode(stream)
    except av.FFmpegError:
        if not stream.duration:
            raise


def _open_decord(media: Media, only_stream: bool) -> None:
    """Use decord where it shows the same frames: it chooses its stream itself and does not count hidden frames."""
    if not only_stream or media._rotation:
        return
    try:
        import decord
    except ImportError:  # no wheel for this platform
        return
    try:
        reader = decord.VideoReader(str(media.path), ctx=decord.cpu(0), num_threads=1)
        times = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0]
    except Exception:  # DECORDError or RuntimeError: what it can't open PyAV may
        return
    assert media.frame_times is not None
    if len(times) == len(media.frame_times):
        offset = (times - times[0]) - (media.frame_times - media.frame_times[0])
        if np.abs(offset).max() < 1e-3 and reader[0].shape[:2] == media.size:
            media._decord = reader


def _truncated(path: Path, what: str, declared: str, decoded: str) -> DataError:
    return DataError(f"{path} is truncated: its {what} declares {declared}, {decoded} could be decoded; get it again")


@contextlib.contextmanager
def _as_data_error(path: Path) -> Iterator[None]:
    """The decoders raise many types: FFmpegError, DECORDError, IndexError, ValueError, StopIteration, ..."""
    try:
        yield
    except (DataError, KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"{path} can't be decoded ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
        ) from error
