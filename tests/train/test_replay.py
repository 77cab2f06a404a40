"""The loop against plain torch: a run of 12 steps, on one rank and on two, is what replay.py makes of its clips.

Faults of the loop that were planted, one at a time, and seen to fail here: `python -m tests.plant`.
"""

import math

import pytest

from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train import replay, runs

RANKS = (1, 2)


@pytest.fixture(scope="module", params=RANKS)
def both(request, tmp_path_factory):
    """(folder of the run, clips of its steps, what the replay finds)."""
    root = tmp_path_factory.mktemp("replay")
    data = make_dataset(root / "data", replay.BUCKETS)
    valid = make_dataset(root / "valid", [(bucket, 2) for bucket, _ in replay.BUCKETS], seed=1)
    name = f"ranks{request.param}"
    records = run_cases(request.param, {"run": (replay.recorded, (root, name, data, valid))})["run"]
    steps = replay.clips_of(records, data)
    return root / name, steps, replay.replay(root / name, steps, valid)


def test_the_run_meets_what_it_is_meant_to_meet(both):
    _, steps, told = both
    kinds = [(clips[0].video is not None, clips[0].audio is not None) for clips in steps]
    assert set(kinds) == {(True, True), (True, False), (False, True)}
    assert {clip.fps for clips in steps for clip in clips} == {30.0, 16.0, 12.5}
    assert {len(clips) for clips in steps} == {3} and 0 < told.clipped < replay.STEPS
    assert len({clip.number for clips in steps for clip in clips}) == 3 * replay.STEPS
    with_picture = [replay.CYCLE[step % 3] for step, kind in enumerate(kinds) if kind[0]]
    assert set(with_picture) == {"high", "low"}


def test_every_row_of_the_metrics(both):
    run, _, told = both
    training, validation = runs.metrics(run.parent, run.name)
    assert len(training) == replay.STEPS
    for row, expected in zip(training, told.steps, strict=True):
        assert row["train/expert"] == replay.CYCLE[row["step"] % 3]
        for name, value in expected.items():
            found = row["step"] if name == "step" else row[f"train/{name}"]
            found = math.nan if found is None else found
            assert found == pytest.approx(value, rel=1e-4, nan_ok=True), (row["step"], name)
    assert [row["step"] for row in validation] == [0, 5, 10, 12]
    for row, expected in zip(validation, told.validations, strict=True):
        assert row.keys() == {"step"} | {f"valid/{name}" for name in expected if name != "step"}
        for name, value in expected.items():
            assert row["step" if name == "step" else f"valid/{name}"] == pytest.approx(value, rel=1e-4), name


def test_weights_averages_and_moments_at_the_end(both):
    run, _, told = both
    found = replay.end_of(run)
    assert found.keys() == told.end.keys()
    for name, expected in told.end.items():
        difference, scale = (found[name] - expected).norm().item(), expected.norm().item()
        assert difference <= (1e-3 if name.startswith("optim.") else 1e-5) * scale + 1e-9, name
