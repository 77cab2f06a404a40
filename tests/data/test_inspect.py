"""Shards that could do harm are refused, an index is rebuilt from shards alone, and inspect names every difference."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import save

import data.index
from core.compose import compose
from data.clip import Bucket, EncodedClip
from data.dataset.build import build_index
from data.dataset.index import DatasetIndex
from data.dataset.shards import ShardWriter, write_captioners, write_empty_text
from data.dataset.tensors import is_finite, load_tensors, parse_header
from data.errors import DamagedSample, DataError
from data.inspect import PROGRAM, InspectConfig, captioner_differences, inspect
from tests.shards import make_dataset

BOTH = Bucket(frames=3, height=4, width=4, audio_steps=8, fps=24.0, has_video=True, has_audio=True)
CHECKS: list[Literal["none", "crc", "full"]] = ["none", "crc", "full"]
SOUND = Bucket(frames=3, height=4, width=4, audio_steps=5, fps=24.0, has_video=False, has_audio=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "set", [(BOTH, 4), (SOUND, 3), (BOTH, 2)])


def add_member(path: Path, name: str, data: bytes = b"x", **attributes: Any) -> None:
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data) if not attributes else 0
        for attribute, value in attributes.items():
            setattr(member, attribute, value)
        tar.addfile(member, io.BytesIO(data))


UNSAFE: list[tuple[str, dict[str, Any], str]] = [
    ("../outside.json", {}, "out of the folder"),
    ("/etc/cron.d/x.json", {}, "out of the folder"),
    ("a/../../x.json", {}, "out of the folder"),
    ("..\\x.json", {}, "out of the folder"),
    ("folder/x.json", {}, "lies in a folder"),
    ("x.json", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "link"),
    ("x.safetensors", {"type": tarfile.LNKTYPE, "linkname": "x"}, "link"),
    ("x.json", {"type": tarfile.FIFOTYPE}, "special"),
    ("x", {"type": tarfile.DIRTYPE}, "folder"),
    ("x.pkl", {}, "pickle"),
    ("x.text.pyd", {}, "members"),
    ("x.pth", {}, "pickle"),
    ("x.PT", {}, "pickle"),
    ("x.npy", {}, "pickle"),
]


@pytest.mark.parametrize("column", ["av", "text-plain"])
@pytest.mark.parametrize(("name", "attributes", "message"), UNSAFE)
def test_unsafe_members_are_refused(
    root: Path, column: str, name: str, attributes: dict[str, Any], message: str
) -> None:
    shard = root / f"{column}-000001.tar"
    add_member(shard, name, pickle.dumps([1]), **attributes)
    with pytest.raises(DataError, match=message) as caught:
        build_index(root)
    assert shard.name in str(caught.value)
    # The index of before is still there, and inspect says both that the shard changed and why it is dangerous.
    messages = inspect(InspectConfig(dir=str(root), samples=0))
    assert any(message in found and shard.name in found for found in messages)


@pytest.mark.parametrize("cut", ["middle", "after a sample", "half of the end mark"])
def test_a_truncated_shard_is_refused(root: Path, cut: str) -> None:
    """Also where all that is left looks whole: lost samples must not go unnoticed."""
    shard = root / "av-000000.tar"
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    size = {"middle": shard.stat().st_size // 2, "after a sample": members[4].offset}
    os.truncate(shard, size.get(cut, -(-(members[-1].offset_data + members[-1].size) // 512) * 512 + 512))
    with pytest.raises(DataError, match="av-000000.tar is truncated"):
        build_index(root)


def test_inspect_tells_what_is_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(InspectConfig(dir=str(root), verify=True)) == []
    said = capsys.readouterr().out
    index = DatasetIndex.open(root)
    for part in (
        "9 in 3 shards",
        index.fingerprint,
        "plain",
        "video+audio: 6 samples in 2 shards",
        index.key(0),
    ):
        assert part in said
    hours = 9 * 9 / 24 / 3600  # 9 samples of 9 frames, at 24 a second
    assert f"hours        {hours:.4f}" in said


def test_every_difference_is_listed(root: Path, tmp_path: Path) -> None:
    (root / "text-plain-000000.tar").unlink()
    with open(root / "av-000001.tar", "ab") as file:
        file.write(b"\0" * 512)
    with open(root / "av-000002.tar", "rb+") as file:
        file.seek(4000)
        file.write(b"????")
    found = inspect(InspectConfig(dir=str(root)))
    assert [re.findall(r"[a-z-]+-\d{6}\.tar", line)[0] for line in found[:2]] == [
        "text-plain-000000.tar",
        "av-000001.tar",
    ]
    assert not any("av-000002" in line for line in found)
    found = inspect(InspectConfig(dir=str(root), verify=True))
    assert any("av-000002.tar: SHA-256" in line for line in found)


def test_the_programs(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit codes, and a message instead of a traceback."""
    before = DatasetIndex.open(root).record
    (root / "index" / "dataset.json").unlink()
    with pytest.raises(DataError, match=f"mova index dir={root}"):
        inspect(InspectConfig(dir=str(root)))
    assert data.index.PROGRAM.run([f"dir={root}"]) == 0
    assert "9 samples in 3 shards" in capsys.readouterr().out
    assert DatasetIndex.open(root).record == before
    with open(root / "av-000002.tar", "rb+") as file:
        file.seek(4000)
        file.write(b"????")
    command = [sys.executable, "-m", "data.inspect", str(root), "verify=true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "difference: av-000002.tar: SHA-256" in done.stderr
    assert "error: 1 differences" in done.stderr and "Traceback" not in done.stderr
    assert data.index.PROGRAM.run([]) == 1 and "dir is missing" in capsys.readouterr().err


def test_an_argument_alone_is_the_dataset() -> None:
    for alone in ("/data/x", "pipe:aws s3 cp s3://b/{name}?a=b -", "https://host/x?a=b", "./a=b", "null"):
        composed = compose(PROGRAM.schema, PROGRAM.split([alone, "verify=true"])[0])
        assert composed.typed() == InspectConfig(dir=alone, verify=True)
    assert PROGRAM.split(["dir=x"]) == (["dir=x"], False) and PROGRAM.split([]) == ([], False)


def scored(root: Path, scores: list[dict[str, Any] | None]) -> Path:
    """One shard per sample."""
    root.mkdir()
    for number, values in enumerate(scores):
        key = f"{number:024x}"
        grid = (16, BOTH.frames, BOTH.height, BOTH.width)
        meta: dict[str, Any] = {"bucket": BOTH.to_dict(), "seconds": 2.5}
        if values is not None:
            meta["scores"] = values
        clip = EncodedClip(key, torch.ones(grid), torch.ones(8, 128), torch.ones(grid), meta)
        members = clip.to_members()
        text = {"__key__": key, "safetensors": save({"text": torch.ones(2, 6).bfloat16()}), "json": b"{}"}
        with webdataset.TarWriter(str(root / f"av-{number:06d}.tar")) as tar:
            tar.write({"__key__": key, "safetensors": members[0], "json": members[1]})
        with webdataset.TarWriter(str(root / f"text-a-{number:06d}.tar")) as tar:
            tar.write(text)
    (root / "empty-text.safetensors").write_bytes(save({"text": torch.ones(1, 6).bfloat16()}))
    return root


def test_scores_become_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = scored(tmp_path / "set", [{"lag": -0.25, "shots": 2, "speaker": "x"}, None, {"lag": None, "speech": 0.5}])
    index = build_index(root)
    assert index.scores == ["lag", "shots", "speech"]
    expected = {"lag": [-0.25, np.nan, np.nan], "shots": [2, np.nan, np.nan], "speech": [np.nan, np.nan, 0.5]}
    for name, values in expected.items():
        assert index.score(name).dtype == np.float32
        np.testing.assert_array_equal(index.score(name), np.array(values, np.float32))
    with pytest.raises(DataError, match="no score 'dnsmos'"):
        index.score("dnsmos")
    assert inspect(InspectConfig(dir=str(root))) == []
    said = capsys.readouterr().out
    assert "lag: -0.25 .. -0.25 .. -0.25" in said and "2 not measured" in said
    with pytest.raises(DataError, match="score named '../x'"):
        build_index(scored(tmp_path / "bad", [{"../x": 1.0}]))


# The tensors' container.


def test_the_header_is_read_as_the_library_reads_it() -> None:
    tensors = {
        "video": torch.randn(2, 3).bfloat16(),
        "audio": torch.randn(4, 5).bfloat16(),
        "none": torch.ones(0, 3).bfloat16(),
    }
    data = save(tensors)
    found = load_tensors(data)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)


