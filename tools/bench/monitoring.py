"""What monitoring costs: seconds inside its code, and whole runs with it and without it in turns.

    python -m tools.bench.monitoring                        # writes bench/monitoring.md; wants a quiet machine

Each round trains one run as `python -m train` does by default (all metrics, W&B offline), and one without metrics,
W&B and the ear for requests to look inside. Keys: model, clips (a step), steps (timed; tens, since one step in ten has
the norms), rounds (2 to 20; the two runs change places from round to round), processes, output.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig, OmegaConf

from model.joint import JointConfig
from tools.bench.ranks import on_ranks
from tools.bench.read import make_shards
from tools.bench.record import write_record
from tools.bench.step import CLIP
from train import loop
from train.checkpoint import CheckpointConfig
from train.config import RunConfig, TrainConfig
from train.feed import DataConfig
from train.inspect import Inspector
from train.mesh import make_layout
from train.meter import Meter
from train.monitor import Monitor
from train.probes import BridgeProbe

STUDENT = (  # 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip
WARM = 5  # steps before those that are timed
CODE: dict[str, tuple[type, tuple[str, ...]]] = {
    "metrics of the device": (Meter, ("begin", "sums")),
    "metrics of the host": (Meter, ("host", "read")),
    "the Bridge's part": (BridgeProbe, ("_look",)),
    "metrics.jsonl and display": (Monitor, ("step",)),
    "requests to look inside": (Inspector, ("step", "requested")),
}


@dataclass
class MonitoringBench:
    """What is measured."""

    model: JointConfig = MISSING
    clips: int = 2
    steps: int = 60
    rounds: int = 8
    processes: int = 1
    output: str = "bench"


class _Nothing:
    """Stands where something measures or shows: does nothing, and answers always the same."""

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
    forward_backward = loop.forward_backward

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
        for name, answer in (("Meter", {}), ("Monitor", None), ("Inspector", False)):
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


@hydra.main(version_base=None, config_path="pkg://conf", config_name="bench_monitoring")
def main(config: DictConfig) -> None:
    """Entry point."""
    bench = OmegaConf.to_object(config)
    assert isinstance(bench, MonitoringBench)
    if not 2 <= bench.rounds <= len(STUDENT) + 1:
        sys.exit(f"error: rounds={bench.rounds}: give 2 to {len(STUDENT) + 1}, for a confidence interval")
    if bench.steps < 10 or bench.steps % 10:
        sys.exit(f"error: steps={bench.steps}: give a multiple of 10, so that one step in ten has the norms")
    name = HydraConfig.get().runtime.choices["model"]
    path = Path(bench.output) / "monitoring.md"
    command = f"python -m tools.bench.monitoring {' '.join(sys.argv[1:])}".strip()
    title = f"What monitoring costs: `{name}`, {bench.processes} process(es), {bench.clips} clips a step"
    write_record(path, title, command, measure(bench), NOTES)
    print(f"written to {path}")


NOTES = (
    "One thread a process. With monitoring: every metric of docs/monitoring.md as by default (`monitor.every=10`), W&B "
    "offline with its thread in the trainer's process. Without: none of it; the loss is still summed over ranks. The "
    "difference compares medians of step times, in which the norms (one step in ten) do not show; the time inside the "
    "code, wall time of the first rank between call and return, has them."
)


if __name__ == "__main__":
    ConfigStore.instance().store(name="bench_monitoring_schema", node=MonitoringBench)
    main()
