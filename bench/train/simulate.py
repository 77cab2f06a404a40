"""Bytes and memory of one rank of a large run, counted by the real program on simulated ranks.

    python -m bench.train.simulate   # every layout of LAYOUTS -> bench/results/simulate.md, half an hour
    python -m bench.train.simulate 'layouts=[8 GPUs]'   # some of them; their rows are replaced

The training step runs unchanged, at true sizes, as rank 0 of simulated ranks: torch's fake process group and
fake tensors, which have shapes but no storage. Counted are bytes sent by mesh axis, beside their formulas and what the
reference sends, and memory by what it holds. Results are kept in simulate.json beside the table.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from core.compose import Schema
from core.errors import UserError
from core.program import Call, Program
from model.joint import JointConfig, JointTransformer
from tools.bench.record import commit
from train.config import compose_train
from train.engine.engine import ShardedEngine
from train.engine.optim import local
from train.engine.optim_config import OptimConfig
from train.monitor.counters import CollectiveCounter
from train.objective.objective import ObjectiveConfig
from train.parallel.flops import forward_flops
from train.parallel.memory import LiveMemory
from train.parallel.mesh import Layout, ParallelConfig, make_layout
from train.parallel.parallelize import place_model, recompute_kinds
from train.parallel.traffic import attention_bytes, bridge_bytes, step_bytes
from train.parallel.workload import Workload
from train.plan.count import make_batch
from train.step import forward_backward

GIB = 2**30
P360, P720 = ((49, 44, 80), 403), ((49, 90, 160), 403)  # latents of a clip of 193 frames: grid, steps of sound


@dataclass(frozen=True)
class Simulation:
    """One layout: ranks, one clip a rank's micro-batch, parallel settings."""

    world: int
    parallel: dict[str, Any]
    clip: tuple[tuple[int, int, int], int] = P360
    micro_batches: int = 1


def _of(world: int, clip: Any = P360, micro_batches: int = 1, recompute: str = "full", **parallel: Any) -> Simulation:
    settings = {"compute_dtype": "bfloat16", "recompute": recompute, **parallel}
    return Simulation(world, settings, clip, micro_batches)


LAYOUTS = {
    "4 GPUs, moments on the host": _of(4, ulysses=4, optimizer_state="host"),
    "8 GPUs": _of(8, ulysses=8),
    "8 GPUs, moments on the host": _of(8, ulysses=8, optimizer_state="host"),
    "8 GPUs, 2 micro-batches": _of(8, ulysses=8, micro_batches=2),
    "8 GPUs, 2 micro-batches, summed whole": _of(8, ulysses=8, micro_batches=2, accumulate="unsharded"),
    "8 GPUs, 720p, moments on the host": _of(8, P720, ulysses=8, optimizer_state="host"),
    "16 GPUs": _of(16, ulysses=8),
    "16 GPUs, 2 micro-batches": _of(16, ulysses=8, micro_batches=2),
    "16 GPUs, 720p, 2 micro-batches": _of(16, P720, ring=2, ulysses=8, micro_batches=2),
    "64 GPUs, no sequence parallelism": _of(64),
    "64 GPUs, ulysses 2": _of(64, ulysses=2),
    "64 GPUs, ulysses 4": _of(64, ulysses=4),
    "64 GPUs": _of(64, ulysses=8),
    "64 GPUs, attention kept": _of(64, recompute="attention", ulysses=8),
    "64 GPUs, attention kept, 2 micro-batches": _of(64, recompute="attention", ulysses=8, micro_batches=2),
    "64 GPUs, 720p, 2 micro-batches": _of(64, P720, recompute="attention", ring=2, ulysses=8, micro_batches=2),
    "64 GPUs, 20 GiB kept": _of(64, recompute="budget", recompute_gib=20.0, ulysses=8),
    "64 GPUs, ring 2 x ulysses 4": _of(64, ring=2, ulysses=4),
    "1,024 GPUs, sharded over all": _of(1024, recompute="attention", ulysses=8),
    "1,024 GPUs": _of(1024, recompute="attention", dp_replicate=16, ulysses=8),
    "1,024 GPUs, 720p": _of(1024, P720, recompute="attention", dp_replicate=16, ulysses=8),
    "1,024 GPUs, 720p, ring 2 x ulysses 8": _of(1024, P720, recompute="attention", dp_replicate=16, ring=2, ulysses=8),
}


