"""Detects pictures missing from a stream, from its packets alone.

Decoders continue silently after a lost picture: what is predicted from it is wrong until the next entry. H.264 numbers
its references and MPEG-1 and -2 their pictures. Of other codecs with prediction only the timestamps are left: in a
stream of constant rate a hole before a predicted frame says that something was lost. (HEVC's decoder names references
that it misses.) Where no other picture depends on the lost one, the one before would be shown for too long.
"""

from typing import Any, Protocol

import numpy as np

from data.media.nal import first_unit, nal_size, units

CONSTANT = 0.995  # share of equal frame durations from which on a stream has a constant rate
FEW = 3  # of other durations that a short one may have
UNCOUNTED = {
    "mpeg4", "msmpeg4v1", "msmpeg4v2", "msmpeg4v3", "msmpeg4", "wmv1", "wmv2", "h263", "flv", "theora", "vp8", "vp9",
    "ffv1", "libdav1d", "av1", "libvpx", "libvpx-vp9",
}  # fmt: skip
STEADY = UNCOUNTED | {"h264", "hevc", "mpeg1video", "mpeg2video"}  # where a stream of constant rate has no holes


class Count(Protocol):
    """Looks at the packets of a stream in order.

    lost: indices of packets that follow a picture that is missing; anew: of predicted ones at which the count begins
    anew, which is the same where they come behind a hole.
    """

    lost: list[int]
    anew: list[int]

    def add(self, index: int, data: memoryview) -> None: ...
    def end(self) -> None: ...


def picture_count(codec: Any) -> Count | None:
    """The count that the codec allows."""
    if codec.name in ("mpeg1video", "mpeg2video"):
        return GroupCount()
    if codec.name == "h264":
        return FrameCount(bytes(codec.extradata or b""))
    return None


class GroupCount:
    """MPEG-1 and -2 number the pictures of a group as they are shown (temporal_reference, ISO 13818-2, 6.3.9)."""

    def __init__(self) -> None:
        self.lost: list[int] = []
        self.anew: list[int] = []
        self._group: list[tuple[int, int]] = []  # (number, index) of the group so far

    def add(self, index: int, data: memoryview) -> None:
        """The next packet."""
        content = bytes(data[:512])  # headers come first
        position = content.find(b"\x00\x00\x01\x00")
        if not 0 <= position < len(content) - 5:
            return
        if 0 <= content.find(b"\x00\x00\x01\xb8") < position:  # a group begins
            self.end()
        self._group.append((content[position + 4] << 2 | content[position + 5] >> 6, index))

    def end(self) -> None:
        """Look at a group that is complete. The first numbers may be absent: a cut leaves out what can't be shown."""
        numbers = {number for number, _ in self._group}
        if numbers and len(numbers) <= max(numbers) - min(numbers):
            gap = next(number for number in range(min(numbers), max(numbers)) if number not in numbers)
            self.lost.append(next(index for number, index in self._group if number > gap))
        self._group = []


class FrameCount:
    """H.264's frame_num rises by one from reference picture to reference picture (ITU-T H.264, 7.4.3)."""

    def __init__(self, headers: bytes):
        self.lost: list[int] = []
        self.anew: list[int] = []
        self._size = nal_size(headers)
        self._previous: int | None = None
        self._bits, self._planes = 0, False  # 0: no count
        if self._size and len(headers) > 8:
            length = int.from_bytes(headers[6:8], "big")
            self._read_headers(headers[8 : 8 + length])

    def _read_headers(self, unit: bytes) -> None:
        """log2_max_frame_num and what else is needed from a sequence parameter set."""
        bits = Bits(unescaped(unit[:64]))
        profile = bits.take(32) >> 16 & 255
        bits.golomb()
        self._planes = False
        if profile in (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135):
            if bits.golomb() == 3:
                self._planes = bool(bits.take(1))
            bits.golomb()
            bits.golomb()
            bits.take(1)
            if bits.take(1):  # scaling lists: rare, and long to read
                self._bits = 0
                return
        self._bits = bits.golomb() + 4
        if (order := bits.golomb()) == 0:
            bits.golomb()
        elif order == 1:
            self._bits = 0
            return
        bits.golomb()
        if bits.take(1):  # gaps are allowed: layers may be left out
            self._bits = 0

    def add(self, index: int, data: memoryview) -> None:
        """The next packet."""
        if self._size == 0:
            headers = next((unit for unit in units(data, 0) if unit[0] & 31 == 7), None)
            if headers is not None:
                self._read_headers(bytes(headers[:64]))
        unit = first_unit(data, self._size, lambda byte: 1 <= byte & 31 <= 5)
        if unit is None or self._bits == 0:
            self._previous = None
            return
        bits = Bits(unescaped(bytes(unit[1:32])))
        for _ in range(3):
            bits.golomb()
        if self._planes:
            bits.take(2)
        number, reference, idr = bits.take(self._bits), unit[0] >> 5 & 3, unit[0] & 31 == 5
        previous = self._previous
        if not idr and previous is not None and number not in (previous, (previous + 1) % (1 << self._bits)):
            (self.anew if number in (0, 1) else self.lost).append(index)
        if reference or self._previous is None:
            self._previous = number

    def end(self) -> None:
        """Nothing is left to look at."""


class Bits:
    """Reads a string of bits from the left."""

    def __init__(self, data: bytes):
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        """The next `count` bits. ValueError at the end."""
        self._left -= count
        if self._left < 0:
            raise ValueError("a header of the picture ends early")
        return self._value >> self._left & ((1 << count) - 1)

    def golomb(self) -> int:
        """An unsigned exponential Golomb code."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)


def unescaped(unit: bytes) -> bytes:
    """Without the bytes that keep start codes out of a NAL unit."""
    return unit.replace(b"\x00\x00\x03", b"\x00\x00")


def gaps(times: np.ndarray) -> np.ndarray:
    """[G] places of rising times between which and the next one pictures are missing, in a stream of constant rate."""
    if len(times) < 3:
        return np.zeros(0, np.int64)
    steps = np.diff(times)
    usual = float(np.median(steps))
    unequal = int((np.abs(steps - usual) > max(0.1 * usual, min(1.0, 0.4 * usual))).sum())
    if unequal > max(FEW, (1 - CONSTANT) * len(steps)) or 4 * unequal > len(steps):
        return np.zeros(0, np.int64)
    return np.nonzero(steps > 1.5 * usual)[0]


def behind(pts: np.ndarray, times: np.ndarray, gaps: np.ndarray) -> list[int]:
    """Indices of the packets that are decoded next after gaps."""
    return [int(np.nonzero(pts > times[position])[0][0]) for position in gaps]
