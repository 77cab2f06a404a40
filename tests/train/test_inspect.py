"""Looks inside a run: of the steps and ranks that were asked for, by config and by file, and of nothing else."""

import json
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from data.clip import Bucket
from tests.distributed import run_cases
from tests.shards import make_dataset
from tests.train import runs
from train import inspect, loop
from train.errors import RunError
from train.inspect import InspectConfig

CLIP = Bucket(frames=2, height=4, width=4, audio_steps=9, fps=24.0, has_video=True, has_audio=True)
ASKED = {  # in step -> what the file says
    6: '{"steps": 2, "ranks": [0]}',
    11: '{"rank": [0]}',
    13: '{"ranks": [0, 7]}',
    15: '{"steps": 1.5}',
    17: "[",
    19: "",
}


@contextmanager
def patched(place, name, value):
    right = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, right)


def looked(root: Path, data: Path, run_id: str, *overrides: str, fails_in: int | None = None) -> dict:
    """A run in which files ask for looks."""
    right, step = loop.forward_backward, -1

    def asking(*arguments):
        nonlocal step
        step += 1
        if step in ASKED and torch.distributed.get_rank() == 0 and "inspect.at" in overrides[0]:
            (root / run_id / "profile").write_text(ASKED[step])
        if step == fails_in:
            raise RunError("planted")
        return right(*arguments)

    with patched(loop, "forward_backward", asking):
        return runs.train(root, data, run_id, "steps=24", "validation.every=0", *overrides)


def unlooked(*arguments) -> dict:
    """A run that meets an error as soon as it does anything for a look."""

    def never(*_, **__):
        raise AssertionError("nobody asked")

    with (
        patched(inspect.Inspector, "take", never),
        patched(inspect, "_Look", never),
        patched(inspect.threading, "Timer", never),
    ):
        return looked(*arguments)


def in_the_way(root: Path, *arguments) -> dict:
    """A run that finds a file where the folder of the looks should be."""
    if torch.distributed.get_rank() == 0:
        (root / "blocked").mkdir()
        (root / "blocked" / "inspect").touch()
    return looked(root, *arguments)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    data = make_dataset(root / "data", [(CLIP, 8), (CLIP, 8)])
    some = ("inspect.at=[3]", "inspect.steps=2", "inspect.ranks=[1]", "inspect.what=[trace,memory,stacks]")
    results = run_cases(
        2,
        {
            "looked": (looked, (root, data, "looked", *some)),
            "plain": (unlooked, (root, data, "plain", "inspect.steps=2")),
            "blocked": (in_the_way, (root, data, "blocked", "inspect.steps=2", "inspect.at=[2,3]", "steps=6")),
            "failed": (failed, (root, data)),
            "no such rank": (runs.train, (root, data, "none", "inspect.ranks=[2]")),
        },
    )
    return root, results


def failed(root: Path, data: Path) -> dict:
    return looked(root, data, "failed", "inspect.steps=9", "inspect.at=[3]", fails_in=5)


@cache
def traced(path: Path) -> list[dict]:
    return json.loads(path.read_text())["traceEvents"]


def steps_in(path: Path) -> set[str]:
    return {event["name"] for event in traced(path) if event["name"].startswith("step ")}


def events(root: Path, kind: str) -> list[int]:
    lines = [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == kind]


def test_the_steps_and_ranks_that_were_asked_for_are_looked_at_and_no_others(ranks):
    root, results = ranks
    run = root / "looked"
    assert [result.get("ending") for result in results["looked"]] == ["finished"] * 2, results["looked"]
    found = {path.name: steps_in(path) for path in (run / "inspect").iterdir()}
    assert found == {
        "step-00000003-rank1.trace.json": {"step 3", "step 4"},
        "step-00000008-rank0.trace.json": {"step 8", "step 9"},  # the file came in step 6, all ranks heard of it in 7
        "step-00000021-rank1.trace.json": {"step 21", "step 22"},  # an empty file: as the config says
    }
    names = {event["name"] for event in traced(run / "inspect" / "step-00000008-rank0.trace.json")}
    assert {"aten::mm", "gloo:all_reduce"} <= names and any("Backward" in name for name in names)
    assert not (run / "profile").exists()
    assert events(run, "inspected") == [3, 8, 21]


def test_stacks_are_those_of_the_ranks_asked_for(ranks):
    for rank, steps in ((1, ["3", "4", "21", "22"]), (0, ["8", "9"])):
        text = (ranks[0] / "looked" / "logs" / f"stacks-rank{rank}.txt").read_text()
        told = re.findall(rf"rank {rank}: [\d.]+ s after step (\d+) began", text)
        assert sorted(told, key=int) == steps
        assert "in _train" in text


def test_a_request_that_cannot_be_met_is_said_and_ends_nothing(ranks):
    root, results = ranks
    said = results["looked"][0]["said"]
    for what in (
        "inspect: memory snapshots are of GPUs; this run has none",
        """profile is left aside: '{"rank": [0]}' is no object of "steps", "ranks", "what\"""",
        "inspect.ranks [7]: this run has ranks 0 to 1",
        "inspect.steps is 1.5; give a number of steps",
        "profile is left aside: Expecting value",
    ):
        assert what in said
    assert results["blocked"][0]["ending"] == "finished"
    assert "rank 0: not all of inspect can be had" in results["blocked"][0]["said"]
    assert "step 3: no look begins while one is under way" in results["blocked"][0]["said"]
    assert results["no such rank"][1]["error"] == "inspect.ranks [2]: this run has ranks 0 to 1"


def test_a_look_changes_no_number_and_none_costs_nothing(ranks):
    root, results = ranks
    assert results["plain"][0].get("ending") == "finished", results["plain"]
    assert runs.metrics(root, "looked") == runs.metrics(root, "plain")
    assert not (root / "plain" / "inspect").exists()


def test_what_a_look_has_seen_survives_the_error_that_ends_the_run(ranks):
    root, results = ranks
    assert results["failed"][0]["error"] == "planted"
    assert steps_in(root / "failed" / "inspect" / "step-00000003-rank0.trace.json") == {"step 3", "step 4", "step 5"}


def test_memory_of_a_gpu_becomes_a_page(tmp_path, monkeypatch):
    calls = []
    trace = [{"action": "alloc", "addr": 1, "size": 10, "stream": 0, "frames": []}]
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **keys: calls.append(keys))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"segments": [], "device_traces": [trace]})
    look = inspect._Look(5, InspectConfig(what=["memory"]), torch.device("cuda"), True)
    look.start()
    look.mark(5)
    look.write(tmp_path, "name")
    assert "MemoryViz" in (tmp_path / "name.memory.html").read_text()
    assert [keys.get("enabled", "all") for keys in calls] == ["all", None]  # it is switched off again


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "inspect.steps is 0"),
        ({"at": [-1]}, r"inspect.at is \[-1\]"),
        ({"ranks": 0}, "inspect.ranks is 0"),
        ({"what": []}, r"inspect.what is \[\]; give a list of some of trace, memory, stacks"),
        ({"what": ["traces"]}, "inspect.what is"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        InspectConfig(**values)
