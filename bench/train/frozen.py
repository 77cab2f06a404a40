"""Savings of frozen parts compared with training all: bytes, memory and processor time.

    python -m bench.train.frozen                        # writes bench/results/frozen.md; five minutes on two cores

First `small` on two real processes, under FSDP2 and ZeRO 3: CPU seconds of a step, what a process sends, and the
bytes of its tensors. Then MOVA-360p on 64 GPUs, by the formulas that the table at a run's start shows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from model.joint import JointConfig, JointTransformer
from tools.bench.ranks import on_ranks
from tools.bench.record import write_record
from tools.bench.step import make_batch
from train.config import compose_train
from train.engine.engine import build_engine
from train.engine.optim_config import OptimConfig
from train.monitor.counters import CollectiveCounter
from train.objective.objective import Objective, ObjectiveConfig
from train.parallel.flops import step_flops
from train.parallel.mesh import ParallelConfig, make_layout
from train.parallel.parts import freeze, tower_of, trained_towers
from train.parallel.recompute import units
from train.parallel.traffic import step_bytes
from train.parallel.workload import Workload
from train.step import forward_backward

CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "all": (("video", "audio", "bridge"), {}),
    "towers frozen": (("bridge",), {"bridge_dropout": 0.0}),
    "video alone": (("video",), {"audio_weight": 0.0, "bridge_dropout": 1.0}),
    "audio alone": (("audio",), {"video_weight": 0.0, "bridge_dropout": 1.0}),
}
ENGINES = ("fsdp2", "zero3")
WARM, STEPS = 2, 4  # steps: the second is counted, those from WARM on are timed, one of each expert in turn
EMA = 0.999
GPUS, CLIP = 64, ((49, 44, 80), 403)


def model_config(name: str) -> JointConfig:
    """A model of conf/model."""
    return compose_train([f"model={name}", "run.id=bench", "data.path=none"])[0].model


def measure_case(engine_name: str, case: str) -> dict[str, float]:
    """CPU seconds of a step on this rank, bytes that it sends in one, bytes of its state and of its gradients."""
    train, changes = CASES[case]
    config = model_config("small")
    parallel = ParallelConfig(engine=engine_name)
    layout = make_layout(parallel, torch.device("cpu"))
    objective = Objective(ObjectiveConfig(**changes), config.experts)
    engine = build_engine(config, parallel, OptimConfig(train=[*train]), layout, seed=0, ema_decay=EMA)
    times, gradients, counter = [], 0, CollectiveCounter(layout)
    for step in range(STEPS):
        prepared = make_batch(config, 1, step, objective)
        prepared = replace(prepared, batch=objective.alone(prepared.batch))
        expert = objective.expert(step)
        dist.barrier()
        begin = time.process_time()
        if step == WARM - 1:
            with counter:
                forward_backward(engine.model, [prepared], objective.config, expert, layout, engine.backward)
                gradients = _bytes(p.grad for p in engine.network.parameters() if p.grad is not None)
                engine.step(1.0, expert)
        else:
            forward_backward(engine.model, [prepared], objective.config, expert, layout, engine.backward)
            engine.step(1.0, expert)
        times.append(time.process_time() - begin)
    return {
        "cpu": sum(times[WARM:]) / len(times[WARM:]),
        "sent": sum(counter.bytes.values()),
        "reduced": sum(size for (_, kind), size in counter.bytes.items() if "reduce" in kind),
        "state": _bytes(engine.tensors().values()),
        "gradients": gradients,
    }


def _bytes(tensors: Any) -> int:
    """Of what this rank holds of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _local(tensors))


def _local(tensors: Any) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        yield tensor.to_local() if hasattr(tensor, "to_local") else tensor


def measure_all() -> dict[tuple[str, str], dict[str, float]]:
    """Every engine and case, on one rank of two."""
    return {(engine, case): measure_case(engine, case) for engine in ENGINES for case in CASES}


def measured() -> list[tuple[str, str]]:
    """The rows of the real processes."""
    ranks = on_ranks(2, measure_all)
    rows = []
    for engine, case in ranks[0]:
        found = max((rank[engine, case] for rank in ranks), key=lambda one: one["cpu"])
        held = f", {found['gradients'] / 1e6:.1f} MB of gradients" if engine == "fsdp2" else ""
        rows.append(
            (
                f"`small`, {engine}: {case}",
                f"{found['cpu']:.2f} CPU s a step, {found['sent'] / 1e6:.1f} MB sent ({found['reduced'] / 1e6:.1f} for "
                f"sums), {found['state'] / 1e6:.1f} MB of state{held}",
            )
        )
    return rows


def by_formula() -> list[tuple[str, str]]:
    """The rows of MOVA-360p: one clip for each group of 8 ranks."""
    config, parallel = model_config("mova_360p"), ParallelConfig(compute_dtype="bfloat16")
    alone: Any = SimpleNamespace(size=1)  # bytes over fsdp do not depend on who shares a clip's tokens
    layout: Any = SimpleNamespace(world=GPUS, dp_replicate=1, compute=torch.bfloat16, sequence=alone)
    workload = Workload(1, *CLIP)
    rows = []
    for case in ("all", "towers frozen"):
        trained = trained_towers(CASES[case][0], config.experts)
        with torch.device("meta"):
            model = JointTransformer(config)
        freeze(model, trained)
        sizes = {name: 4 * -(-p.shape[0] // GPUS) * p.shape[1:].numel() for name, p in model.named_parameters()}
        learned = sum(size for name, size in sizes.items() if tower_of(name) in trained)
        idle = sum(
            size for name, size in sizes.items() if name.startswith("video_dit_2.") and tower_of(name) in trained
        )
        sent = step_bytes(model, parallel, layout, workload, ["full"] * len(units(model)))["fsdp"]
        flops = step_flops(config, *CLIP, trained)
        held = [sum(sizes.values()), 2 * learned, learned - idle, learned]
        shown = "weights {:.2f}, moments {:.2f}, gradients {:.2f}, averages {:.2f}".format(*(h / 2**30 for h in held))
        what = f"MOVA-360p on {GPUS} GPUs, predicted: {case}"
        rows.append(
            (
                what,
                f"GiB a rank: {shown}; {sent / 1e9:.1f} GB sent over fsdp a micro-batch, "
                f"{flops / 1e15:.2f} PFLOP a clip",
            )
        )
    return rows


NOTES = (
    "Rows of `small`: measured on 2 processes of one thread, one clip each, two experts in turn, averages kept. CPU "
    "seconds are those of the slower process, waiting in gloo and updates included; state is its part of weights, "
    "moments and averages. Rows of MOVA-360p: predicted, by the formulas of the table at a run's start, which "
    "tests/train/engine/test_frozen.py holds against what collectives of a real step are counted to send. That frozen "
    "weights keep every bit over 50 steps is asserted there. GPU: not measured."
)


def main() -> None:
    """Entry point."""
    rows = measured() + by_formula()
    title = "What frozen parts save, against training all"
    write_record(Path("bench") / "results" / "frozen.md", title, "python -m bench.train.frozen", rows, NOTES)
    print("written to bench/results/frozen.md")


if __name__ == "__main__":
    main()
