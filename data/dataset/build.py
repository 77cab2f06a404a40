"""Builds the index of a dataset from its shards (data/index.py is the program).

The rows of an index come from stored parts (data.dataset.rows): those that were written along with the shards, or those
that are read back from the tars. Putting them together needs the memory of one part, and gives the same bytes either
way.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.durable import recover_folder, replace_folder
from core.locks import lock_when_free
from data.dataset.checksum import FORMAT, sha256
from data.dataset.columns import BLOCK, ColumnWriter, digest_file, hash_keys
from data.dataset.index import DatasetIndex
from data.dataset.record import (
    CAPTIONERS,
    DATASET,
    EMPTY_TEXT,
    INDEX,
    PLAIN_NAME,
    fingerprint,
    read_captioners,
    seal,
    text_fingerprint,
)
from data.dataset.rows import AV, Rows, column, dtype_of, join, load_files, load_rows, merge_encoders, save_rows
from data.dataset.scan import read_rows
from data.dataset.selection import chunks
from data.dataset.shards import write_captioners
from data.dataset.tensors import load_tensors
from data.errors import DataError

UNFINISHED = "index.tmp"  # becomes the index
SCANNED = ".index-rows"  # what was read from the tars, until the index is there
ROWS_A_PART = 1 << 16


def write_index(root: Path) -> None:
    """Scan the shards in `root` and write `root/index` (atomically, replacing an old one).

    DataError when there are no shards, a tar doesn't parse or holds anything unsafe (see data.dataset.scan), the
    columns of text don't hold the same keys in the same order, a shard mixes buckets, or a key occurs twice.
    """
    numbers = sorted(path.name[3:-4] for path in root.glob("av-*.tar") if path.name[3:-4].isdigit())
    if not numbers:
        raise DataError(f"{root} holds no shards (av-000000.tar, ...); make them with `mova prepare`")
    own, added = _captioners(root, numbers[0])
    _text_dim(root)  # before the tars are read, which takes long
    folder = root / SCANNED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        columns = [AV, *(f"text-{captioner}" for captioner in [*own, *added])]
        parts = {name: _scan(root, folder, name, numbers) for name in columns}
        assemble(root, parts, own)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _captioners(root: Path, number: str) -> tuple[list[str], list[str]]:
    """Own and added captioners; without captioners.json all that there are belong to the dataset itself."""
    found = sorted(path.name[5 : -5 - len(number)] for path in root.glob(f"text-*-{number}.tar"))
    stated = read_captioners(root)
    if stated is None:
        return found, []
    own, added = stated
    for captioner in sorted(set(found) - {*own, *added}):
        print(f"{root}: captions by {captioner} are left out: they are unfinished, {CAPTIONERS} does not list them")
    return own, added


def _scan(root: Path, folder: Path, column: str, numbers: Sequence[str]) -> list[Path]:
    """Store the rows of all tars of one kind, some shards a part."""
    paths: list[Path] = []
    parts: list[Rows] = []
    for number in numbers:
        parts.append(read_rows(root / f"{column}-{number}.tar", column))
        if sum(map(len, parts)) >= ROWS_A_PART or number == numbers[-1]:
            paths.append(folder / f"{column}.{len(paths)}.npz")
            save_rows(paths[-1], join(parts))
            parts = []
    return paths


def assemble(root: Path, parts: Mapping[str, Sequence[Path]], own: Sequence[str]) -> None:
    """Put stored rows together to `root/index` (atomically, replacing an old one).

    parts: files of save_rows in the order of the shards, for "av" and each "text-<captioner>", own captioners first.
    DataError when they don't fit each other, or a key occurs twice.
    """
    text_dim = _text_dim(root)
    shards, buckets, encoders = _shards(parts[AV])
    starts = np.cumsum([0, *(shard["samples"] for shard in shards)])
    with _locked(root), _unfinished(root) as folder:
        written = _write_columns(folder, parts[AV], int(starts[-1]))
        writer = ColumnWriter(folder / "shard.npy", dtype_of("shard"), int(starts[-1]))
        for number, shard in enumerate(shards):
            writer.append(np.full(shard["samples"], number, np.uint32))
        written["shard"] = writer.close()
        _refuse_twice(root, folder / "key.npy")
        captioners = [name.removeprefix("text-") for name in parts if name != AV]
        for captioner in captioners:
            written |= _add_text(root, folder, shards, captioner, parts[f"text-{captioner}"])
        empty = root / EMPTY_TEXT
        record: dict[str, Any] = {
            "format": FORMAT,
            "samples": int(starts[-1]),
            "buckets": buckets,
            "captioners": captioners,
            "own_captioners": list(own),
            "text_dim": text_dim,
            "encoders": encoders,
            "empty_text": {"bytes": empty.stat().st_size, "sha256": sha256(empty)},
            "shards": shards,
            "text_fingerprint": {},
        }
        _close(root, folder, record, written)


def add_captioner(root: Path, captioner: str, parts: Sequence[Path] = ()) -> None:
    """Enter a further captioner's finished tars (`text-<captioner>-*.tar`) into the index of a finished dataset.

    parts: files of save_rows in the order of the shards, as TextTar gives them; without them the tars are read. The
    dataset's fingerprint and the order of its samples stay; the index is replaced in one step, and who has it open
    keeps the one before. Nothing happens when the same captions are there already. DataError when the captioner is the
    dataset's own, has other captions there, or its tars don't hold the keys of the shards in their order.
    """
    if not PLAIN_NAME.fullmatch(captioner):
        raise DataError(f"captioner {captioner!r}: use letters, digits and . _ + = -")
    recover_folder(root / INDEX)
    record = DatasetIndex.open(root, check_files=False).record
    keep_own(root)
    numbers = [shard["name"][3:-4] for shard in record["shards"]]
    scanned = root / SCANNED
    try:
        if not parts:
            shutil.rmtree(scanned, ignore_errors=True)
            scanned.mkdir()
            parts = _scan(root, scanned, f"text-{captioner}", numbers)
        with _locked(root), _unfinished(root) as folder:
            index = DatasetIndex.open(root, check_files=False)  # as it is now that nobody else changes it
            record = {name: value for name, value in index.record.items() if name != "sha256"}
            if _is_there(root, record, captioner, parts):
                return
            written = _link_columns(root / INDEX, folder, record)
            written |= _add_text(root, folder, record["shards"], captioner, parts)
            own, added = read_captioners(root) or (record["captioners"], [])
            record |= {"format": FORMAT, "own_captioners": own, "captioners": [*record["captioners"], captioner]}
            record["text_fingerprint"] = {}
            write_captioners(root, own, list(dict.fromkeys([*added, captioner])))
            _close(root, folder, record, written)
    finally:
        shutil.rmtree(scanned, ignore_errors=True)


def keep_own(root: Path) -> None:
    """State in captioners.json whose captions are the dataset's own; to be called before tars of others appear."""
    if read_captioners(root) is None:
        write_captioners(root, DatasetIndex.open(root, check_files=False).own_captioners, [])


