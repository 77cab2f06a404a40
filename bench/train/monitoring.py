"""Cost of monitoring: seconds inside its code, and alternating whole runs with and without it.

    python -m bench.train.monitoring                        # writes bench/results/monitoring.md; needs an idle machine

Each round trains one run as `mova train` does by default (all metrics, W&B offline), and one without metrics, W&B and
checks for profiling requests.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

import train.step
from core.compose import Schema
from core.errors import UserError
from core.program import Call, Program
from model.joint import JointConfig
from tools.bench.ranks import on_ranks
from tools.bench.read import make_shards
from tools.bench.record import write_record
from tools.bench.step import CLIP
from train import loop
from train.checkpoint.checkpoint import CheckpointConfig
from train.config import RunConfig, TrainConfig
from train.data_config import DataConfig
from train.monitor.bridge_probe import BridgeProbe
from train.monitor.log import Monitor
from train.monitor.metrics import Metrics
from train.monitor.profiler import Profiler
from train.parallel.mesh import make_layout

STUDENT = (  # 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip
WARM = 5  # steps before those that are timed
CODE: dict[str, tuple[type, tuple[str, ...]]] = {
    "metrics of the device": (Metrics, ("begin", "sums")),
    "metrics of the host": (Metrics, ("host", "read")),
    "the Bridge's part": (BridgeProbe, ("_look",)),
    "metrics.jsonl and display": (Monitor, ("step",)),
    "profiling requests": (Profiler, ("step", "requested")),
}


@dataclass
class MonitoringBench:
    """What is trained, with and without metrics.

    clips: of a batch
    steps: of a run, a multiple of 10
    rounds: pairs of runs
    processes: that train
    output: folder of the record
    """

    model: JointConfig = MISSING
    clips: int = 2
    steps: int = 60
    rounds: int = 8
    processes: int = 1
    output: str = "bench/results"


class _Nothing:
    """Replaces an object that measures or displays: does nothing, and always returns the same."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: self._answer

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def train_once(config: TrainConfig, monitored: bool) -> dict[str, Any]:
    """One run; "times": seconds of each timed step, "inside": seconds in all of them by what was done. In a process of
    its own, since parts of the trainer are replaced."""
    begins: list[float] = []
    inside = dict.fromkeys(CODE, 0.0)
    forward_backward = train.step.forward_backward

    def begun(*arguments: Any) -> Any:
        begins.append(time.perf_counter())
        return forward_backward(*arguments)

    def timed(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keys: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **keys)
            finally:
                if WARM < len(begins) <= config.steps:
                    inside[what] += time.perf_counter() - begin

        return call

    places: Any = loop
    places.forward_backward = begun
    if monitored:
        for what, (owner, names) in CODE.items():
            for name in names:
                setattr(owner, name, timed(getattr(owner, name), what))
    else:
        for name, answer in (("Metrics", {}), ("Monitor", None), ("Profiler", False)):
            setattr(places, name, lambda *_, answer=answer: _Nothing(answer))
    os.environ["WANDB_SILENT"] = "true"
    ends = signal.getsignal(signal.SIGTERM)
    loop.run(config, asdict(config), make_layout(config.parallel, torch.device("cpu")))
    signal.signal(signal.SIGTERM, ends)  # the run took it over, and its pool ends this process by it
    times = [after - before for before, after in zip(begins[WARM:], begins[WARM + 1 :], strict=False)]
    return {"times": times, "inside": inside}


def interval(ratios: list[float]) -> tuple[float, float]:
    """Mean of the ratios, and half the width of its 95 % confidence interval (Student's t)."""
    half = STUDENT[len(ratios) - 2] * statistics.stdev(ratios) / len(ratios) ** 0.5
    return statistics.mean(ratios), half


def measure(bench: MonitoringBench) -> list[tuple[str, str]]:
    """All rounds; returns the table."""
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder) / "data", CLIP, 16, (bench.model.text_length, bench.model.video.text_dim))
        for number in range(bench.rounds):
            for monitored in (True, False) if number % 2 else (False, True):
                config = TrainConfig(
                    run=RunConfig(id=f"{number}-{monitored}", root=f"{folder}/runs"),
                    steps=WARM + bench.steps + 1,
                    model=bench.model,
                    data=DataConfig(path=f"{folder}/data", batch_size=bench.clips),
                    checkpoint=CheckpointConfig(every=0, minutes=0),
                )
                found[monitored].append(on_ranks(bench.processes, train_once, config, monitored)[0])
                median = statistics.median(found[monitored][-1]["times"])
                what = "with monitoring" if monitored else "without"
                print(f"round {number + 1}/{bench.rounds}, {what}: {median:.4f} s a step", flush=True)
    medians = {key: [statistics.median(run["times"]) for run in runs] for key, runs in found.items()}
    ratio, half = interval([a / b - 1 for a, b in zip(medians[True], medians[False], strict=True)])
    total = sum(sum(run["times"]) for run in found[True])
    inside = {what: sum(run["inside"][what] for run in found[True]) for what in CODE}
    count = sum(len(run["times"]) for run in found[True])
    return [
        ("load of the machine before, one minute", f"{load:.1f}"),
        ("step with monitoring, median of medians", f"{statistics.median(medians[True]):.4f} s"),
        ("step without", f"{statistics.median(medians[False]):.4f} s"),
        ("difference, mean of the rounds", f"{ratio:+.2%} ± {half:.2%} (95 % confidence)"),
        ("inside its code, of the step time", f"{sum(inside.values()) / total:.3%}"),
        *((f"- {what}", f"{s / total:.3%}, {1e6 * s / count:.0f} µs a step") for what, s in inside.items()),
    ]


def run(call: Call[MonitoringBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    if not 2 <= bench.rounds <= len(STUDENT) + 1:
        raise UserError(f"rounds={bench.rounds}: give 2 to {len(STUDENT) + 1}, for a confidence interval")
    if bench.steps < 10 or bench.steps % 10:
        raise UserError(f"steps={bench.steps}: give a multiple of 10, so that one step in ten has the norms")
    name = call.choices["model"]
    path = Path(bench.output) / "monitoring.md"
    title = f"What monitoring costs: `{name}`, {bench.processes} process(es), {bench.clips} clips a step"
    write_record(path, title, call.command, measure(bench), NOTES)


NOTES = (
    "One thread a process. With monitoring: every metric of docs/monitoring.md as by default (`monitor.every=10`), W&B "
    "offline with its thread in the trainer's process. Without: none of it; the loss is still summed over ranks. The "
    "difference compares medians of step times, in which the norms (one step in ten) do not show; the time inside the "
    "code, wall time of the first rank between call and return, has them."
)


PROGRAM = Program(
    "monitoring",
    __doc__,
    run,
    schema=Schema("bench_monitoring", MonitoringBench, (("model", "small"),)),
    command="python -m bench.train.monitoring",
)

if __name__ == "__main__":
    PROGRAM.start()
