"""One open media file: frames and sound of any time, on one clock.

Everything is placed by the timestamps of the file, in seconds from the container's time 0: a variable frame rate, a
late sound or an offset between the streams can't shift picture against sound. How frames are found stands in
`data.media.picture`, when decoding may begin in `data.media.packets`, how sound is placed in `data.media.sound`, what
colours mean in `data.media.scale`.

Rejected with the reason, as a file: HDR (PQ, HLG, Dolby Vision without a compatible base), less content than declared,
a picture without any frame that can be decoded, NaN in the sound. As a window: a size or transfer that changes in the
middle, pictures that are damaged or follow lost ones, sound that can't be decoded.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.media.open import as_data_error, open_container, truncated
from data.media.packets import REORDERED, Packets, read_packets, untimed_packets
from data.media.picture import Frames, PictureReader, SeekMissed, deinterlaced, listening, shown_at
from data.media.scale import FAST, Scaler, assumed_matrix, display_turn, refuse_hdr
from data.media.sound import SAMPLE_RATE, SoundFacts, SoundFile, SoundReader

TIE = 0.002  # s: at half the source's rate a middle falls on a frame's edge; rounding must not decide
SLACK = 0.15  # s by which decoded and declared length may differ: some muxers round to packets
OWN_LENGTHS = ("mov", "avi", "mxf", "wav", "w64", "aiff", "caf", "flac")  # formats that declare a stream's length
PROBED = 16  # frames that are looked at for their order
SCAN = 48  # frames that scan_frames gives at a time


class Media:
    """One open file. Make it with `open_media`; close it, or use it as a context manager.

    frame_times: [N] seconds at which each frame appears, rising, or None without a picture; video_end: when the last
    one goes; sound_span: (start, end) of the sound in seconds (start may be negative), or None without sound; size:
    (height, width) of the picture in pixels as displayed; pixel_aspect: width of a pixel over its height; treatment:
    what was done to the file, and to the window that was read last, in plain json values; turn: the display matrix,
    see `data.media.scale.turned`; video_stream: index of the chosen stream of pictures; rates: at which its sound
    can be read.
    """

    def __init__(self, path: Path, rates: Sequence[int] = (SAMPLE_RATE,)):
        self.path, self.rates = path, tuple(rates)
        self.frame_times: np.ndarray | None = None
        self.video_end = 0.0
        self.size = (0, 0)
        self.pixel_aspect = 1.0
        self.sound_span: tuple[float, float] | None = None
        self.treatment: dict[str, Any] = {}
        self.turn = (1, 0, 0, 1)
        self._stored = (0, 0)  # height and width of the stored frames
        self.video_stream = 0  # index of the chosen video stream
        self._base = 1.0  # s of a unit of its timestamps
        self._packets: Packets | None = None
        self._reader: PictureReader | None = None
        self._interlaced = False  # a frame that is has been seen
        self._sound_file: SoundFile | None = None
        self._sound: SoundReader | None = None

    def __enter__(self) -> "Media":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the decoders."""
        for reader in (self._reader, self._sound):
            if reader is not None:
                reader.close()

    @property
    def span(self) -> tuple[float, float]:
        """(start, end) in seconds of the picture; without one, of the sound."""
        if self.frame_times is not None:
            return float(self.frame_times[0]), self.video_end
        assert self.sound_span is not None
        return self.sound_span

    def frames(self, start: float, count: int, fps: float, height: int, width: int) -> Tensor:
        """[3, count, height, width] in [-1, 1]; frame i is what is shown at time start + (i + 1/2)/fps.

        The middle of the interval errs least when rates differ. The centre is cropped to the aspect asked for, then
        resized with antialiasing. DataError when a frame can't be decoded, or not as it was meant.
        """
        assert self._reader is not None and self._packets is not None, "no picture"
        times = self._times(start + (np.arange(count) + 0.5) / fps)
        if (gap := self._packets.in_gap(times)) is not None:
            at = (gap - self._packets.shift) * self._base
            raise DataError(
                f"{self.path}: the picture from {start:.2f} s on is not whole (one is missing at {at:.2f} s)"
            )
        out = torch.empty(3, count, height, width)
        with as_data_error(self.path), listening():
            scaler = Scaler(height, width, self.pixel_aspect, self.turn)
            done = False
            while not done:
                entry = self._reader.entry(self._first_needed(times[0]))
                try:
                    done = self._fill(out, times, scaler, entry)
                except SeekMissed:
                    self._reader.missed(entry)
            if (words := self._reader.damage(self._shown(times[0]), self._shown(times[-1]))) is not None:
                raise DataError(f"{self.path}: the picture from {start:.2f} s on is not whole ({words})")
        return out.div_(127.5).sub_(1)

    def sound(self, start: float, samples: int, rate: int = SAMPLE_RATE) -> Tensor:
        """[samples] at `rate` (one of `rates`) from time `start` on; silence where the file has none yet, or no more.

        DataError where a packet of it can't be decoded.
        """
        assert self._sound is not None and self._sound_file is not None and self.sound_span is not None, "no sound"
        with as_data_error(self.path):
            found = self._sound.read(round((start - self.sound_span[0]) * rate), samples, rate)
        for begin, end in self._sound_file.damaged:
            if begin < start + samples / rate and start < end:
                raise DataError(f"{self.path}: the sound at {max(begin, start):.2f} s can't be decoded")
        return found

    def sound_blocks(self, seconds: float) -> Iterator[Tensor]:
        """All sound in order from sound_span[0] on: blocks [seconds * SAMPLE_RATE], the last one shorter."""
        assert self._sound is not None, "no sound"
        size = round(seconds * SAMPLE_RATE)
        length = self._sound.length()
        for first in range(0, length, size):
            with as_data_error(self.path):
                block = self._sound.read(first, min(size, length - first))
            yield block

    def scan_frames(self, fps: float, height: int) -> Iterator[np.ndarray]:
        """The whole picture in one pass, small: uint8 RGB [n, height, width, 3], n up to SCAN, for looking it over.

        Frame i of all blocks together is what is shown at span[0] + (i + 1/2) / fps. Pixels come out square. For speed
        the decoder's loop filter is left out: a frame differs a little from what `frames` gives. Damage is ignored.
        """
        assert self._packets is not None, "no picture"
        start, end = self.span
        height = min(height, self.size[0])
        width = max(16, round(height * self.size[1] * self.pixel_aspect / self.size[0]))
        total = max(1, round((end - start) * fps))
        times = self._times(start + (np.arange(total) + 0.5) / fps)
        scaler = Scaler(height, width, self.pixel_aspect, self.turn, flags=FAST)
        reader = PictureReader(self.path, self.video_stream, self._packets, {"skip_loop_filter": "all"})
        pictures: list[np.ndarray] = []
        with as_data_error(self.path), contextlib.closing(reader):
            for positions, frame in shown_at(reader.read(int(times[0]), -1), times, int(self._packets.shown[-1])):
                picture = scaler(frame).transpose(1, 2, 0)
                for _ in range(positions.stop - positions.start):
                    pictures.append(picture)
                    if len(pictures) == SCAN:
                        yield np.stack(pictures)
                        pictures = []
        if pictures:
            yield np.stack(pictures)

    def _times(self, seconds: np.ndarray) -> np.ndarray:
        """Moments in units of the picture's timestamps, rounded so that a frame that begins there counts as shown."""
        assert self._packets is not None
        return np.floor((seconds + TIE) / self._base + 1e-6).astype(np.int64) + self._packets.shift

    def _shown(self, time: int, earlier: int = 0) -> int:
        """By the table: when the frame appears that is shown at a time, or one some frames earlier."""
        assert self._packets is not None
        shown = self._packets.shown
        return int(shown[max(0, int(np.searchsorted(shown, time, side="right")) - 1 - earlier)])

    def _first_needed(self, time: int) -> int:
        return self._shown(time, earlier=1 if self._interlaced else 0)

    def _fill(self, out: Tensor, times: np.ndarray, scaler: Scaler, entry: int) -> bool:
        """Decode a window into `out` [3, n, h, w], 0 to 255. False: again, for the first interlaced frame is seen."""
        assert self._reader is not None
        self.treatment.pop("deinterlaced", None)
        frames: Any = self._checked(
            self._reader.read(self._first_needed(times[0]), entry), self._shown(times[0]), self._shown(times[-1])
        )
        if self._interlaced:
            frames = deinterlaced(frames)
        for positions, frame in shown_at(frames, times, self._shown(times[-1])):
            if "deinterlaced" in self.treatment and not self._interlaced:
                self._interlaced = True
                return False
            out[:, positions] = torch.from_numpy(scaler(frame))[:, None]
        return True

    def _checked(self, frames: Frames, first: int, last: int) -> Frames:
        """The frames as they come; those that are needed are looked at. DataError; notes that one is interlaced."""
        for time, frame in frames:
            if first <= time <= last:
                if frame.interlaced_frame:
                    self.treatment["deinterlaced"] = "bwdif"
                if (frame.height, frame.width) != self._stored:
                    raise DataError(
                        f"{self.path}: the picture's size changes from {self._stored[1]} x {self._stored[0]} to "
                        f"{frame.width} x {frame.height} at {time * self._base:.2f} s"
                    )
                refuse_hdr(self.path, frame)
            yield time, frame