@dataclass
class Simulations:
    """The layouts to simulate.

    layouts: names of LAYOUTS; []: all
    model: a file of conf/model
    output: folder of the result
    """

    layouts: list[str] = field(default_factory=list)
    model: str = "mova_360p"
    output: str = "bench/results"


def simulate(model_name: str, simulation: Simulation) -> dict[str, Any]:
    """One step of rank 0 on fake tensors: what is counted, by name. Call in a process of its own."""
    begin = time.perf_counter()
    config = compose_train([f"model={model_name}", "run.id=simulated", "data.path=none"])[0].model
    parallel = ParallelConfig(**simulation.parallel)
    dist.init_process_group("fake", rank=0, world_size=simulation.world, store=FakeStore())
    layout = make_layout(parallel, torch.device("cpu"))  # outside of the fake mode, which cannot make meshes
    workload = Workload(1, *simulation.clip, simulation.micro_batches)
    with torch.device("meta"):
        kinds = recompute_kinds(JointTransformer(config), parallel, layout, workload)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = JointTransformer(config)
        place_model(model, parallel, layout, workload)
        on_host = parallel.optimizer_state == "host"
        engine = ShardedEngine(model, OptimConfig(), layout, parallel.accumulate, on_host)
        engine.restore(dict.fromkeys(engine.optimizer.parameters, 1), lambda _: None)  # as if in mid-run
        found = _step(engine, layout, workload, config)
    found["formula"] = step_bytes(model, parallel, layout, workload, kinds)
    compute = 2
    found["bridge_formula"] = bridge_bytes(config, layout.sequence.size, workload, 4)[0]
    found["attention_formula"] = sum(attention_bytes(config, layout, workload, compute, 4)[0].values())
    clips, ranks = workload.clips * workload.micro_batches, layout.sequence.size
    found["flops"] = 3 * clips * forward_flops(config, workload.grid, workload.audio_steps).total / ranks
    found["tokens"] = -(-workload.video_tokens(config) // ranks)
    found["layout"] = {key: value for key, value in simulation.parallel.items() if key != "compute_dtype"}
    found["world"], found["ranks"] = simulation.world, ranks
    found["seconds"] = time.perf_counter() - begin
    dist.destroy_process_group()
    return found


def _step(engine: ShardedEngine, layout: Layout, workload: Workload, config: JointConfig) -> dict[str, Any]:
    shards = [local(parameter) for parameter in engine.model.parameters()]
    weights = sum(_nbytes(shard) for shard in shards)
    moments = 0 if engine.optimizer.state_on_host else 2 * weights
    micro_batches = [make_batch(config, workload)] * workload.micro_batches
    marks: dict[str, Any] = {}
    memory, counter = LiveMemory(), CollectiveCounter(layout)

    def backward(loss: torch.Tensor, last: bool) -> None:
        if "kept" not in marks:
            marks["kept"], marks["forward"] = memory.live, dict(counter.bytes)
        engine.backward(loss, last)

    with counter, memory:
        forward_backward(engine.model, micro_batches, ObjectiveConfig(), "high", layout, backward)
        marks["gradients"] = memory.live
        peak = memory.peak
        engine.step(1.0, "high")
    forward = {axis: sum(size for (a, _), size in marks["forward"].items() if a == axis) for axis in layout.groups()}
    layers = len(engine.model.dual_tower_bridge.layers)
    return {
        "weights": weights,
        "moments": moments,
        "gradients": marks["gradients"],
        "kept": marks["kept"],
        "peak": weights + moments + max(peak, memory.peak),
        "step peak": weights + moments + memory.peak,
        "sent": {axis: counter.axis_bytes(axis) for axis in layout.groups() if counter.axis_bytes(axis)},
        "calls": {f"{axis}/{kind}": count for (axis, kind), count in sorted(counter.calls.items())},
        "bridge": forward["sequence"] / layers if layout.sequence.size > 1 else 0.0,
        "attention": (forward["ulysses"] + forward["ring"]) / config.video.num_layers,
    }


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _report(results: dict[str, dict[str, Any]], model: str) -> str:
    """The Markdown page of all results."""
    made = f"Commit {commit()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, CPU only; GPU: not measured."
    lines = [f"# `{model}` on simulated ranks", "", NOTES, "", made, "", "## Memory of rank 0, GiB", ""]
    lines += ["| layout | settings | tokens a rank | weights | moments | gradients | kept for backward | peak |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, found in results.items():
        settings = ", ".join(f"{key} {value}" for key, value in found["layout"].items())
        parts = [f"{found[key] / GIB:.1f}" for key in ("weights", "moments", "gradients", "kept", "peak")]
        lines.append(f"| {name} | {settings} | {found['tokens']:,} | {' | '.join(parts)} |")
    lines += ["", "## Sent by rank 0 in a step, GB (formula in brackets)", ""]
    axes = ("fsdp", "dp_replicate", "ulysses", "ring", "sequence")
    lines += [f"| layout | {' | '.join(axes)} | model TFLOP |", "|---|---|---|---|---|---|---|"]
    for name, found in results.items():
        cells = [_cell(found["sent"].get(axis), found["formula"].get(axis)) for axis in axes]
        lines.append(f"| {name} | {' | '.join(cells)} | {found['flops'] / 1e12:,.0f} |")
    lines += ["", "## Sent by rank 0 in one layer's forward, MB (formula in brackets)", ""]
    lines += ["| layout | Bridge | video self-attention |", "|---|---|---|"]
    for name, found in results.items():
        if found["ranks"] > 1:
            cells = [f"{found[k] / 1e6:.2f} ({found[k + '_formula'] / 1e6:.2f})" for k in ("bridge", "attention")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", REFERENCE, ""])


def _cell(counted: float | None, formula: float | None) -> str:
    return "-" if not counted else f"{counted / 1e9:.2f} ({(formula or 0) / 1e9:.2f})"


def run(call: Call[Simulations]) -> None:
    """Measure and write the record."""
    chosen = call.config
    if unknown := [name for name in chosen.layouts if name not in LAYOUTS]:
        raise UserError(f"layouts={unknown}: unknown; choose from {', '.join(map(repr, LAYOUTS))}")
    page = Path(chosen.output) / "simulate.md"
    store = page.with_suffix(".json")
    results = json.loads(store.read_text()) if store.exists() else {}
    names = chosen.layouts or list(LAYOUTS)
    begin = time.monotonic()
    for number, name in enumerate(names):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process group and fake tables each
            results[name] = pool.apply(simulate, (chosen.model, LAYOUTS[name]))
        left = (time.monotonic() - begin) / (number + 1) * (len(names) - number - 1)
        print(f"{number + 1}/{len(names)} {name}: peak {results[name]['peak'] / GIB:.1f} GiB, {left / 60:.0f} min left")
        results = {known: results[known] for known in LAYOUTS if known in results}
        page.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(results, indent=1) + "\n")
        page.write_text(_report(results, chosen.model))
    print(f"written to {page}")


NOTES = (
    "`python -m bench.train.simulate`: one training step (forward, backward, clip, AdamW) of rank 0, the real program "
    "on fake tensors, in bfloat16 with float32 masters. 360p: a clip of 43,120 video tokens; 720p: 176,400. Bytes are "
    "those that leave the rank. Memory is that of live tensors: kernels' workspaces, the allocator's slack and CUDA's "
    "own gigabyte come on top. Weights and moments are of all 32.7 billion parameters, gradients of the active expert, "
    "the audio tower and the Bridge."
)
REFERENCE = (
    "The reference's context parallelism sends 83 MB a rank in a Bridge layer's forward at 8 ranks and 360p, 169 MB at "
    "16 ranks and 720p (it exchanges video for the 403 audio keys). Ulysses' minimum for self-attention is that of its "
    "formula: q, k, v of a rank's tokens for the heads of others, and the answers back."
)


PROGRAM = Program(
    "simulate", __doc__, run, schema=Schema("bench_simulate", Simulations, ()), command="python -m bench.train.simulate"
)

if __name__ == "__main__":
    PROGRAM.start()
