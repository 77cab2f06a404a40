"""Published runs as stages of the time model: their counts against known ones, and the errors that are reported."""

import dataclasses
import re
from pathlib import Path

import pytest

from bench.train import published_runs as runs
from bench.train.published import compare, mean_error, page
from train.config import compose_train
from train.parallel.flops import block_flops
from train.plan.timing import bound

RECORD = Path(__file__).parents[2] / "bench" / "results" / "published.md"


@pytest.fixture(scope="module")
def found():
    return compare(runs.published_runs(), "middle")


def test_weights_are_those_of_the_released_models():
    """Parameters of Llama 3.1 8B and 70B without their norms: 2 x layers + 1 vectors."""
    for shape, whole in ((runs.LLAMA_8B, 8_030_261_248), (runs.LLAMA_70B, 70_553_706_496)):
        norms = (2 * shape.layers + 1) * shape.dim
        assert shape.layers * shape.layer_weights + 2 * shape.dim * shape.vocabulary + norms == whole


def test_a_wan_layer_costs_what_a_block_of_the_video_tower_costs():
    video = compose_train(["model=mova_360p", "run.id=x", "data.path=none"])[0].model.video
    products, attention = block_flops(video, runs.WAN_TOKENS, runs.WAN_TOKENS, 512)
    counted = sum(one.flops * one.times for one in runs.WAN_14B.products(runs.WAN_TOKENS))
    attended = sum(one.flops for one in runs.WAN_14B.attention(runs.WAN_TOKENS, runs.WAN_TOKENS))
    assert (counted, attended) == (products, attention)
    assert runs.model_flops(runs.WAN_14B, runs.WAN_TOKENS) == 3 * 40 * (products + attention)


def test_a_rank_needs_its_share_of_the_flops():
    """Split among 8 by tensors and tokens: eight times a rank's are one's that has all, but for the text's keys and
    values, which every rank that shares tokens computes."""
    whole = runs.needed_flops(runs.WAN_14B, runs.Setup(runs.WAN_TOKENS, runs.WAN_TOKENS, True, 1), 1)
    setup = runs.Setup(runs.WAN_TOKENS // 4, runs.WAN_TOKENS, True, 1, tensor=2, context=4)
    rank = runs.needed_flops(runs.WAN_14B, setup, 1)
    text = 3 * 40 * 2 * 2 * 512 * 5120**2
    assert 8 * rank["gemm"] == whole["gemm"] + 3 * text
    assert 8 * rank["attention"] == whole["attention"] and 8 * rank["attention_backward"] == whole["attention_backward"]
    assert whole["attention_backward"] == 2.5 * whole["attention"]


def test_tokens_of_a_language_model_cost_six_flops_a_weight():
    setup = runs.Setup(16384, 8192, True, 8)
    needed = runs.needed_flops(runs.LLAMA_8B, setup, 1)
    weights = 32 * runs.LLAMA_8B.layer_weights + 4096 * 128256  # looking up an embedding is no product
    assert needed["gemm"] == 6 * weights * 16384
    assert needed["attention"] == 32 * 2 * 8192 * 16384 * 4096  # half of the pairs: causal


def test_what_is_computed_again_is_added_to_backward():
    plain = runs.Setup(1024, 1024, False, 8)
    again = dataclasses.replace(plain, recomputed=40)
    half = dataclasses.replace(again, again=(0.5, 0.0, 1.0))
    forward, backward = (runs.flops_of(stages) for stages in runs.layer_stages(runs.WAN_14B, plain))
    repeated = runs.flops_of(runs.layer_stages(runs.WAN_14B, again)[1])
    assert repeated["gemm"] == backward["gemm"] + forward["gemm"]
    assert repeated["attention"] == forward["attention"] and "attention" not in backward
    some = runs.flops_of(runs.layer_stages(runs.WAN_14B, half)[1])
    assert some["gemm"] == backward["gemm"] + forward["gemm"] / 2 and "attention" not in some


def test_every_run_takes_longer_than_its_bound(found):
    assert len(found) == 12
    for one in found:
        assert one.run.seconds > one.least == bound(one.run.needed, one.run.hardware) > 0, one.run.name
        assert one.modelled > one.least, one.run.name


def test_the_mean_error_is_below_a_fifth(found):
    assert mean_error(found) < 0.2
    assert mean_error([one for one in found if not one.alone]) < 0.2
    assert [one.run.name for one in found if one.alone] == ["MOVA-360p LoRA, 8 H100"]


def test_a_run_is_predicted_without_its_own_figure(found):
    """Another figure for one run leaves its own prediction and moves the others' of its stack by the right root."""
    other = {"Llama 70B, 64 H100": 8}
    changed = [dataclasses.replace(one.run, seconds=one.run.seconds * other.get(one.run.name, 1)) for one in found]
    for before, after in zip(found, compare(changed, "middle"), strict=True):
        wanted = 1.0
        if before.run.stack == runs.AUTOMODEL and before.run.name not in other:
            wanted = 8 ** (1 / 2)  # two others
        elif before.alone:
            wanted = 8 ** (1 / 3 / 3)  # three stacks, one of which has three runs
        assert after.predicted / before.predicted == pytest.approx(wanted), before.run.name


def test_the_record_is_what_the_model_gives_today(found):
    rows = [line for line in page(found, "x", "middle").splitlines() if line.startswith("| ")]
    assert [line for line in RECORD.read_text().splitlines() if line.startswith("| ")] == rows, (
        "python -m bench.train.published"
    )
    stated = re.search(r"Mean error, leaving one run out: \*\*([\d.]+)%\*\*", RECORD.read_text())
    assert stated and float(stated[1]) == pytest.approx(100 * mean_error(found), abs=0.06)
