"""A process ends in bounded time after its last save, whatever hangs, and none of its children outlives it."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.train import chaos

PROGRAM = """
import atexit, subprocess, sys, threading, time
from pathlib import Path
from train.faults.ending import end_within, leave
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print(child.pid, flush=True)
lock = threading.Lock(); lock.acquire()
{hang}
"""
HANGS = {
    "what closes": "with end_within(1.0, lambda: Path(sys.argv[1]).touch()): lock.acquire()",
    "a thread": "threading.Thread(target=lock.acquire).start(); Path(sys.argv[1]).touch(); leave()",
    "the interpreter's end": "atexit.register(time.sleep, 1000); Path(sys.argv[1]).touch(); leave()",
    "last words": "with end_within(1.0, lambda: 1 / 0): lock.acquire()",
}


@pytest.mark.parametrize("what", HANGS)
def test_a_process_ends_with_its_children_whatever_hangs(tmp_path: Path, what: str) -> None:
    said = tmp_path / "said"
    command = [sys.executable, "-c", PROGRAM.format(hang=HANGS[what]), str(said)]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=chaos.REPOSITORY, stdout=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == 0 and time.monotonic() - begin < 20
    assert said.exists() or what == "last words"
    child = int(done.stdout)
    with contextlib.suppress(psutil.NoSuchProcess):  # killed before it ended; the system may take a moment
        end = time.monotonic() + 10
        while (state := psutil.Process(child).status()) != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < end, state
            time.sleep(0.02)
