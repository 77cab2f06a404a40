"""What a layout is said to send, keep and recompute, against what a real step does."""

import pytest
import torch

from core.errors import RunError
from model.joint import JointTransformer
from tests.distributed import run_cases
from tests.train import cases
from train.engine.engine import build_engine
from train.monitor.counters import CollectiveCounter
from train.parallel.memory import LiveMemory
from train.parallel.mesh import ParallelConfig, make_layout
from train.parallel.parallelize import recompute_kinds
from train.parallel.recompute import CHOSEN, GIB, choose_kinds, recompute_activations, unit_cost, units
from train.parallel.traffic import layout_rows, step_bytes
from train.parallel.workload import Workload
from train.step import forward_backward

# name: (micro-batch, video heads, degrees)
LAYOUTS = {
    "fsdp": (1, 1, {}),
    "fsdp, unsharded accumulation": (1, 1, {"dp_shard": 2, "ulysses": 2, "accumulate": "unsharded"}),
    "hsdp, bf16": (1, 1, {"dp_replicate": 2, "compute_dtype": "bfloat16"}),
    "ulysses 4, 5 heads": (2, 5, {"ulysses": 4}),
    "ulysses 4, 3 heads, recomputed": (4, 3, {"ulysses": 4, "recompute": "full"}),
    "ulysses 4, recomputed but attention": (4, 5, {"ulysses": 4, "recompute": "attention"}),
    "ulysses 4, exchanges kept": (4, 5, {"ulysses": 4, "recompute": "selective"}),
    "ring 4, recomputed": (2, 2, {"ring": 4, "recompute": "full"}),
    "ring 4, recomputed but attention": (2, 2, {"ring": 4, "recompute": "attention"}),
    "ring 2 x ulysses 2, replicated": (1, 3, {"ring": 2, "ulysses": 2}),
    "ulysses 2 in replicas": (1, 2, {"ulysses": 2, "dp_replicate": 2}),
}
CONFIG = {"trainable_condition_scale": True, "pooled_adaln": True}


def count_step(micro: int, heads: int, parallel: dict) -> dict:
    """Bytes by axis of one step: counted, and by formula."""
    config, settings = cases.tiny_config(heads, **CONFIG), ParallelConfig(**parallel)
    layout = make_layout(settings, torch.device("cpu"))
    engine = build_engine(config, settings, cases.OPTIM, layout, seed=0)
    mine = cases.my_micro_batches(cases.global_batch(0, torch.float32), layout, micro)
    clips = len(mine[0].batch.keys)
    with CollectiveCounter(layout) as counter:
        forward_backward(engine.model, mine, cases.OBJECTIVE, "high", layout, engine.backward)
    bucket = cases.BUCKET
    workload = Workload(clips, (bucket.frames, bucket.height, bucket.width), bucket.audio_steps, len(mine))
    with torch.device("meta"):
        plain = JointTransformer(config)
    kinds = recompute_kinds(plain, settings, layout, workload)
    return {
        "counted": {axis: counter.axis_bytes(axis) for axis in layout.groups() if counter.axis_bytes(axis)},
        "formula": step_bytes(plain, settings, layout, workload, kinds),
        "table": dict(layout_rows(config, settings, layout, workload)),
        "metrics": counter.metrics(),
    }


@pytest.fixture(scope="module")
def counted():
    return run_cases(4, {name: (count_step, case) for name, case in LAYOUTS.items()})


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_axis_sends_what_its_formula_says(counted, name):
    for result in counted[name]:
        assert result["counted"].keys() == result["formula"].keys()
        for axis, size in result["formula"].items():
            assert result["counted"][axis] == pytest.approx(size, rel=1e-6), axis


def test_the_table_says_who_shares_what(counted):
    table = counted["ring 2 x ulysses 2, replicated"][0]["table"]
    assert table["ranks"] == "4 on cpu, fsdp2, compute in float32 (auto: on cpu)"
    assert table["samples"] == "1 group of 4 ranks, each with its own samples"
    assert (
        table["video tokens"] == "18 per clip, 4 or 5 per rank"
        and table["video heads"] == "3, 1 or 2 per rank; ring of 2"
    )
    assert {"sent over fsdp", "sent over ulysses", "sent over ring", "sent over sequence"} <= table.keys()


