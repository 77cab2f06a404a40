"""Shards and their index: what is written is found, and every damage is told apart and named."""

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

import data.storage.retry
import data.storage.storage
from data.clip import Bucket, EncodedClip
from data.dataset.build import build_index
from data.dataset.index import DatasetIndex
from data.dataset.shards import ShardWriter, write_empty_text
from data.errors import DamagedSample, DataError

BOTH = Bucket(frames=3, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
SILENT = Bucket(frames=3, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=False)


def make(root: Path, samples: int = 7, nan_at: int | None = None) -> None:
    generator = torch.Generator().manual_seed(3)
    with ShardWriter(root, samples_per_shard=2) as writer:
        for number in range(samples):
            bucket = SILENT if number % 3 == 2 else BOTH
            video = torch.randn(16, 3, 2, 2, generator=generator)
            if number == nan_at:
                video[0, 0, 0, 0] = float("inf")
            sound = torch.randn(5, 128, generator=generator)
            condition = torch.zeros(16, 3, 2, 2)
            clip = EncodedClip(
                f"{number:024x}", video, sound if bucket.has_audio else None, condition, {"number": number}
            )
            writer.write(clip, bucket, f"caption {number}", torch.full((2 + number, 8), float(number)))
    write_empty_text(root, torch.ones(1, 8))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    make(tmp_path / "set")
    build_index(tmp_path / "set").close()
    return tmp_path / "set"


def row_of(index: DatasetIndex, number: int) -> int:
    return next(row for row in range(len(index)) if index.key(row) == f"{number:024x}")


def test_every_sample_is_found_in_its_bucket(dataset: Path) -> None:
    index = DatasetIndex.open(dataset)
    assert len(index) == 7 and index.captioners == ["builtin"] and index.text_dim == 8
    assert sorted(index.key(row) for row in range(7)) == [f"{number:024x}" for number in range(7)]
    for row in range(7):
        clip = index.read_clip(row)
        number = clip.meta["number"]
        assert index.key(row) == f"{number:024x}" and index.bucket_of(row) == (SILENT if number % 3 == 2 else BOTH)
        assert (clip.audio is None) == (number % 3 == 2)
        text = index.read_text(row, "builtin")
        assert text.shape == (2 + number, 8) and float(text[0, 0]) == number
        assert index.read_meta(row)["number"] == number
    assert index.empty_text().shape == (1, 8)
    assert index.verify() == []
    assert int(index.shard_start[-1]) == 7 and len(index.shard_bucket) == len(index.shards) == 4


def test_shards_are_reproducible_and_a_plain_webdataset(dataset: Path, tmp_path: Path) -> None:
    make(tmp_path / "again")
    assert build_index(tmp_path / "again").fingerprint == DatasetIndex.open(dataset).fingerprint
    found = list(webdataset.WebDataset(str(dataset / "av-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [f"{0:024x}", f"{1:024x}"]
    assert {"safetensors", "json"} <= set(found[0])


def test_any_change_of_content_changes_the_fingerprint(dataset: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", samples=6)
    assert build_index(tmp_path / "other").fingerprint != DatasetIndex.open(dataset).fingerprint


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "rb+") as file:
        file.seek(offset)
        file.write(data)


def test_damage_is_verified_and_named(dataset: Path) -> None:
    index = DatasetIndex.open(dataset)
    row = row_of(index, 4)
    shard = index.shards[index.shard_of(row)]["name"]
    overwrite(dataset / shard, int(index.columns["av_offset"][row]) + 300, b"\x5a\x5a\x5a\x5a")
    with pytest.raises(DamagedSample, match="checksum") as caught:
        index.read_clip(row)
    assert (caught.value.key, caught.value.shard) == (index.key(row), shard)
    assert [message.split(":")[0] for message in index.verify()] == [shard]
    for other in range(len(index)):
        if other != row:
            index.read_clip(other)


def test_damaged_text_is_named(dataset: Path) -> None:
    index = DatasetIndex.open(dataset)
    overwrite(dataset / "text-builtin-000001.tar", int(index.columns["text-builtin_offset"][2]) + 90, b"????")
    with pytest.raises(DamagedSample, match="text-builtin"):
        index.read_text(2, "builtin")
    with pytest.raises(DataError, match="captioner 'other'"):
        index.read_text(2, "other")


def test_nan_in_a_latent_is_damage(tmp_path: Path) -> None:
    make(tmp_path, nan_at=1)
    index = build_index(tmp_path)
    with pytest.raises(DamagedSample, match="NaN or inf in video"):
        index.read_clip(row_of(index, 1))


def test_a_shard_that_is_missing_or_of_another_size_is_refused(dataset: Path) -> None:
    moved = dataset / "text-builtin-000002.tar"
    moved.rename(dataset / "elsewhere")
    with pytest.raises(DataError, match="text-builtin-000002.tar .* is missing"):
        DatasetIndex.open(dataset)
    (dataset / "elsewhere").rename(moved)
    with open(dataset / "av-000001.tar", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"av-000001.tar .* bytes, the index recorded"):
        DatasetIndex.open(dataset)


def test_a_folder_that_is_missing_empty_or_not_indexed_is_refused(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        DatasetIndex.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no index"):
        DatasetIndex.open(tmp_path / "empty")
    with pytest.raises(DataError, match="did you mean one of its folders set"):
        DatasetIndex.open(tmp_path)
    with pytest.raises(DataError, match="holds no shards"):
        build_index(tmp_path / "empty")
    (dataset / "index" / "key.npy").write_bytes(b"garbage")
    with pytest.raises(DataError, match="unreadable"):
        DatasetIndex.open(dataset)


def test_a_lost_index_is_rebuilt_the_same(dataset: Path) -> None:
    before = json.loads((dataset / "index" / "dataset.json").read_bytes())
    shutil.rmtree(dataset / "index")
    build_index(dataset)
    assert json.loads((dataset / "index" / "dataset.json").read_bytes()) == before


def test_columns_that_do_not_match_are_refused(dataset: Path) -> None:
    shutil.copy(dataset / "text-builtin-000001.tar", dataset / "text-builtin-000000.tar")
    with pytest.raises(DataError, match="does not hold the keys"):
        build_index(dataset)
    with tarfile.open(dataset / "av-000000.tar", "w"):
        pass
    with pytest.raises(DataError, match="is empty"):
        build_index(dataset)


def test_transient_errors_are_retried_then_stop_without_damage(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.storage.retry, "LOCAL_WAITS", (0.0, 0.0, 0.0))
    index = DatasetIndex.open(dataset)
    true_pread, failures = os.pread, [0]

    def flaky(*arguments: Any) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return true_pread(*arguments)

    monkeypatch.setattr(os, "pread", flaky)
    failures[0] = 3
    assert index.read_clip(0).key == index.key(0)
    failures[0] = 4
    with pytest.raises(DataError, match="after 4 attempts") as caught:
        index.read_clip(0)
    assert not isinstance(caught.value, DamagedSample)


def test_an_interrupted_writer_leaves_no_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 4) as writer:
        clip = EncodedClip("k", torch.zeros(16, 3, 2, 2), None, torch.zeros(16, 3, 2, 2), {})
        writer.write(clip, SILENT, "", torch.zeros(1, 8))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_many_shards_share_few_descriptors(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.storage.storage, "OPEN_SHARDS", 2)
    index = DatasetIndex.open(dataset)
    for row in np.random.default_rng(0).permutation(len(index)).tolist() * 3:
        assert index.read_clip(row).key == index.key(row)
        assert len(index.storage._open) <= 2  # type: ignore[attr-defined]
    index.close()
    assert index.read_clip(0).key == index.key(0)
