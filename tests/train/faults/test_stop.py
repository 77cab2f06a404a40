"""A request to stop is seen within a validation too; what it cuts off is made up by the next attempt."""

import json
import os
import signal
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from data.clip import Bucket
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train import runs
from train import loop
from train.faults.ending import CLOSING
from train.faults.lead import Lead
from train.faults.stop import StopRequest
from train.objective.validate import Validator

CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)
SLOW = 2.0  # seconds of a held-out clip, longer than any step


def validating(action, arguments: tuple, **given) -> dict:
    """A run; `action(n)` is done when this rank looks at its n-th held-out clip. "seen": at how many it looked."""
    seen, inner = 0, Validator._row

    def row(self, *rest):
        nonlocal seen
        seen += 1
        action(seen)
        return inner(self, *rest)

    Validator._row = row
    try:
        return {**runs.train(*arguments, **given), "seen": seen}
    finally:
        Validator._row = inner


def stopped_at(clip: int, *arguments) -> dict:
    """SIGTERM to the second rank while it looks at its `clip`-th held-out clip."""

    def action(seen: int) -> None:
        if seen == clip and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    return validating(action, arguments)


def stopped_after(step: int, *arguments) -> dict:
    return runs.train(*arguments, kill_after=step)


def lead_of(*arguments) -> tuple[float, dict[str, float]]:
    """The lead at the end of a run in whose second validation one clip takes SLOW seconds, and the longest of each kind
    that it was told of."""
    stops, longest = [], {}

    class RememberedStop(StopRequest):
        def __init__(self) -> None:
            super().__init__()
            stops.append(self)

    class RememberedLead(Lead):
        def took(self, what: str, seconds: float) -> None:
            super().took(what, seconds)
            longest[what] = max(seconds, longest.get(what, 0.0))

    with patch.object(loop, "StopRequest", RememberedStop), patch.object(loop, "Lead", RememberedLead):
        outcome = validating(lambda seen: time.sleep(SLOW * (seen == 5)), arguments)
    assert outcome["ending"] == "finished", outcome
    return stops[0].lead, longest


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    root = tmp_path_factory.mktemp("stop")
    make_dataset(root / "data", [(CLIP, 9)])
    make_dataset(root / "valid", [(CLIP, 5)], seed=1)
    # Three clips a rank, once for the weights and once for their averages: six a validation.
    keys = ("steps=6", "validation.samples=5", "validation.every=3", "validation.sigmas=[0.5]", "ema.decay=0.9")
    keys = (*keys, f"data.valid_path={root / 'valid'}", "checkpoint.keep=9")
    whole, broken = ((root, root / "data", name, *keys) for name in ("whole", "broken"))
    slow = (root, root / "data", "slow", *keys, "ema.decay=0", "guard.stop_margin=7")
    cases = {
        "whole": (runs.train, whole),
        "before the first step": (stopped_at, (2, *broken)),
        "in the step before a validation": (stopped_after, (2, *broken)),
        "in what was made up": (stopped_at, (2, *broken)),
        "with averages in place": (stopped_at, (5, *broken)),
        "in the last": (stopped_at, (6 + 2, *broken)),
        "goes on": (runs.train, broken),
        "lead": (lead_of, slow),
    }
    return root, run_cases(2, cases)


def test_a_stop_within_a_validation_does_not_wait_for_its_end(ended):
    outcomes = ended[1]
    for name, step, seen in (
        ("before the first step", 0, 2), ("in what was made up", 3, 2), ("with averages in place", 3, 5),
        ("in the last", 6, 8),
    ):  # fmt: skip
        assert [outcome.get("ending") for outcome in outcomes[name]] == ["stopped"] * 2, outcomes[name]
        assert [outcome["seen"] for outcome in outcomes[name]] == [seen] * 2, name  # not one clip more
        assert f"stopped at step {step} of 6" in outcomes[name][0]["said"]


def test_what_was_cut_off_is_made_up_and_the_run_has_every_row_of_the_unbroken_one(ended):
    root, outcomes = ended
    assert "stopped at step 3 of 6" in outcomes["in the step before a validation"][0]["said"]
    assert [outcome.get("ending") for outcome in outcomes["goes on"]] == ["finished"] * 2, outcomes["goes on"]
    whole, broken = (rows(root / name) for name in ("whole", "broken"))
    assert [row["step"] for row in whole if "valid/loss" in row] == [0, 3, 6]
    assert whole == broken  # in the same order too


def rows(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def test_the_lead_holds_steps_and_clips_and_no_step_holds_a_validation(ended):
    for lead, longest in ended[1]["lead"]:
        assert longest["step"] < SLOW <= longest["clip"]
        assert lead >= 7 + 2 * CLOSING + 5 * longest["step"] + longest["clip"]


def test_the_lead_is_what_stopping_took_so_far():
    lead = Lead(60.0)
    assert lead.seconds(saving=4.0) == 60 + 2 * 4
    for what, seconds in (("step", 3.0), ("step", 2.0), ("clip", 20.0), ("clip", 0.1), ("comparison", 1.5)):
        lead.took(what, seconds)
    assert lead.seconds(saving=4.0) == 60 + 2 * 4 + 5 * 3 + 20 + 1.5
    for _ in range(50):  # the slow one is long ago
        lead.took("step", 2.0)
    assert lead.seconds(saving=4.0) == 60 + 2 * 4 + 5 * 2 + 20 + 1.5
