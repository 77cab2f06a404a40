"""The index of a dataset: where each sample lies, memory-mapped, with checksums.

A dataset is a folder of shards (`av-000000.tar`, `text-<captioner>-000000.tar`, see data.shards),
`empty-text.safetensors` and `index/`: one .npy per column, a row per sample (rows of a shard are contiguous, in the
order of its tar), and `dataset.json`. `data.build` makes it from the tars alone: a lost index costs a scan, no data.

    python -m data.index dir=DIR          # (re)builds the index of finished shards
"""

import hashlib
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from data.clip import AUDIO_CHANNELS, VIDEO_CHANNELS, Bucket, EncodedClip
from data.errors import DamagedSample, DataError, ReadError
from data.places import CACHE_BYTES, Place, Remote, find_place
from data.tensors import Entry, Source, buffer_of, is_finite, load_tensors, read_bytes, read_tensors

FORMAT = 2
EMPTY_TEXT = "empty-text.safetensors"
RETRY_WAITS = (0.2, 1.0, 3.0)  # seconds before each new attempt after a transient read error
REMOTE_WAITS = (0.5, 1.0, 3.0, 8.0, 20.0)  # the same for a remote place
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")  # of files: part of paths, addresses and commands

T = TypeVar("T")


class DatasetIndex:
    """Random access to the samples of a dataset. Make it with `open`. Threads may read at the same time."""

    def __init__(self, place: Place, record: dict[str, Any], columns: dict[str, np.ndarray], check: str = "crc"):
        self.place = place
        self.root: Path | str = place.root
        self.record = record
        self.check = check
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
            root: its folder, or the address or command of a remote one (as str, see data.places).
            cache: folder for what comes from elsewhere (default: mova-data in the user's cache folder).
            cache_bytes: what the shards in it may take. A window of shards and one more must fit, or they are fetched
                again and again. All processes that name one folder share it; the index itself isn't counted.
            verify: "crc" compares the checksum of each sample that is read; "full" also looks for NaN and inf, which
                otherwise are those found when the index was built; "none" trusts the bytes.
            timeout: seconds without a byte after which a remote read has failed.
            check_files: look at the size of every shard (of a local folder; remote ones are seen when read).

        DataError when the place is missing, has no readable index, or a shard is missing or not of the recorded size.
        """
        if verify not in ("none", "crc", "full"):
            raise DataError(f"verify is {verify!r}: choose none, crc or full")
        place = find_place(root, Path(cache) if cache is not None else None, cache_bytes, timeout)
        folder = _fetch_index(place) if isinstance(place, Remote) else _find_index(Path(place.root))
        rebuild = "rebuild it: python -m data.index dir=" + (str(place) if not place.remote else "DIR (where it lies)")
        try:
            record = json.loads((folder / "dataset.json").read_bytes())
            if record["format"] != FORMAT:
                raise DataError(f"the index of {place} has format {record['format']}, expected {FORMAT}; {rebuild}")
            check_names(record)
            columns = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)  # a memmap is slower by the row
                for name in record["columns"]
            }
            index = cls(place, record, columns, verify)
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"index of {place} is unreadable ({type(error).__name__}: {error}); {rebuild}"
            raise DataError(message) from error
        if any(len(column) != len(index) for column in columns.values()):
            raise DataError(f"index of {place} has columns of unequal length; {rebuild}")
        if check_files and not place.remote and (differences := index.size_differences()):
            more = f" ({len(differences)} such files: python -m data.inspect {root})" if len(differences) > 1 else ""
            raise DataError(differences[0] + more)
        return index

    def size_differences(self) -> list[str]:
        """One message for every file of a local dataset that is missing or has another size than recorded."""
        root, messages = Path(self.root), []
        for name, size, _ in self.recorded_files():
            found = (root / name).stat().st_size if (root / name).is_file() else None
            if found is None:
                what = "is missing"
            elif found != size:
                what = f"has {found} bytes, the index recorded {size}"
            else:
                continue
            messages.append(f"shard {name} of dataset {root} {what}; restore it or prepare the dataset again")
        return messages

    def __len__(self) -> int:
        return int(self.shard_start[-1])

    def key(self, row: int) -> str:
        """Key of sample `row` (24 hex digits)."""
        return bytes(self.columns["key"][row]).decode()

    @property
    def scores(self) -> list[str]:
        """Names of the scores that samples of this dataset have."""
        return [name.removeprefix("score-") for name in self.columns if name.startswith("score-")]

    def score(self, name: str) -> np.ndarray:
        """[rows] float32, memory-mapped: a score of every sample, NaN where it wasn't measured."""
        if name not in self.scores:
            known = ", ".join(self.scores) or "none"
            raise DataError(f"dataset {self.place} has no score {name!r}; it has: {known}")
        return self.columns[f"score-{name}"]

    def shard_of(self, row: int) -> int:
        """Number of the shard that holds `row`."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a dataset with {len(self)} samples")
        return int(np.searchsorted(self.shard_start, row, side="right")) - 1

    def bucket_of(self, row: int) -> Bucket:
        """Geometry of sample `row`."""
        return self.buckets[self.shard_bucket[self.shard_of(row)]]

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

        def parse(source: Source, offset: int, size: int, crc: int | None) -> dict[str, Any]:
            data = read_bytes(source, offset, size, crc)
            try:
                return json.loads(data)
            except ValueError as error:
                raise ValueError(f"does not parse ({error})") from error

        return self._read(row, "json", None, parse)

    def empty_text(self) -> Tensor:
        """The encoded empty prompt [L0, D] bfloat16: dropped text in training, the unconditional branch in sampling."""
        if self._empty_text is not None:
            return self._empty_text
        data = retry(lambda: b"".join(self.place.stream(EMPTY_TEXT)), self.place, EMPTY_TEXT)
        try:
            text = load_tensors(data).get("text")
            if text is None or text.ndim != 2 or text.shape[1] != self.text_dim or len(text) == 0:
                raise ValueError(f"holds no text [L, {self.text_dim}]")
            if not is_finite(text):
                raise ValueError("holds NaN or inf")
            self._empty_text = text
            return text
        except ValueError as error:
            raise DataError(f"{EMPTY_TEXT} of {self.place} {error}; prepare the dataset again") from error

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
            retry(lambda: _digest(self.place, name), self.place, name)
            if self.place.remote
            else _digest(self.place, name)
        )

    def close(self) -> None:
        """Close the shards that are held open; reading again opens them again."""
        self.place.close()

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

    def _read_av(self, row: int, video: Tensor | None, condition: Tensor | None, sound: Tensor | None) -> None:
        """Read the tensors that are given (those of the bucket), sound as stored [La, 128]."""
        expected = {
            name: t for name, t in (("video", video), ("condition", condition), ("audio", sound)) if t is not None
        }
        stored = 0  # frames of the condition: its constant tail isn't stored

        def targets(entries: dict[str, Entry]) -> list[memoryview]:
            nonlocal stored
            shapes = {name: entry.shape for name, entry in entries.items()}
            wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
            if condition is not None and len(shape := shapes.get("condition", ())) == 4:
                stored = shape[1]
                if 1 <= stored <= condition.shape[1]:
                    wanted["condition"] = (condition.shape[0], stored, *condition.shape[2:])
            if shapes != wanted:
                raise ValueError(f"holds tensors {shapes}, its bucket says {wanted}")
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

        def fill(source: Source, offset: int, size: int, crc: int | None) -> None:
            read_tensors(source, offset, size, crc, targets)
            if condition is not None and stored < condition.shape[1]:
                condition[:, stored:] = condition[:, stored - 1 : stored]
            self._refuse_not_finite(row, "av", expected)  # of whole tensors: before, the tail holds anything

        self._read(row, "av", None, fill)

    def _read_text(self, row: int, captioner: str, padded: Tensor | None) -> Tensor:
        """Read a caption's embedding into `padded` [length, D], or into a new tensor [L, D]."""
        if captioner not in self.captioners:
            raise DataError(f"dataset {self.place} has no captioner {captioner!r}; it has {', '.join(self.captioners)}")
        text = torch.empty(0)

        def targets(entries: dict[str, Entry]) -> list[memoryview]:
            nonlocal text
            shapes = {name: entry.shape for name, entry in entries.items()}
            shape = shapes.get("text", ())
            if len(shapes) != 1 or len(shape) != 2 or shape[1] != self.text_dim or shape[0] == 0:
                raise ValueError(f"holds tensors {shapes}, expected text [L, {self.text_dim}]")
            text = torch.empty(shape, dtype=torch.bfloat16) if padded is None else padded[: shape[0]]
            rest = torch.empty(shape[0] - len(text), shape[1], dtype=torch.bfloat16)  # cut off, but checked
            return [buffer_of(text), buffer_of(rest)]

        def fill(source: Source, offset: int, size: int, crc: int | None) -> None:
            read_tensors(source, offset, size, crc, targets)
            self._refuse_not_finite(row, f"text-{captioner}", {"text": text})

        self._read(row, f"text-{captioner}", captioner, fill)
        if padded is None:
            return text
        padded[len(text) :] = 0
        return padded

    def _refuse_not_finite(self, row: int, column: str, tensors: dict[str, Tensor]) -> None:
        if self.check == "full" or not self.columns[f"{column}_finite"][row]:
            for name, tensor in tensors.items():
                if not is_finite(tensor):
                    raise ValueError(f"NaN or inf in {name}")

    def _read(
        self, row: int, column: str, captioner: str | None, read: Callable[[Source, int, int, int | None], T]
    ) -> T:
        """Let `read` (source, offset, size, checksum) read one member; it raises ValueError for wrong bytes.

        They are read twice before they count as damage: the first time, they may have been damaged on their way.
        """
        shard = self.shards[self.shard_of(row)]
        name, length, digest = shard["name"], shard["bytes"], shard["sha256"]
        if captioner is not None:
            name, length, digest = (shard[kind][captioner] for kind in ("text", "text_bytes", "text_sha256"))
        offset, size, recorded = (int(self.columns[f"{column}_{what}"][row]) for what in ("offset", "size", "crc"))
        crc = recorded if self.check != "none" else None
        if size == 0:
            raise DamagedSample(self.key(row), name, f"{column} has length zero")

        def attempt() -> T:
            with self.place.source(name, length, digest) as source:
                return read(source, offset, size, crc)

        for last in (False, True):
            try:
                return retry(attempt, self.place, name)
            except ValueError as error:
                if last:
                    raise DamagedSample(self.key(row), name, f"{column} {error}") from error
                self.place.forget(name, digest)
        raise AssertionError("unreachable")


def build_index(root: Path | str) -> DatasetIndex:
    """Scan the shards in `root` and write `root/index`; see data.build.write_index."""
    from data.build import write_index

    write_index(Path(root))
    return DatasetIndex.open(root)


def check_names(record: dict[str, Any]) -> None:
    """ValueError when a file name in an index could lead out of its folder or be taken for an option."""
    names = [*record["columns"], *record["captioners"]]
    for shard in record["shards"]:
        names += [shard["name"], *shard["text"].values()]
    for name in names:
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no plain file name")


def retry(read: Callable[[], T], place: Place, name: str) -> T:
    """Read errors are mostly transient; the last attempt stops the job with DataError, and no sample is lost."""
    waits = REMOTE_WAITS if place.remote else RETRY_WAITS
    for wait in (*waits, None):
        try:
            return read()
        except OSError as error:
            if wait is None:
                remedy = "check the line and the store" if place.remote else "check the file system"
                raise ReadError(
                    f"{name} of {place} can't be read after {len(waits) + 1} attempts ({error}); {remedy}, then resume"
                ) from error
            time.sleep(wait)
    raise AssertionError("unreachable")


def _find_index(root: Path) -> Path:
    if not root.is_dir():
        raise DataError(
            f"dataset folder {root} does not exist; make it: python -m data.prepare source=... output={root}"
        )
    path = root / "index" / "dataset.json"
    if not path.is_file():
        nested = sorted(entry.parent.parent.name for entry in root.glob("*/index/dataset.json"))
        hint = f"make it: python -m data.index dir={root}" if any(root.glob("av-*.tar")) else ""
        hint = hint or "make it: python -m data.prepare source=... output=..."
        hint = f"did you mean one of its folders {', '.join(nested)}?" if nested else hint
        raise DataError(f"{root} has no index ({path} is missing): it is empty or was not finished; {hint}")
    return path.parent


def _fetch_index(place: Remote) -> Path:
    """The index of a remote dataset, fetched once for all processes that share the cache."""
    described = retry(lambda: b"".join(place.stream("index/dataset.json")), place, "index/dataset.json")
    try:
        record = json.loads(described)
        check_names(record)
        columns = {name: record["column_sha256"][name] for name in record["columns"]}
    except (ValueError, KeyError, TypeError) as error:
        message = (
            f"index/dataset.json of {place} is unreadable ({type(error).__name__}: {error}); build the index again"
        )
        raise DataError(message) from error

    def write(target: Path) -> None:
        def save(name: str) -> None:
            retry(lambda: _save(place, name, columns[name], target), place, f"index/{name}.npy")

        with ThreadPoolExecutor(4) as pool:  # small files: most of the time is waiting for the first byte
            list(pool.map(save, columns))
        (target / "dataset.json").write_bytes(described)

    return place.cache.folder_of(f"index-{hashlib.sha256(described).hexdigest()[:32]}", write)


def _save(place: Place, name: str, digest: str, folder: Path) -> None:
    found = hashlib.sha256()
    with open(folder / f"{name}.npy", "wb") as file:
        for part in place.stream(f"index/{name}.npy"):
            found.update(part)
            file.write(part)
    if found.hexdigest() != digest:
        raise OSError(
            "its bytes have another SHA-256 than dataset.json says: it is being replaced, or broke on its way"
        )


def _digest(place: Place, name: str) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    for part in place.stream(name):
        size += len(part)
        digest.update(part)
    return size, digest.hexdigest()


if __name__ == "__main__":
    from data.build import main

    main()
