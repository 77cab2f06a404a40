"""The index rows of shards, gathered while they are written or read back from the tars, with the same result.

Rows of one kind of tar (`av`, or `text-<captioner>`) are columns with a value per sample, and a list of the files. They
can be stored, so that the index of a large dataset is put together from many parts without reading a shard.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.durable import write_atomically
from data.clip import Bucket
from data.dataset.checksum import XXH3, ChecksumKind
from data.dataset.record import PLAIN_NAME
from data.dataset.tensors import is_finite, load_tensors
from data.errors import DataError

AV = "av"
AGAIN = "delete the folder of unfinished work, so that it is written again"


@dataclass
class Rows:
    """files: per tar, in the order of their numbers: name, samples, bytes, sha256; of av tars bucket and encoders too.

    columns: one value per sample; `key`, and the names that docs/shard-format.md lists for the kind of tar.
    """

    files: list[dict[str, Any]]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["key"])


class TarRows:
    """Gathers the rows of one tar, sample by sample."""

    def __init__(self, column: str, path: Path, kind: ChecksumKind = XXH3):
        """column: "av" or "text-<captioner>"; path: of the tar, for messages; kind: of the checksums."""
        self.column, self.path, self._kind = column, path, kind
        self.keys: list[str] = []
        self._numbers: dict[str, list[int]] = {}
        self._metas: list[dict[str, Any]] = []

    def add(self, key: str, tensors: tuple[int, bytes | bytearray], meta: tuple[int, bytes | bytearray]) -> None:
        """A sample: place and bytes of its two members. DataError when the json doesn't parse."""
        self.keys.append(key)
        self._member(self.column, *tensors)
        self._number(f"{self.column}_finite", _sound(tensors[1]))
        try:
            values = dict(json.loads(meta[1]))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{self.path}: {key}.json does not parse ({error}); prepare it again") from error
        if self.column == AV:
            self._member("json", *meta)
            self._metas.append(values)
        else:
            self._number(f"{self.column}_absent", is_absent(values.get("caption")))

    def close(self, size: int, digest: str) -> Rows:
        """The rows of the whole tar of `size` bytes. DataError when its samples don't belong into one shard."""
        described = {"name": self.path.name, "samples": len(self.keys), "bytes": size, "sha256": digest}
        columns = {"key": np.array([key.encode() for key in self.keys], "S24")}
        for name, numbers in self._numbers.items():
            columns[name] = np.array(numbers, dtype_of(name))
        if self.column == AV:
            described |= {"bucket": bucket_of(self.path, self._metas), "encoders": encoders_of(self.path, self._metas)}
            columns |= scores_of(self.path, self._metas)
        return Rows([described], columns)

    def _member(self, column: str, offset: int, data: bytes | bytearray) -> None:
        self._number(f"{column}_offset", offset)
        self._number(f"{column}_size", len(data))
        self._number(f"{column}_{self._kind.name}", self._kind.of(data))

    def _number(self, name: str, value: int) -> None:
        self._numbers.setdefault(name, []).append(value)


DTYPES = {"offset": "<u8", "size": "<u8", "xxh3": "<u8", "crc": "<u4", "finite": "|u1", "absent": "|u1"}


def dtype_of(name: str) -> np.dtype:
    """Type of a column of an index, by its name."""
    if name == "key":
        return np.dtype("S24")
    if name == "shard":
        return np.dtype("<u4")
    return np.dtype("<f4" if name.startswith("score-") else DTYPES[name.rpartition("_")[2]])


def is_absent(caption: Any) -> bool:
    """Whether a sample has no words: no caption, or an empty one."""
    return not (caption.strip() if isinstance(caption, str) else caption)


def bucket_of(path: Path, metas: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The one bucket of all samples of a shard. DataError when there is none, or more than one."""
    try:
        for meta in metas:
            Bucket.from_dict(meta["bucket"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: a sample's json has no valid bucket ({error}); prepare the dataset again") from error
    if any(meta["bucket"] != metas[0]["bucket"] for meta in metas):
        raise DataError(f"{path} mixes buckets; all samples of one shard must have one geometry")
    content: dict[str, Any] = metas[0]["bucket"]
    return content


def encoders_of(path: Path, metas: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Fingerprints of the encoders by kind. DataError when samples have others, or something else stands there."""
    encoders: dict[str, str] = {}
    for meta in metas:
        stated = meta.get("encoders", {})
        if not isinstance(stated, dict) or not all(isinstance(value, str) for value in stated.values()):
            raise DataError(f"{path}: a sample's encoders are {stated!r}, expected texts by kind; prepare it again")
        merge_encoders(path.name, stated, encoders)
    return encoders


def merge_encoders(name: str, stated: Mapping[str, str], encoders: dict[str, str]) -> None:
    """Enter what one shard states. DataError when it contradicts the others."""
    for kind, fingerprint in stated.items():
        if encoders.setdefault(kind, fingerprint) != fingerprint:
            raise DataError(
                f"{name} has {kind} encoder {fingerprint}, others {encoders[kind]}; prepare it again with one"
            )


def scores_of(path: Path, metas: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Numbers in the samples' "scores": column -> [samples] float32, NaN where a sample doesn't have it."""
    columns: dict[str, np.ndarray] = {}
    for i, meta in enumerate(metas):
        scores = meta.get("scores")
        for name, value in scores.items() if isinstance(scores, dict) else ():
            if isinstance(value, (int, float)):
                if not PLAIN_NAME.fullmatch(name):
                    raise DataError(f"{path} has a score named {name!r}: use letters, digits and . _ + = -")
                columns.setdefault(f"score-{name}", np.full(len(metas), np.nan, np.float32))[i] = value
    return columns


def join(parts: Sequence[Rows]) -> Rows:
    """Rows of consecutive tars as one; a tar without a score has NaN there."""
    names = list(dict.fromkeys(name for part in parts for name in part.columns))
    return Rows(
        [file for part in parts for file in part.files],
        {name: np.concatenate([column(part, name) for part in parts]) for name in names},
    )


def column(rows: Rows, name: str) -> np.ndarray:
    """A column of rows, NaN where they lack that score."""
    found = rows.columns.get(name)
    return np.full(len(rows), np.nan, np.float32) if found is None else found


def save_rows(path: Path, rows: Rows) -> None:
    """Store rows in a file (atomically, durably)."""
    described = np.frombuffer(json.dumps(rows.files).encode(), np.uint8)

    def write(unfinished: Path) -> None:
        with open(unfinished, "wb") as file:
            np.savez(file, **{"files": described, **rows.columns})  # type: ignore[arg-type]

    write_atomically(path, write)


def load_rows(path: Path) -> Rows:
    """What save_rows stored. DataError when it can't be read."""
    files, names = load_files(path)
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Rows(files, {name: stored[name] for name in names})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is unreadable ({error}); {AGAIN}") from error


def load_files(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The files that save_rows stored, and the names of the columns. DataError when they can't be read."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return json.loads(stored["files"].tobytes()), [name for name in stored.files if name != "files"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is unreadable ({error}); {AGAIN}") from error


def _sound(data: bytes | bytearray) -> int:
    try:
        return int(all(is_finite(tensor) for tensor in load_tensors(data).values()))
    except ValueError:
        return 0  # reading says what is wrong with it
