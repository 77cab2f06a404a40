"""Cost of planning a checkpoint for the first rank of a large run, and of a load for each rank, on simulated ranks.

    python -m bench.train.plan                              # writes bench/results/checkpoint-plan.md, two minutes
    python -m bench.train.plan 'layouts=[[16,64]]' average=false

The planning runs as it is, for rank 0 over torch's fake process group, with the model's true names and shapes and no
data; collectives and the writing and reading of tensors are not included.
"""

from __future__ import annotations

import multiprocessing
import pickle
import resource
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from core.compose import Schema
from core.program import Call, Program
from model.joint import JointTransformer
from tools.bench.record import write_record
from train.checkpoint.dcp_files import METADATA, FilePlan, placements_of
from train.checkpoint.dcp_metadata import plan_reads
from train.checkpoint.saver import Written
from train.config import compose_train
from train.optimizer.adamw import AdamW

GB = 1e9


@dataclass
class PlanBench:
    """The checkpoints that are planned.

    layouts: [replicas, shards] of each
    preset: a file of conf/model
    average: with averaged weights
    output: folder of the record
    """

    layouts: list[list[int]] = field(default_factory=lambda: [[1, 64], [16, 64]])
    preset: str = "mova_360p"
    average: bool = True
    output: str = "bench/results"


def simulated_state(model: str, replicas: int, shards: int, average: bool) -> dict[str, Tensor]:
    """What rank 0 of so many ranks saves, with memory that nobody touches. Starts a fake process group."""
    config = compose_train([f"model={model}", "run.id=simulated", "data.path=none"])[0].model
    dist.init_process_group("fake", rank=0, world_size=replicas * shards, store=FakeStore())
    if replicas > 1:
        mesh, placements = init_device_mesh("cpu", (replicas, shards)), [Replicate(), Shard(0)]
    else:
        mesh, placements = init_device_mesh("cpu", (shards,)), [Shard(0)]
    with torch.device("meta"):
        network = JointTransformer(config)
    state: dict[str, Tensor] = {}
    for name, p in network.named_parameters():
        local = (-(-p.shape[0] // shards), *p.shape[1:])  # the first shard is a full one
        keys = [f"model.{name}", *(f"optim.{name}.{key}" for key in AdamW.KEYS)]
        for key in keys + ([f"ema.{name}"] if average else []):
            state[key] = DTensor.from_local(
                torch.empty(local), mesh, placements, run_check=False, shape=p.shape, stride=p.stride()
            )
    return state


def measure_save(model: str, replicas: int, shards: int, average: bool, folder: str) -> dict[str, Any]:
    """CPU seconds and memory of rank 0 for the first save and the one after it. In a process of its own."""
    state = simulated_state(model, replicas, shards, average)
    before, begin = _peak(), time.process_time()
    plan = FilePlan(placements_of(state))
    digest, mine = plan.digest(), plan.pieces(0)
    content = plan.metadata()
    first, memory = time.process_time() - begin, _peak() - before
    del plan
    begin = time.process_time()
    plan = FilePlan(placements_of(state))
    if plan.digest() != digest or plan.pieces(0) != mine:
        raise RuntimeError("the same state has two plans")
    later = time.process_time() - begin
    (Path(folder) / METADATA).write_bytes(content)
    said = len(pickle.dumps(Written(digest, {"__1000_0.distcp": 2**32 - 1})))
    return {
        "tensors": len(state), "first": first, "later": later, "memory": memory, "metadata": len(content),
        "said": said * replicas * shards, "written": sum(piece.length for piece in mine),
    }  # fmt: skip


def measure_load(model: str, replicas: int, shards: int, average: bool, folder: str) -> dict[str, Any]:
    """CPU seconds and memory of one rank for its plan of a load. In a process of its own."""
    state = simulated_state(model, replicas, shards, average)
    before, begin = _peak(), time.process_time()
    planned = plan_reads(state, Path(folder))
    return {"load": time.process_time() - begin, "load memory": _peak() - before, "reads": len(planned.plan.items)}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(bench: PlanBench, replicas: int, shards: int) -> dict[str, Any]:
    """Both measurements of one layout."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in (measure_save, measure_load):
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fake group, and a peak of memory, each
                found |= pool.apply(part, (bench.preset, replicas, shards, bench.average, folder))
    return found


def rows(found: dict[str, Any], replicas: int, shards: int) -> list[tuple[str, str]]:
    """The lines of one layout."""
    where = f"{replicas * shards:,} ranks" + (f" ({replicas} x {shards})" if replicas > 1 else ", sharded over all")
    return [
        (f"**{where}**: tensors of rank 0", f"{found['tensors']:,}, {found['written'] / GB:.2f} GB in its file"),
        ("first save, rank 0", f"{found['first']:.2f} s of CPU, {found['memory'] / GB:.2f} GB of memory"),
        ("later saves, every rank", f"{found['later']:.2f} s of CPU"),
        ("gathered to rank 0 in a save", f"{found['said'] / 1e6:.2f} MB"),
        ("`.metadata`", f"{found['metadata'] / 1e6:.0f} MB"),
        ("load, every rank", f"{found['load']:.2f} s of CPU, {found['load memory'] / GB:.2f} GB of memory"),
    ]


def run(call: Call[PlanBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    table = []
    for replicas, shards in bench.layouts:
        table += rows(measure(bench, replicas, shards), replicas, shards)
        print("\n".join(f"{what}: {value}" for what, value in table[-6:]), flush=True)
    title = f"Planning a checkpoint of `{bench.preset}` on simulated ranks"
    write_record(Path(bench.output) / "checkpoint-plan.md", title, call.command, table, NOTES)


NOTES = (
    "Simulated: rank 0 alone runs `train/checkpoint/dcp_files.py` and `train/checkpoint/dcp_metadata.py`, with true "
    "names and shapes. The first save makes `.metadata` from the layout (as does one whose tensors differ from the "
    "last one's: the first with both experts' moments); later ones compare a digest. Process CPU time of one thread; "
    "memory is the growth of the process's peak. Not counted: the writing and reading of tensors, and collectives."
)


PROGRAM = Program(
    "plan", __doc__, run, schema=Schema("bench_plan", PlanBench, ()), command="python -m bench.train.plan"
)

if __name__ == "__main__":
    PROGRAM.start()
