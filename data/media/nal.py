"""The units of H.264 and HEVC packets, in both forms: with start codes (Annex B), or with lengths (mp4, mkv)."""

import re
from collections.abc import Callable, Iterator

START_CODE = re.compile(b"\x00\x00\x01")


def nal_size(headers: bytes, position: int = 4) -> int:
    """Bytes of a unit's length by the decoder's headers (avcC: place 4, hvcC: 21); 0: start codes are used."""
    return (headers[position] & 3) + 1 if len(headers) > position and headers[0] == 1 else 0


def units(data: memoryview, size: int) -> Iterator[memoryview]:
    """All units of a packet; of Annex B ones the end may hold the next one's start."""
    if size == 0:
        for found in START_CODE.finditer(data):
            if found.end() < len(data):
                yield data[found.end() :]
        return
    position = 0
    while position + size < len(data):
        length = int.from_bytes(data[position : position + size], "big")
        if length:
            yield data[position + size : position + size + length]
        position += size + length


def first_unit(data: memoryview, size: int, wanted: Callable[[int], bool]) -> memoryview | None:
    """The first unit whose first byte is wanted."""
    return next((unit for unit in units(data, size) if wanted(unit[0])), None)
