"""The index of a dataset: where each sample lies, memory-mapped, with checksums.

A dataset is a folder of shards (`av-000000.tar`, `text-<captioner>-000000.tar`, see data.dataset.shards),
`empty-text.safetensors` and `index/`: one .npy per column, a row per sample (rows of a shard are contiguous, in the
order of its tar), and `dataset.json`. `data.dataset.build` makes it from the tars alone: a lost index costs a scan, no
data.
"""

import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.clip import AUDIO_CHANNELS, VIDEO_CHANNELS, Bucket, EncodedClip
from data.dataset.checksum import CRC, XXH3, ChecksumKind, Recorded
from data.dataset.columns import Column, Columns
from data.dataset.record import DATASET, EMPTY_TEXT, INDEX, own_captioners, rebuild, unseal
from data.dataset.tensors import TensorEntry, buffer_of, is_finite, load_tensors, read_bytes, read_tensors
from data.errors import DamagedSample, DataError, MissingData
from data.storage.retry import retried
from data.storage.source import ByteSource
from data.storage.storage import CACHE_BYTES, Remote, Storage, find_storage

CHECK_MOUNT = "check the mount and the permissions"
REPLACED = 2.0  # seconds in which a folder is replaced

T = TypeVar("T")


class DatasetIndex:
    """Random access to the samples of a dataset. Make it with `open`. Threads may read at the same time."""

    def __init__(self, storage: Storage, record: dict[str, Any], columns: Columns, check: str = "crc"):
        self.storage = storage
        self.root: Path | str = storage.root
        self.record = record
        self.check = check
        self.shards: list[dict[str, Any]] = record["shards"]
        self.fingerprint: str = record["fingerprint"]
        self.buckets = [Bucket.from_dict(values) for values in record["buckets"]]
        self.captioners: list[str] = record["captioners"]  # the dataset's own first
        self.own_captioners = own_captioners(record)  # whose captions are part of the fingerprint
        self.text_fingerprints: dict[str, str] = record.get("text_fingerprint", {})  # by captioner
        self.text_dim: int = record["text_dim"]
        self.encoders: dict[str, str] = record["encoders"]
        self.shard_bucket = np.array([shard["bucket"] for shard in self.shards], dtype=np.int64)  # [S]
        self.shard_start = np.zeros(len(self.shards) + 1, dtype=np.int64)  # [S + 1] first row of each shard
        np.cumsum([shard["samples"] for shard in self.shards], out=self.shard_start[1:])
        if len(self) != record["samples"]:
            raise ValueError(f"its shards have {len(self)} samples, it records {record['samples']}")
        self.columns: Mapping[str, np.ndarray] = columns  # whole ones, verified
        self._at: Callable[[str], Column] = columns.at  # by the row
        self._kinds = {name: XXH3 if f"{name}_xxh3" in columns else CRC for name in self._members()}
        self._empty_text: Tensor | None = None

    @classmethod
    def open(
        cls,
        root: Path | str,
        *,
        cache: Path | str | None = None,
        cache_bytes: int = CACHE_BYTES,
        verify: Literal["none", "crc", "full"] = "crc",
        timeout: float = 60.0,
        check_files: bool = True,
    ) -> "DatasetIndex":
        """Open a dataset.

        Args:
            root: its folder, or the address or command of a remote one (as str, see data.storage).
            cache: folder for what comes from elsewhere (default: mova-data in the user's cache folder).
            cache_bytes: what the shards in it may take. A window of shards and one more must fit, or they are fetched
                again and again. All processes that name one folder share it; the index itself isn't counted.
            verify: "crc" compares the checksum of each sample that is read; "full" also looks for NaN and inf, which
                otherwise are those found when the index was built; "none" trusts the bytes.
            timeout: seconds after which a remote read that gets no byte, or too few, has failed (see data.storage.web).
            check_files: look at the size of every shard (of a local folder; remote ones are seen when read).

        DataError when the index is damaged or a shard not of the recorded size; MissingData when the folder, its index
        or a shard is not there or cannot be opened.
        """
        if verify not in ("none", "crc", "full"):
            raise DataError(f"verify is {verify!r}: choose none, crc or full")
        storage = find_storage(root, Path(cache) if cache is not None else None, cache_bytes, timeout)
        try:
            folder = _fetch_index(storage) if isinstance(storage, Remote) else _find_index(Path(storage.root))
        except OSError as error:
            raise MissingData(f"dataset {storage} can't be opened: {error}; {CHECK_MOUNT}") from error
        where = str(storage)
        remedy = f"delete {folder}, so that it is fetched again" if storage.remote else rebuild(where)
        try:
            record = unseal((folder / DATASET).read_bytes(), where, remedy)
            columns = Columns.open(folder, record, where, remedy)
            index = cls(storage, record, columns, verify)
        except OSError as error:
            raise MissingData(f"index/{DATASET} of {storage} can't be read: {error}; {CHECK_MOUNT}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = (
                f"index/{DATASET} of {storage} is unreadable ({type(error).__name__}: {error}); {rebuild(str(storage))}"
            )
            raise DataError(message) from error
        if check_files:
            columns.verify_small()
        if check_files and not storage.remote:
            index.check_sizes()
        return index

    def check_sizes(self) -> None:
        """MissingData, or DataError, when a file of a local dataset is missing, or has another size than recorded."""
        missing, differing = self._absent_and_differing()
        if found := missing + differing:
            more = f" ({len(found)} such files: mova inspect {self.root})" if len(found) > 1 else ""
            raise (MissingData if missing else DataError)(found[0] + more)

    def size_differences(self) -> list[str]:
        """One message for every file of a local dataset that is missing or has another size than recorded."""
        missing, differing = self._absent_and_differing()
        return missing + differing

    def _absent_and_differing(self) -> tuple[list[str], list[str]]:
        root = str(self.root)
        missing: list[str] = []
        differing: list[str] = []
        for name, size, _ in self.recorded_files():
            messages, remedy = missing, "restore it or prepare the dataset again"
            try:
                found = os.stat(f"{root}/{name}")
            except FileNotFoundError:
                what = "is missing"
            except OSError as error:
                what, remedy = f"can't be looked at ({error.strerror})", CHECK_MOUNT
            else:
                if not stat.S_ISREG(found.st_mode):
                    what = "is missing"
                elif found.st_size != size:
                    messages, what = differing, f"has {found.st_size} bytes, the index recorded {size}"
                else:
                    continue
            messages.append(f"shard {name} of dataset {root} {what}; {remedy}")
        return missing, differing

    def column_differences(self) -> list[str]:
        """One message for every column of the index whose bytes are not those that were written."""
        assert isinstance(self.columns, Columns)
        return self.columns.differences()

    def __len__(self) -> int:
        return int(self.shard_start[-1])

    def key(self, row: int) -> str:
        """Key of sample `row` (24 hex digits)."""
        return bytes(self._at("key")[row]).decode()

    @property
    def scores(self) -> list[str]:
        """Names of the scores that samples of this dataset have."""
        return [name.removeprefix("score-") for name in self.columns if name.startswith("score-")]

    def score(self, name: str) -> np.ndarray:
        """[rows] float32, memory-mapped, verified: a score of every sample, NaN where it wasn't measured."""
        if name not in self.scores:
            known = ", ".join(self.scores) or "none"
            raise DataError(f"dataset {self.storage} has no score {name!r}; it has: {known}")
        return self.columns[f"score-{name}"]

    def is_absent(self, row: int, captioner: str) -> bool:
        """Whether sample `row` has no caption by this captioner, or an empty one; no where the dataset doesn't say."""
        name = f"text-{captioner}_absent"
        return name in self.columns and bool(self._at(name)[row])

    def count_absent(self, captioner: str) -> int:
        """How many samples have no caption by this captioner, as far as the dataset says."""
        name = f"text-{captioner}_absent"
        return int(np.count_nonzero(self.columns[name])) if name in self.columns else 0

    def shard_of(self, row: int) -> int:
        """Number of the shard that holds `row`."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a dataset with {len(self)} samples")
        return int(np.searchsorted(self.shard_start, row, side="right")) - 1

    def bucket_of(self, row: int) -> Bucket:
        """Geometry of sample `row`."""
        result: Bucket = self.buckets[self.shard_bucket[self.shard_of(row)]]
        return result

    def read_into(
        self, row: int, captioner: str, *, video: Tensor, audio: Tensor, condition: Tensor, text: Tensor
    ) -> None:
        """Read sample `row` into one slot of a batch, in the model's layout; every element is written.

        video, condition: [16, T, H, W]; audio: [128, La]; text: [length, D], zeros after the caption, which is cut off
        where it is longer. All bfloat16 and contiguous (the audio needn't be). A modality that the bucket lacks becomes
        zeros. Errors as read_clip; after a DamagedSample the slot is zeros.
        """
        bucket = self.bucket_of(row)
        sound = torch.empty(bucket.audio_steps, AUDIO_CHANNELS, dtype=torch.bfloat16) if bucket.has_audio else None
        try:
            if bucket.has_video:
                self._read_av(row, video, condition, sound)
            else:
                self._read_av(row, None, None, sound)
                video.zero_()
                condition.zero_()
            if sound is None:
                audio.zero_()
            else:
                audio.copy_(sound.T)
            self._read_text(row, captioner, text)
        except DamagedSample:
            for tensor in (video, audio, condition, text):
                tensor.zero_()
            raise

    def read_clip(self, row: int) -> EncodedClip:
        """Latents and meta of sample `row`. DamagedSample when bytes are wrong, DataError when they can't be read."""
        bucket = self.bucket_of(row)
        grid = (VIDEO_CHANNELS, bucket.frames, bucket.height, bucket.width)
        video, condition = (torch.empty(grid, dtype=torch.bfloat16) if bucket.has_video else None for _ in range(2))
        sound = torch.empty(bucket.audio_steps, AUDIO_CHANNELS, dtype=torch.bfloat16) if bucket.has_audio else None
        self._read_av(row, video, condition, sound)
        return EncodedClip(self.key(row), video, sound, condition, self.read_meta(row))

    def read_text(self, row: int, captioner: str) -> Tensor:
        """Text embedding [L, D] bfloat16, unpadded, of sample `row`. Errors as read_clip."""
        return self._read_text(row, captioner, None)

    def read_meta(self, row: int) -> dict[str, Any]:
        """The json of sample `row`. Errors as read_clip."""

        def parse(source: ByteSource, offset: int, size: int, checksum: Recorded | None) -> dict[str, Any]:
            data = read_bytes(source, offset, size, checksum)
            try:
                content: dict[str, Any] = json.loads(data)
                return content
            except ValueError as error:
                raise ValueError(f"does not parse ({error})") from error

        return self._read(row, "json", None, parse)

    def empty_text(self) -> Tensor:
        """The encoded empty prompt [L0, D] bfloat16: dropped text in training, the unconditional branch in sampling."""
        if self._empty_text is not None:
            return self._empty_text
        data = _retried(lambda: b"".join(self.storage.stream(EMPTY_TEXT)), self.storage, EMPTY_TEXT)
        try:
            text = load_tensors(data).get("text")
            if text is None or text.ndim != 2 or text.shape[1] != self.text_dim or len(text) == 0:
                raise ValueError(f"holds no text [L, {self.text_dim}]")
            if not is_finite(text):
                raise ValueError("holds NaN or inf")
            self._empty_text = text
            return text
        except ValueError as error:
            raise DataError(f"{EMPTY_TEXT} of {self.storage} {error}; prepare the dataset again") from error

    def verify(self) -> list[str]:
        """Read every file in full and compare with the recorded SHA-256. One message for every difference."""
        messages = []
        for name, size, digest in self.recorded_files():
            try:
                found_size, found = self._digest(name)
            except OSError as error:
                messages.append(f"{name}: {error.strerror or error}")
                continue
            except DataError as error:
                messages.append(f"{name}: {error}")
                continue
            if found_size != size:
                messages.append(f"{name}: has {found_size} bytes, recorded {size}")
            elif found != digest:
                messages.append(f"{name}: SHA-256 is {found}, recorded {digest}")
        return messages

    def _digest(self, name: str) -> tuple[int, str]:
        return (
            _retried(lambda: _digest(self.storage, name), self.storage, name)
            if self.storage.remote
            else _digest(self.storage, name)
        )

    def close(self) -> None:
        """Close the shards that are held open; reading again opens them again."""
        self.storage.close()

    def recorded_files(self) -> list[tuple[str, int, str]]:
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

    def checksum_of(self, column: str) -> ChecksumKind:
        """The kind of the checksums of "av", "json" or "text-<captioner>" members."""
        return self._kinds[column]

    def _members(self) -> list[str]:
        """Names of the columns of members: latents, metas, texts."""
        return ["av", "json", *(f"text-{captioner}" for captioner in self.captioners)]

    def _read_av(self, row: int, video: Tensor | None, condition: Tensor | None, sound: Tensor | None) -> None:
        """Read the tensors that are given (those of the bucket), sound as stored [La, 128]."""
        expected = {
            name: t for name, t in (("video", video), ("condition", condition), ("audio", sound)) if t is not None
        }
        stored = 0  # frames of the condition: its constant tail isn't stored

        def targets(entries: dict[str, TensorEntry]) -> list[memoryview]:
            nonlocal stored
            shapes = {name: entry.shape for name, entry in entries.items()}
            wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
            if condition is not None and len(shape := shapes.get("condition", ())) == 4:
                stored = shape[1]
                if 1 <= stored <= condition.shape[1]:
                    wanted["condition"] = (condition.shape[0], stored, *condition.shape[2:])
            if shapes != wanted:
                raise ValueError(f"holds tensors {shapes}, its bucket requires {wanted}")
            buffers: list[memoryview] = []
            for name in entries:
                buffer = buffer_of(expected[name])
                if name == "condition":  # channel by channel, each to its first frames
                    channel = len(buffer) // VIDEO_CHANNELS
                    kept = channel // expected[name].shape[1] * stored
                    buffers += [buffer[c * channel : c * channel + kept] for c in range(VIDEO_CHANNELS)]
                else:
                    buffers.append(buffer)
            return buffers

        def fill(source: ByteSource, offset: int, size: int, checksum: Recorded | None) -> None:
            read_tensors(source, offset, size, checksum, targets)
            if condition is not None and stored < condition.shape[1]:
                condition[:, stored:] = condition[:, stored - 1 : stored]
            self._refuse_not_finite(row, "av", expected)  # of whole tensors: before, the tail holds anything

        self._read(row, "av", None, fill)

    def _read_text(self, row: int, captioner: str, padded: Tensor | None) -> Tensor:
        """Read a caption's embedding into `padded` [length, D], or into a new tensor [L, D]."""
        if captioner not in self.captioners:
            raise DataError(
                f"dataset {self.storage} has no captioner {captioner!r}; it has {', '.join(self.captioners)}"
            )
        text = torch.empty(0)

        def targets(entries: dict[str, TensorEntry]) -> list[memoryview]:
            nonlocal text
            shapes = {name: entry.shape for name, entry in entries.items()}
            shape = shapes.get("text", ())
            if len(shapes) != 1 or len(shape) != 2 or shape[1] != self.text_dim or shape[0] == 0:
                raise ValueError(f"holds tensors {shapes}, expected text [L, {self.text_dim}]")
            text = torch.empty(shape, dtype=torch.bfloat16) if padded is None else padded[: shape[0]]
            rest = torch.empty(shape[0] - len(text), shape[1], dtype=torch.bfloat16)  # cut off, but checked
            return [buffer_of(text), buffer_of(rest)]

        def fill(source: ByteSource, offset: int, size: int, checksum: Recorded | None) -> None:
            read_tensors(source, offset, size, checksum, targets)
            self._refuse_not_finite(row, f"text-{captioner}", {"text": text})

        self._read(row, f"text-{captioner}", captioner, fill)
        if padded is None:
            return text
        padded[len(text) :] = 0
        return padded

    def _refuse_not_finite(self, row: int, column: str, tensors: dict[str, Tensor]) -> None:
        if self.check == "full" or not self._at(f"{column}_finite")[row]:
            for name, tensor in tensors.items():
                if not is_finite(tensor):
                    raise ValueError(f"NaN or inf in {name}")

    def _read(
        self, row: int, column: str, captioner: str | None, read: Callable[[ByteSource, int, int, Recorded | None], T]
    ) -> T:
        """Let `read` (source, offset, size, checksum) read one member; it raises ValueError for wrong bytes.

        They are read twice before they count as damage: the first time, they may have been damaged on their way.
        """
        shard = self.shards[self.shard_of(row)]
        name, length, digest = shard["name"], shard["bytes"], shard["sha256"]
        if captioner is not None:
            name, length, digest = (shard[kind][captioner] for kind in ("text", "text_bytes", "text_sha256"))
        kind = self._kinds[column]
        offset, size, value = (int(self._at(f"{column}_{what}")[row]) for what in ("offset", "size", kind.name))
        checksum = Recorded(kind, value) if self.check != "none" else None
        if size == 0:
            raise DamagedSample(self.key(row), name, f"{column} has length zero")

        def attempt() -> T:
            with self.storage.source(name, length, digest) as source:
                return read(source, offset, size, checksum)

        for last in (False, True):
            try:
                return _retried(attempt, self.storage, name)
            except ValueError as error:
                if last:
                    raise DamagedSample(self.key(row), name, f"{column} {error}") from error
                self.storage.forget(name, digest)
        raise AssertionError("unreachable")


def _retried(read: Callable[[], T], storage: Storage, name: str) -> T:
    """No sample is lost to an error that passes; one that stays stops the job."""
    return retried(read, f"{name} of {storage}", storage.remote)


def _find_index(root: Path) -> Path:
    if not root.is_dir():
        raise MissingData(f"dataset folder {root} does not exist; make it: mova prepare source=... output={root}")
    path = root / INDEX / DATASET
    end = time.monotonic() + REPLACED
    while not path.is_file() and (root / f"{INDEX}.old").is_dir() and time.monotonic() < end:
        time.sleep(0.05)  # it is being replaced
    if not path.is_file():
        nested = sorted(entry.parent.parent.name for entry in root.glob("*/index/dataset.json"))
        hint = f"make it: mova index dir={root}" if any(root.glob("av-*.tar")) else ""
        hint = hint or "make it: mova prepare source=... output=..."
        hint = f"did you mean one of its folders {', '.join(nested)}?" if nested else hint
        raise MissingData(f"{root} has no index ({path} is missing): it is empty or was not finished; {hint}")
    return path.parent


def _fetch_index(storage: Remote) -> Path:
    """The index of a remote dataset, fetched once for all processes that share the cache."""
    name = f"index/{DATASET}"
    described = _retried(lambda: b"".join(storage.stream(name)), storage, name)
    try:
        record = unseal(described, str(storage), "build the index again, where it lies")
        columns = {name: record["column_sha256"][name] for name in record["columns"]}
    except (ValueError, KeyError, TypeError) as error:
        message = (
            f"index/dataset.json of {storage} is unreadable ({type(error).__name__}: {error}); build the index again"
        )
        raise DataError(message) from error

    def write(target: Path) -> None:
        def save(name: str) -> None:
            _retried(lambda: _save(storage, name, columns[name], target), storage, f"index/{name}.npy")

        with ThreadPoolExecutor(4) as pool:  # small files: most of the time is waiting for the first byte
            list(pool.map(save, columns))
        (target / DATASET).write_bytes(described)

    return storage.cache.folder_of(f"index-{hashlib.sha256(described).hexdigest()[:32]}", write)


def _save(storage: Storage, name: str, digest: str, folder: Path) -> None:
    found = hashlib.sha256()
    with open(folder / f"{name}.npy", "wb") as file:
        for part in storage.stream(f"index/{name}.npy"):
            found.update(part)
            file.write(part)
    if found.hexdigest() != digest:
        raise OSError(
            "its bytes have another SHA-256 than dataset.json records: it is being replaced, or was damaged in transfer"
        )


def _digest(storage: Storage, name: str) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    for part in storage.stream(name):
        size += len(part)
        digest.update(part)
    return size, digest.hexdigest()
