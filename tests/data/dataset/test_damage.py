"""A damaged index is refused with the name of its file: every byte of every file, small and large, format 2 and 3."""

import json
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data.dataset.columns
from data.clip import Bucket
from data.dataset.index import DatasetIndex
from data.dataset.selection import Rule, Selection
from data.errors import DamagedSample, DataError
from data.inspect import InspectConfig, inspect
from tests.shards import make_dataset

BOTH = Bucket(frames=2, height=2, width=3, audio_steps=5, fps=24.0, has_video=True, has_audio=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("damage") / "set", [(BOTH, 4), (BOTH, 3)])


def as_format_2(root: Path) -> None:
    """The index as it was written before: CRC-32, one SHA-256 a column, nothing else."""
    index = DatasetIndex.open(root)
    record, folder = dict(index.record), root / "index"
    columns = {name: np.array(values) for name, values in index.columns.items()}
    for member in ("av", "json", "text-plain"):
        del columns[f"{member}_xxh3"]
        sums = []
        for row in range(len(index)):
            shard = index.shards[index.shard_of(row)]
            tar = (root / (shard["text"]["plain"] if member == "text-plain" else shard["name"])).read_bytes()
            offset, size = int(columns[f"{member}_offset"][row]), int(columns[f"{member}_size"][row])
            sums.append(zlib.crc32(tar[offset : offset + size]))
        columns[f"{member}_crc"] = np.array(sums, np.uint32)
    del columns["text-plain_absent"]
    shutil.rmtree(folder)
    folder.mkdir()
    for name, values in columns.items():
        np.save(folder / f"{name}.npy", values)
    record = {
        name: record[name]
        for name in ("samples", "buckets", "captioners", "text_dim", "encoders", "empty_text", "shards", "fingerprint")
    }
    record |= {"format": 2, "columns": sorted(columns)}
    record["column_sha256"] = {name: sha256(folder / f"{name}.npy") for name in columns}
    (folder / "dataset.json").write_text(json.dumps(record))


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture(params=[2, 3])
def root(whole: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    shutil.copytree(whole, tmp_path / "set")
    if request.param == 2:
        as_format_2(tmp_path / "set")
    return tmp_path / "set"


def refused(root: Path, name: str) -> None:
    """Opening names the file and what to do; inspect finds it."""
    with pytest.raises(DataError, match=re.escape(f"index/{name}")) as caught:
        DatasetIndex.open(root)
    assert f"mova index dir={root}" in str(caught.value)
    try:
        found = inspect(InspectConfig(dir=str(root), verify=True, samples=0))
    except DataError as error:
        found = [str(error)]
    assert any(f"index/{name}" in message for message in found)


def test_format_2_is_read_as_before(whole: Path, root: Path) -> None:
    index, now = DatasetIndex.open(root), DatasetIndex.open(whole)
    assert index.fingerprint == now.fingerprint and index.captioners == index.own_captioners == ["plain"]
    for row in range(7):
        assert (index.read_clip(row).video == now.read_clip(row).video).all()  # type: ignore[union-attr]
    assert inspect(InspectConfig(dir=str(root), verify=True)) == []
    flip(root / "av-000000.tar", int(index.columns["av_offset"][1]) + 300)
    with pytest.raises(DamagedSample, match="checksum"):
        DatasetIndex.open(root).read_clip(1)


def test_a_flipped_bit_anywhere_in_a_column_is_refused(root: Path) -> None:
    for path in sorted((root / "index").glob("*.npy")):
        good = path.read_bytes()
        places = {0, 6, 9, 20, len(good) // 2, 125, 127, 128, len(good) - 1}
        for place in sorted(places):
            flip(path, place, place % 8)
            refused(root, path.name)
            path.write_bytes(good)
    DatasetIndex.open(root)


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "missing", "swapped", "another type"])
def test_a_column_that_is_another_file_is_refused(root: Path, damage: str) -> None:
    path = root / "index" / "av_offset.npy"
    content = path.read_bytes()
    actions: dict[str, Callable[[], object]] = {
        "cut": lambda: path.write_bytes(content[:-8]),
        "longer": lambda: path.write_bytes(content + bytes(8)),
        "empty": lambda: path.write_bytes(b""),
        "missing": path.unlink,
        "swapped": lambda: shutil.copy(root / "index" / "av_size.npy", path),
        "another type": lambda: np.save(path, np.load(path).astype(np.int64)),
    }
    actions[damage]()
    refused(root, "av_offset.npy")


