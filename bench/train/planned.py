"""What `mova plan` predicts beside what real steps do on this machine's CPU: memory, FLOPs, bytes sent, seconds.

    python -m bench.train.planned                  # writes bench/results/planned.md, ten minutes on two idle cores
    python -m bench.train.planned seconds=false    # memory, FLOPs and bytes alone, whatever else the machine does

Each layout is planned with the kernels that torch runs on a CPU, then run for three steps by as many processes. Memory
is the largest sum of live tensors of the first rank within a step, weights and moments included; FLOPs are those of
matrix products, as torch's own counter has them (it knows no attention of a CPU); bytes are those of the collectives
that the step issues, the sums of single numbers (norms, losses) among them, which a plan leaves out. Seconds are the
median of the steps, beside a plan at the rates that `mova bench matmul`, `attention` and `exchange` find just before
while as many processes work, one thread each.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from core.compose import Schema
from core.errors import RunError
from core.program import Call, Program
from tools.bench import attention, exchange, matmul
from tools.bench.ranks import on_ranks
from tools.bench.record import write_record
from train.config import TrainConfig, compose_train
from train.engine.engine import ShardedEngine, build_engine
from train.engine.optim import local
from train.monitor.counters import CollectiveCounter
from train.parallel.memory import LiveMemory
from train.parallel.mesh import make_layout
from train.plan.count import make_batch
from train.plan.gpu import GpuConfig, read_sheet
from train.plan.plan import KnownCounts, plan_run, workload_of
from train.plan.question import ClipSize, Question
from train.step import forward_backward

CLIPS = {"tiny": ClipSize(49, 64, 64), "sync": ClipSize(49, 64, 64), "small": ClipSize(49, 128, 128)}
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 process": (1, []),
    "2 processes, FSDP2": (2, []),
    "2 processes, ulysses 2, attention": (2, ["parallel.ulysses=2", "parallel.recompute=attention"]),
    "4 processes, 2 copies, full": (4, ["parallel.dp_replicate=2", "parallel.recompute=full"]),
    "4 processes, ulysses 2": (4, ["parallel.ulysses=2"]),
}
CLIPS_A_STEP = 4


@dataclass
class PlannedBench:
    """What is planned and run.

    models: files of conf/model
    seconds: whether the rates of this machine are measured, and steps timed
    rounds: in which rates are measured
    steps: that are timed
    output: folder of the record
    """

    models: list[str] = field(default_factory=lambda: list(CLIPS))
    seconds: bool = True
    rounds: int = 10
    steps: int = 5
    output: str = "bench/results"


def config_of(model: str, overrides: list[str]) -> TrainConfig:
    """The training config of one case."""
    given = [f"model={model}", "run.id=planned", "data.path=none", f"data.batch_size={CLIPS_A_STEP}"]
    return compose_train([*given, "parallel.compute_dtype=float32", *overrides])[0]


def cpu_sheet() -> GpuConfig:
    """A sheet whose rates say nothing, where only counts are asked for."""
    rates = {name: [1.0, 1.0, 1.0] for name in GpuConfig.rate_names()}
    return GpuConfig("cpu", "CPU", 1024.0, 1.0, node_gpus=64, host_gib=1024.0, **rates)  # type: ignore[arg-type]


def measured_sheet(processes: int, rounds: int) -> GpuConfig:
    """What this machine's CPU reaches while so many processes work. RunError if it can't be measured."""
    with tempfile.TemporaryDirectory() as folder:
        sheet = f"sheet={folder}/machine.yaml"
        for program, used in ((matmul, processes), (attention, processes), (exchange, max(2, processes))):
            if program.PROGRAM.run([f"processes={used}", f"rounds={rounds}", sheet]):
                raise RunError(f"{program.PROGRAM.name} failed; seconds=false compares memory, FLOPs and bytes alone")
        return read_sheet(Path(folder) / "machine.yaml")


def plan_case(model: str, world: int, overrides: list[str], sheet: GpuConfig) -> dict[str, Any]:
    """Peak, FLOPs of a step's kernels, bytes by axis and seconds, planned."""
    question = Question(config_of(model, overrides), world, world, sheet, CLIPS[model])
    plan = plan_run(question, KnownCounts())
    return {
        "peak": plan.peak.total,
        "flops": int(plan.what["kernel_flops"]["gemm"]),
        "sent": {axis: int(size) for axis, size in plan.sent.items()},
        "seconds": plan.step.seconds,
    }