def header(described: Any, body: int) -> bytes:
    text = json.dumps(described).encode() if not isinstance(described, bytes) else described
    return len(text).to_bytes(8, "little") + text + b"\0" * body


def entry(shape: list[Any], start: int, stop: int, dtype: str = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little") + b"{}",
        header(b"not json", 0),
        header([], 0),
        header({"a": 3}, 0),
        header({"a": entry([2], 0, 4, "F32")}, 4),
        header({"a": entry([2], 0, 4)}, 2),  # cut off
        header({"a": entry([2], 0, 4)}, 6),  # bytes of nobody
        header({"a": entry([3], 0, 4)}, 4),  # another size than the shape
        header({"a": entry([2], 2, 6)}, 6),  # a hole
        header({"a": entry([2], 0, 4), "b": entry([2], 2, 6)}, 6),  # overlap
        header({"a": entry([-2], 0, -4)}, 0),
        header({"a": entry([2], -4, 0)}, 0),
        header({"a": entry([2.0], 0, 4)}, 4),
        header({"a": entry([True], 0, 2)}, 2),
        header(b"[" * 5000, 0),
    ],
)
def test_a_wrong_header_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="parse"):
        parse_header(data, len(data))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_is_seen_by_its_bits(value: float) -> None:
    values = torch.randn(70_001).bfloat16()
    values[:4] = torch.tensor([3.3e38, -3.3e38, 0.0, -0.0]).bfloat16()
    assert is_finite(values)
    for place in (0, 65_535, 65_536, 70_000):
        bad = values.clone()
        bad[place] = value
        assert not is_finite(bad)


