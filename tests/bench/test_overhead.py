"""bench.train.overhead: what each kind of run has and has not."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.train import overhead
from data.clip import Bucket
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train.runs import SMALL
from train.config import compose_train

CLIP = Bucket(frames=2, height=4, width=4, audio_steps=5, fps=24.0, has_video=True, has_audio=True)


def one_run(kind: str, folder: str, warm: int = 2) -> dict[str, Any]:
    every = "checkpoint.every=3" if kind == "whole" else "checkpoint.every=0"
    given = [f"run.root={folder}", f"run.id={kind}", f"data.path={folder}/data", "steps=7", "checkpoint.minutes=0"]
    config, _ = compose_train([*SMALL, *given, every, "monitor.wandb=offline", "validation.every=0"])
    return vars(overhead.train_once(config, kind, warm))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("overhead")


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, dict[str, Any]]:
    """Each kind in a launch of its own: parts of the trainer are replaced in its process."""
    make_dataset(root / "data", [(CLIP, 12)])
    return {kind: run_cases(1, {kind: (one_run, (kind, str(root)))})[kind][0] for kind in overhead.KINDS}


def test_a_bare_run_has_nothing_of_what_it_is_compared_with(runs: dict[str, Any], root: Path) -> None:
    assert not (root / "bare" / "metrics.jsonl").exists() and not (root / "bare" / "wandb").exists()
    assert runs["bare"]["inside"] == dict.fromkeys(overhead.CODE, 0.0)
    for kind in ("monitored", "whole"):
        steps = [json.loads(line)["step"] for line in (root / kind / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(7))
        never = {what for what, seconds in runs[kind]["inside"].items() if seconds == 0}
        assert never == ({"the next batch of the stream", overhead.COPIES} if kind == "monitored" else set())


def test_the_whole_run_alone_saves_on_its_way(runs: dict[str, Any], root: Path) -> None:
    saved = {kind: [path.name for path in sorted((root / kind / "checkpoints").iterdir())] for kind in runs}
    assert {kind: len(names) for kind, names in saved.items()} == {"bare": 1, "monitored": 1, "whole": 2}


def test_times_are_of_all_steps_but_the_first(runs: dict[str, Any]) -> None:
    for run in runs.values():
        assert len(run["wall"]) == 4 and run["process"] >= run["cpu"] > 0 and run["first_copy"] == 0


def test_the_first_copy_is_apart_where_it_comes_before_the_timed_steps(root: Path, runs: dict[str, Any]) -> None:
    folder = root / "late"
    make_dataset(folder / "data", [(CLIP, 12)])
    (run,) = run_cases(1, {"late": (one_run, ("whole", str(folder), 5))})["late"]
    assert len(run["wall"]) == 1 and run["first_copy"] > 0


def test_a_batch_is_kept() -> None:
    numbers = iter(range(3))
    kept: Any = overhead._kept(lambda training, step: [next(numbers)])  # type: ignore[list-item]
    assert [kept(None, step) for step in range(3)] == [[0], [0], [0]]


def test_what_has_moved_is_not_replaced_in_vain() -> None:
    with pytest.raises(AttributeError):
        overhead._replace(overhead.loop, "Metrics", lambda there: there)


def test_more_than_the_bare_step_by_hand() -> None:
    """Bare steps of 2 s, and 2.02 and 2.06 s in two rounds: 2 % more, half of 95 % being 12.706 * s / sqrt(2)."""
    step = {"bare": (2.0, 2.0), "monitored": (2.02, 2.06), "whole": (2.0, 2.0)}
    found = {
        kind: [overhead.Run([s, s], 2 * s, 2 * s, dict.fromkeys(overhead.CODE, 0.004)) for s in seconds]
        for kind, seconds in step.items()
    }
    rows = overhead._times(found)
    assert rows[:3] == [
        ("bare step, wall time, mean", "2.0000 s"),
        ("- monitored, mean of the rounds", "+2.00% ± 12.71% (95 % confidence)"),
        ("- whole, mean of the rounds", "+0.00% ± 0.00% (95 % confidence)"),
    ]
    assert len(rows) == 9 and {row[1] for row in rows[3:6]} == {row[1] for row in rows[6:]} == {r[1] for r in rows[:3]}
