"""What a run costs beyond its bare step: monitoring, the stream of data, checkpoints. Whole runs in turn.

    python -m bench.train.overhead                        # writes bench/results/overhead.md; needs an idle machine

Each round trains three runs of the same model: "bare", the trainer's steps on one batch that is kept, with no metrics,
W&B or profiling requests and no checkpoint; "monitored", the same as `mova train` monitors it by default (all metrics,
W&B offline); and "whole", which reads its batches from shards and saves checkpoints in the background besides.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from core.compose import Schema
from core.errors import UserError
from core.program import Call, Program
from model.joint import JointConfig
from tools.bench.ranks import on_ranks
from tools.bench.read import make_shards
from tools.bench.record import write_record
from tools.bench.step import CLIP
from train import loop, ready
from train.checkpoint.checkpoint import CheckpointConfig
from train.checkpoint.saver import Saver
from train.config import RunConfig, TrainConfig
from train.data_config import DataConfig
from train.monitor.bridge_probe import BridgeProbe
from train.monitor.log import Monitor
from train.monitor.metrics import Metrics
from train.monitor.profiler import Profiler
from train.objective.noise import Prepared
from train.parallel.mesh import make_layout

STUDENT = (  # 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip
WARM = 5  # steps before those that are timed, and before them the first checkpoint of a run that saves some
COPIES = "copies for checkpoints"
CODE: dict[str, tuple[type, tuple[str, ...]]] = {
    "metrics of the device": (Metrics, ("begin", "sums")),
    "metrics of the host": (Metrics, ("host", "read")),
    "the Bridge's part": (BridgeProbe, ("_look",)),
    "metrics.jsonl and display": (Monitor, ("step",)),
    "profiling requests": (Profiler, ("step", "requested")),
    "the next batch of the stream": (loop.Training, ("_next_batch",)),
    COPIES: (Saver, ("begin",)),
    "word of checkpoints": (Saver, ("settle", "due_by_clock", "failed")),
}


KINDS = ("bare", "monitored", "whole")


@dataclass
class OverheadBench:
    """What is trained, and how often.

    clips: of a batch
    steps: that are timed of a run, a multiple of 10
    save_every: steps between checkpoints of the whole run
    rounds: times that each kind of run is trained
    processes: that train
    output: folder of the record
    """

    model: JointConfig = MISSING
    clips: int = 2
    steps: int = 40
    save_every: int = 20
    rounds: int = 5
    processes: int = 1
    output: str = "bench/results"


@dataclass
class Run:
    """Seconds of the timed steps of one run, on its first rank.

    wall: of each step
    cpu: of the training thread, all steps
    process: of all threads of the process, all steps
    inside: of code that a bare step does not run, all steps, by what was done (wall time)
    first_copy: of the copies for checkpoints before the timed steps
    """

    wall: list[float]
    cpu: float
    process: float
    inside: dict[str, float]
    first_copy: float = 0.0


class _Nothing:
    """Replaces an object that measures or displays: its methods return `answers`, or None."""

    def __init__(self, **answers: Any) -> None:
        self._answers = answers

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: self._answers.get(name)

    def in_place_of(self, _: object) -> Callable[..., _Nothing]:
        """A class whose every object this is."""
        return lambda *_, **__: self

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        return None


NOTHING = {
    "Metrics": _Nothing(sums={}, host={}, read={}),
    "Monitor": _Nothing(),
    "Profiler": _Nothing(step={}, requested=False),
}


def _replace(owner: Any, name: str, put: Callable[[Any], Any]) -> None:
    """Put put(what is there) in the place of `owner.name`. AttributeError where nothing is: it has moved."""
    setattr(owner, name, put(getattr(owner, name)))


def train_once(config: TrainConfig, kind: str, warm: int) -> Run:
    """One run of a kind of KINDS, timed from step `warm` on. In a process of its own, since parts of the trainer are
    replaced."""
    clocks: list[tuple[float, float, float]] = []
    under_way: list[str] = []
    inside, before = dict.fromkeys(CODE, 0.0), dict.fromkeys(CODE, 0.0)

    def noted(forward_backward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            clocks.append((time.perf_counter(), time.thread_time(), time.process_time()))
            return forward_backward(*arguments)

        return call

    def timed(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def put(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **keys: Any) -> Any:
                if under_way:  # called by another of CODE, which counts it
                    return function(*arguments, **keys)
                begin = time.perf_counter()
                under_way.append(what)
                try:
                    return function(*arguments, **keys)
                finally:
                    under_way.clear()
                    if len(clocks) < config.steps:  # the last one is not timed, and the end of the run no part of it
                        times = inside if len(clocks) > warm else before
                        times[what] += time.perf_counter() - begin

            return call

        return put

    _replace(loop, "forward_backward", noted)
    if kind == "bare":
        for name, nothing in NOTHING.items():
            _replace(ready, name, nothing.in_place_of)
    else:
        for what, (owner, names) in CODE.items():
            for name in names:
                _replace(owner, name, timed(what))
    if kind != "whole":
        _replace(loop.Training, "_next_batch", _kept)
    os.environ["WANDB_SILENT"] = "true"
    loop.run(config, asdict(config), make_layout(config.parallel, torch.device("cpu")))
    timed_clocks = clocks[warm:]
    assert len(timed_clocks) == config.steps - warm, "forward_backward was not called once a step"
    wall = [after[0] - before[0] for before, after in zip(timed_clocks, timed_clocks[1:], strict=False)]
    first, last = timed_clocks[0], timed_clocks[-1]
    return Run(wall, last[1] - first[1], last[2] - first[2], inside, before[COPIES])


def _kept(next_batch: Callable[..., list[Prepared]]) -> Callable[..., list[Prepared]]:
    """Returns the first batch again and again."""
    kept: list[list[Prepared]] = []

    def call(training: loop.Training, step: int) -> list[Prepared]:
        if not kept:
            kept.append(next_batch(training, step))
        return kept[0]

    return call


def interval(ratios: list[float]) -> tuple[float, float]:
    """Mean of the ratios, and half the width of its 95 % confidence interval (Student's t)."""
    half = STUDENT[len(ratios) - 2] * statistics.stdev(ratios) / len(ratios) ** 0.5
    return statistics.mean(ratios), half


def measure(bench: OverheadBench) -> list[tuple[str, str]]:
    """All rounds; returns the table."""
    found: dict[str, list[Run]] = {kind: [] for kind in KINDS}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder) / "data", CLIP, 16, (bench.model.text_length, bench.model.video.text_dim))
        for number in range(bench.rounds):
            for kind in KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]:
                saves = kind == "whole"
                warm = WARM + bench.save_every * saves
                config = TrainConfig(
                    run=RunConfig(id=f"{number}-{kind}", root=f"{folder}/runs"),
                    steps=warm + bench.steps + 1,
                    model=bench.model,
                    data=DataConfig(path=f"{folder}/data", batch_size=bench.clips),
                    checkpoint=CheckpointConfig(every=bench.save_every * saves, minutes=0),
                )
                found[kind].append(on_ranks(bench.processes, train_once, config, kind, warm)[0])
                median = statistics.median(found[kind][-1].wall)
                print(f"round {number + 1}/{bench.rounds}, {kind}: {median:.4f} s a step", flush=True)
                shutil.rmtree(f"{folder}/runs")
    return [("load of the machine before, one minute", f"{load:.1f}"), *_times(found), *_inside(found)]