# Reading into a batch.


def slot(bucket: Bucket, length: int) -> dict[str, torch.Tensor]:
    """Of a batch whose memory holds something else."""
    grid = (16, bucket.frames, bucket.height, bucket.width)
    shapes = {"video": grid, "audio": (128, bucket.audio_steps), "condition": grid, "text": (length, 6)}
    return {name: torch.full(shape, 7.0, dtype=torch.bfloat16) for name, shape in shapes.items()}


def member_bytes(path: Path, name: str) -> bytes:
    with tarfile.open(path) as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read()


@pytest.mark.parametrize("length", [1, 4, 9])
def test_read_into_gives_what_was_written(tmp_path: Path, length: int) -> None:
    root = make_dataset(tmp_path / "set", [(BOTH, 4), (SOUND, 3)])
    index = DatasetIndex.open(root)
    for row in range(7):
        views = slot(index.bucket_of(row), length)
        index.read_into(row, "plain", **views)
        shard = root / index.shards[index.shard_of(row)]["name"]
        members = [member_bytes(shard, f"{index.key(row)}.{kind}") for kind in ("safetensors", "json")]
        clip = EncodedClip.from_members("", members[0], members[1], index.bucket_of(row))
        again = index.read_clip(row)
        for name in ("video", "condition"):
            stored = getattr(clip, name)
            assert torch.equal(views[name], torch.zeros_like(views[name]) if stored is None else stored)
            assert stored is None or torch.equal(getattr(again, name), stored)
        assert clip.audio is not None and torch.equal(views["audio"], clip.audio.T)
        assert again.audio is not None and torch.equal(again.audio, clip.audio)
        text = index.read_text(row, "plain")
        kept = min(len(text), length)
        assert torch.equal(views["text"][:kept], text[:kept]) and not views["text"][kept:].any()


