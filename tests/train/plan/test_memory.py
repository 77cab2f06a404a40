"""The planner's memory against the whole program: on simulated ranks, as recorded, and in steps of real processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.train.planned import CLIPS_A_STEP, config_of, cpu_sheet, plan_case, run_case
from bench.train.simulate import LAYOUTS, Simulation
from tests.distributed import run_cases
from tests.selection import chosen
from tests.train.cases import reference_model, tiny_config
from train.config import TrainConfig, compose_train
from train.parallel.mesh import ParallelConfig
from train.parallel.parts import freeze
from train.parallel.recompute import units
from train.plan.gpu import GpuConfig
from train.plan.memory import Weights
from train.plan.plan import KnownCounts, plan_run, simulated_layout
from train.plan.question import ClipSize, Question

RECORDED = json.loads((Path(__file__).parents[3] / "bench" / "results" / "simulate.json").read_text())
# Layouts that need three counts between them: each kind of checkpointing, moments on the host, copies, micro-batches
# summed sharded and whole, a ring.
EVERY_RECORDED = (
    "8 GPUs", "8 GPUs, moments on the host", "8 GPUs, 2 micro-batches", "8 GPUs, 2 micro-batches, summed whole",
    "16 GPUs", "64 GPUs", "64 GPUs, attention kept", "64 GPUs, ring 2 x ulysses 4", "1,024 GPUs, sharded over all",
    "1,024 GPUs",
)  # fmt: skip
CHOSEN = chosen(
    {name: LAYOUTS[name] for name in EVERY_RECORDED},
    "8 GPUs, 2 micro-batches, summed whole", "64 GPUs, attention kept", "64 GPUs, ring 2 x ulysses 4", "1,024 GPUs",
)  # fmt: skip


def config_of_simulation(simulation: Simulation) -> TrainConfig:
    groups = simulation.world // (simulation.parallel.get("ulysses", 1) * simulation.parallel.get("ring", 1))
    given = [f"parallel.{key}={value}" for key, value in simulation.parallel.items()]
    batch = f"data.batch_size={groups * simulation.micro_batches}"
    return compose_train(["model=mova_360p", "run.id=x", "data.path=none", batch, *given])[0]


@pytest.fixture(scope="module")
def counted() -> KnownCounts:
    return KnownCounts()


@pytest.mark.parametrize("name", CHOSEN)
def test_the_peak_is_that_of_the_whole_program_on_simulated_ranks(name: str, counted: KnownCounts) -> None:
    simulation, known = CHOSEN[name], RECORDED[name]
    assert simulation.clip == ((49, 44, 80), 403)
    question = Question(config_of_simulation(simulation), simulation.world, 8, cpu_sheet(), ClipSize(193, 352, 640))
    plan = plan_run(question, counted)
    parts = plan.peak.parts
    assert (
        parts["weights"] == known["weights"]
        and abs(parts["moments"] / max(1, known["moments"]) - 1) < 0.01
        or (parts["moments"] == known["moments"] == 0)
    )
    assert plan.what["kept_gib"] * 2**30 == pytest.approx(known["kept"], rel=0.002)
    assert plan.peak.total == pytest.approx(known["peak"], rel=0.025)
    assert plan.what["micro_batches"] == simulation.micro_batches
    for axis, size in known["sent"].items():
        assert plan.sent[axis] == pytest.approx(size, rel=2e-3), axis  # what is counted has single numbers in it


EVERY_REAL: dict[str, tuple[int, list[str]]] = {
    "alone": (1, []),
    "alone, summed whole": (1, ["data.micro_batch=2", "parallel.accumulate=unsharded"]),
    "alone, float32 between blocks": (1, ["parallel.compute_dtype=bfloat16", "parallel.residual=float32"]),
    "fsdp": (2, []),
    "ulysses, attention": (2, ["parallel.ulysses=2", "parallel.recompute=attention"]),
    "ulysses, selective": (2, ["parallel.ulysses=2", "parallel.recompute=selective"]),
    "copies, full": (4, ["parallel.dp_replicate=2", "parallel.recompute=full"]),
    "ring": (4, ["parallel.ring=2"]),
}
REAL = chosen(EVERY_REAL, "alone, float32 between blocks", "fsdp", "ulysses, selective", "ring")


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for world in (1, 2, 4):
        cases = {name: (run_case, ("tiny", given, 1)) for name, (ranks, given) in REAL.items() if ranks == world}
        found |= {name: outcomes[0] for name, outcomes in run_cases(world, cases).items()}
    return found


@pytest.mark.parametrize("name", REAL)
def test_real_steps_hold_send_and_compute_what_was_planned(name: str, real: dict[str, Any]) -> None:
    world, given = REAL[name]
    planned, found = plan_case("tiny", world, given, cpu_sheet()), real[name]
    assert planned["peak"] == pytest.approx(found["peak"], rel=0.05)
    assert planned["flops"] == found["flops"]
    assert planned["sent"].keys() == found["sent"].keys()
    for axis, size in found["sent"].items():
        assert 0 <= size - planned["sent"][axis] < 100, axis  # sums of single numbers, which are left out


def test_what_runs_beside_a_video_block_is_one_unit() -> None:
    """Bytes by hand, of 4 ranks that split rows: gathered in bfloat16, what learns reduced in float32."""
    model = reference_model(tiny_config(3), torch.float32)
    freeze(model, {"video_dit", "dual_tower_bridge"})
    parallel = ParallelConfig(compute_dtype="bfloat16")
    with simulated_layout(parallel, 4) as layout:
        weights = Weights(model, parallel, layout, ["none"] * len(units(model)), False)
    sizes = {
        part: sum(-(-p.shape[0] // 4) * 4 * p[0].numel() for n, p in model.named_parameters() if n.startswith(part))
        for part in ("dual_tower_bridge.", "audio_dit.blocks.", "video_dit.blocks.0.", "video_dit.time_")
    }
    bridge, audio, video, time = sizes.values()
    assert [len(unit.parts) for unit in weights.units] == [1, 1, 1, 1, 3, 1, 1, 1, 1]  # joined: what stems hold
    small, block, exact = weights.units[4], weights.units[5], weights.units[1]
    assert [part.shape for part in small.parts] == ["to_video", "to_audio", "audio"]
    assert (small.gathered, small.reduced, small.shard) == (2 * (bridge + audio), 4 * bridge, bridge)
    assert (block.gathered, block.reduced, block.shard) == (2 * video, 4 * video, video)
    assert exact.gathered == exact.reduced == 4 * time and weights.units[3].reduced == 0  # audio's time path


def test_a_cpu_has_no_margin_and_a_gpu_has_the_assumed_one() -> None:
    config = config_of("tiny", [])
    sheet = cpu_sheet()
    on_cpu = plan_run(Question(config, 1, 1, sheet, ClipSize(49, 64, 64)))
    assert sum(on_cpu.memory.values()) == on_cpu.peak.total
    sheet = GpuConfig(**{**vars(sheet), "device": "cuda", "memory_gib": 2.52})
    on_gpu = plan_run(
        Question(config_of("tiny", ["parallel.compute_dtype=bfloat16"]), 1, 1, sheet, ClipSize(49, 64, 64))
    )
    margin = on_gpu.memory["allocator, workspaces"]
    assert margin == int(0.05 * on_gpu.peak.total) and on_gpu.memory["CUDA, NCCL"] == int(2.5 * 2**30)
    assert not on_gpu.fits and on_gpu.as_dict()["fits"] is False and config.data.batch_size == CLIPS_A_STEP
