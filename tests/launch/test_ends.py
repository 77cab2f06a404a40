"""How real training processes end: with which exit status, what status.json says, and within which time."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from core.run_dir import RunDir
from tests.launch import test_launch
from tests.launch.test_launch import REPOSITORY, arguments

folder = test_launch.folder  # a fixture
BOUND = 120.0  # seconds from a signal to the end, on a machine that is busy with more: seconds where it is not


@pytest.fixture
def begin() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a program of the project; none of its processes outlives the test. `ignored`: signals that it inherits as
    ignored, as under nohup."""
    begun: list[subprocess.Popen[bytes]] = []

    def start(module: str, given: list[str], *ignored: signal.Signals) -> subprocess.Popen[bytes]:
        words = "; ".join(f"trap '' {number.name.removeprefix('SIG')}" for number in ignored)
        command = ["bash", "-c", f'{words or "true"}; exec "$@"', "bash", sys.executable, "-m", module, *given]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        begun.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()


def steps_of(run: RunDir) -> int:
    return run.metrics.read_bytes().count(b'"train/loss"') if run.metrics.exists() else 0


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.poll()
        time.sleep(0.05)


def test_a_run_ends_with_the_status_of_how_it_ended(
    folder: Path, begin: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """One run: under nohup the terminal goes, Ctrl-C twice stops it, SIGTERM stops it, then it finishes; and once more
    there is nothing to do."""
    run, given = RunDir(folder / "ends"), arguments(folder, "ends")
    process = begin("train", given, signal.SIGHUP)
    wait_for(lambda: steps_of(run) > 2, process)
    process.send_signal(signal.SIGHUP)
    before = steps_of(run)
    wait_for(lambda: steps_of(run) > before + 20, process)  # a request ends a run after three
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert process.wait(BOUND) == 0 and run.read_status()["state"] == "stopped"
    stopped = run.read_status()["step"]
    assert stopped == run.committed_step() == steps_of(run) > before

    process = begin("train", given)
    wait_for(lambda: steps_of(run) > stopped, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(BOUND) == 0 and run.read_status()["state"] == "stopped"
    again = run.committed_step()
    assert again > stopped

    for _ in range(2):
        process = begin("train", [*given, f"steps={again + 2}"])
        assert process.wait(2 * BOUND) == 0 and run.read_status()["state"] == "finished"
        assert run.committed_step() == steps_of(run) == again + 2


def test_a_second_ctrl_c_ends_a_launch_without_waiting(
    folder: Path, begin: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """The workers have saved and wait for an upload, a minute and more."""
    run = RunDir(folder / "twice-pressed")
    more = [
        "cluster.processes=1",
        'checkpoint.upload=[sh,-c,"sleep 1000; echo {path}"]',
        "checkpoint.upload_seconds=900",
    ]
    process = begin("launch", arguments(folder, run.root.name, *more))
    wait_for(lambda: steps_of(run) > 2, process)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: (run.root / "uploads.json").exists(), process)
    time.sleep(3)  # longer than what a finger presses twice by accident
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(BOUND) == 1
    assert run.committed_step() == steps_of(run)
    waiting = json.loads((run.root / "uploads.json").read_text())["waiting"]
    assert waiting == [f"step-{run.committed_step():08d}"] and run.holder() is None
