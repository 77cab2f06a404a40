"""Cost of a start for one rank of a large run, from the start of its process to its first step: fresh, and resumed.

    python -m bench.train.start   # writes bench/results/start.md; 7 GB of disk, 15 GB of memory, two minutes
    python -m bench.train.start preset=small ranks=8

The engine is built and filled unchanged, as rank 0 of simulated ranks: torch's fake process group, with host memory
instead of the device's. Data, the checksums of a checkpoint and collectives are not included.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from core.compose import Schema
from core.program import Call, Program
from model import init
from tools.bench.record import write_record
from train.checkpoint.dcp_files import METADATA, FilePlan, placements_of, write_file
from train.checkpoint.dcp_metadata import read_alone
from train.config import compose_train
from train.engine.engine import Engine, build_engine
from train.engine.optim import local
from train.engine.optim_config import OptimConfig
from train.parallel.mesh import ParallelConfig, make_layout

GB = 1e9


@dataclass
class StartBench:
    """The model and the ranks.

    preset: a file of conf/model
    ranks: that are simulated
    folder: for temporary files
    output: folder of the record
    """

    preset: str = "mova_360p"
    ranks: int = 64
    folder: str | None = None
    output: str = "bench/results"


class CopiedBytes(TorchDispatchMode):
    """Counts what is copied into tensors of an engine, which would lie on the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and not args[0].is_meta:
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def _engine(bench: StartBench, seed: int | None) -> Engine:
    config = compose_train([f"model={bench.preset}", "run.id=simulated", "data.path=none"])[0].model
    dist.init_process_group("fake", rank=0, world_size=bench.ranks, store=FakeStore())
    parallel = ParallelConfig(compute_dtype="bfloat16", recompute="full")
    return build_engine(config, parallel, OptimConfig(), make_layout(parallel, torch.device("cpu")), seed)


def write_checkpoint(bench: StartBench, folder: str) -> None:
    """Rank 0's part of a checkpoint with the moments of all parameters, and METADATA of all ranks."""
    engine = _engine(bench, None)
    engine.restore(_counts(engine), _zero)
    plan = FilePlan(placements_of(engine.tensors()))
    write_file(plan, engine.tensors(), Path(folder), 0)
    (Path(folder) / METADATA).write_bytes(plan.metadata())


def _counts(engine: Engine) -> dict[str, int]:
    return {name: 1 for name, _ in engine.network.named_parameters()}


def _zero(tensors: dict[str, Tensor]) -> None:
    for tensor in tensors.values():
        local(tensor).zero_()


def measure(bench: StartBench, folder: str | None) -> dict[str, float]:
    """One start, in a process of its own; `folder`: of the checkpoint that it resumes from."""
    drawn, real = 0, init._normals

    def counted(stream: str, shape: tuple[int, ...], start: int, stop: int) -> Tensor:
        nonlocal drawn
        drawn += stop - start
        return real(stream, shape, start, stop)

    init._normals = counted
    imported, begin = time.process_time(), time.perf_counter()
    with CopiedBytes() as copied:
        engine = _engine(bench, 0 if folder is None else None)
        if folder is not None:
            engine.restore(_counts(engine), lambda tensors: _read(tensors, Path(folder)))
    held = sum(local(tensor).nbytes for tensor in engine.tensors().values())
    return {
        "imports": imported, "cpu": time.process_time(), "seconds": time.perf_counter() - begin, "drawn": drawn,
        "copied": copied.bytes, "held": held, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def _read(tensors: dict[str, Tensor], folder: Path) -> None:
    if (fault := read_alone(tensors, folder)) is not None:
        raise RuntimeError(fault[0])


def _in_a_process(function: Any, *arguments: Any) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _rows(name: str, found: dict[str, float], read: int) -> list[tuple[str, str]]:
    return [
        (f"**{name}**: CPU of the rank, from the start of its process", f"{found['cpu']:.1f} s"),
        ("of which until all modules are imported", f"{found['imports']:.1f} s"),
        ("random numbers drawn", f"{found['drawn'] / 1e6:,.0f} million"),
        ("read from the checkpoint", f"{read / GB:.2f} GB"),
        ("copied to the device", f"{found['copied'] / GB:.2f} GB"),
        ("held on the device then", f"{found['held'] / GB:.2f} GB"),
        ("peak memory of the process, with the device's", f"{found['peak'] / GB:.2f} GB"),
    ]


def run(call: Call[StartBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    rows = _rows("fresh", _in_a_process(measure, bench, None), 0)
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        _in_a_process(write_checkpoint, bench, folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        rows += _rows("resumed, weights and moments", _in_a_process(measure, bench, folder), size)
    print("\n".join(f"{what}: {value}" for what, value in rows))
    title = f"The start of one of {bench.ranks} simulated ranks of `{bench.preset}`"
    write_record(Path(bench.output) / "start.md", title, call.command, rows, NOTES)


NOTES = (
    "Simulated: rank 0 alone, over a fake process group, with host memory in the place of the device's. Until the "
    "first step could begin: imports, the model on the meta device, FSDP2, memory, weights (drawn, or read from a "
    "checkpoint of the same layout). Not counted: data, checksums of the checkpoint, collectives, CUDA."
)


PROGRAM = Program(
    "start", __doc__, run, schema=Schema("bench_start", StartBench, ()), command="python -m bench.train.start"
)

if __name__ == "__main__":
    PROGRAM.start()
