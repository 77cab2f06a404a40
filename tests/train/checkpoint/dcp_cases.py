"""What ranks do in test_dcp_files.py: tensors of every kind of placement, written here and by DCP itself."""

import itertools
import json
import os
import pickle
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from core.errors import RunError
from tests.train import runs
from tests.train.checkpoint.save_cases import CONFIG, state_at
from train import generate
from train.checkpoint import checkpoint, dcp_files, saver
from train.checkpoint.checkpoint import CheckpointConfig
from train.checkpoint.dcp_files import METADATA, FilePlan, placements_of, write_file
from train.checkpoint.dcp_metadata import read_tensors
from train.checkpoint.saver import Saver
from train.parallel.mesh import ParallelConfig, make_layout

SHAPES = {  # rows that the shards divide, that they do not, fewer than shards; one dimension, one number
    "even": ((8, 5), torch.float32), "uneven": ((7, 3), torch.bfloat16), "few": ((1, 6, 4), torch.float32),
    "vector": ((13,), torch.float64), "counts": ((9,), torch.int64),
}  # fmt: skip


def whole(name: str) -> torch.Tensor:
    shape, dtype = SHAPES[name]
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(1000).to(dtype)


def made(mesh: DeviceMesh, zeros: bool = False) -> dict[str, torch.Tensor]:
    """Every shape over every axis: split over the last one, whole on the others; and tensors that are no DTensors."""
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    full = {name: torch.zeros_like(whole(name)) if zeros else whole(name) for name in SHAPES}
    split = {
        f"split.{name}": distribute_tensor(value, mesh, placements, src_data_rank=None) for name, value in full.items()
    }
    copied = {
        f"copied.{name}": distribute_tensor(value, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
        for name, value in full.items()
    }
    plain = {f"plain.{name}": value for name, value in full.items()}
    return {**split, **copied, **plain, "plain.number": torch.tensor(0.0 if zeros else 4.5)}


def write_both(folder: Path, shape: tuple[int, ...]) -> dict:
    """The same tensors by FilePlan and by DCP; read again, by both, at another layout."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))
    tensors, rank = made(mesh), dist.get_rank()
    ours, theirs = folder / "ours", folder / "theirs"
    if rank == 0:
        ours.mkdir(parents=True)
    dist.barrier()
    plan = FilePlan(placements_of(tensors))
    sums = write_file(plan, tensors, ours, rank)
    if rank == 0:
        (ours / METADATA).write_bytes(plan.metadata())
    dcp.save(tensors, checkpoint_id=theirs)
    other = init_device_mesh("cpu", (dist.get_world_size(),))
    read = {}
    for name, path in (("ours", ours), ("theirs", theirs)):
        read[name] = made(other, zeros=True)
        read_tensors(read[name], path)
    read["ours by DCP"] = made(other, zeros=True)
    dcp.load(read["ours by DCP"], checkpoint_id=ours)
    expected = made(other)
    faults = [
        (name, key)
        for name, key in itertools.product(read, expected)
        if not torch.equal(_local(read[name][key]), _local(expected[key]))
    ]
    return {"faults": faults, "sums": sums, "digest": plan.digest()}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def another_torch_save(folder: Path) -> str:
    """What is written has another length than was reckoned with."""
    real = dcp_files.saved_bytes
    other = mock.patch.object(dcp_files, "saved_bytes", lambda *args: real(*args) + 64)
    return _outcome(folder, lambda state: None, other)


def other_tensors_on_one_rank(folder: Path) -> str:
    """The second rank holds one more tensor than the others."""
    more = {"model.video_dit.more": torch.zeros(3)} if dist.get_rank() == 1 else {}
    return _outcome(folder, lambda state: state.engine.held.update(more))


def split_by_columns(folder: Path) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns = distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)], src_data_rank=None)
    return _outcome(folder, lambda state: state.engine.held.update({"model.video_dit.columns": columns}))


def _outcome(folder: Path, change, fault=nullcontext()) -> str:  # noqa: B008
    """The error of a save, on every rank; the next save, of a state as usual, must succeed."""
    keeper = Saver(folder, CheckpointConfig(max_failures=3), CONFIG, "ranks")
    state = state_at(1, 1.0)
    change(state)
    with fault:
        keeper.begin(state)
        keeper.settle()
    events = keeper.events()
    state = state_at(2, 2.0)
    keeper.begin(state)
    keeper.finish()
    made_again = (folder / "step-00000002" / "COMMITTED").exists()
    assert made_again, "the save after a failed one failed"
    return next(event.text for event in events if event.kind == "checkpoint failed")


def metadata_made_once(folder: Path) -> int:
    """How often `.metadata` is made in three saves, the first of which fails on the second rank."""
    keeper, state, count = Saver(folder, CheckpointConfig(keep=9), CONFIG, "ranks"), state_at(0, 1.0), 0
    real_metadata, real_write = FilePlan.metadata, write_file

    def counted(self):
        nonlocal count
        count += 1
        return real_metadata(self)

    def write(*args):
        if state.step == 1 and dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return real_write(*args)

    with mock.patch.object(FilePlan, "metadata", counted), mock.patch.object(saver, "write_file", write):
        for step in (1, 2, 3, 4):
            state.step = step
            keeper.begin(state)
            keeper.settle()
        keeper.finish()
    assert [(folder / f"step-{step:08d}" / "COMMITTED").exists() for step in (1, 2, 3, 4)] == [False, True, True, True]
    return count


class Evil:
    """Leaves a file behind when it is unpickled without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def made_up(root: Path, data: Path) -> dict[str, str]:
    """A real run whose checkpoint then gets a METADATA that runs a command, with its sums made right: what every way
    into it says."""
    assert runs.train(root, data, "first", "steps=1", "validation.every=0")["ending"] == "finished"
    path = root / "first" / "checkpoints" / "step-00000001"
    (path / METADATA).write_bytes(pickle.dumps(Evil(root / "executed")))
    state = json.loads((path / checkpoint.STATE).read_text())
    state["files"][METADATA] = {
        "bytes": (path / METADATA).stat().st_size,
        "crc32": checkpoint.checksum(path / METADATA),
    }
    (path / checkpoint.STATE).write_text(json.dumps(state))
    checkpoint.write_marker(path)
    layout = make_layout(ParallelConfig(), torch.device("cpu"))
    said = {
        "resume": runs.train(root, data, "first", "steps=2", "validation.every=0"),
        "start_from": runs.train(root, data, "other", "steps=1", f"init.source={path}", "validation.every=0"),
    }
    said = {name: outcome.get("error", "it was loaded") for name, outcome in said.items()}
    try:
        generate.load_model(path, ParallelConfig(), layout)
        said["sample"] = "it was loaded"
    except RunError as error:
        said["sample"] = str(error)
    return said
