"""A dataset by a writer that follows docs/shard-format.md alone (tarfile, safetensors, json), read by ours."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import save

from data.dataset.build import write_index
from data.dataset.index import DatasetIndex
from data.errors import DataError
from data.inspect import InspectConfig, inspect
from data.loader.mixture import Mixture
from data.loader.state import DataState, Segment
from data.loader.stream import Stream

BUCKETS: list[dict[str, Any]] = [
    {"frames": 4, "height": 2, "width": 6, "audio_steps": 7, "fps": 24, "has_video": True, "has_audio": True},
    {"frames": 4, "height": 2, "width": 6, "audio_steps": 7, "fps": 24, "has_video": True, "has_audio": False},
    {"frames": 4, "height": 2, "width": 6, "audio_steps": 7, "fps": 24, "has_video": False, "has_audio": True},
]
WORDS = ["one", "", "three"]


def member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uname = len(data), 1_700_000_000, 0o600, "somebody"
    tar.addfile(info, io.BytesIO(data))


def tensors_of(key: str, bucket: dict[str, Any], stored: int) -> dict[str, torch.Tensor]:
    """Latents by key; the condition's frames from `stored` on are equal and left out."""
    generator = torch.Generator().manual_seed(sum(key.encode()))
    grid = (16, bucket["frames"], bucket["height"], bucket["width"])
    found = {}
    if bucket["has_audio"]:
        found["audio"] = torch.randn(bucket["audio_steps"], 128, generator=generator).bfloat16()
    if bucket["has_video"]:
        found["video"] = torch.randn(grid, generator=generator).bfloat16()
        found["condition"] = torch.randn(grid, generator=generator).bfloat16()[:, :stored].contiguous()
    return found


def write(root: Path) -> list[str]:
    """Three shards of three samples by hand; numbers with a gap, keys of several lengths. Returns the keys by row."""
    root.mkdir()
    keys = []
    for number, bucket in zip((2, 10, 11), BUCKETS, strict=True):
        mode: Any = {"format": tarfile.PAX_FORMAT if number == 10 else tarfile.USTAR_FORMAT}
        with (
            tarfile.open(root / f"av-{number:07d}.tar", "w", **mode) as av,
            tarfile.open(root / f"text-by hand-{number:07d}.tar".replace(" ", "."), "w", **mode) as text,
        ):
            for sample, words in enumerate(WORDS):
                key = ["k", "klänge-7", f"{number:024d}"][sample] if number == 10 else f"{number}_{sample}"
                keys.append(key)
                meta = {"bucket": bucket, "scores": {"speech": sample / 2, "lag": None}, "encoders": {"video": "mine"}}
                body = [("safetensors", save(tensors_of(key, bucket, 1 + sample))), ("json", json.dumps(meta).encode())]
                for kind, data in body if sample % 2 else body[::-1]:
                    member(av, f"{key}.{kind}", data)
                embedding = save({"text": torch.full((1 + sample, 8), float(number)).bfloat16()}, {"made": "by hand"})
                member(text, f"{key}.safetensors", embedding)
                member(text, f"{key}.json", json.dumps({"caption": words}).encode())
    (root / "empty-text.safetensors").write_bytes(save({"text": torch.ones(2, 8).bfloat16()}))
    return keys


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "set")
    write_index(tmp_path / "set")
    return tmp_path / "set"


