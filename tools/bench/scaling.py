"""Step time on 1, 2 and 4 processes at fixed work per process: what is lost, and where it goes.

    python -m tools.bench.scaling                           # writes bench/scaling.md; wants a quiet machine

At each number of processes the same step runs twice: by processes that know nothing of each other (what is lost there,
the machine's cores and memory lose), and under FSDP2. The collectives of a step are then replayed without the work
around them. Keys: model, clips (of a process and step), steps (timed), rounds (each starts all processes anew).
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from model.joint import JointConfig
from tools.bench.ranks import on_ranks
from tools.bench.record import write_record
from tools.bench.step import make_batch
from train.counters import CollectiveCounter
from train.engine import build_engine
from train.mesh import ParallelConfig, make_layout
from train.objective import Objective, ObjectiveConfig
from train.optim import OptimConfig
from train.step import forward_backward

WORLDS = (1, 2, 4)


@dataclass
class ScalingBench:
    """What is measured."""

    model: JointConfig = MISSING
    clips: int = 1
    steps: int = 6
    rounds: int = 3
    output: str = "bench"


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
    parallel = ParallelConfig()
    layout = make_layout(parallel, torch.device("cpu"))
    objective = Objective(ObjectiveConfig(), config.experts)
    engine = build_engine(config, parallel, OptimConfig(), layout, seed=0)
    times, recorder = [], _Recorder(layout)
    for step in range(steps + 3):
        prepared = make_batch(config, clips, step, objective)
        dist.barrier()
        begin = time.perf_counter()
        if step == 2:
            with recorder:
                forward_backward(engine.model, [prepared], objective.config, "high", layout, engine.backward)
        else:
            forward_backward(engine.model, [prepared], objective.config, "high", layout, engine.backward)
        engine.step(1.0, "high")
        if step > 2:
            times.append(time.perf_counter() - begin)
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
            ("- of it one process alone", f"{alone:.3f} s"),
            ("- lost to shared cores and memory", f"{a - alone:+.3f} s ({a:.3f} s a step without any exchange)"),
            ("- lost to sharding", f"{b - a:+.3f} s; its collectives alone take {replay:.3f} s"),
            ("- work done a second against one process", f"{world * alone / b:.2f} times"),
        ]  # fmt: skip
    return rows


@hydra.main(version_base=None, config_path="pkg://conf", config_name="bench_scaling")
def main(config: DictConfig) -> None:
    """Entry point."""
    bench = OmegaConf.to_object(config)
    assert isinstance(bench, ScalingBench)
    name = HydraConfig.get().runtime.choices["model"]
    path = Path(bench.output) / "scaling.md"
    command = f"python -m tools.bench.scaling {' '.join(sys.argv[1:])}".strip()
    rows = measure(bench)
    write_record(path, f"`{name}` on 1, 2 and 4 processes at fixed work per process", command, rows, NOTES)
    print(f"written to {path}")


NOTES = (
    "One thread a process; each time is the median of the slowest process. Four processes on two cores do twice the "
    "work per core, so twice the time of one is their floor. Replayed collectives meet no late partner; in a step, "
    "waiting for the slower processes counts as lost to sharding too."
)


if __name__ == "__main__":
    ConfigStore.instance().store(name="bench_scaling_schema", node=ScalingBench)
    main()
