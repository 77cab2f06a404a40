"""Uploads checkpoints: runs the user's command for each committed one, in the background, within a bounded time.

Waiting uploads are listed in `uploads.json` of the run's folder. A run that ends gives its uploads a few seconds, ends
the command that is still running, and leaves the rest to its next attempt, or to `mova upload runs/ID`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.durable import write_atomically
from core.run_dir import STEP
from train.checkpoint.checkpoint import has_marker, step_of

RECORD = "uploads.json"
LAST_SIGNALS = 4.0  # seconds within which a command ends after SIGTERM and SIGKILL together


@dataclass(frozen=True)
class CheckpointEvent:
    """An event about a checkpoint that the user should know of. `details`: plain values for the record."""

    kind: str  # "checkpoint", "checkpoint failed", "uploaded", "upload failed", "uploads wait", "old checkpoints stay"
    step: int
    text: str
    details: dict[str, Any]


def waiting_uploads(folder: Path) -> list[Path]:
    """Checkpoints in `folder` that an earlier attempt left to upload and that still exist, the oldest first."""
    try:
        names = json.loads((folder.parent / RECORD).read_text())["waiting"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    names = [name for name in names or [] if isinstance(name, str) and STEP.fullmatch(name)]  # and no path to elsewhere
    return [folder / name for name in names if has_marker(folder / name)]


class Uploads:
    """Runs the command for one checkpoint after another, off the training thread. `folder`: of the checkpoints."""

    def __init__(self, folder: Path, command: list[str], tell: Callable[[CheckpointEvent], None]) -> None:
        self._folder, self._command, self._tell = folder, command, tell
        self._paths = waiting_uploads(folder)
        self._changed = threading.Condition()
        self._closed = False
        self._child: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._work, name="checkpoint upload", daemon=True)
        self._thread.start()

    def add(self, path: Path) -> None:
        """Upload this one after those before it."""
        with self._changed:
            self._paths.append(path)
            self._write()
            self._changed.notify_all()

    def waiting(self) -> set[Path]:
        """Checkpoints that must not be deleted yet."""
        with self._changed:
            return set(self._paths)

    def close(self, seconds: float) -> None:
        """Wait until all are done, for at most `seconds`; an upload still running is then ended and left for later."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)
        if not self._thread.is_alive():
            return
        self._end_child()
        with self._changed:
            left = list(self._paths)
        names = ", ".join(path.name for path in left)
        text = (
            f"WARNING: uploads did not finish within checkpoint.upload_seconds={seconds:g}: {names} wait for the next "
            f"attempt, or for: mova upload {self._folder.parent}"
        )
        self._tell(CheckpointEvent("uploads wait", step_of(left[-1]) if left else 0, text, {"waiting": len(left)}))

    def _end_child(self) -> None:
        """End the command and whatever it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            child = self._child
            if child is None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            self._thread.join(LAST_SIGNALS / 2)
            if not self._thread.is_alive():
                return

    # What follows runs in the thread.

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._paths) or self._closed)
                if not self._paths:
                    return
                path = self._paths[0]
            event = self._upload(path)
            if event is None:  # it was ended from outside, and waits on
                return
            self._tell(event)
            with self._changed:
                self._paths.pop(0)
                self._write()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # a full disk costs the memory of what waits, no training
            record = {"waiting": [path.name for path in self._paths], "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            write_atomically(self._folder.parent / RECORD, json.dumps(record) + "\n")

    def _upload(self, path: Path) -> CheckpointEvent | None:
        step = step_of(path)
        try:
            self._child = start(self._command, path)
            said = self._child.communicate()[1]
            status, self._child = self._child.returncode, None
        except OSError as error:
            problem = f"{self._command[0]} cannot be run ({error.strerror})"
        else:
            if status == 0:
                return CheckpointEvent("uploaded", step, f"uploaded {path}", {})
            if self._closed and status < 0:
                return None
            problem = f"exit status {status}: {said.strip()[-500:]}"
        text = f"WARNING: upload of {path} failed: {problem}. The checkpoint itself is complete; training continues"
        return CheckpointEvent("upload failed", step, text, {"error": problem})


def start(command: list[str], path: Path) -> subprocess.Popen[str]:
    """Begin to upload one checkpoint, in a process group of its own. OSError if the command cannot be run."""
    words = [word.replace("{path}", str(path)) for word in command]
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip


def forget(folder: Path, done: list[Path]) -> None:
    """Remove what was uploaded by hand from the list."""
    left = [path.name for path in waiting_uploads(folder) if path not in done]
    write_atomically(folder.parent / RECORD, json.dumps({"waiting": left}) + "\n")
