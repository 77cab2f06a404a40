"""The columns of an index: one .npy file each, mapped; what is read of them has been verified.

A file has one checksum a block of BLOCK bytes (format 3), or one SHA-256 for all of it (format 2), in dataset.json. A
block is verified when something in it is wanted for the first time; where all columns together are small, at once.
"""

import hashlib
import io
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data.dataset.checksum import XXH3
from data.dataset.rows import dtype_of
from data.errors import DataError

BLOCK = 1 << 18  # bytes under one checksum
HEADER = 64  # bytes that a .npy file has before its values, at least
PART = 1 << 24  # bytes that are looked at in one go
SMALL = 32 << 20  # bytes of all columns up to which they are verified when the index is opened


class Column:
    """One mapped column. Threads may use it at the same time."""

    def __init__(self, path: Path, rows: int, blocks: list[str], block: int, size: int | None, where: str, remedy: str):
        """blocks: hex digests in order, of `block` bytes each; size: of the file, where it was recorded; where, remedy:
        the dataset, and what helps, for messages.

        DataError when the file is missing or can't hold the rows. Its header is not read: it is verified like the rest,
        and says what the name of the column and the number of rows say already.
        """
        self.name, self._remedy = f"index/{path.name} of {where}", remedy
        self._blocks, self._block, self._verified = blocks, block, bytearray(len(blocks))
        self._whole = False  # all are verified
        dtype = dtype_of(path.stem)
        try:
            found = os.stat(path).st_size
            self._start = found - rows * dtype.itemsize  # of the values, after the header
            if self._start < HEADER or (size is not None and found != size):
                raise ValueError(f"it has {found} bytes, {size or f'{rows} rows'} recorded")
            mapped = np.memmap(path, dtype, "r", self._start, (rows,))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.name} is unreadable ({error}); {remedy}") from error
        assert isinstance(mapped.base, mmap.mmap)
        self._bytes: mmap.mmap = mapped.base  # the whole file
        self._values: np.ndarray = mapped.view(np.ndarray)  # a memmap is slower by the row
        if len(blocks) != -(-len(self._bytes) // block):
            raise DataError(f"{self.name} has {len(self._bytes)} bytes and {len(blocks)} checksums; {remedy}")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._bytes)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, row: int) -> Any:
        """One value, verified."""
        item = self._values.itemsize
        first = (self._start + row * item) // self._block
        last = (self._start + (row + 1) * item - 1) // self._block
        if not (self._verified[first] and self._verified[last]):
            self._verify(0)  # the header says what the bytes mean
            self._verify(first)
            self._verify(last)
        return self._values[row]

    def whole(self) -> np.ndarray:
        """All values, mapped, verified."""
        if not self._whole:
            for number in range(len(self._blocks)):
                self._verify(number)
            self._bytes.madvise(mmap.MADV_DONTNEED)  # or all that was looked at counts as memory of this process
            self._whole = True
        return self._values

    def _verify(self, number: int) -> None:
        if self._verified[number]:
            return
        recorded, found = self._blocks[number], self._digest(number)
        if found != recorded:
            raise DataError(
                f"{self.name} is damaged: its block {number} has checksum {found}, recorded {recorded}; {self._remedy}"
            )
        self._verified[number] = 1

    def _digest(self, number: int) -> str:
        hasher = hashlib.sha256() if len(self._blocks[number]) == 64 else xxhash.xxh3_64()
        first, end = number * self._block, min(len(self._bytes), (number + 1) * self._block)
        with memoryview(self._bytes) as view:
            for start in range(first, end, PART):
                with view[start : min(end, start + PART)] as part:
                    hasher.update(part)
                if end - first > PART:
                    self._bytes.madvise(mmap.MADV_DONTNEED, start, min(end, start + PART) - start)
        return hasher.hexdigest()


class Columns(Mapping[str, np.ndarray]):
    """The columns of an index by name. `columns[name]` is a whole one, `columns.at(name)` is read row by row."""

    def __init__(self, columns: dict[str, Column]):
        self._columns = columns

    @classmethod
    def open(cls, folder: Path, record: dict[str, Any], where: str, remedy: str) -> "Columns":
        """Map the columns that `record` (dataset.json) names. DataError naming the file that can't be mapped.

        where, remedy: the dataset, and what helps, for messages.
        """
        blocks: dict[str, tuple[list[str], int, int | None]] = {}
        for name in record["columns"]:
            if "column_xxh3" in record:
                digests, size = record["column_xxh3"][name], record["column_bytes"][name]
                blocks[name] = ([digests[i : i + 16] for i in range(0, len(digests), 16)], record["column_block"], size)
            else:
                blocks[name] = ([record["column_sha256"][name]], 1 << 60, None)
        rows = record["samples"]
        columns = {name: Column(folder / f"{name}.npy", rows, *found, where, remedy) for name, found in blocks.items()}
        return cls(columns)

    def verify_small(self) -> None:
        """Verify all columns if that takes no time. DataError naming the first that is damaged."""
        if sum(column.size for column in self._columns.values()) <= SMALL:
            for name in self:
                self.at(name).whole()

    def differences(self) -> list[str]:
        """One message for every column that is damaged."""
        messages = []
        for name in self:
            try:
                self.at(name).whole()
            except DataError as error:
                messages.append(str(error))
        return messages

    def at(self, name: str) -> Column:
        """A column whose rows are verified as they are read. KeyError when there is none of that name."""
        return self._columns[name]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._columns[name].whole()

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


class ColumnWriter:
    """Writes one column of `rows` values, part by part, with its checksums."""

    def __init__(self, path: Path, dtype: np.dtype, rows: int):
        self._file = open(path, "wb")  # noqa: SIM115
        self._dtype, self._sha256 = dtype, hashlib.sha256()
        self._pending, self._blocks, self._size = bytearray(), "", 0
        header = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(header, described)
        self._write(header.getbuffer())

    def append(self, values: np.ndarray) -> None:
        """The next rows."""
        self._write(np.ascontiguousarray(values, self._dtype).tobytes())

    def close(self) -> dict[str, Any]:
        """What dataset.json records of the column; it is durable then."""
        if self._pending:
            self._end_block(len(self._pending))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"sha256": self._sha256.hexdigest(), "bytes": self._size, "xxh3": self._blocks}

    def _write(self, data: Any) -> None:
        self._pending += data
        while len(self._pending) >= BLOCK:
            self._end_block(BLOCK)

    def _end_block(self, size: int) -> None:
        with memoryview(self._pending) as view, view[:size] as block:
            self._file.write(block)
            self._sha256.update(block)
            self._blocks += f"{XXH3.of(block):016x}"
        del self._pending[:size]
        self._size += size


def digest_file(path: Path) -> dict[str, Any]:
    """What ColumnWriter.close records, of a column that is there."""
    digest, size, blocks = hashlib.sha256(), 0, []
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            blocks.append(f"{XXH3.of(block):016x}")
            size += len(block)
    return {"sha256": digest.hexdigest(), "bytes": size, "xxh3": "".join(blocks)}


def hash_keys(keys: np.ndarray) -> np.ndarray:
    """[n] uint64 hash of the bytes of keys [n], whose width is a multiple of 8."""
    words = np.ascontiguousarray(keys).view(np.uint64).reshape(len(keys), keys.dtype.itemsize // 8)
    mixed = words[:, 0] * np.uint64(0x9E3779B97F4A7C15)
    for column in range(1, words.shape[1]):
        mixed = (mixed ^ words[:, column]) * np.uint64(0x9E3779B97F4A7C15)
    return mixed
