"""Which changes of `steps` a run may see: those that leave the learning rate of what is done as it was."""

import math
from pathlib import Path
from typing import Any

import pytest

from core.errors import RunError
from core.run_dir import RunDir
from train.checkpoint.resume import check_run, open_run
from train.config import default_values
from train.engine.optim_config import OptimConfig
from train.engine.schedule import misfit

USUAL = {"warmup": 10, "final_ratio": 0.1, "decay_steps": 0}


def resolved(steps: int, new_schedule: bool = False, **optim: Any) -> dict[str, Any]:
    return {"steps": steps, "run": {"id": "x", "new_schedule": new_schedule}, "optim": {**USUAL, **optim}}


def resume(tmp_path: Path, done: int, before: dict[str, Any], now: dict[str, Any]) -> None:
    run = RunDir(tmp_path / "x")
    open_run(run, before, default_values())
    run.write_status("running")
    marker = run.checkpoints / f"step-{done:08d}" / "COMMITTED"
    if done:
        marker.parent.mkdir(parents=True)
        marker.touch()
    check_run(RunDir(tmp_path / "x"), now, default_values())


@pytest.mark.parametrize(
    ("done", "before", "after", "optim"),
    [
        (100, 100, 200, {"schedule": "constant"}),
        (50, 100, 60, {"schedule": "constant"}),
        (0, 100, 200, {"schedule": "cosine"}),  # nothing is done
        (10, 100, 200, {"schedule": "cosine"}),  # still rising
        (70, 100, 200, {"schedule": "wsd", "decay_steps": 30}),  # its decay has not begun
        (70, 100, 90, {"schedule": "wsd", "decay_steps": 20}),  # nor in the new one
    ],
)
def test_steps_may_change_where_no_rate_moves(
    tmp_path: Path, done: int, before: int, after: int, optim: dict[str, Any]
) -> None:
    resume(tmp_path, done, resolved(before, **optim), resolved(after, **optim))


@pytest.mark.parametrize(
    ("done", "before", "after", "optim", "jump"),
    [
        # cosine from 0.1 at its end to the middle of the longer one: 0.1 + 0.9 * (1 + cos(pi * 90 / 190)) / 2
        (100, 100, 200, {"schedule": "cosine"}, f"from 0.100 to {0.1 + 0.45 * (1 + math.cos(math.pi * 90 / 190)):.3f}"),
        (50, 100, 60, {"schedule": "cosine"}, "after 50 steps"),
        (80, 100, 200, {"schedule": "wsd", "decay_steps": 30}, "to 1.000 of its value"),
        (70, 200, 80, {"schedule": "wsd", "decay_steps": 30}, "from 1.000 to"),
        (71, 100, 90, {"schedule": "wsd", "decay_steps": 20}, "from 1.000 to"),  # its decay would have begun at step 70
    ],
)
def test_a_jump_is_refused_unless_it_is_meant(
    tmp_path: Path, done: int, before: int, after: int, optim: dict[str, Any], jump: str
) -> None:
    with pytest.raises(RunError, match=f"steps: {before} -> {after}: .*jump.*run.new_schedule=true") as refused:
        resume(tmp_path, done, resolved(before, **optim), resolved(after, **optim))
    assert jump in str(refused.value) and "\n" not in str(refused.value)
    check_run(RunDir(tmp_path / "x"), resolved(after, new_schedule=True, **optim), default_values())


@pytest.mark.parametrize(
    ("optim", "steps", "told"),
    [
        ({"schedule": "constant"}, 1000, None),
        ({"schedule": "constant"}, 200, "ends at 0.20 of its value; set optim.warmup"),
        ({"schedule": "cosine"}, 1000, "never decays; set optim.warmup"),
        (
            {"schedule": "wsd", "decay_steps": 100},
            1000,
            "optim.schedule=wsd never decays; set optim.warmup",
        ),  # the defaults
        ({"schedule": "wsd", "decay_steps": 100}, 1050, "overlap in steps=1050"),
        ({"schedule": "wsd", "decay_steps": 100}, 1100, None),
        ({"schedule": "cosine", "warmup": 0}, 10, None),
    ],
)
def test_a_schedule_that_does_not_fit_is_told(optim: dict[str, Any], steps: int, told: str | None) -> None:
    line = misfit(OptimConfig(**optim), steps)
    assert line is None if told is None else line is not None and told in line and "\n" not in line
