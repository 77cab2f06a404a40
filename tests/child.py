"""Programs that tests run beside themselves."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run_child(command: Sequence[str | Path], **options: Any) -> str:
    """Run a program to its end and return what it printed. Where it fails, AssertionError with the last line of its
    errors first: pytest's summary shows that line."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing was printed"]
        raise AssertionError(f"status {done.returncode}: {lines[-1]}\n" + "\n".join(lines[-60:]))
    return done.stdout