def _times(found: dict[str, list[Run]]) -> list[tuple[str, str]]:
    """Rows: seconds of a step of the bare run, and what the others take more, by three clocks."""
    rows = []
    clocks: dict[str, Callable[[Run], float]] = {
        "wall time": lambda run: statistics.mean(run.wall),
        "CPU time of the training thread": lambda run: run.cpu / len(run.wall),
        "CPU time of all threads": lambda run: run.process / len(run.wall),
    }
    for clock, seconds in clocks.items():
        bare = [seconds(run) for run in found["bare"]]
        rows.append((f"bare step, {clock}, mean", f"{statistics.mean(bare):.4f} s"))
        for kind in KINDS[1:]:
            more, half = interval([seconds(run) / one - 1 for run, one in zip(found[kind], bare, strict=True)])
            rows.append((f"- {kind}, mean of the rounds", f"{more:+.2%} ± {half:.2%} (95 % confidence)"))
    return rows


def _inside(found: dict[str, list[Run]]) -> list[tuple[str, str]]:
    """Rows: time between call and return of what a bare step does not run, in whole runs."""
    runs = found["whole"]
    total, count = sum(sum(run.wall) for run in runs), sum(len(run.wall) for run in runs)
    inside = {what: sum(run.inside[what] for run in runs) for what in CODE}
    first = statistics.mean(run.first_copy for run in runs)
    return [
        ("whole run: inside all that a bare step lacks, of the step time", f"{sum(inside.values()) / total:.3%}"),
        *((f"- {what}", f"{s / total:.3%}, {1e6 * s / count:.0f} µs a step") for what, s in inside.items()),
        ("the first copy of a run, which allocates its memory", f"{first:.2f} s"),
    ]


def run(call: Call[OverheadBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    if not 2 <= bench.rounds <= len(STUDENT) + 1:
        raise UserError(f"rounds={bench.rounds}: give 2 to {len(STUDENT) + 1}, for a confidence interval")
    if bench.steps < 10 or bench.steps % 10:
        raise UserError(f"steps={bench.steps}: give a multiple of 10, so that one step in ten has the norms")
    if bench.save_every < 1 or bench.steps % bench.save_every:
        raise UserError(f"save_every={bench.save_every} of steps={bench.steps}: give a divisor, for whole intervals")
    name = call.choices["model"]
    title = (
        f"What a run costs beyond its bare step: `{name}`, {bench.processes} process(es), {bench.clips} clips a step"
    )
    notes = NOTES.format(save_every=bench.save_every)
    write_record(Path(bench.output) / "overhead.md", title, call.command, measure(bench), notes)


NOTES = (
    "One thread a process. Bare: the trainer's steps on one batch that is kept, without metrics, W&B, profiling "
    "requests and checkpoints; the loss is still summed over ranks. Monitored: the same batch, every metric of "
    "docs/monitoring.md as by default (`monitor.every=10`), W&B offline with its thread in the trainer's process. "
    "Whole: batches read from shards besides, and a checkpoint every {save_every} steps, written in the background; "
    "its wall time has the copy that training waits for, but for the first one of a run, which has a row. Means of all "
    "timed steps of a run; a round compares runs that follow each other, so what changes on the machine is in these "
    "differences. The times inside are wall time of the training thread between call and return, in the same steps as "
    "what they are divided by. By default a run saves a checkpoint every 8 minutes."
)


PROGRAM = Program(
    "overhead",
    __doc__,
    run,
    schema=Schema("bench_overhead", OverheadBench, (("model", "small"),)),
    command="python -m bench.train.overhead",
)

if __name__ == "__main__":
    PROGRAM.start()
