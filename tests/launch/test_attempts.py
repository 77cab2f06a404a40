"""Whether another attempt is made: counting, crash loops, what exit statuses say, stop files."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from core.run_dir import RunDir
from launch.attempts import CRASHED, FINISHED, REFUSED, STOPPED, Attempts, Limits, how_it_ended
from launch.slurm import job

LIMITS = Limits(restarts=3, max_failed_restarts=2)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "try1")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump({"steps": 100}))
    return run


def commit(run: RunDir, step: int) -> None:
    path = run.checkpoints / f"step-{step:08d}"
    path.mkdir()
    (path / "COMMITTED").touch()


def begin(run: RunDir, number: int, follows: RunDir | None = None) -> int:
    return job.begin(run, "7", number, "n1", LIMITS, follows, lock_wait=0.1)


def test_an_attempt_that_gains_steps_is_followed_by_others_up_to_the_limit(run: RunDir) -> None:
    for number in range(4):
        assert begin(run, number) == 0
        commit(run, number + 1)
        assert job.end(run, "7", number, 75, "RUNNING") == 75
    assert begin(run, 4) == 1
    assert "restarted 3 times" in run.read_status()["error"]


def test_a_crash_loop(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """Two attempts in a row without a step: one is killed and writes nothing, the other crashes with a word."""
    commit(run, 5)
    assert begin(run, 0) == 0
    assert begin(run, 1) == 0
    run.write_status("failed", error="no memory", exit_status=75)
    assert job.end(run, "7", 1, 75, "RUNNING") == 75
    assert begin(run, 2) == 1
    assert run.read_status()["state"] == "failed"
    assert "2 attempts in a row gained no step" in run.read_status()["error"]
    assert run.read_status()["error"].endswith("last error: no memory")
    Attempts(run).submitted()  # a user has launched it again
    assert begin(run, 0) == 0


def test_a_gain_ends_the_row(run: RunDir) -> None:
    assert begin(run, 0) == 0
    assert begin(run, 1) == 0
    commit(run, 1)
    assert Attempts(run).failed_restarts() == 0
    assert begin(run, 2) == 0
    assert Attempts(run).failed_restarts() == 1


def test_being_stopped_at_once_is_no_crash(run: RunDir) -> None:
    for number in range(3):
        assert begin(run, number) == 0
        assert job.end(run, "7", number, 0, "RUNNING") == 75
    assert Attempts(run).failed_restarts() == 0


@pytest.mark.parametrize(
    "status, said, ended",
    [
        (0, {"state": "finished"}, FINISHED),
        (0, {"state": "stopped"}, STOPPED),
        (0, {"state": "starting"}, STOPPED),
        (1, {"state": "starting"}, REFUSED),
        (137, {"state": "running"}, CRASHED),
        (75, {"state": "running"}, CRASHED),
        (137, {"state": "failed", "exit_status": 1}, REFUSED),  # peers of the rank that knew why were killed
        (1, {"state": "failed", "exit_status": 75}, CRASHED),
    ],
)
def test_how_an_attempt_ended(run: RunDir, status: int, said: dict, ended: str) -> None:
    if said["state"] == "finished":
        commit(run, 100)
    run.status.write_text(json.dumps(said))
    assert how_it_ended(run, status) == ended


def test_a_finished_run_with_more_steps_to_do_goes_on(run: RunDir) -> None:
    commit(run, 100)
    run.write_status("finished", step=100)
    assert begin(run, 0) == job.NOTHING_TO_DO
    run.config.write_text(yaml.safe_dump({"steps": 200}))
    assert begin(run, 0) == 0


def test_only_a_job_that_runs_may_ask_for_another_attempt(run: RunDir) -> None:
    assert begin(run, 0) == 0
    run.write_status("stopped", step=3)
    assert job.end(run, "7", 0, 0, "COMPLETING") == 0
    assert Attempts(run).read()[-1]["ended"] == "cancelled"
    assert begin(run, 1) == 0
    assert job.end(run, "7", 1, 143, "COMPLETING") == 1


def test_what_a_restart_does_not_cure_ends_a_chain_too(run: RunDir) -> None:
    assert begin(run, 0) == 0
    run.write_status("failed", error="data changed", exit_status=1)
    assert job.end(run, "7", 0, 137, "RUNNING") == 1
    assert job.begin(run, "8", 0, "n1", LIMITS, lock_wait=0.1) == 1


def test_stop_files(run: RunDir) -> None:
    assert begin(run, 0) == 0
    run.stop_file.write_text("signal 7 0\n")
    assert job.end(run, "7", 0, 0, "RUNNING") == 75 and run.stop_file.exists()
    assert begin(run, 1) == 0 and not run.stop_file.exists()
    run.stop_file.write_text("signal 7 2\n")  # came before its attempt asked whether it may begin
    assert begin(run, 2) == 0 and run.stop_file.exists()
    run.stop_file.write_text("")  # a user's
    assert job.end(run, "7", 2, 0, "RUNNING") == 0
    assert begin(run, 3) == job.NOTHING_TO_DO and run.stop_file.exists()


def test_a_run_that_is_held_is_not_begun(run: RunDir) -> None:
    with run.lock():
        assert begin(run, 0) == 1
    assert run.read_status() == {}, "the status of the process that trains is left alone"
    assert begin(run, 0) == 0


def test_a_phase_waits_for_the_one_before(run: RunDir, tmp_path: Path) -> None:
    before = RunDir(tmp_path / "before")
    before.checkpoints.mkdir(parents=True)
    before.config.write_text(yaml.safe_dump({"steps": 5}))
    before.write_status("stopped", step=3)
    assert begin(run, 0, before) == 1
    commit(before, 5)
    before.write_status("finished", step=5)
    assert begin(run, 0, before) == 0


def test_a_line_cut_off_by_a_death_is_passed_over(run: RunDir) -> None:
    Attempts(run).begin("7", 0)
    with open(run.root / "attempts.jsonl", "a") as file:
        file.write('{"event": "be')
    Attempts(run).end("7", 0, CRASHED, 75)
    assert [line["event"] for line in Attempts(run).read()] == ["begin", "end"]


def test_a_state_that_nobody_knows_is_not_cancelled(run: RunDir) -> None:
    """The controller did not answer: the run may go on."""
    for state, status in (("", 75), ("RUNNING", 75), ("COMPLETING", 1)):
        assert begin(run, 0) == 0
        commit(run, run.committed_step() + 1)
        assert job.end(run, "7", 0, 75, state) == status, state


def test_a_script_asks_slurm_until_it_answers(tmp_path: Path) -> None:
    """Twice without an answer, then with one."""
    asked = tmp_path / "asked"
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho x >>{asked}\n[ $(wc -l <{asked}) -ge 3 ] && echo RUNNING\n")
    (tmp_path / "squeue").chmod(0o755)
    script = f". {Path(job.__file__).with_name('clean.sh')}; sleep() {{ :; }}; ask {tmp_path}/squeue"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "RUNNING\n" and asked.read_text() == "x\n" * 3
