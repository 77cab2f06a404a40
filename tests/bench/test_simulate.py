"""Simulated ranks: the real step on fake tensors counts what the formulas say, at sizes that no machine here has."""

import multiprocessing

import pytest

from bench.train.simulate import Simulation, simulate
from tests.selection import chosen

CLIP = ((12, 16, 16), 103)  # 768 video tokens
SETTINGS = {"compute_dtype": "bfloat16", "recompute": "full", "ulysses": 1}
# One case at full size: what takes its time are the process groups, whose number grows with the ranks.
EVERY = {
    "ulysses 1": Simulation(64, SETTINGS, CLIP),
    "ulysses 4": Simulation(64, {**SETTINGS, "ulysses": 4}, CLIP),
    "both, replicated": Simulation(1024, {**SETTINGS, "ulysses": 2, "ring": 4, "dp_replicate": 16}, CLIP),
    "on the host": Simulation(64, {**SETTINGS, "ulysses": 4, "optimizer_state": "host"}, CLIP),
}
CASES = chosen(EVERY, "ulysses 1", "ulysses 4", "on the host")


@pytest.fixture(scope="module")
def found():
    with multiprocessing.get_context("spawn").Pool(
        1
    ) as pool:  # fake tables and process groups stay out of this process
        return {name: pool.apply(simulate, ("tiny", case)) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_rank_sends_what_the_formulas_say(found, name):
    result = found[name]
    assert result["sent"].keys() == result["formula"].keys() and result["sent"]["fsdp"] > 0
    for axis, size in result["formula"].items():
        assert result["sent"][axis] == pytest.approx(size, rel=1e-3), axis  # beside sums of single numbers
    assert result["bridge"] == pytest.approx(result["bridge_formula"])
    assert result["attention"] == pytest.approx(result["attention_formula"])


def test_what_is_kept_for_backward_falls_with_the_ranks_that_share_a_clip(found):
    one, four = found["ulysses 1"]["kept"], found["ulysses 4"]["kept"]
    assert four < 0.6 * one  # audio and text, which every rank holds, do not fall


def test_moments_on_the_host_take_no_memory_of_the_device(found):
    device, host = found["ulysses 4"], found["on the host"]
    assert host["moments"] == 0 and device["moments"] == 2 * device["weights"]
    assert host["peak"] < device["peak"]
