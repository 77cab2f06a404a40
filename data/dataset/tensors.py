"""The safetensors container, read without a copy: its header is checked, its tensors go where the caller wants them.

A member is 8 bytes (length of the header), the header (JSON: dtype, shape, place of each tensor) and the tensors.
All tensors of a dataset are bfloat16. The library's own loader takes the whole file as one `bytes` and copies it.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.dataset.checksum import Recorded
from data.storage.source import ByteSource

HEADER_LIMIT = 1 << 16  # bytes; ours have about 250
HEAD = 1024  # bytes read first: more than our headers have
PART = 1 << 19  # bytes that are read and hashed at a time
BYTES = 2  # of a bfloat16


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's shape and the place of its bytes, counted from the start of the member."""

    shape: tuple[int, ...]
    start: int
    stop: int


def header_size(first: bytes | bytearray | memoryview, size: int) -> int:
    """Bytes before the tensors, from the first 8 bytes of a member of `size` bytes. ValueError when impossible."""
    length = int.from_bytes(first[:8], "little") if len(first) >= 8 else -1
    if not 2 <= length <= min(size - 8, HEADER_LIMIT):
        raise ValueError(f"does not parse (header of {length} bytes in a member of {size})")
    return 8 + length


def parse_header(head: bytes | bytearray | memoryview, size: int) -> dict[str, TensorEntry]:
    """The tensors of a member of `size` bytes, whose first `header_size` bytes are `head`, in the order of their bytes.

    ValueError when it is not a header, a tensor is not bfloat16, or the tensors don't fill the member exactly.
    """
    begin = header_size(head, size)
    try:
        described = json.loads(bytes(head[8:begin]))
        described.pop("__metadata__", None)
        entries = {}
        for name, values in described.items():
            if values["dtype"] != "BF16":
                raise ValueError(f"{name} is {values['dtype']}, expected BF16")
            shape, (start, stop) = tuple(values["shape"]), values["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
                raise ValueError(f"{name} has shape {shape} and place {start}:{stop}")
            if stop - start != math.prod(shape) * BYTES:
                raise ValueError(f"{name} has shape {shape} but {stop - start} bytes")
            entries[name] = TensorEntry(shape, begin + start, begin + stop)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"does not parse ({type(error).__name__}: {error})") from error
    position = begin
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    for name, entry in ordered.items():
        if entry.start != position:
            raise ValueError(f"does not parse ({name} starts at byte {entry.start}, the one before ends at {position})")
        position = entry.stop
    if position != size:
        raise ValueError(f"does not parse (tensors end at byte {position} of {size})")
    return ordered


def load_tensors(data: bytes | bytearray) -> dict[str, Tensor]:
    """Tensors over the bytes of a whole member, not copied if `data` is a bytearray. ValueError as parse_header."""
    entries = parse_header(data, len(data))
    writable = data if isinstance(data, bytearray) else bytearray(data)
    flat = np.frombuffer(writable, dtype=np.uint8)
    tensors = {}
    for name, entry in entries.items():
        part = flat[entry.start : entry.stop]
        if entry.start % BYTES:
            part = part.copy()  # headers of other writers may end at an odd byte
        tensors[name] = torch.from_numpy(part.view(np.int16)).view(torch.bfloat16).reshape(entry.shape)
    return tensors


def buffer_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous bfloat16 tensor, writable in place."""
    if tensor.dtype != torch.bfloat16 or not tensor.is_contiguous():
        raise ValueError(f"{tuple(tensor.shape)} {tensor.dtype} is no contiguous bfloat16 tensor")
    return tensor.view(torch.int16).numpy().reshape(-1).view(np.uint8).data


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no inf in a bfloat16 tensor, by the bits of the exponent (torch.isfinite takes 30 times as long)."""
    bits = tensor.contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)
    step = 1 << 16  # stays in the processor's cache
    return all(int((bits[i : i + step] & 0x7FFF).max()) < 0x7F80 for i in range(0, len(bits), step))


class _Memory:
    whole = False

    def __init__(self, data: memoryview):
        self.data = data

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        count = 0
        for buffer in buffers:
            part = self.data[offset + count : offset + count + len(buffer)]
            buffer[: len(part)] = part
            count += len(part)
        return count


def read_bytes(source: ByteSource, offset: int, size: int, checksum: Recorded | None) -> bytearray:
    """A member of `size` bytes at `offset`. ValueError when it is cut off or hasn't the checksum (if one is given)."""
    data = bytearray(size)
    _fill(source, offset, [memoryview(data)], size)
    if checksum is not None:
        checksum.compare(checksum.kind.of(data))
    return data


def read_tensors(
    source: ByteSource,
    offset: int,
    size: int,
    checksum: Recorded | None,
    targets: Callable[[dict[str, TensorEntry]], list[memoryview]],
) -> None:
    """Read a member straight to where it belongs.

    targets: from the tensors that the header names to buffers that take all their bytes, in the order of the bytes;
    it raises ValueError for tensors that it doesn't expect. Other errors as read_bytes and parse_header.
    """
    if source.whole:
        data = memoryview(bytearray(size))
        _fill(source, offset, [data], size)
        source, offset = _Memory(data), 0
    head = bytearray(min(size, HEAD))
    _fill(source, offset, [memoryview(head)], len(head))
    begin = header_size(head, size)
    if begin > len(head):
        head = bytearray(begin)
        _fill(source, offset, [memoryview(head)], begin)
    buffers = targets(parse_header(head, size))
    if checksum is None:
        _fill(source, offset + begin, buffers, size - begin)
        return
    hasher = checksum.kind.start()
    hasher.update(memoryview(head)[:begin])
    offset += begin
    for group in _groups(buffers):
        count = sum(map(len, group))
        _fill(source, offset, group, count)
        offset += count
        for buffer in group:
            hasher.update(buffer)
    checksum.compare(hasher.intdigest())


def _groups(buffers: list[memoryview]) -> Iterator[list[memoryview]]:
    """The same bytes in parts of about PART: they are hashed while they are still in the processor's cache."""
    group, size = [], 0
    for buffer in buffers:
        for start in range(0, len(buffer), PART):
            group.append(buffer[start : start + PART])
            size += len(group[-1])
            if size >= PART:
                yield group
                group, size = [], 0
    if group:
        yield group


def _fill(source: ByteSource, offset: int, buffers: list[memoryview], size: int) -> None:
    if (found := source.read_into(offset, buffers)) != size:
        raise ValueError(f"ends after {found} of {size} bytes")
