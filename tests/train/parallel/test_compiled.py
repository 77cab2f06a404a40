"""Units that torch.compile leaves in eager mode are counted and named at the start of a run: torch itself is silent."""

from collections import Counter
from typing import Any

import pytest
import torch

from data.clip import Bucket
from tests.distributed import run_cases
from tests.train import cases
from tests.train.parallel import parity
from tools.bench.step import make_batch
from train.objective.objective import Objective, loss_share
from train.parallel.mesh import ParallelConfig
from train.parallel.parallelize import compiled_graphs, eager_units, recompute_kinds
from train.parallel.recompute import units
from train.parallel.traffic import layout_rows
from train.parallel.workload import Workload
from train.step import forward_backward

CASES: dict[str, tuple[dict[str, int], str]] = {
    "alone, full": ({}, "full"),
    "alone, selective": ({}, "selective"),
    "ulysses, none": ({"ulysses": 2}, "none"),
    "ulysses, full": ({"ulysses": 2}, "full"),
    "ring, selective": ({"ring": 2}, "selective"),
}

# Ten geometries: latent frames, height, width; steps of sound.
BUCKETS = [
    (2, 4, 4, 9), (3, 4, 4, 13), (2, 6, 4, 9), (5, 2, 8, 21), (2, 8, 2, 9), (4, 4, 6, 17), (3, 2, 2, 13), (6, 4, 4, 25),
    (2, 10, 4, 9), (7, 2, 4, 30),
]  # fmt: skip


def counting(ran: Counter[str]) -> None:
    """Make a backend of torch.compile of this name, whose graphs run as they are and are counted."""

    def compiler(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        def run(*given: Any) -> Any:
            ran["graphs"] += 1
            return module.forward(*given)

        return run

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.backends.registry._COMPILER_FNS["counting"] = compiler
    torch._dynamo.backends.registry._BACKENDS["counting"] = None


def a_step(settings: dict[str, int], kind: str) -> dict[str, Any]:
    """How many graphs ran in one forward and backward of a layout, which units were called, and what is said of it."""
    ran: Counter[str] = Counter()
    counting(ran)
    parallel = ParallelConfig(compute_dtype="float64", recompute=kind, compile="counting", **settings)
    config = parity.config_of(3)
    model, layout = cases.sharded_model(config, parallel)
    batches = parity.micro_batches(0, 4, layout.dp_rank, layout.dp_world, torch.float64)
    forward_backward(model, batches, parity.OBJECTIVE, "high", layout)
    idle = {id(module) for module in model.video_dit_2.modules()}
    workload = Workload(4, (2, 2, 2), 9)
    kinds = recompute_kinds(model, parallel, layout, workload)
    active = [unit for unit in units(model) if id(unit) not in idle]
    return {
        "ran": ran["graphs"], "active": len(active) * len(batches),
        "idle": len(units(model)) - len(active), "blocks": len(model.video_dit.blocks) * len(batches),
        "to_audio": len(model.dual_tower_bridge.video_to_audio_conditioners) * len(batches),
        "eager": eager_units(model, parallel, layout, kinds), "units": len(kinds),
        "row": dict(layout_rows(config, parallel, layout, workload))["compiled"],
    }  # fmt: skip


def many_buckets(settings: dict[str, int], kind: str) -> dict[str, Any]:
    """Graphs after each step: ten buckets, of one and of two clips in turn, a visit of validation behind each."""
    counting(Counter())
    parallel = ParallelConfig(compute_dtype="float64", recompute=kind, compile="counting", **settings)
    config = parity.config_of(3)
    model, layout = cases.sharded_model(config, parallel)
    objective, graphs = Objective(parity.OBJECTIVE, config.experts), []
    for number, (frames, height, width, sound) in enumerate(BUCKETS * 2):
        bucket = Bucket(frames, height, width, sound, 24.0, has_video=True, has_audio=True)
        batches = [make_batch(config, 1 + number % 2, number, objective, bucket)]
        forward_backward(model, batches, parity.OBJECTIVE, ("high", "low")[number // 2 % 2], layout)
        with torch.no_grad():
            loss_share(model, batches[0].batch, batches[0].draws, parity.OBJECTIVE, "high")
        graphs.append(compiled_graphs())
    return {"graphs": graphs}


@pytest.fixture(scope="module")
def ranks() -> dict[str, list[dict[str, Any]]]:
    buckets = {f"buckets, {name}": (many_buckets, CASES[name]) for name in ("alone, full", "ulysses, none")}
    return run_cases(2, {name: (a_step, case) for name, case in CASES.items()} | buckets)


@pytest.mark.parametrize("name", CASES)
def test_units_that_run_as_they_are_are_those_that_are_counted(
    ranks: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """A compiled unit runs one graph, and more where it is broken at a core; one in eager mode runs none."""
    for found in ranks[name]:
        if name in ("alone, full", "alone, selective", "ulysses, none"):
            assert found["eager"] == 0 and found["ran"] >= found["active"]
            assert found["row"] == f"{found['units']} of {found['units']} units by counting"
        else:
            assert found["ran"] == found["active"] - found["blocks"] - found["to_audio"] > 0
            assert found["eager"] == found["idle"] + found["blocks"] + found["to_audio"]
            assert f"{found['eager']} run in eager mode (recomputed, and shared by ranks)" in found["row"]


@pytest.mark.parametrize("name", ["alone, full", "ulysses, none"])
def test_graphs_are_made_for_the_first_buckets_and_serve_all(ranks: dict[str, list[dict[str, Any]]], name: str) -> None:
    """None is made for a bucket that was seen, and fewer than half of what a set for each bucket would be; more of a
    piece of code than the limit would be an error."""
    for found in ranks[f"buckets, {name}"]:
        graphs = found["graphs"]
        assert graphs[9] == graphs[-1] and graphs[0] < graphs[-1] < len(BUCKETS) / 2 * graphs[0]
