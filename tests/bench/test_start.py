"""Simulated ranks: what a start draws and copies, and what planning a checkpoint leaves, at a size that runs here."""

import pytest

from bench.train import plan, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    bench = start.StartBench(preset="tiny", ranks=4)
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    fresh = start._in_a_process(start.measure, bench, None)
    start._in_a_process(start.write_checkpoint, bench, folder)
    return fresh, start._in_a_process(start.measure, bench, folder)


def test_a_rank_draws_and_copies_its_own_share_and_a_resumed_one_draws_nothing(begun):
    fresh, resumed = begun
    assert fresh["copied"] == fresh["held"] and resumed["copied"] == resumed["held"] == 3 * fresh["held"]
    assert resumed["drawn"] == 0 and 0 < 4 * fresh["drawn"] <= fresh["held"]


def test_a_plan_names_every_tensor_and_is_made_once(tmp_path):
    found = plan.measure(plan.PlanBench(preset="tiny"), 2, 4)
    assert found["tensors"] % 4 == 0 and found["reads"] >= found["tensors"]
    assert 0 < found["later"] < found["first"] and found["said"] < 8 * 1000