def test_index_says_what_the_page_says(tmp_path: Path) -> None:
    keys = write(tmp_path / "set")
    write_index(tmp_path / "set")
    folder = tmp_path / "set" / "index"
    content = (folder / "dataset.json").read_bytes()
    record = json.loads(content)
    columns = {name: np.load(folder / f"{name}.npy") for name in record["columns"]}
    assert [key.decode() for key in columns["key"].tolist()] == keys and columns["key"].dtype == "S24"
    assert columns["shard"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert columns["text-by.hand_absent"].tolist() == [0, 1, 0] * 3
    assert columns["score-speech"].tolist() == [0, 0.5, 1] * 3 and "score-lag" not in columns
    types = {"offset": "<u8", "size": "<u8", "xxh3": "<u8", "finite": "|u1", "absent": "|u1"}
    for name, values in columns.items():
        if (kind := name.rpartition("_")[2]) in types:
            assert values.dtype == np.dtype(types[kind])
    for row, shard in enumerate(columns["shard"].tolist()):
        tars = {"av": record["shards"][shard]["name"], "text-by.hand": record["shards"][shard]["text"]["by.hand"]}
        for column, kind in (("av", "safetensors"), ("json", "json"), ("text-by.hand", "safetensors")):
            name = tars.get(column, tars["av"])
            with tarfile.open(tmp_path / "set" / name) as tar:
                member = tar.extractfile(f"{keys[row]}.{kind}")
                assert member is not None
                expected = member.read()
            offset, size = int(columns[f"{column}_offset"][row]), int(columns[f"{column}_size"][row])
            assert (tmp_path / "set" / name).read_bytes()[offset : offset + size] == expected
            assert int(columns[f"{column}_xxh3"][row]) == xxhash.xxh3_64_intdigest(expected)
    hashes = [
        [sha256(tmp_path / "set" / s["name"]), [["by.hand", sha256(tmp_path / "set" / s["text"]["by.hand"])]]]
        for s in record["shards"]
    ]
    listed = [*hashes, sha256(tmp_path / "set" / "empty-text.safetensors")]
    assert record["fingerprint"] == hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    texts = [shard[1][0][1] for shard in hashes]
    assert record["text_fingerprint"] == {"by.hand": hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
    assert record["format"] == 3 and record["buckets"] == BUCKETS and record["text_dim"] == 8
    assert record["captioners"] == record["own_captioners"] == ["by.hand"] and record["encoders"] == {"video": "mine"}
    for name in columns:
        data, block = (folder / f"{name}.npy").read_bytes(), record["column_block"]
        parts = [data[i : i + block] for i in range(0, len(data), block)]
        assert record["column_xxh3"][name] == "".join(f"{xxhash.xxh3_64_intdigest(part):016x}" for part in parts)
        assert record["column_bytes"][name] == len(data)
        assert record["column_sha256"][name] == hashlib.sha256(data).hexdigest()
    head, _, tail = content.rpartition(b', "sha256": ')
    assert json.loads(tail[:-1]) == hashlib.sha256(head + b"}").hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_is_read(root: Path) -> None:
    index = DatasetIndex.open(root)
    assert inspect(InspectConfig(dir=str(root), verify=True)) == []
    for row in range(9):
        clip, bucket = index.read_clip(row), BUCKETS[row // 3]
        expected = tensors_of(index.key(row), bucket, 1 + row % 3)
        assert (clip.video is None) == (not bucket["has_video"]) and (clip.audio is None) == (not bucket["has_audio"])
        if clip.video is not None and clip.condition is not None:
            assert torch.equal(clip.video, expected["video"])
            frames = [min(frame, row % 3) for frame in range(4)]
            assert torch.equal(clip.condition, expected["condition"][:, frames])
        if clip.audio is not None:
            assert torch.equal(clip.audio, expected["audio"])
        assert index.read_text(row, "by.hand").shape == (1 + row % 3, 8)
    assert index.empty_text().shape == (2, 8) and index.count_absent("by.hand") == 3


def test_it_is_streamed(root: Path) -> None:
    index = DatasetIndex.open(root)
    mixture = Mixture.of(index)
    state = DataState([Segment(0, mixture.fingerprint, [3, 3, 3], seed=0, window=2)])
    seen: list[str] = []
    with Stream(
        mixture, state, dp_rank=0, dp_world=1, micro_batch=3, text_length=4, transform=lambda batch: batch
    ) as stream:
        for _ in range(3):
            (batch,) = next(stream)
            seen += batch.keys
            for slot, key in enumerate(batch.keys):
                row = next(row for row in range(9) if index.key(row) == key)
                expected = tensors_of(key, BUCKETS[row // 3], 1 + row % 3)
                assert torch.equal(batch.audio[slot].T, expected.get("audio", torch.zeros(7, 128).bfloat16()))
                assert torch.equal(batch.video[slot], expected.get("video", torch.zeros(16, 4, 2, 6).bfloat16()))
    assert sorted(seen) == sorted(index.key(row) for row in range(9))


BREACHES: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("no valid bucket", lambda meta: meta.pop("bucket")),
    ("no valid bucket", lambda meta: meta["bucket"].update(height=0)),
    ("mixes buckets", lambda meta: meta["bucket"].update(height=4)),
    ("score named", lambda meta: meta["scores"].update({"a/b": 1})),
    ("encoder another, others mine", lambda meta: meta["encoders"].update(video="another")),
    ("encoders are", lambda meta: meta.update(encoders=["mine"])),
]


@pytest.mark.parametrize(("message", "breach"), BREACHES)
def test_a_breach_of_the_page_is_refused(root: Path, message: str, breach: Callable[[dict[str, Any]], None]) -> None:
    path = root / "av-0000002.tar"
    with tarfile.open(path) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar.getmembers()]  # type: ignore[union-attr]
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            if name == "2_1.json":
                meta = json.loads(data)
                breach(meta)
                data = json.dumps(meta).encode()
            member(tar, name, data)
    with pytest.raises(DataError, match=message) as caught:
        write_index(root)
    assert "av-0000002.tar" in str(caught.value)
