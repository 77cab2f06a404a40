"""Cost of a checkpoint: how long training pauses for one written in the background, compared with a blocking one; and,
with a dataset, the time of a run from the death of a process to its next new step.

    python -m bench.train.checkpoint model=small dataset=shards/train       # writes bench/results/checkpoint.md
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import MISSING
from torch import Tensor

from core.child import command, environment
from core.compose import Schema
from core.errors import RunError
from core.program import Call, Program
from data.loader.state import DataState
from model.joint import JointConfig
from tools.bench.record import write_record
from train.checkpoint.checkpoint import CheckpointConfig, TrainState
from train.checkpoint.saver import Saver
from train.engine.engine import build_engine
from train.engine.optim_config import OptimConfig
from train.parallel.mesh import ParallelConfig, make_layout

RANKS = 2


@dataclass
class CheckpointBench:
    """The saves that are timed.

    saves: of each kind
    folder: for temporary files
    dataset: shards; with them also the time from a death to the next step is measured
    output: folder of the record
    """

    model: JointConfig = MISSING
    saves: int = 5
    folder: str | None = None
    dataset: str | None = None
    output: str = "bench/results"


def measure(rank: int, bench: CheckpointBench, folder: str) -> None:
    """One of the ranks: saves with a state of weights and moments, waited for and not, in turns."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    parallel = ParallelConfig()
    layout = make_layout(parallel, torch.device("cpu"))
    engine = build_engine(bench.model, parallel, OptimConfig(), layout, seed=0)
    names = [key.removeprefix("model.") for key in engine.tensors()]
    engine.restore(dict.fromkeys(names, 1), _nothing)  # moments for all parameters
    state = TrainState(engine, DataState.start("0" * 8, [1], 0, 1))
    saver = Saver(Path(folder), CheckpointConfig(keep=1), {}, layout.describe())
    waited: list[float] = []
    stopped: list[float] = []
    done: list[float] = []
    for number in range(2 * bench.saves + 1):
        state.step = number + 1
        dist.barrier()
        begin = time.perf_counter()
        saver.begin(state)
        stop = time.perf_counter() - begin
        if number % 2:  # training computes meanwhile
            _compute(saver)
        saver.settle(last=True)
        whole = time.perf_counter() - begin
        if number:
            (done if number % 2 else waited).append(whole)
            if number % 2:
                stopped.append(stop)
        else:
            first = stop
    if rank == 0:
        size = next(event.details["bytes"] for event in saver.events())
        found = {"bytes": size, "waited": waited, "stopped": stopped, "done": done, "first": first}
        Path(folder, "result.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _nothing(tensors: dict[str, Tensor]) -> None:
    """Leaves the tensors as they are."""


def _compute(saver: Saver) -> None:
    a = torch.randn(512, 512)
    while saver.busy():
        torch.mm(a, a)


def death_to_step(data: str, folder: Path) -> tuple[float, float]:
    """Seconds from the SIGKILL of a process of a tiny run to the first step that it had not done before, and to the
    start of training itself ("resumed")."""
    typed = [
        f"cluster.processes={RANKS}", "cluster.restarts=1", "model=tiny",
        f"run.root={folder}", "run.id=killed", f"data.path={data}", "steps=100000", "monitor.wandb=disabled",
        "checkpoint.every=5", "validation.every=0", "data.batch_size=4",
    ]  # fmt: skip
    launcher = subprocess.Popen(command("launch", more=typed), env=environment(), stderr=subprocess.DEVNULL)
    metrics, events = folder / "killed" / "metrics.jsonl", folder / "killed" / "events.jsonl"
    try:
        _wait(launcher, lambda: _last_step(metrics) >= 12)
        worker = next(p for p in psutil.Process(launcher.pid).children(recursive=True) if p.name() == "rank 0")
        before = _last_step(metrics)
        begin = time.monotonic()
        worker.kill()
        _wait(launcher, lambda: '"resumed"' in events.read_text())
        resumed = time.monotonic() - begin
        _wait(launcher, lambda: _last_step(metrics) > before)
        return time.monotonic() - begin, resumed
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=120)


def _last_step(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    steps = [json.loads(line)["step"] for line in lines if '"train/loss"' in line and line.endswith("}")]
    return max(steps, default=-1)


def _wait(launcher: subprocess.Popen[bytes], condition: Callable[[], object]) -> None:
    while not condition():
        if launcher.poll() is not None:
            raise RunError(f"the run ended before it could be killed, with status {launcher.returncode}")
        time.sleep(0.05)


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})"


def run(call: Call[CheckpointBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    name = call.choices["model"]
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        load = os.getloadavg()[0]
        mp.spawn(measure, args=(bench, folder), nprocs=RANKS)
        found = json.loads(Path(folder, "result.json").read_text())
        ratio = statistics.median(found["stopped"]) / statistics.median(found["waited"])
        rows = [
            (f"state of `{name}`, weights and moments, on {RANKS} ranks", f"{found['bytes'] / 1e6:,.0f} MB"),
            ("a blocking save, median (min to max)", _seconds(found["waited"])),
            ("a save in the background: training pauses for", _seconds(found["stopped"])),
            ("as a fraction of the blocking one", f"{ratio:.1%}"),
            ("the same for the first save, which allocates the buffers", f"{found['first']:.3f} s"),
            ("a save in the background, until its commit, while the ranks compute", _seconds(found["done"])),
        ]
        if bench.dataset is not None:
            step, resumed = death_to_step(bench.dataset, Path(folder))
            rows.append(("`tiny`: from the SIGKILL of one process to the next new step", f"{step:.1f} s"))
            rows.append(("until all processes were restarted and had loaded the checkpoint", f"{resumed:.1f} s"))
        rows.append(("load of the machine at the start (1 min)", f"{load:.1f} on {os.cpu_count()} cores"))
    write_record(Path(bench.output) / "checkpoint.md", "What a checkpoint costs", call.command, rows, NOTES)
    print("\n".join(f"{what}: {value}" for what, value in rows))


NOTES = (
    "Through `train/checkpoint/saver.py`, as training does it. Waited for: from the step boundary to the commit of a "
    "save on idle ranks, fsync and checksums of all files included. In the background: from the step boundary to the "
    "return to training. The time from a death has one launcher with `cluster.restarts=1`: the dead rank is noticed, "
    "all processes start and import again, verify and load the checkpoint, and repeat the steps since it."
)


PROGRAM = Program(
    "checkpoint",
    __doc__,
    run,
    schema=Schema("bench_checkpoint", CheckpointBench, (("model", "small"),)),
    command="python -m bench.train.checkpoint",
)

if __name__ == "__main__":
    PROGRAM.start()