def test_every_byte_of_dataset_json_counts(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    shutil.copytree(whole, root)
    path = root / "index" / "dataset.json"
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        flip(path, place, place % 7)
        with pytest.raises(DataError, match=r"index/dataset.json|the index of"):
            DatasetIndex.open(root)
        path.write_bytes(good)


def test_a_fingerprint_of_another_dataset_is_refused(root: Path) -> None:
    path = root / "index" / "dataset.json"
    record = json.loads(path.read_bytes())
    record["shards"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="index/dataset.json"):
        DatasetIndex.open(root)
    record["shards"][1]["sha256"], record["fingerprint"] = record["shards"][0]["sha256"], "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="index/dataset.json"):
        DatasetIndex.open(root)


def test_large_columns_are_verified_where_they_are_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.dataset.columns, "SMALL", 0)
    flip(root / "index" / "av_offset.npy", 128)
    flip(root / "index" / "key.npy", 130)
    index = DatasetIndex.open(root)  # nothing of them is needed yet
    with pytest.raises(DataError, match="index/key.npy"):
        index.key(0)
    with pytest.raises(DataError, match="index/key.npy"):
        Selection(index, Rule.of({}, ["a key"]))
    with pytest.raises(DataError, match="index/av_offset.npy") as caught:
        index.read_clip(0)
    assert not isinstance(caught.value, DamagedSample)  # the sample is well: it must not be quarantined
    index.read_text(0, "plain")


def test_blocks_are_verified_one_by_one(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 bytes: damage is seen where it is read, also where a value lies in two of them."""
    monkeypatch.setattr(data.dataset.columns, "BLOCK", 64)
    monkeypatch.setattr("data.dataset.build.BLOCK", 64)
    monkeypatch.setattr(data.dataset.columns, "SMALL", 0)
    root = make_dataset(tmp_path / "set", [(BOTH, 9)], dim=6)
    assert len(DatasetIndex.open(root).record["column_xxh3"]["key"]) == 16 * -(-(128 + 9 * 24) // 64)
    flip(root / "index" / "key.npy", 128 + 2 * 24 + 20)  # row 2 lies in blocks 2 and 3 and is damaged in the second
    index = DatasetIndex.open(root)
    assert [index.key(row) for row in (0, 1, 6, 7, 8)]
    for row in (2, 3):
        with pytest.raises(DataError, match=r"index/key.npy .* block 3"):
            index.key(row)


def test_the_program_finds_columns_that_do_not_say_what_the_tars_hold(root: Path) -> None:
    """An index that is whole, but of other content: written anew with its own checksums."""
    path = root / "index" / "av_finite.npy"
    values = np.load(path)
    values[2] = 0
    np.save(path, values)
    rewrite(root)
    DatasetIndex.open(root)
    command = [sys.executable, "-m", "data.inspect", str(root), "verify=true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "difference: index/av_finite.npy" in done.stderr and "av-000000.tar" in done.stderr


def rewrite(root: Path) -> None:
    """dataset.json for the columns as they are now."""
    from data.dataset.columns import digest_file
    from data.dataset.record import seal

    path = root / "index" / "dataset.json"
    record = json.loads(path.read_bytes())
    record.pop("sha256", None)
    for name in record["columns"]:
        found = digest_file(root / "index" / f"{name}.npy")
        record["column_sha256"][name] = found["sha256"]
        if record["format"] == 3:
            record["column_bytes"][name], record["column_xxh3"][name] = found["bytes"], found["xxh3"]
    path.write_bytes(seal(record) if record["format"] == 3 else json.dumps(record).encode())
