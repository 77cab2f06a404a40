"""Checkpoint files without DCP's plan: what DCP reads and what it would have written; and pickles that run nothing."""

import builtins
import math
import os
import pickle
import subprocess
from collections import Counter

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from core.errors import RunError
from data.clip import Bucket
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train.checkpoint import dcp_cases as cases
from train.checkpoint.dcp_files import METADATA, FilePlan, Placed
from train.checkpoint.dcp_metadata import read_metadata

MESHES = {"all shards": (4,), "replicas": (2, 2), "copies": (4, 1)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("dcp")


@pytest.fixture(scope="module")
def four(root):
    return run_cases(4, {name: (cases.write_both, (root / name, shape)) for name, shape in MESHES.items()})


@pytest.fixture(scope="module")
def two(root):
    def place(name):
        (root / name).mkdir()
        return (root / name,)

    names = ("another_torch_save", "other_tensors_on_one_rank", "split_by_columns", "metadata_made_once")
    return run_cases(2, {name: (getattr(cases, name), place(name)) for name in names})


@pytest.mark.parametrize("name", MESHES)
def test_what_we_write_and_what_dcp_writes_is_read_by_both_at_another_layout(four, name):
    assert [result["faults"] for result in four[name]] == [[]] * 4
    assert len({result["digest"] for result in four[name]}) == 1


@pytest.mark.parametrize("name", MESHES)
def test_metadata_is_that_of_dcp(root, four, name):
    """Chunks, sizes, types and planner data as DCP itself describes them; each chunk stands once in one file."""
    ours, theirs = (dcp.FileSystemReader(root / name / who).read_metadata() for who in ("ours", "theirs"))
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    for key, mine in ours.state_dict_metadata.items():
        other = theirs.state_dict_metadata[key]
        assert (mine.size, mine.properties.dtype) == (other.size, other.properties.dtype), key
        chunks = [[c for c in entry.chunks if math.prod(c.sizes)] for entry in (mine, other)]
        assert sorted(map(repr, chunks[0])) == sorted(map(repr, chunks[1])), key
    assert ours.planner_data == theirs.planner_data and ours.version == theirs.version
    empty = {index for index in theirs.storage_data if _rows(theirs, index) == 0}
    assert ours.storage_data.keys() == theirs.storage_data.keys() - empty
    _check_files(root / name / "ours", ours)


def _rows(metadata: Metadata, index: MetadataIndex) -> int:
    chunks = metadata.state_dict_metadata[index.fqn].chunks
    return next(math.prod(chunk.sizes) for chunk in chunks if chunk.offsets == index.offset)


def _check_files(folder, metadata: Metadata) -> None:
    """The records fill the files without holes or overlaps."""
    records = {}
    for info in metadata.storage_data.values():
        records.setdefault(info.relative_path, []).append((info.offset, info.length))
    assert set(records) == {file.name for file in folder.glob("*.distcp")}
    for name, parts in records.items():
        end = 0
        for offset, length in sorted(parts):
            assert offset == end
            end += length
        assert end == (folder / name).stat().st_size


def test_checksums_are_those_of_the_files(root, four):
    from train.checkpoint.checkpoint import checksum

    for name in MESHES:
        sums = {file: value for result in four[name] for file, value in result["sums"].items()}
        assert sums == {file.name: checksum(file) for file in (root / name / "ours").glob("*.distcp")}


def test_replicas_share_the_work_at_a_thousand_ranks():
    """Every row of every tensor is written once, at the end of what stands before it, and no rank writes much more."""
    grid = tuple(tuple(range(64 * replica, 64 * replica + 64)) for replica in range(16))
    everywhere = tuple((rank,) for rank in range(1024))
    placed = {f"w{n}": Placed((100 + n, 64), torch.float32, grid) for n in range(60)}
    placed |= {f"c{n}": Placed((3,), torch.int64, everywhere) for n in range(9)}
    plan = FilePlan(placed)
    rows, sizes = Counter(), []
    for rank in range(1024):
        pieces = plan.pieces(rank)
        assert [p.offset for p in pieces] == [sum(q.length for q in pieces[:n]) for n in range(len(pieces))]
        rows.update({piece.key: piece.shape[0] for piece in pieces})
        sizes.append(sum(math.prod(piece.shape) for piece in pieces))
    assert rows == {key: one.shape[0] for key, one in placed.items()}
    shard0 = [sizes[64 * replica] for replica in range(16)]
    assert max(shard0) < 1.2 * sum(shard0) / 16


def test_a_length_that_was_not_reckoned_with_fails_the_save_and_no_later_one(two):
    for text in two["another_torch_save"]:
        assert "torch.save wrote" in text and "bytes" in text and "WARNING" in text


def test_ranks_that_hold_other_tensors_fail_the_save_on_all_ranks(two):
    for text in two["other_tensors_on_one_rank"]:
        assert "rank 1 does not hold the tensors" in text


def test_a_split_that_the_files_cannot_tell_is_refused(two):
    for text in two["split_by_columns"]:
        assert "rank 0: " in text and "model.video_dit.columns is placed as" in text and "Shard(dim=1)" in text


def test_metadata_is_made_once_also_after_a_failed_first_save(two):
    assert two["metadata_made_once"] == [1, 0]


class Call:
    """Unpickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def call_by_name(module: str, name: str) -> bytes:
    """A pickle that looks a dotted name up, as protocol 4 allows, and calls it."""
    words = [b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)]
    return b"\x80\x04" + b"".join(words) + b"\x93)R."


def described(**changes) -> Metadata:
    whole = {"state_dict_metadata": {}, "storage_data": {}, "planner_data": {}}
    return Metadata(**{**whole, **changes})


def refused_pickles(trace) -> dict[str, tuple[bytes, str]]:
    info = dcp.filesystem._StorageInfo
    index = MetadataIndex("w", [0])
    touch = f"open({str(trace)!r}, 'w')"
    return {
        "os.system": (pickle.dumps(Call(os.system, f"touch {trace}")), f"{os.system.__module__}.system"),
        "eval": (pickle.dumps(Call(builtins.eval, touch)), "builtins.eval"),
        "getattr": (pickle.dumps(Call(getattr, 1, "real")), "builtins.getattr"),
        "popen": (pickle.dumps(Call(subprocess.Popen, ["touch", str(trace)])), "subprocess.Popen"),
        "a class of torch": (pickle.dumps(Call(torch.nn.Linear, 2, 2)), "torch.nn.modules.linear.Linear"),
        "torch.load": (pickle.dumps(Call(torch.load, "x")), "torch.serialization.load"),
        "within": (pickle.dumps(described(planner_data=Call(os.system, f"touch {trace}"))), "system"),
        "dotted": (call_by_name("pathlib", "PosixPath.cwd"), "pathlib.PosixPath.cwd"),
        "bytes": (pickle.dumps(described(state_dict_metadata={"x": BytesStorageMetadata()})), "BytesStorageMetadata"),
        "elsewhere": (pickle.dumps(described(storage_data={index: info("../other", 0, 8)})), "'../other'"),
        "absolute": (pickle.dumps(described(storage_data={index: info("/etc/passwd", 0, 8)})), "'/etc/passwd'"),
        "something else": (pickle.dumps({"model": 1}), "dict"),
        "cut": (pickle.dumps(described())[:-9], METADATA),
    }


@pytest.mark.parametrize("name", refused_pickles("x"))
def test_a_pickle_that_is_no_description_of_tensors_is_refused_and_nothing_runs(tmp_path, name):
    trace = tmp_path / "executed"
    content, word = refused_pickles(trace)[name]
    (tmp_path / METADATA).write_bytes(content)
    with pytest.raises(RunError) as caught:
        read_metadata(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / METADATA) in message and word in message and "\n" not in message
    assert not caught.value.retry and not trace.exists()


def test_every_way_into_a_checkpoint_reads_it_with_care(root):
    bucket = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
    make_dataset(root / "data", [(bucket, 4)], dim=6)
    (said,) = run_cases(1, {"made up": (cases.made_up, (root, root / "data"))})["made up"]
    assert said.keys() == {"resume", "start_from", "sample"}
    for message in said.values():
        assert "is refused, nothing in it was run" in message and "system" in message
    assert not (root / "executed").exists()