def _is_there(root: Path, record: dict[str, Any], captioner: str, parts: Sequence[Path]) -> bool:
    if captioner not in record["captioners"]:
        return False
    new = [file["sha256"] for path in parts for file in load_files(path)[0]]
    if new == [shard["text_sha256"][captioner] for shard in record["shards"]]:
        return True
    raise DataError(f"dataset {root} has other captions by {captioner!r} already; give the new ones another name")


def _shards(parts: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """The shards as dataset.json lists them, the buckets, and the encoders."""
    shards: list[dict[str, Any]] = []
    buckets: list[dict[str, Any]] = []
    encoders: dict[str, str] = {}
    for path in parts:
        for file in load_files(path)[0]:
            bucket = file.pop("bucket")
            if bucket not in buckets:
                buckets.append(bucket)
            merge_encoders(file["name"], file.pop("encoders"), encoders)
            if shards and file["name"] <= shards[-1]["name"]:
                raise DataError(f"{path} lists {file['name']} after {shards[-1]['name']}: its parts are out of order")
            shards.append(file | {"bucket": buckets.index(bucket), "text": {}, "text_bytes": {}, "text_sha256": {}})
    return shards, buckets, encoders


def _write_columns(
    folder: Path, parts: Sequence[Path], rows: int, but: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Write all columns of these parts (`but`: except these) to a folder. Returns what is recorded of each."""
    names = sorted({name for path in parts for name in load_files(path)[1]} - set(but))
    writers = {name: ColumnWriter(folder / f"{name}.npy", dtype_of(name), rows) for name in names}
    for path in parts:
        part = load_rows(path)
        for name, writer in writers.items():
            writer.append(column(part, name))
    return {name: writer.close() for name, writer in writers.items()}


def _add_text(
    root: Path, folder: Path, shards: list[dict[str, Any]], captioner: str, parts: Sequence[Path]
) -> dict[str, dict[str, Any]]:
    """Write a captioner's columns and enter its files into the shards."""
    number, rows = 0, sum(shard["samples"] for shard in shards)
    keys = _keys(folder / "key.npy", rows)
    for path in parts:
        part = load_rows(path)
        first = 0
        for file in part.files:
            end = first + file["samples"]
            shard: dict[str, Any] = shards[number] if number < len(shards) else {"name": "no shard", "samples": -1}
            expected = f"text-{captioner}-{shard['name'][3:]}"
            same = file["samples"] == shard["samples"] and file["name"] == expected
            if not same or not np.array_equal(part.columns["key"][first:end], keys(end - first)):
                raise DataError(
                    f"{root / file['name']} does not hold the keys of {shard['name']} in the same order; "
                    "caption it again"
                )
            for kind in ("name", "bytes", "sha256"):
                shard["text" if kind == "name" else f"text_{kind}"][captioner] = file[kind]
            number, first = number + 1, end
    if number != len(shards):
        raise DataError(f"{root}: captions by {captioner} end before shard {shards[number]['name']}; finish them first")
    return _write_columns(folder, parts, rows, but=["key"])


def _keys(path: Path, rows: int) -> Callable[[int], np.ndarray]:
    """A function that gives the next keys of a column: read, not mapped, or all would count as memory here."""
    width = dtype_of("key").itemsize
    offset = path.stat().st_size - rows * width

    def take(count: int) -> np.ndarray:
        nonlocal offset
        found = np.fromfile(path, dtype_of("key"), count, offset=offset)
        offset += count * width
        return found

    return take


def _link_columns(index: Path, folder: Path, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Give the columns of an index a second name in a new one, verified."""
    written = {}
    for name in record["columns"]:
        source = index / f"{name}.npy"
        written[name] = digest_file(source)
        if written[name]["sha256"] != record["column_sha256"][name]:
            raise DataError(
                f"index/{source.name} of {index.parent} is damaged; rebuild it: mova index dir={index.parent}"
            )
        try:
            os.link(source, folder / source.name)
        except OSError:  # a file system without such links
            shutil.copyfile(source, folder / source.name)
    return written


def _close(root: Path, folder: Path, record: dict[str, Any], written: dict[str, dict[str, Any]]) -> None:
    """Write dataset.json and give the folder its name."""
    record |= {
        "columns": sorted(written),
        "column_sha256": {name: found["sha256"] for name, found in written.items()},
        "column_bytes": {name: found["bytes"] for name, found in written.items()},
        "column_xxh3": {name: found["xxh3"] for name, found in written.items()},
        "column_block": BLOCK,
        "text_fingerprint": {name: text_fingerprint(record, name) for name in record["captioners"]},
    }
    record["fingerprint"] = fingerprint(record)
    with open(folder / DATASET, "wb") as file:
        file.write(seal(record))
        file.flush()
        os.fsync(file.fileno())
    replace_folder(folder, root / INDEX)


@contextlib.contextmanager
def _unfinished(root: Path) -> Iterator[Path]:
    folder = root / UNFINISHED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process at a time changes the index of a dataset."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        lock_when_free(descriptor)
        yield
    finally:
        os.close(descriptor)


def _text_dim(root: Path) -> int:
    empty = root / EMPTY_TEXT
    if not empty.is_file():
        raise DataError(f"{empty} is missing; prepare the dataset again")
    try:
        return int(load_tensors(empty.read_bytes())["text"].shape[-1])
    except (ValueError, KeyError) as error:
        raise DataError(f"{empty} holds no text ({error}); prepare the dataset again") from error


def _refuse_twice(root: Path, path: Path) -> None:
    """By a 64-bit hash of each key first: sorting the keys themselves takes the memory of all of them, twice."""
    keys = np.load(path, mmap_mode="r")
    hashes = np.empty(len(keys), np.uint64)
    for start, part in chunks(keys):
        hashes[start : start + len(part)] = hash_keys(part)
    hashes.sort()
    again = hashes[1:][hashes[1:] == hashes[:-1]]
    if not len(again):
        return
    suspects = np.concatenate([part[np.isin(hash_keys(part), again)] for _, part in chunks(keys)])
    names, counts = np.unique(suspects, return_counts=True)
    if twice := [name.decode() for name in names[counts > 1][:3].tolist()]:
        raise DataError(f"{root}: keys occur more than once: {', '.join(twice)}; prepare the dataset again")


def build_index(root: Path | str) -> DatasetIndex:
    """Scan the shards in `root` and write `root/index`; see data.dataset.build.write_index."""

    write_index(Path(root))
    return DatasetIndex.open(root)
