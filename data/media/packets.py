"""The packets of a picture: when each frame is shown, where decoding may begin, and where packets are missing.

Decoding may begin at an entry: a packet from which on every frame with a timestamp of at least its own is the same as
in a linear decode. Per codec: H.264 only IDR pictures (the key frames of demuxers include recovery points and open
GOPs); HEVC any IRAP picture, MPEG-1 and -2 any I picture behind a sequence header, MPEG-4, H.263 and Microsoft's
codecs any I picture (what is decoded after it and shown before it refers to what came before: it is not exact, and not
used); Theora's key frames; VP8, VP9 and AV1 ones that are shown; of codecs without prediction every packet. A packet
must also be preceded by earlier timestamps only. Every other codec is decoded from the first packet.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.media.lost import STEADY, UNCOUNTED, behind, gaps, picture_count
from data.media.nal import first_unit, nal_size
from data.media.open import open_container

# an I picture is what the container calls a key frame, and resets all that later pictures depend on
IN_ORDER = {"msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "msmpeg4", "wmv1", "wmv2", "h263", "flv", "ffv1"}
FLAGGED = IN_ORDER | {"mpeg4"}
DECODING_TIMES = ("avi", "asf")  # containers that tell when a packet is decoded, or not which of both it is
OFF = 4  # frames by which the timestamp of a frame in a program stream may be wrong
REORDERED = {"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "vc1", "wmv3", "rv30", "rv40", "cavs"}
INTRA = {
    "mjpeg", "prores", "dnxhd", "huffyuv", "ffvhuff", "utvideo", "rawvideo", "png", "jpeg2000", "v210", "dvvideo",
    "cfhd", "hap", "magicyuv",
}  # fmt: skip


@dataclass
class Packets:
    """All packets of one picture in the order of decoding; times in units of the stream's time base.

    pts: [P]; kept: [P], False where an edit list hides the frame; entries: [E] indices of packets where decoding may
    begin, without the first; duration: of the last frame, 0 where unknown; first_key: index of the first packet that
    the container calls a key frame; damage: (index of a packet that is damaged or has lost its predecessor, words).
    timed: False when packets bear no usable timestamps; the rows are then the frames of a linear decode. ordered: no
    timestamp is earlier than one before, which of pictures that are reordered says that they are times of decoding.
    slots: ticks from the first packet to the last. shown: rising times at which frames appear; gaps: [G, 2] times of
    the frames before and behind missing ones. first: the first packet's time of decoding; shift: what is subtracted
    from all times for the file's clock.
    """

    pts: np.ndarray
    kept: np.ndarray
    entries: np.ndarray
    duration: int = 0
    timed: bool = True
    ordered: bool = True
    slots: int = 0
    first_key: int | None = None
    first: int = 0
    shift: int = 0
    damage: list[tuple[int, str]] = field(default_factory=list)
    shown: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    gaps: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def show_from(self, start: int) -> None:
        """Fill in `shown`: the rising times at which frames appear, from `start` on."""
        shown = np.unique(self.pts[self.kept])
        self.shown = shown[shown >= start]

    def in_gap(self, times: np.ndarray) -> int | None:
        """The first of some times at which a frame is missing, so that the one before would be repeated."""
        usual = float(np.median(np.diff(self.shown))) if len(self.gaps) else 0.0
        for before, after in self.gaps:
            inside = times[(times >= before + 1.1 * usual) & (times < after)]
            if len(inside):
                return int(inside[0])
        return None

    def entry_before(self, time: int) -> int:
        """Number of the last entry whose frames are exact at `time`; -1: decode from the first packet."""
        return int(np.searchsorted(self.pts[self.entries], time, side="right")) - 1

    def index_of(self, time: int) -> int | None:
        """Index of the packet with this timestamp."""
        if not hasattr(self, "_order"):
            self._order = np.argsort(self.pts, kind="stable")
        position = int(np.searchsorted(self.pts, time, sorter=self._order))
        if position == len(self.pts) or self.pts[self._order[position]] != time:
            return None
        return int(self._order[position])


def read_packets(container: Any, stream: Any) -> Packets:
    """One pass over the packets, without decoding. About 33 bytes a frame are kept: 2.9 MB an hour at 24 a second."""
    is_entry = entry_test(stream.codec_context)
    count = picture_count(stream.codec_context)
    pts, kept, entries = array("q"), array("b"), array("q")
    found = Packets(np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, np.int64))
    highest, durations = None, {}
    back = 1 / float(stream.time_base)  # a second: less is a guess of libavformat's, more is a file that begins anew
    new_headers, first_dts, last_dts = False, None, None
    for packet in container.demux(stream):
        if packet.size == 0:
            continue  # the flush packet at the end
        index, time = len(pts), packet.pts
        if time is None or (last_dts is not None and packet.dts is not None and packet.dts < last_dts - back):
            found.timed = False
        last_dts = packet.dts if packet.dts is not None else last_dts
        first_dts = last_dts if first_dts is None else first_dts
        if packet.is_corrupt:
            found.damage.append((index, "packets are missing or damaged"))
        new_headers |= index > 0 and packet.has_sidedata("new_extradata")
        later = highest is None or (time is not None and time > highest)
        found.ordered &= later
        if packet.is_keyframe:
            found.first_key = index if found.first_key is None else found.first_key
            if later and is_entry is not None and not packet.is_discard and is_entry(bytes(packet)):
                entries.append(index)
        if count is not None:
            count.add(index, memoryview(packet))
        pts.append(time or 0)
        kept.append(not packet.is_discard)
        if time is not None and later:
            highest, durations = time, {time: packet.duration or 0}
    found.pts, found.kept = np.array(pts, np.int64), np.array(kept, bool)
    found.entries = np.array([] if new_headers else entries, np.int64)
    found.duration, found.first = next(iter(durations.values()), 0), first_dts or 0
    found.slots = (last_dts - first_dts + 1) if first_dts is not None and last_dts is not None else 0
    found.timed &= len(np.unique(found.pts[found.kept])) == int(found.kept.sum())
    if container.format.name in DECODING_TIMES:  # what libavformat calls presentation times there is a guess
        found.timed &= stream.codec_context.name in IN_ORDER | INTRA
        found.shift = int(found.pts[0] - first_dts) if len(pts) and first_dts is not None else 0
    lost, anew = [], []
    if count is not None:
        count.end()
        lost, anew = list(count.lost), count.anew
    if found.timed and container.format.name not in DECODING_TIMES and stream.codec_context.name in STEADY | INTRA:
        times = np.unique(found.pts[found.kept])
        positions = gaps(times)
        found.gaps = np.stack([times[positions], times[positions + 1]], 1)
        after = [index for index in behind(found.pts, times, positions) if index not in found.entries]
        lost += after if stream.codec_context.name in UNCOUNTED else [index for index in after if index in anew]
    found.damage += [(index, "a picture that others depend on is missing") for index in lost]
    return found


def untimed_packets(path: Path, stream: Any, packets: Packets, name: str) -> Packets:
    """The table of a file whose packets have no usable timestamps: one linear decode, times by the order of the frames.

    Where frames bear timestamps those are taken, and what is missing is filled in at the stream's rate. Without any,
    the times of decoding, in rising order: the first frame is shown at the first of them (AVI), or as much later as
    the codec's reordering takes (ASF). Where times of frames go back though all are near those of a constant rate
    (program streams bear one for several frames), that rate's are taken. name: of the container's format.
    """
    pts: list[int | None] = []
    dts: list[int | None] = []
    keys: list[int] = []
    with open_container(path, only=stream.index) as container:
        for frame in container.decode(container.streams[stream.index]):
            if frame.key_frame:
                keys.append(len(pts))
            pts.append(frame.pts)
            dts.append(frame.dts)
    step = max(1.0, 1 / float(stream.average_rate or 24) / float(stream.time_base))
    by_decoding = name in DECODING_TIMES or (packets.ordered and packets.timed)
    known = sorted(time for time in dts if time is not None)
    ordered = [*known, *[None] * (len(dts) - len(known))]  # the last ones come without a packet
    by_decoding |= all(time is None for time in pts)
    if by_decoding and known:
        step = (known[-1] - known[0]) / (len(known) - 1) if len(known) > 1 else step
        times = np.array(_filled(ordered, step), np.int64)
        late = stream.codec_context.reorder_depth if name == "asf" else 0  # AVI's sound does not wait for the decoder
        times += packets.first + round(late * step) - times[0]
    elif not by_decoding and pts:
        times = _smoothed(np.array(_filled(pts, step), np.int64), step)
    else:
        raise DataError(f"{path}: a frame has no timestamp; remux the file, for example to mp4")
    if (np.diff(times) <= 0).any():
        position = int(np.argmax(np.diff(times) <= 0))
        at = float(times[position] * stream.time_base)
        raise DataError(f"{path}: the picture's timestamps go back after {at:.2f} s; remux the file")
    kept = np.ones(len(times), bool)
    return Packets(times, kept, np.array(keys, np.int64), packets.duration, timed=False, shown=times)


def _smoothed(times: np.ndarray, step: float) -> np.ndarray:
    """Times of a constant rate in the place of such as go back and are at most OFF steps from them."""
    if (np.diff(times) > 0).all():
        return times
    regular = np.arange(len(times)) * step
    regular += np.median(times - regular)
    return np.rint(regular).astype(np.int64) if np.abs(times - regular).max() <= OFF * step else times


def _filled(times: list[int | None], step: float) -> list[int]:
    """Times with the missing ones spread evenly between those that are known, beyond the first and last by `step`."""
    positions = np.array([position for position, time in enumerate(times) if time is not None])
    known = np.array([time for time in times if time is not None], np.float64)
    late = known - positions * step
    near = np.abs(late - np.median(late)) < step / 2
    if near.mean() >= 0.9:  # a constant rate; the others went to the wrong picture, which program streams allow
        positions, known = positions[near], known[near]
    at = np.arange(len(times))
    spread = np.interp(at, positions, known)
    spread += np.minimum(at - positions[0], 0) * step + np.maximum(at - positions[-1], 0) * step
    values: list[int] = np.rint(spread).astype(np.int64).tolist()
    return values


def entry_test(codec: Any) -> Callable[[bytes], bool] | None:
    """Whether decoding may begin at a packet that its container calls a key frame; None: at no packet."""
    name, headers = codec.name, bytes(codec.extradata or b"")
    if name == "h264":
        size = nal_size(headers)
        return lambda data: _first_type(data, size, lambda byte: byte & 31, range(1, 6)) == 5
    if name == "hevc":
        size = nal_size(headers, 21)
        return lambda data: _first_type(data, size, lambda byte: byte >> 1 & 63, range(32)) in range(16, 22)
    if name in ("mpeg1video", "mpeg2video"):
        return lambda data: _mpeg2_type(data) == 1 and (b"\x00\x00\x01\xb3" in data or bool(headers))
    if name in ("vp8", "libvpx"):
        return lambda data: data[0] & 1 == 0
    if name == "theora":
        return lambda data: data[0] >> 6 == 0  # a picture, and an intra one (Theora specification, 7.1)
    if name in ("vp9", "libvpx-vp9"):
        return _vp9_key
    if name in ("av1", "libdav1d", "libaom-av1"):
        return _av1_key
    if name in FLAGGED or name in INTRA:
        return lambda data: True
    return None


def _first_type(data: bytes, size: int, kind: Callable[[int], int], pictures: range) -> int:
    """Type of the first NAL unit that is a part of a picture; -1 without one."""
    unit = first_unit(memoryview(data), size, lambda byte: kind(byte) in pictures)
    return -1 if unit is None else kind(unit[0])


def _mpeg2_type(data: bytes) -> int | None:
    position = data.find(b"\x00\x00\x01\x00")
    return data[position + 5] >> 3 & 7 if 0 <= position < len(data) - 5 else None


def _vp9_key(data: bytes) -> bool:
    """A key frame that is shown (VP9 bitstream specification, 6.2)."""
    bits = int.from_bytes(data[:2], "big")
    profile = (bits >> 13 & 1) | (bits >> 12 & 1) << 1
    rest = 10 - (profile == 3)  # bits below show_existing_frame
    show_existing, frame_type, show = bits >> rest + 1 & 1, bits >> rest & 1, bits >> rest - 1 & 1
    return bits >> 14 == 2 and not show_existing and frame_type == 0 and show == 1


def _av1_key(data: bytes) -> bool:
    """The first frame of a temporal unit is a key frame that is shown (AV1 bitstream specification, 5.3 and 5.9)."""
    position = 0
    while position < len(data):
        kind, extended, sized = data[position] >> 3 & 15, data[position] >> 2 & 1, data[position] >> 1 & 1
        position += 1 + extended
        length, shift = 0, 0
        while sized and position < len(data):
            byte = data[position]
            position, length, shift = position + 1, length | (byte & 127) << shift, shift + 7
            if not byte & 128:
                break
        if kind in (3, 6):  # a frame header, alone or with its frame
            return position < len(data) and data[position] >> 4 == 0b0001  # not show_existing, KEY_FRAME, show_frame
        if not sized:
            return False
        position += length
    return False