def run_case(model: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """The same of real steps, on the first rank. All processes of a group call."""
    config = config_of(model, overrides)
    layout = make_layout(config.parallel, torch.device("cpu"))
    question = Question(config, layout.world, layout.world, cpu_sheet(), CLIPS[model])
    workload = workload_of(question, layout)
    engine = build_engine(config.model, config.parallel, config.optim, layout, 0, workload)
    assert isinstance(engine, ShardedEngine)
    batches = [make_batch(config.model, workload)] * workload.micro_batches

    def step() -> None:
        forward_backward(engine.model, batches, config.objective, "high", layout, engine.backward)
        engine.step(1.0, "high")

    step()
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    # Of the idle expert there are no moments yet; a plan counts those of all.
    weights = sum(local(parameter).nbytes for parameter in engine.model.parameters())
    with LiveMemory() as memory:
        step()
    with CollectiveCounter(layout) as counter:
        step()
    with FlopCounterMode(display=False) as flops:
        step()
    sent = {axis: counter.axis_bytes(axis) for axis in layout.groups() if counter.axis_bytes(axis)}
    return {
        "peak": 3 * weights + memory.peak,
        "flops": flops.get_total_flops(),
        "sent": sent,
        "seconds": statistics.median(times),
    }


def run(call: Call[PlannedBench]) -> None:
    """Plan, run, and write the record."""
    bench, rows = call.config, []
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    torch.set_num_threads(1)
    for world in sorted({world for world, _ in LAYOUTS.values()}):
        sheet = measured_sheet(world, bench.rounds) if bench.seconds else cpu_sheet()
        for model in bench.models:
            for name, (ranks, overrides) in LAYOUTS.items():
                if ranks == world:
                    planned = plan_case(model, world, overrides, sheet)
                    found = on_ranks(world, run_case, model, overrides, bench.steps)[0]
                    rows.append((f"{model}, {name}", _words(planned, found, bench.seconds)))
                    print(": ".join(rows[-1]), flush=True)
    path = Path(bench.output) / "planned.md"
    write_record(
        path, "Planned and measured steps on a CPU", call.command, rows, str(__doc__).split("\n\n")[-1].strip()
    )
    print(f"written to {path}")


def _words(planned: dict[str, Any], found: dict[str, Any], timed: bool) -> str:
    memory = f"peak {planned['peak'] / 2**20:,.1f} MiB planned, {found['peak'] / 2**20:,.1f} measured "
    words = [memory + f"({planned['peak'] / found['peak'] - 1:+.1%})"]
    words.append(f"FLOPs of products {planned['flops']:,} planned, {found['flops']:,} counted")
    sent = [
        f"{axis} {planned['sent'].get(axis, 0):,} planned, {size:,} counted" for axis, size in found["sent"].items()
    ]
    words.append(f"bytes sent {', '.join(sent) or 'none'}")
    if timed:
        seconds = planned["seconds"] / found["seconds"] - 1
        words.append(f"{planned['seconds']:.3f} s planned, {found['seconds']:.3f} s measured ({seconds:+.0%})")
    return "; ".join(words)


PROGRAM = Program(
    "planned", __doc__, run, schema=Schema("bench_planned", PlannedBench, ()), command="python -m bench.train.planned"
)

if __name__ == "__main__":
    PROGRAM.start()