def test_each_unit_of_the_active_expert_is_gathered_once_in_forward_and_once_in_backward(counted):
    """Twice in all, whatever is fetched ahead; the idle expert never."""
    units = 2 * (2 + 1) + 2 + 1  # stem, time path and head of each tower; video blocks; audio block and Bridge as one
    assert counted["fsdp"][0]["metrics"]["perf/comm/fsdp/all_gather_calls"] == 2 * units + 1  # the root, once


# --- budgets of recomputation ----------------------------------------------------------------------------------------


def kept_by_step(model: JointTransformer, kinds: list[str]) -> int:
    """Bytes that a forward leaves for backward in blocks and Bridge, measured on the whole model."""
    recompute_activations(model, kinds)
    inside = {"bytes": 0, "now": 0}
    prepared = cases.global_batch(0, torch.float32)
    with LiveMemory() as memory:

        def enter(*_):
            inside["now"] = memory.live

        def leave(module, _, out):
            inside["bytes"] += memory.live - inside["now"]

        for module in units(model):
            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave)
        draws, batch = prepared.draws, prepared.batch
        out = model(
            video=draws.noise_video, audio=draws.noise_audio, condition=batch.condition.float(),
            text=batch.text.float(), t_video=draws.t_video, t_audio=draws.t_audio,
        )  # fmt: skip
        assert out.video is not None
    return inside["bytes"]


@pytest.mark.parametrize("kind", ["none", "full", "attention"])
def test_what_a_unit_keeps_is_what_the_real_model_keeps(kind):
    config = cases.tiny_config(3)
    model = cases.reference_model(config, torch.float32)
    workload = Workload(4, (3, 4, 6), 7)
    predicted = 0
    for shape, count in (("video", 2), ("audio", 1), ("to_video", 1), ("to_audio", 1)):
        predicted += count * unit_cost(config, shape, kind, workload, 1, torch.float32).kept
    # Predicted are a unit's input and what lies between; measured what lies between and its output: as large.
    found = kept_by_step(model, [kind] * len(units(model)))
    assert found == pytest.approx(predicted, rel=0.02)


def test_a_budget_relaxes_what_saves_most_and_is_kept():
    config = cases.tiny_config(3)
    with torch.device("meta"):
        model = JointTransformer(config)
    workload = Workload(4, (3, 4, 6), 7)
    counts = {"video": 2, "audio": 1, "to_video": 1, "to_audio": 1}
    cost = {
        (shape, kind): unit_cost(config, shape, kind, workload, 1, torch.float32) for shape in counts for kind in CHOSEN
    }
    least, most = (sum(n * cost[shape, kind].kept for shape, n in counts.items()) for kind in ("full", "none"))
    flops = []
    for budget in (least, (least + most) // 2, most):
        kinds = choose_kinds(model, "budget", budget / GIB, workload, 1, torch.float32)
        video, other = kinds[:2], kinds[4:]
        assert kinds[2:4] == video  # the other expert alike
        chosen = [*zip(["video"] * 2, video, strict=True), *zip(["audio", "to_video", "to_audio"], other, strict=True)]
        assert sum(cost[unit].kept for unit in chosen) <= budget
        flops.append(sum(cost[unit].again for unit in chosen))
    assert flops[0] > flops[1] > flops[2] == 0
    with pytest.raises(RunError, match="even with full checkpointing"):
        choose_kinds(model, "budget", (least - 1) / GIB, workload, 1, torch.float32)


def test_a_budget_goes_with_recompute_budget_only():
    with pytest.raises(ValueError, match="recompute_gib=4"):
        ParallelConfig(recompute="full", recompute_gib=4)
    with pytest.raises(ValueError, match="recompute=budget"):
        ParallelConfig(recompute="budget")