def open_media(path: Path | str, rates: Sequence[int] = (SAMPLE_RATE,)) -> Media:
    """Read timestamps and sound of a file and check that it is whole.

    rates: Hz at which its sound can be read, beside SAMPLE_RATE; it is decoded once for all of them. With several
    streams of a kind the one flagged as default is taken, else the first. DataError when the file can't be parsed, is
    no container format of one file, has neither picture nor sound, is HDR, or when less is there than it declares (it
    was truncated).
    """
    path = Path(path)
    media = Media(path, [SAMPLE_RATE, *(rate for rate in rates if rate != SAMPLE_RATE)])
    try:
        with as_data_error(path):
            _probe(media)
    except BaseException:
        media.close()
        raise
    return media


def _probe(media: Media) -> None:
    path = media.path
    with open_container(path) as container:
        covers = av.stream.Disposition.attached_pic
        videos = [stream for stream in container.streams.video if not stream.disposition & covers]
        audios = list(container.streams.audio)
        if not videos and not audios:
            raise DataError(f"{path} has neither picture nor sound")
        ends = []
        if videos:
            _probe_picture(media, container, _choose(videos))
            ends.append(media.video_end)
        if audios:
            _probe_sound(media, container, _choose(audios))
            if media.sound_span is not None:
                ends.append(media.sound_span[1])
        if not ends:
            raise DataError(f"{path} has neither picture nor sound: its sound stream is empty")
        declared = container.duration / av.time_base if container.duration else None
        started = (container.start_time or 0) / av.time_base
        if container.format.name.startswith("matroska"):
            started = 0.0  # what it declares is the time of the end
        if declared is not None and max(ends) - started < declared - 0.5:  # where the streams declare nothing
            raise truncated(path, "file", f"{declared:.2f} s", f"{max(ends) - started:.2f} s")