@pytest.mark.parametrize("stored", [1, 2, 3])
def test_the_conditions_tail_is_restored_in_place(tmp_path: Path, stored: int) -> None:
    root = scored(tmp_path / "set", [None])
    condition = torch.randn(16, 3, 4, 4).bfloat16()
    condition[:, stored:] = condition[:, stored - 1 : stored]
    clip = EncodedClip("0" * 24, torch.ones(16, 3, 4, 4), torch.ones(8, 128), condition, {"bucket": BOTH.to_dict()})
    members = clip.to_members()
    with webdataset.TarWriter(str(root / "av-000000.tar")) as tar:
        tar.write({"__key__": clip.key, "safetensors": members[0], "json": members[1]})
    build_index(root)
    for verify in CHECKS:
        views = {name: torch.full_like(tensor, torch.nan) for name, tensor in slot(BOTH, 4).items()}
        DatasetIndex.open(root, verify=verify).read_into(0, "a", **views)
        assert torch.equal(views["condition"], condition)


@pytest.mark.parametrize("column", ["av", "text-plain"])
@pytest.mark.parametrize("place", [3, 20, -1])  # length of the header, the header, the last byte
def test_damage_leaves_zeros(root: Path, column: str, place: int) -> None:
    index = DatasetIndex.open(root)
    offset, size = (int(index.columns[f"{column}_{what}"][2]) for what in ("offset", "size"))
    with open(root / f"{column}-000000.tar", "rb+") as file:
        file.seek(offset + place % size)
        byte = file.read(1)[0]
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([byte ^ 255]))
    views = slot(BOTH, 4)
    with pytest.raises(DamagedSample) as caught:
        index.read_into(2, "plain", **views)
    assert caught.value.key == index.key(2) and not any(tensor.any() for tensor in views.values())
    for row in (1, 3):
        index.read_into(row, "plain", **views)


def test_what_each_check_sees(root: Path, tmp_path: Path) -> None:
    """crc: every changed bit; none: nothing; full: also NaN that came with a rewritten index."""
    index = DatasetIndex.open(root)
    end = int(index.columns["av_offset"][2] + index.columns["av_size"][2])
    with open(root / "av-000000.tar", "rb+") as file:
        file.seek(end - 2)
        file.write(b"\xc0\x7f")  # NaN in the video
    with pytest.raises(DamagedSample, match="checksum"):
        index.read_clip(2)
    assert DatasetIndex.open(root, verify="none").read_clip(2).not_finite() == "video"
    with pytest.raises(DataError, match="verify is 'no'"):
        DatasetIndex.open(root, verify="no")  # type: ignore[arg-type]
    build_index(root)
    assert DatasetIndex.open(root).columns["av_finite"].tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1]
    for verify in CHECKS:
        with pytest.raises(DamagedSample, match="NaN or inf in video"):
            DatasetIndex.open(root, verify=verify).read_clip(2)


def test_captioners_that_are_not_those_of_the_index_are_named(root: Path) -> None:
    """Every bit of the file from which a lost index would be built again."""
    path = root / "captioners.json"
    write_captioners(root, ["plain"], [])
    assert inspect(InspectConfig(dir=str(root), verify=True, samples=0)) == []
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert captioner_differences(DatasetIndex.open(root)), place


def test_names_in_any_letters_on_any_terminal(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "set", 1) as writer:
        meta = {"source": "Fl\u00f6te.mp4", "start": 0, "seconds": 1.0, "encoders": {}}
        sound = torch.ones(5, 128, dtype=torch.bfloat16)
        writer.write(EncodedClip("0" * 24, None, sound, None, meta), SOUND, "x", torch.ones(1, 8))
    write_empty_text(tmp_path / "set", torch.ones(1, 8))
    build_index(tmp_path / "set")
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "data.inspect", str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert done.returncode == 0 and "Fl\\xf6te.mp4" in done.stdout
