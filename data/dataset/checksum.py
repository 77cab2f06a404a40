"""Checksums of the members of shards and of the columns of an index: which kind, by the format of the index."""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash


class Hasher(Protocol):
    """Takes bytes in parts. Both kinds let other threads run meanwhile."""

    def update(self, data: Any, /) -> None:
        """More bytes."""

    def intdigest(self) -> int:
        """The checksum of all bytes up to here."""


class Crc32:
    """The checksum of datasets of format 2."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        """See Hasher."""
        self._value = zlib.crc32(data, self._value)

    def intdigest(self) -> int:
        """See Hasher."""
        return self._value


@dataclass(frozen=True)
class ChecksumKind:
    """A kind of checksum. name: the end of its columns (`av_xxh3`); dtype: of these."""

    name: str
    dtype: type[np.unsignedinteger[Any]]
    start: Callable[[], Hasher]

    def of(self, data: Any) -> int:
        """The checksum of some bytes."""
        hasher = self.start()
        hasher.update(data)
        return hasher.intdigest()


@dataclass(frozen=True)
class Recorded:
    """What the index says of a member's bytes."""

    kind: ChecksumKind
    value: int

    def compare(self, found: int) -> None:
        """ValueError when it is not the one that was found."""
        if found != self.value:
            raise ValueError(f"has checksum {found:08x}, recorded {self.value:08x}")


XXH3 = ChecksumKind("xxh3", np.uint64, xxhash.xxh3_64)  # at the speed of memory; CRC-32 takes five times as long
CRC = ChecksumKind("crc", np.uint32, Crc32)
KINDS = {2: CRC, 3: XXH3}  # by the format of the index
FORMAT = 3


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