def _choose(streams: list[Any]) -> Any:
    default = av.stream.Disposition.default
    return next((stream for stream in streams if stream.disposition & default), streams[0])


def _probe_picture(media: Media, container: Any, stream: Any) -> None:
    """The packet table, the times of the frames, and what the first frame says of all."""
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    packets = read_packets(container, stream)
    count = max(len(packets.pts), packets.slots if container.format.name == "avi" else 0)  # it leaves slots empty
    if not packets.kept.any() or stream.frames > count + 1:
        raise truncated(media.path, "picture", f"{stream.frames} frames", f"{count}")
    media.video_stream, media._base = stream.index, float(stream.time_base)
    if packets.timed and packets.ordered and stream.codec_context.name in REORDERED:
        with listening(), contextlib.closing(PictureReader(media.path, stream.index, packets)) as reader:
            untimed = reader.decoding_times(PROBED)
    else:
        untimed = not packets.timed
    if untimed:
        packets = untimed_packets(media.path, stream, packets, container.format.name)
    media._packets, media._reader = packets, PictureReader(media.path, stream.index, packets)
    with listening():
        time, first = next(media._reader.read(int(packets.pts.min()), -1), (0, None))
    if first is None:
        raise DataError(f"{media.path}: no frame of the picture can be decoded; the file is damaged")
    packets.show_from(max(time, int(packets.pts[packets.first_key]) if packets.first_key is not None else time))
    if len(packets.shown) == 0:
        raise DataError(f"{media.path}: no frame of the picture can be decoded; the file is damaged")
    media.frame_times = (packets.shown - packets.shift) * media._base
    _check_length(media, container, stream)
    if stream.codec_context.codec_tag in ("dvh1", "dvhe", "dva1", "dvav", "dav1"):
        raise DataError(f"{media.path} is Dolby Vision; convert it to BT.709 first")
    refuse_hdr(media.path, first)
    _read_display(media, stream, first)
    media.treatment["decoder"] = stream.codec_context.name
    if (matrix := assumed_matrix(first)) is not None:
        media.treatment["matrix_assumed"] = matrix


