"""Step time on 1, 2 and 4 processes at fixed work per process: how much is lost, and where.

    python -m bench.train.scaling                           # writes bench/results/scaling.md; needs an idle machine

At each number of processes the same step runs twice: by independent processes (their loss is due to
the machine's shared cores and memory), and under FSDP2. The collectives of a step are then replayed without the work
around them.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import MISSING

from core.compose import Schema
from core.program import Call, Program
from model.joint import JointConfig
from tools.bench.ranks import on_ranks
from tools.bench.record import write_record
from tools.bench.step import timed_steps
from train.monitor.counters import CollectiveCounter
from train.parallel.mesh import ParallelConfig

WORLDS = (1, 2, 4)


@dataclass
class ScalingBench:
    """What is trained.

    clips: of a process
    steps: of a measurement
    rounds: of all variants in turn
    output: folder of the record
    """

    model: JointConfig = MISSING
    clips: int = 1
    steps: int = 6
    rounds: int = 3
    output: str = "bench/results"


class _Recorder(CollectiveCounter):
    """Also remembers each collective, so that it can be replayed."""

    def __init__(self, layout: Any) -> None:
        super().__init__(layout)
        self.log: list[tuple[str, int, torch.dtype]] = []

    def _count(self, name: str, args: Any) -> None:
        super()._count(name, args)
        if name in ("_allgather_base_", "_reduce_scatter_base_"):
            whole = args[0] if name == "_allgather_base_" else args[1]
            self.log.append((name, whole.numel(), whole.dtype))


def measure_steps(config: JointConfig, clips: int, steps: int) -> dict[str, Any]:
    """Median step time of this rank, that of its collectives replayed alone, and the bytes that it sends."""
    times, [recorder] = timed_steps(config, ParallelConfig(), clips, steps, counter=_Recorder)
    assert isinstance(recorder, _Recorder)
    dist.barrier()
    replays = []
    for _ in range(3):
        begin = time.perf_counter()
        _replay(recorder.log)
        replays.append(time.perf_counter() - begin)
    return {"step": statistics.median(times), "replay": min(replays), "sent": recorder.axis_bytes("fsdp")}


def _replay(log: list[tuple[str, int, torch.dtype]]) -> None:
    world = dist.get_world_size()
    for name, count, dtype in log:
        whole, part = torch.zeros(count, dtype=dtype), torch.zeros(count // world, dtype=dtype)
        if name == "_allgather_base_":
            dist.all_gather_into_tensor(whole, part)
        else:
            dist.reduce_scatter_tensor(part, whole)


def measure(bench: ScalingBench) -> list[tuple[str, str]]:
    """All rounds, interleaved; returns the table."""
    found: dict[tuple[int, bool], list[dict[str, Any]]] = {}
    for number in range(bench.rounds):
        for world in WORLDS:
            for together in (False, True):
                ranks = on_ranks(world, measure_steps, bench.model, bench.clips, bench.steps, together=together)
                slowest = max(ranks, key=lambda rank: rank["step"])
                found.setdefault((world, together), []).append(slowest)
                print(f"round {number + 1}/{bench.rounds}, {world} processes, "
                      f"{'FSDP2' if together else 'apart'}: {slowest['step']:.3f} s a step", flush=True)  # fmt: skip
    rows = [("load of the machine, one minute", f"{os.getloadavg()[0]:.1f} with this program's own processes")]
    alone = statistics.median(run["step"] for run in found[1, False])
    for world in WORLDS:
        apart, sharded = ([run["step"] for run in found[world, together]] for together in (False, True))
        replay = statistics.median(run["replay"] for run in found[world, True])
        a, b = statistics.median(apart), statistics.median(sharded)
        sent = found[world, True][0]["sent"]
        rows += [
            (f"{world} processes, FSDP2: step", f"{b:.3f} s ({min(sharded):.3f} to {max(sharded):.3f}), "
                                                f"{sent / 1e6:.0f} MB sent a process"),
            ("- a single process alone", f"{alone:.3f} s"),
            ("- lost to shared cores and memory", f"{a - alone:+.3f} s ({a:.3f} s per step without communication)"),
            ("- lost to sharding", f"{b - a:+.3f} s; its collectives alone take {replay:.3f} s"),
            ("- work per second relative to one process", f"{world * alone / b:.2f} times"),
        ]  # fmt: skip
    return rows


def run(call: Call[ScalingBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    name = call.choices["model"]
    path = Path(bench.output) / "scaling.md"
    rows = measure(bench)
    write_record(path, f"`{name}` on 1, 2 and 4 processes at fixed work per process", call.command, rows, NOTES)


NOTES = (
    "One thread a process; each time is the median of the slowest process. Four processes on two cores do twice the "
    "work per core, so twice the time of one is their floor. Replayed collectives meet no late partner; in a step, "
    "waiting for the slower processes counts as lost to sharding too."
)


PROGRAM = Program(
    "scaling",
    __doc__,
    run,
    schema=Schema("bench_scaling", ScalingBench, (("model", "small"),)),
    command="python -m bench.train.scaling",
)

if __name__ == "__main__":
    PROGRAM.start()
