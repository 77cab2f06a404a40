"""Whether a run's folder can be written to, and how long a run waits until it can.

A full disk, a quota, a file system that turned read-only, a folder that was moved or is not mounted: no attempt
succeeds before that is over, and every one does afterwards. So such an attempt counts toward no limit of restarts; the
next one comes after a pause that grows, until the run is given up. On SLURM the batch script waits
(submit.sh.template), since a folder that is away holds its code, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from dataclasses import dataclass, field

from core.errors import UNWRITABLE
from core.run_dir import RunDir
from launch.cluster import ClusterConfig

PROBE = 1 << 20  # bytes that status, attempts, metrics and logs take for a while


def obstacle(run: RunDir) -> str | None:
    """Why nothing can be written into the folder of a run that has begun, as text; None if it can."""
    probe = run.root / f".probe.{secrets.token_hex(6)}.partial"
    try:
        if not run.config.exists():
            return f"{run.root} is gone (moved, or its file system is not mounted)"
        with open(probe, "wb") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{run.root}: {error.strerror}" if error.errno in UNWRITABLE else None
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return None


def obstacle_to_saving(run: RunDir) -> str | None:
    """As `obstacle`, or that a checkpoint as large as the newest one does not fit."""
    if (words := obstacle(run)) is not None:
        return words
    try:
        marker = run.checkpoints / f"step-{run.committed_step():08d}" / "COMMITTED"
        size = sum(entry["bytes"] for entry in json.loads(marker.read_bytes())["files"].values())
        free = shutil.disk_usage(run.checkpoints).free
    except (OSError, ValueError, KeyError):
        return None  # there is none yet
    if free < size:
        return f"{run.checkpoints}: a checkpoint needs {size / 1e9:.3f} GB, {free / 1e9:.3f} GB are free"
    return None


@dataclass
class Patience:
    """The pauses of a run that waits for a writable folder: each as long as it has waited so far, within configured
    limits."""

    config: ClusterConfig
    since: float = field(default=0.0, init=False)
    step: int = field(default=-1, init=False)

    def pause(self, step: int, now: float) -> float | None:
        """Seconds until the next check, None if the run is given up. `step`: newest committed; a run that has gained
        one since it began to wait starts over. `now`: seconds of any clock."""
        if step > self.step:
            self.since, self.step = now, step
        waited = now - self.since
        if waited >= 3600 * self.config.disk_wait_hours:
            return None
        shortest, longest = (60 * minutes for minutes in self.config.disk_pause_minutes)
        return min(max(waited, shortest), longest)
