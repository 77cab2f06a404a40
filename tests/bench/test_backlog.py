"""The bench of W&B's backlog sends a whole history."""

import subprocess
import sys
from pathlib import Path


def test_every_step_of_a_history_is_sent(tmp_path: Path) -> None:
    """In a process of its own: afterwards wandb's library is of no use in it."""
    code = "from bench.train.backlog import *; print(measure(BacklogBench(steps=300, values=3)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "'300, 4'" in done.stdout and "µs a step" in done.stdout
