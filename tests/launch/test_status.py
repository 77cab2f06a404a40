"""What `mova status` says of runs, above all of those that say of themselves what is no longer true."""

import json
import os
import time
from pathlib import Path

import pytest
import yaml

from core.run_dir import RunDir
from core.terminal import clock
from launch import status
from launch.attempts import Attempts
from launch.slurm import slurm


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of 200 steps, at step 100, with a checkpoint of step 80."""
    run = RunDir(tmp_path / "try1")
    (run.checkpoints / "step-00000080").mkdir(parents=True)
    (run.checkpoints / "step-00000080" / "COMMITTED").touch()
    (run.checkpoints / "step-00000100").mkdir()  # being written
    run.config.write_text(yaml.safe_dump({"steps": 200}))
    lines = [
        {"step": n, "train/loss": 2.0 - n / 100, "perf/step_time": 3.0, "perf/tokens_per_s": 1e5} for n in range(100)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 100, "lo')
    return run


def said(run: RunDir, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert status.PROGRAM.run([str(run.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    width = next(line.index(str(run.root)) for line in lines)
    return {line[:width].strip(): line[width:].strip() for line in lines}


def test_a_run_that_trains(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.write_status("running", step=0)
    with run.lock():
        told = said(run, capsys)
    assert told["state"] == "running" and str(os.getpid()) in told["why"]
    assert told["step"] == "100 of 200" and told["loss"] == "1.0100" and told["a step"] == "3.00 s"
    assert told["time left"] == "5 min" and told["tokens a second"] == "100,000"
    assert told["checkpoint"].startswith("80 (") and told["restarts"] == "0"


def test_running_but_dead(run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_status("running", step=0)
    assert said(run, capsys)["state"] == "dead"
    Attempts(run).submitted()
    Attempts(run).queued("77")
    monkeypatch.setattr(status, "queued", lambda jobs, run: {})
    told = said(run, capsys)
    assert told["state"] == "dead" and "none of its jobs is in the queue (77)" in told["why"]
    assert told["time left"] == "-"


def test_running_but_silent(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.write_status("running", step=0)
    for path in (run.metrics, run.status):
        os.utime(path, (time.time() - 3000, time.time() - 3000))
    with run.lock():
        told = said(run, capsys)
    assert told["state"] == "silent" and "50 min" in told["why"]


@pytest.mark.parametrize(
    "job, state, why",
    [
        (("PENDING", "Resources"), "queued", "job 77 waits (Resources), after stopped"),
        (("RUNNING", "None"), "starting", "job 77 runs"),
        (("COMPLETING", "None"), "ending", "job 77 is completing"),
    ],
)
def test_a_run_in_the_queue(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, job: tuple, state: str, why: str
) -> None:
    run.write_status("stopped", step=100)
    Attempts(run).submitted()
    Attempts(run).queued("77")
    monkeypatch.setattr(status, "queued", lambda jobs, run: {"77": job})
    told = said(run, capsys)
    assert told["state"] == state and told["why"].startswith(why) and told["jobs in the queue"] == "77"


def test_a_run_that_failed_says_why(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    run.write_status("failed", error="disk full [red]", exit_status=75)
    told = said(run, capsys)
    assert told["state"] == "failed" and told["why"] == "disk full [red]"


def test_many_runs_in_one_table(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = RunDir(tmp_path / "other")
    other.root.mkdir()
    other.config.write_text(yaml.safe_dump({"steps": 7}))
    run.write_status("finished", step=200)
    assert status.PROGRAM.run([str(run.root), str(other.root)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "state", "step"]
    assert first.split()[:5] == ["try1", "finished", "100", "of", "200"]
    assert second.split()[:5] == ["other", "new", "0", "of", "7"]


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.PROGRAM.run([str(tmp_path)]) == 1
    assert "it has no config.yaml" in capsys.readouterr().err


def test_without_slurm(run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without its commands the rest is told all the same."""
    Attempts(run).queued("77")
    monkeypatch.setenv("PATH", "/nowhere")
    assert slurm.queued([], run) == {}
    run.write_status("running", step=0)
    told = said(run, capsys)
    assert told["state"] == "dead" and "squeue is not found" in told["why"]


def test_durations() -> None:
    assert [clock(s) for s in (5, 130, 7500, 90000, float("nan"))] == [
        "5 s",
        "2 min",
        "2 h 05 min",
        "1 d 1 h",
        "?",
    ]
