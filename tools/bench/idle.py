"""What an idle expert costs, against a model with one expert, under FSDP2 and ZeRO.

    python -m tools.bench.idle                              # writes bench/idle-expert.md; wants a quiet machine

Two processes. Per engine: a model with one expert; two experts of which one trains always; two that alternate. Bytes
are counted, times are medians over interleaved rounds. Keys: model, clips, steps (timed), rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass, field, replace
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
from train.mesh import ENGINES, ParallelConfig, make_layout
from train.objective import Objective, ObjectiveConfig
from train.optim import OptimConfig
from train.step import forward_backward

CASES = {"one expert": ("high",), "two, one trains": ("high",), "two, alternating": ("high", "low")}


@dataclass
class IdleBench:
    """What is measured."""

    model: JointConfig = MISSING
    clips: int = 1
    steps: int = 8
    rounds: int = 3
    engines: list[str] = field(default_factory=lambda: list(ENGINES))
    output: str = "bench"


def measure_case(config: JointConfig, engine_name: str, experts: tuple[str, ...], clips: int, steps: int) -> dict:
    """Median step time of this rank, and what it sends in one step of each expert."""
    parallel = ParallelConfig(engine=engine_name)
    layout = make_layout(parallel, torch.device("cpu"))
    objective = Objective(ObjectiveConfig(), config.experts)
    engine = build_engine(config, parallel, OptimConfig(), layout, seed=0)
    times: list[float] = []
    counters: list[CollectiveCounter] = []
    warm = 2 * len(experts)
    for step in range(warm + steps):
        expert = experts[step % len(experts)]
        prepared = make_batch(config, clips, step, objective)
        dist.barrier()
        begin = time.perf_counter()
        if len(experts) <= step < warm:
            counters.append(CollectiveCounter(layout))
            with counters[-1]:
                forward_backward(engine.model, [prepared], objective.config, expert, layout, engine.backward)
                engine.step(1.0, expert)
        else:
            forward_backward(engine.model, [prepared], objective.config, expert, layout, engine.backward)
            engine.step(1.0, expert)
        if step >= warm:
            times.append(time.perf_counter() - begin)
    sent = sum(sum(counter.bytes.values()) for counter in counters) / len(counters)
    gathers = sum(calls for counter in counters for (_, kind), calls in counter.calls.items() if kind == "all_gather")
    return {"time": statistics.median(times), "sent": sent, "gathers": gathers / len(counters)}


def measure(bench: IdleBench) -> list[tuple[str, str]]:
    """All engines and cases, rounds interleaved; returns the table."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number in range(bench.rounds):
        for engine in bench.engines:
            for case, experts in CASES.items():
                config = replace(bench.model, two_experts=case != "one expert")
                ranks = on_ranks(2, measure_case, config, engine, experts, bench.clips, bench.steps)
                slowest = max(ranks, key=lambda rank: rank["time"])
                found.setdefault((engine, case), []).append(slowest)
                print(
                    f"round {number + 1}/{bench.rounds}, {engine}, {case}: {slowest['time']:.3f} s a step", flush=True
                )
    rows = []
    for (engine, case), runs in found.items():
        times = [run["time"] for run in runs]
        first = statistics.median(run["time"] for run in found[engine, "one expert"])
        rows.append(
            (
                f"{engine}: {case}",
                f"{statistics.median(times):.3f} s a step ({min(times):.3f} to {max(times):.3f}; "
                f"{statistics.median(times) / first - 1:+.0%}), {runs[0]['sent'] / 1e6:.2f} MB sent, "
                f"{runs[0]['gathers']:.0f} gathers",
            )
        )
    return rows


@hydra.main(version_base=None, config_path="pkg://conf", config_name="bench_idle")
def main(config: DictConfig) -> None:
    """Entry point."""
    bench = OmegaConf.to_object(config)
    assert isinstance(bench, IdleBench)
    name = HydraConfig.get().runtime.choices["model"]
    path = Path(bench.output) / "idle-expert.md"
    command = f"python -m tools.bench.idle {' '.join(sys.argv[1:])}".strip()
    rows = measure(bench)
    write_record(path, f"What an idle expert costs: `{name}` on 2 processes", command, rows, NOTES)
    print(f"written to {path}")


NOTES = (
    "One thread a process; medians of the slower process, percent against one expert under the same engine. Bytes are "
    "what a process sends in a step, update included. ZeRO 3 fetches parameters ahead by the order of the last step; "
    "when the expert changes, that order is wrong and is recorded anew: the difference between its last two rows. That "
    "the idle expert's weights and moments keep every bit is asserted in tests/train/test_layouts.py and test_zero.py."
)


if __name__ == "__main__":
    ConfigStore.instance().store(name="bench_idle_schema", node=IdleBench)
    main()