def _check_length(media: Media, container: Any, stream: Any) -> None:
    """Fill in video_end. DataError when less is there than the stream declares."""
    packets = media._packets
    assert packets is not None and media.frame_times is not None
    steps = np.diff(media.frame_times)
    usual = float(np.median(steps)) if len(steps) else 1 / float(stream.average_rate or 24)
    media.video_end = float(media.frame_times[-1]) + (packets.duration * media._base or usual)
    declared = declared_seconds(container, stream)
    length = media.video_end - float(packets.pts[packets.kept].min() - packets.shift) * media._base
    if declared is not None and length < declared - max(SLACK, 2 * usual):
        raise truncated(media.path, "picture", f"{declared:.2f} s", f"{length:.2f} s")


def declared_seconds(container: Any, stream: Any) -> float | None:
    """The length that the file declares for a stream; None where libavformat only repeats that of the whole file."""
    if not stream.duration or not container.format.name.startswith(OWN_LENGTHS):
        return None
    return float(stream.duration * stream.time_base)


def _read_display(media: Media, stream: Any, first: Any) -> None:
    """Size, shape of the pixels, and how the picture is turned."""
    media._stored, media.turn = (first.height, first.width), display_turn(first)
    media.size = media._stored
    media.pixel_aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    if media.turn[0] == 0:
        media.size, media.pixel_aspect = (first.width, first.height), 1 / media.pixel_aspect
    if media.turn != (1, 0, 0, 1):
        media.treatment["display_matrix"] = list(media.turn)


def _probe_sound(media: Media, container: Any, stream: Any) -> None:
    """Survey all sound. An empty stream counts as no sound."""
    media._sound_file = SoundFile(media.path, stream.index)
    facts = media._sound_file.survey()
    declared = declared_seconds(container, stream)
    if facts is None:
        if stream.frames or declared:
            raise truncated(media.path, "sound", f"{declared or 0:.2f} s", "none")
        return
    length = facts.span[1] - facts.span[0]
    if declared is not None and length < declared - SLACK:
        raise truncated(media.path, "sound", f"{declared:.2f} s", f"{length:.2f} s")
    media.sound_span, media._sound = facts.span, SoundReader(media._sound_file, facts, media.rates)
    media.treatment |= sound_treatment(facts)


def sound_treatment(facts: SoundFacts) -> dict[str, Any]:
    """What is done to the sound, of all that is beyond decoding, mixing and resampling it."""
    done: dict[str, Any] = {
        "sound_filled_seconds": round(facts.filled, 4),
        "sound_repeated_seconds": round(facts.dropped, 4),
        "sound_stretched_seconds": round(facts.stretched, 4),
        "sound_channels": {layout: mix.channel for layout, mix in facts.mixes.items() if mix.channel is not None},
        "sound_formats": facts.formats if len(facts.formats) > 1 else [],
    }
    return {name: value for name, value in done.items() if value}
