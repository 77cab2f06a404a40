"""Invariants 3, 6, 9, 10 and the checkpoint contract under DeepSpeed ZeRO: one launch of two ranks."""

import json

import pytest
import torch

from data.clip import Bucket
from tests.distributed import run_cases
from tests.selection import chosen
from tests.shards import make_dataset
from tests.train import runs
from tests.train.engine import zero_cases as cases
from train.parallel.mesh import ParallelConfig

STAGES = ("zero1", "zero2", "zero3")
IDLE = chosen(dict.fromkeys(STAGES), "zero1", "zero3")
STATES: dict[str, tuple[str, ...]] = chosen(  # what blocks pass on
    {
        **{f"bfloat16 {stage}": (stage,) for stage in STAGES},
        **{f"wide {stage}": (stage, "float32") for stage in ("zero1", "zero3")},
    },
    "bfloat16 zero2", "wide zero3",
)  # fmt: skip
# name: (engine, micro-batch, video heads, degrees). Four slots on two ranks: micro-batch 1 accumulates.
EVERY_PARITY: dict[str, tuple[str, int, int, dict]] = {
    "zero1, accumulated": ("zero1", 1, 1, {}),
    "zero2": ("zero2", 2, 1, {}),
    "zero3, accumulated": ("zero3", 1, 1, {}),
    "zero2, accumulated, ulysses 2, 3 heads": ("zero2", 2, 3, {"ulysses": 2}),
    "zero3, recomputed": ("zero3", 2, 1, {"recompute": "full"}),
}
PARITY = chosen(EVERY_PARITY, "zero1, accumulated", "zero2, accumulated, ulysses 2, 3 heads", "zero3, recomputed")
TRIP = ("zero2", "fsdp2", "zero3", "zero1", "fsdp2")


def parity(engine, micro, heads, degrees):
    return cases.parity(engine, micro, heads, **degrees)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    clip = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)
    make_dataset(folder / "data", [(clip, 9), (clip, 6)])
    make_dataset(folder / "valid", [(clip, 4)], seed=1)
    valid = (f"data.valid_path={folder / 'valid'}", "optim.eps=1e-4")
    return folder, run_cases(
        2,
        {
            **{name: (parity, case) for name, case in PARITY.items()},
            **{f"idle {stage}": (cases.idle_and_nan, (stage,)) for stage in IDLE},
            **{name: (cases.bfloat16, case) for name, case in STATES.items()},
            "trip": (cases.round_trip, (folder, list(TRIP))),
            "unbroken": (cases.unbroken, (2 * len(TRIP) + 1,)),
            "run": (runs.train, (folder, folder / "data", "run", "parallel=zero3", "steps=4", *valid)),
            "resumed": (runs.train, (folder, folder / "data", "run", "parallel=zero2", "steps=6", *valid)),
            "sharded": (runs.train, (folder, folder / "data", "sharded", "steps=6", *valid)),
        },
    )


@pytest.mark.parametrize("name", PARITY)
def test_three_clipped_adamw_steps_are_those_of_one_process(ranks, name):
    for result in ranks[1][name]:
        assert result["clipped"] and result["norms"][0] <= 1e-6 and max(result["norms"]) <= 1e-4
        assert result["gradient"] <= 1e-5 and result["update"] <= 1e-4
        assert result["counts"] == {"video_dit": 2, "video_dit_2": 1, "audio_dit": 3, "dual_tower_bridge": 3}


@pytest.mark.parametrize("stage", IDLE)
def test_the_idle_expert_stays_bit_identical(ranks, stage):
    for result in ranks[1][f"idle {stage}"]:
        assert result["idle_moved"] == [] and result["idle_moments"] and result["active_moved"] > 20


@pytest.mark.parametrize("stage", IDLE)
def test_a_nan_on_one_rank_suppresses_the_update_everywhere(ranks, stage):
    for result in ranks[1][f"idle {stage}"]:
        assert result["norm"] == float("inf") and result["suppressed"] and result["goes_on"]


@pytest.mark.parametrize("name", STATES)
def test_masters_are_float32_while_compute_is_bfloat16(ranks, name):
    for result in ranks[1][name]:
        assert result["states"] == {torch.float32 if name.startswith("wide") else torch.bfloat16}
        assert result["differs"] and result["relative"] < 2e-2
        assert result["start_exact"] and result["dtypes"] == {torch.float32}
        assert result["moved_off_the_bfloat16_grid"] and 0 < result["largest_move"] < 3e-3  # about the LR


def test_a_checkpoint_passes_from_engine_to_engine_bit_for_bit(ranks):
    folder, results = ranks
    turns = results["trip"][1]
    for earlier, later in zip(turns, turns[1:], strict=False):
        assert later["loaded"].keys() == earlier["saved"].keys()
        assert all(torch.equal(value, earlier["saved"][key]) for key, value in later["loaded"].items())
    steps = json.loads((folder / "step-00000005" / "state.json").read_text())["optimizer_steps"]
    assert steps == turns[2]["counts"]  # FSDP2 wrote it, by parameter name; ZeRO 3 took it over
    assert steps["video_dit.head.head.bias"] == 3 and steps["video_dit_2.head.head.bias"] == 2
    assert json.loads((folder / "step-00000003" / "state.json").read_text())["layout"].endswith("zero2")


def test_engines_that_take_turns_follow_the_curve_of_one(ranks):
    """Eleven steps under five engines against FSDP2 alone; differences are rounding that AdamW amplifies."""
    end, unbroken = ranks[1]["trip"][0][-1]["saved"], ranks[1]["unbroken"][0]
    difference, size = 0.0, 0.0
    for key, value in unbroken.items():
        if key.endswith("exp_avg"):
            difference += (end[key] - value).double().square().sum().item()
            size += value.double().square().sum().item()
    assert difference <= 1e-3**2 * size


def test_a_run_under_zero_follows_the_curve_of_fsdp2_and_resumes_under_another_stage(ranks):
    folder, results = ranks
    assert [results[name][1].get("ending") for name in ("run", "resumed", "sharded")] == ["finished"] * 3, results
    assert "resumed from" in results["resumed"][0]["said"] and "zero2" in results["resumed"][0]["said"]
    (zero, zero_valid), (sharded, sharded_valid) = (runs.metrics(folder, name) for name in ("run", "sharded"))
    assert [x["step"] for x in zero] == list(range(6))
    by_step = {x["step"]: x for x in zero_valid}
    for found, expected in [*zip(zero, sharded, strict=True), *((by_step[x["step"]], x) for x in sharded_valid)]:
        for key, value in expected.items():
            assert found[key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value), (found, key)


@pytest.mark.parametrize(
    "values,message",
    [
        ({"engine": "zero4"}, "parallel.engine 'zero4' is not one of fsdp2, zero1, zero2, zero3"),
        ({"engine": "zero1", "dp_replicate": 2}, "parallel.dp_replicate=2 needs fsdp2; zero1 has no replicas"),
        ({"engine": "zero2", "compute_dtype": "float64"}, "parallel.compute_dtype=float64 needs fsdp2"),
        ({"engine": "zero3", "compile": "inductor"}, "parallel.compile=inductor needs fsdp2, zero1 or zero2"),
    ],
)
def test_what_zero_cannot_do_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**values)
