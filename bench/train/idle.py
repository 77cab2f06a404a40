"""Cost of an idle expert compared with a model with one expert, under FSDP2 and ZeRO.

    python -m bench.train.idle                              # writes bench/results/idle-expert.md; needs an idle machine

Two processes. Per engine: a model with one expert; two experts of which only one trains; two that alternate. Bytes
are counted, times are medians over interleaved rounds.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from core.compose import Schema
from core.program import Call, Program
from model.joint import JointConfig
from tools.bench.ranks import on_ranks
from tools.bench.record import write_record
from tools.bench.step import timed_steps
from train.parallel.mesh import ENGINES, ParallelConfig

CASES = {"one expert": ("high",), "two, one trains": ("high",), "two, alternating": ("high", "low")}


@dataclass
class IdleBench:
    """What is trained.

    clips: of a batch
    steps: of a measurement
    rounds: of all variants in turn
    engines: that are compared
    output: folder of the record
    """

    model: JointConfig = MISSING
    clips: int = 1
    steps: int = 8
    rounds: int = 3
    engines: list[str] = field(default_factory=lambda: list(ENGINES))
    output: str = "bench/results"


def measure_case(
    config: JointConfig, engine_name: str, experts: tuple[str, ...], clips: int, steps: int
) -> dict[str, Any]:
    """Median step time of this rank, and what it sends in one step of each expert."""
    times, counters = timed_steps(config, ParallelConfig(engine=engine_name), clips, steps, experts)
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


def run(call: Call[IdleBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    name = call.choices["model"]
    path = Path(bench.output) / "idle-expert.md"
    rows = measure(bench)
    write_record(path, f"What an idle expert costs: `{name}` on 2 processes", call.command, rows, NOTES)


NOTES = (
    "One thread a process; medians of the slower process, percent against one expert under the same engine. Bytes are "
    "what a process sends in a step, update included. ZeRO 3 fetches parameters ahead by the order of the last step; "
    "when the expert changes, that order is wrong and is recorded anew: the difference between its last two rows. That "
    "the idle expert's weights and moments keep every bit is asserted in tests/train/parallel/test_layouts.py and "
    "tests/train/engine/test_zero.py."
)


PROGRAM = Program(
    "idle",
    __doc__,
    run,
    schema=Schema("bench_idle", IdleBench, (("model", "small"),)),
    command="python -m bench.train.idle",
)

if __name__ == "__main__":
    PROGRAM.start()
