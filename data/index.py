"""The index of a dataset: where each sample lies, memory-mapped, with checksums.

A dataset is a folder of shards (`av-000000.tar`, `text-<captioner>-000000.tar`, see data.shards),
`empty-text.safetensors` and `index/`: one .npy per column, a row per sample (rows of a shard are contiguous, in the
order of its tar), and `dataset.json`. `build_index` makes it from the tars alone: a lost index costs a scan, no data.
"""

import hashlib
import json
import os
import re
import shutil
import tarfile
import threading
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from data.clip import Bucket, EncodedClip, encode_json
from data.errors import DamagedSample, DataError

FORMAT = 1
EMPTY_TEXT = "empty-text.safetensors"
RETRY_WAITS = (0.2, 1.0, 3.0)  # seconds before each new attempt after a transient read error
OPEN_SHARDS = 64  # file descriptors kept open
REMEDY = "python -m data.prepare source=... output=..."
REBUILD = "rebuild it with data.index.build_index, or prepare the dataset again"

T = TypeVar("T")


class DatasetIndex:
    """Random access to the samples of a dataset. Make it with `open`. Reading is thread-safe."""

    def __init__(self, root: Path, record: dict[str, Any], columns: dict[str, np.ndarray]):
        self.root = root
        self.record = record
        self.shards: list[dict[str, Any]] = record["shards"]
        self.fingerprint: str = record["fingerprint"]
        self.buckets = [Bucket.from_dict(values) for values in record["buckets"]]
        self.captioners: list[str] = record["captioners"]
        self.text_dim: int = record["text_dim"]
        self.encoders: dict[str, str] = record["encoders"]
        self.shard_bucket = np.array([shard["bucket"] for shard in self.shards], dtype=np.int64)  # [S]
        self.shard_start = np.zeros(len(self.shards) + 1, dtype=np.int64)  # [S + 1] first row of each shard
        np.cumsum([shard["samples"] for shard in self.shards], out=self.shard_start[1:])
        self.columns = columns
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, root: Path | str) -> "DatasetIndex":
        """Open the dataset in folder `root`.

        DataError when the folder is missing, has no readable index, or a shard is missing or not of the recorded size.
        """
        root = Path(root)
        if not root.is_dir():
            raise DataError(
                f"dataset folder {root} does not exist; make it: python -m data.prepare source=... output={root}"
            )
        path = root / "index" / "dataset.json"
        if not path.is_file():
            nested = sorted(entry.parent.parent.name for entry in root.glob("*/index/dataset.json"))
            hint = f"did you mean one of its folders {', '.join(nested)}?" if nested else f"make it: {REMEDY}"
            raise DataError(f"{root} has no index ({path} is missing): it is empty or was not finished; {hint}")
        try:
            record = json.loads(path.read_bytes())
            if record["format"] != FORMAT:
                raise DataError(f"{path} has format {record['format']}, expected {FORMAT}; prepare the dataset again")
            columns = {name: np.load(root / "index" / f"{name}.npy", mmap_mode="r") for name in record["columns"]}
            index = cls(root, record, columns)
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"index of {root} is unreadable ({type(error).__name__}: {error}); {REBUILD}"
            raise DataError(message) from error
        if any(len(column) != len(index) for column in columns.values()):
            raise DataError(f"index of {root} has columns of unequal length; {REBUILD}")
        for name, size, _ in index._recorded_files():
            found = (root / name).stat().st_size if (root / name).is_file() else None
            if found is None:
                raise DataError(f"shard {name} of dataset {root} is missing; restore it or prepare the dataset again")
            if found != size:
                raise DataError(
                    f"shard {name} of dataset {root} has {found} bytes, the index recorded {size}; "
                    "restore it or prepare the dataset again"
                )
        return index

    def __len__(self) -> int:
        return int(self.shard_start[-1])

    def key(self, row: int) -> str:
        """Key of sample `row` (24 hex digits)."""
        return bytes(self.columns["key"][row]).decode()

    def shard_of(self, row: int) -> int:
        """Number of the shard that holds `row`."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a dataset with {len(self)} samples")
        return int(np.searchsorted(self.shard_start, row, side="right")) - 1

    def bucket_of(self, row: int) -> Bucket:
        """Geometry of sample `row`."""
        return self.buckets[self.shard_bucket[self.shard_of(row)]]

    def read_clip(self, row: int) -> EncodedClip:
        """Latents and meta of sample `row`. DamagedSample when bytes are wrong, DataError when they can't be read."""
        key, shard = self.key(row), self.shards[self.shard_of(row)]["name"]
        tensors = self._member(row, "av", shard)
        meta = self._member(row, "json", shard)
        try:
            clip = EncodedClip.from_members(key, tensors, meta, self.bucket_of(row))
        except ValueError as error:
            raise DamagedSample(key, shard, str(error)) from error
        if name := clip.not_finite():
            raise DamagedSample(key, shard, f"NaN or inf in {name}")
        return clip

    def read_text(self, row: int, captioner: str) -> Tensor:
        """Text embedding [L, D] bfloat16, unpadded, of sample `row`. Errors as read_clip."""
        if captioner not in self.captioners:
            raise DataError(f"dataset {self.root} has no captioner {captioner!r}; it has {', '.join(self.captioners)}")
        key, shard = self.key(row), self.shards[self.shard_of(row)]["text"][captioner]
        data = self._member(row, f"text-{captioner}", shard)
        try:
            return _parse_text(data, self.text_dim)
        except ValueError as error:
            raise DamagedSample(key, shard, str(error)) from error

    def read_meta(self, row: int) -> dict[str, Any]:
        """The json of sample `row`. Errors as read_clip."""
        shard = self.shards[self.shard_of(row)]["name"]
        data = self._member(row, "json", shard)
        try:
            return json.loads(data)
        except ValueError as error:
            raise DamagedSample(self.key(row), shard, f"json does not parse ({error})") from error

    def empty_text(self) -> Tensor:
        """The encoded empty prompt [L0, D] bfloat16: dropped text in training, the unconditional branch in sampling."""
        path = self.root / EMPTY_TEXT
        data = _retry(lambda: path.read_bytes(), str(path))
        try:
            return _parse_text(data, self.text_dim)
        except ValueError as error:
            raise DataError(f"{path} {error}; prepare the dataset again") from error

    def verify(self) -> list[str]:
        """Read every file in full and compare with the recorded SHA-256. One message for every difference."""
        messages = []
        for name, size, digest in self._recorded_files():
            try:
                found_size, found = (self.root / name).stat().st_size, _sha256(self.root / name)
            except OSError as error:
                messages.append(f"{name}: {error.strerror or error}")
                continue
            if found_size != size:
                messages.append(f"{name}: has {found_size} bytes, recorded {size}")
            elif found != digest:
                messages.append(f"{name}: SHA-256 is {found}, recorded {digest}")
        return messages

    def close(self) -> None:
        """Close the shards that are held open; reading again opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    def _recorded_files(self) -> list[tuple[str, int, str]]:
        """(name, bytes, sha256) of every file of the dataset beside the index."""
        empty = self.record["empty_text"]
        files = [(EMPTY_TEXT, empty["bytes"], empty["sha256"])]
        for shard in self.shards:
            files.append((shard["name"], shard["bytes"], shard["sha256"]))
            files += [
                (name, shard["text_bytes"][captioner], shard["text_sha256"][captioner])
                for captioner, name in shard["text"].items()
            ]
        return files

    def _member(self, row: int, column: str, shard: str) -> bytes:
        """Bytes of one tar member, its checksum verified."""
        offset, size = int(self.columns[f"{column}_offset"][row]), int(self.columns[f"{column}_size"][row])
        if size == 0:
            raise DamagedSample(self.key(row), shard, f"{column} has length zero")
        data = _retry(lambda: self._pread(shard, offset, size), str(self.root / shard))
        if len(data) != size:
            raise DamagedSample(self.key(row), shard, f"{column} ends after {len(data)} of {size} bytes")
        found, recorded = zlib.crc32(data), int(self.columns[f"{column}_crc"][row])
        if found != recorded:
            raise DamagedSample(self.key(row), shard, f"{column} has checksum {found:08x}, recorded {recorded:08x}")
        return data

    def _pread(self, name: str, offset: int, size: int) -> bytes:
        with self._lock:  # held while reading, so that no other thread closes the descriptor
            descriptor = self._files.pop(name, None)
            if descriptor is None:
                descriptor = os.open(self.root / name, os.O_RDONLY)
            self._files[name] = descriptor
            if len(self._files) > OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            try:
                parts = []
                while size > 0 and (part := os.pread(descriptor, size, offset)):
                    parts.append(part)
                    offset, size = offset + len(part), size - len(part)
                return b"".join(parts)
            except OSError:
                os.close(self._files.pop(name))  # a stale handle never recovers: the next attempt opens the file anew
                raise


def build_index(root: Path | str) -> DatasetIndex:
    """Scan the shards in `root` and write `root/index` (atomically, replacing an old one).

    DataError when there are no shards, a tar doesn't parse, the columns of text don't hold the same keys in the same
    order, a shard mixes buckets, or a key occurs twice.
    """
    root = Path(root)
    numbers = sorted(match[1] for path in root.glob("av-*.tar") if (match := re.fullmatch(r"av-(\d+)\.tar", path.name)))
    if not numbers:
        raise DataError(f"{root} holds no shards (av-000000.tar, ...); make them with `python -m data.prepare`")
    first = numbers[0]
    captioners = sorted(path.name[5 : -5 - len(first)] for path in root.glob(f"text-*-{first}.tar"))
    if not (root / EMPTY_TEXT).is_file():
        raise DataError(f"{root / EMPTY_TEXT} is missing; prepare the dataset again")
    empty = load((root / EMPTY_TEXT).read_bytes())["text"]
    rows: dict[str, list[Any]] = {"key": [], "shard": []}
    buckets: list[dict[str, Any]] = []
    encoders: dict[str, str] = {}
    shards: list[dict[str, Any]] = []
    for number, name in enumerate(numbers):
        av = root / f"av-{name}.tar"
        members = _scan(av)
        keys = list(members)
        for captioner in captioners:
            text = root / f"text-{captioner}-{name}.tar"
            text_members = _scan(text)
            if list(text_members) != keys:
                raise DataError(f"{text} does not hold the keys of {av} in the same order; caption it again")
            _append(rows, f"text-{captioner}", text, [text_members[key].get("safetensors") for key in keys])
        _append(rows, "av", av, [members[key].get("safetensors") for key in keys])
        _append(rows, "json", av, [members[key].get("json") for key in keys])
        rows["key"] += [key.encode() for key in keys]
        rows["shard"] += [number] * len(keys)
        metas = _read_metas(av, [members[key]["json"] for key in keys])
        bucket = metas[0]["bucket"]
        if any(meta["bucket"] != bucket for meta in metas):
            raise DataError(f"{av} mixes buckets; all samples of one shard must have one geometry")
        if bucket not in buckets:
            buckets.append(bucket)
        for meta in metas:
            for kind, fingerprint in meta.get("encoders", {}).items():
                if encoders.setdefault(kind, fingerprint) != fingerprint:
                    raise DataError(
                        f"{av} has {kind} encoder {fingerprint}, others {encoders[kind]}; prepare it again with one"
                    )
        text_names = {captioner: f"text-{captioner}-{name}.tar" for captioner in captioners}
        shards.append(
            {
                "name": av.name,
                "samples": len(keys),
                "bucket": buckets.index(bucket),
                "bytes": av.stat().st_size,
                "sha256": _sha256(av),
                "text": text_names,
                "text_bytes": {captioner: (root / text).stat().st_size for captioner, text in text_names.items()},
                "text_sha256": {captioner: _sha256(root / text) for captioner, text in text_names.items()},
            }
        )
    if len(set(rows["key"])) != len(rows["key"]):
        twice = sorted(key.decode() for key, count in Counter(rows["key"]).items() if count > 1)[:3]
        raise DataError(f"{root}: keys occur more than once: {', '.join(twice)}; prepare the dataset again")
    empty_record = {"bytes": (root / EMPTY_TEXT).stat().st_size, "sha256": _sha256(root / EMPTY_TEXT)}
    hashes = [[shard["sha256"], sorted(shard["text_sha256"].items())] for shard in shards] + [empty_record["sha256"]]
    record = {
        "format": FORMAT,
        "samples": len(rows["key"]),
        "buckets": buckets,
        "captioners": captioners,
        "text_dim": empty.shape[-1],
        "encoders": encoders,
        "empty_text": empty_record,
        "shards": shards,
        "columns": sorted(rows),
        "fingerprint": hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
    }
    _write(root, rows, record)
    return DatasetIndex.open(root)


def _scan(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Members of a tar: key -> kind (safetensors, json) -> (offset of the data, size)."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                if kind in members.setdefault(key, {}):
                    raise DataError(f"{path}: {member.name} occurs twice; prepare the dataset again")
                members[key][kind] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} can't be read ({error}); restore it or prepare the dataset again") from error
    for key, kinds in members.items():
        if set(kinds) != {"safetensors", "json"} or len(key) > 24:
            raise DataError(
                f"{path}: sample {key!r} has members {sorted(kinds)}, expected json and safetensors and a key "
                "of at most 24 characters; prepare the dataset again"
            )
    if not members:
        raise DataError(f"{path} is empty; delete it or prepare the dataset again")
    return members


def _append(rows: dict[str, list[Any]], column: str, path: Path, places: list[tuple[int, int] | None]) -> None:
    with open(path, "rb") as file:
        for place in places:
            assert place is not None  # _scan has checked it
            file.seek(place[0])
            rows.setdefault(f"{column}_offset", []).append(place[0])
            rows.setdefault(f"{column}_size", []).append(place[1])
            rows.setdefault(f"{column}_crc", []).append(zlib.crc32(file.read(place[1])))


def _read_metas(path: Path, places: list[tuple[int, int]]) -> list[dict[str, Any]]:
    metas = []
    with open(path, "rb") as file:
        for offset, size in places:
            file.seek(offset)
            try:
                meta = json.loads(file.read(size))
                Bucket.from_dict(meta["bucket"])
            except (ValueError, KeyError, TypeError) as error:
                message = f"{path}: a sample's json has no valid bucket ({error}); prepare the dataset again"
                raise DataError(message) from error
            metas.append(meta)
    return metas


def _write(root: Path, rows: dict[str, list[Any]], record: dict[str, Any]) -> None:
    final, temporary = root / "index", root / "index.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, values in rows.items():
        kind = "S24" if name == "key" else np.uint64 if name.endswith(("_offset", "_size")) else np.uint32
        with open(temporary / f"{name}.npy", "wb") as file:
            np.save(file, np.array(values, dtype=kind), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    with open(temporary / "dataset.json", "wb") as file:
        file.write(encode_json(record))
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)  # a kill between here and the rename loses an index that the tars give back
    os.rename(temporary, final)


def _parse_text(data: bytes, dim: int) -> Tensor:
    try:
        text = load(data)["text"]
    except Exception as error:  # safetensors raises its own class
        raise ValueError(f"does not parse ({type(error).__name__}: {error})") from error
    if text.ndim != 2 or text.shape[1] != dim or text.shape[0] == 0 or text.dtype != torch.bfloat16:
        raise ValueError(f"holds text {tuple(text.shape)} {text.dtype}, expected [L, {dim}] bfloat16")
    if not bool(torch.isfinite(text).all()):
        raise ValueError("NaN or inf in text")
    return text


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()


def _retry(read: Callable[[], T], place: str) -> T:
    """Read errors of a file system are mostly transient; the last attempt stops the job, no sample is lost."""
    for attempt in range(len(RETRY_WAITS) + 1):
        try:
            return read()
        except OSError as error:
            if attempt == len(RETRY_WAITS):
                message = (
                    f"{place} can't be read after {attempt + 1} attempts ({error}); check the file system, then resume"
                )
                raise DataError(message) from error
            time.sleep(RETRY_WAITS[attempt])
    raise AssertionError("unreachable")
