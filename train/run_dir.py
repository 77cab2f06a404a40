"""Where everything of a run lies, and whether a config may go on in it.

runs/<id>/  config.yaml  code/  submit.sh  logs/  checkpoints/  metrics.jsonl  samples/  wandb/  status.json
            layout.json  inspect/  attempts.jsonl (launch/attempts.py)
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from train.errors import RunError

# Keys that may differ when a run goes on: they change neither the data order nor the mathematics.
MAY_CHANGE = (
    "steps", "parallel", "ema", "checkpoint", "guard", "monitor", "inspect", "validation", "data.path",
    "data.valid_path", "data.prefetch", "data.micro_batch", "data.quarantine_budget", "data.workers", "data.places",
    "run.root",
    "data.datasets", "data.segments",  # the data state compares what they mean: folders may move, segments be added
)  # fmt: skip
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. The id is also the W&B run id; the same id again means resume."""

    root: Path

    @classmethod
    def of(cls, root: str, run_id: str) -> RunDir:
        """Raises RunError for an id that is not a plain name."""
        if not ID.fullmatch(run_id):
            raise RunError(f"run.id={run_id!r}: use letters, digits, '.', '_' and '-', starting with a letter or digit")
        return cls(Path(root) / run_id)

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The truth about the curve: one JSON object a line."""
        return self.root / "metrics.jsonl"

    @property
    def status(self) -> Path:
        """How the run stands: running, finished, stopped or failed."""
        return self.root / "status.json"

    @property
    def layout(self) -> Path:
        """The table of the layout that the newest attempt began with: an object, in the order of its rows."""
        return self.root / "layout.json"

    @property
    def stop_file(self) -> Path:
        """Create this file to ask the run to save and stop."""
        return self.root / "stop"

    @property
    def logs(self) -> Path:
        """What the processes of the run print."""
        return self.root / "logs"

    def read_status(self) -> dict[str, Any]:
        """What status.json says; {} when there is none."""
        try:
            return dict(json.loads(self.status.read_text()))
        except (FileNotFoundError, ValueError):
            return {}

    def committed_step(self) -> int:
        """Step of the newest committed checkpoint, 0 when there is none."""
        markers = self.checkpoints.glob("step-*/COMMITTED")
        return max((int(marker.parent.name.removeprefix("step-")) for marker in markers), default=0)

    def holder(self) -> str | None:
        """The process that trains here now, as it calls itself; None when nobody does."""
        try:
            file = open(self.root / "lock")  # noqa: SIM115  closed below
        except FileNotFoundError:
            return None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "another process"
        return None

    def lock(self) -> IO[str]:
        """Keep other processes out of this folder for as long as the returned file is open (or this process lives).

        Raises RunError when another process trains here, naming it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        file = open(self.root / "lock", "a+")  # noqa: SIM115  the caller holds it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise RunError(
                f"run {self.root.name!r} is being trained already, by {holder}; wait for it, stop it "
                f"(touch {self.stop_file}), or choose another run.id"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file

    def open(self, config: dict[str, Any]) -> bool:
        """Create the folder for this config, or check that the config may go on in it. Returns whether it was there.

        Raises RunError with the differing values side by side when keys differ that may not change.
        """
        there = self.check(config)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, yaml.safe_dump(config, sort_keys=False))
        return there

    def check(self, config: dict[str, Any]) -> bool:
        """As `open`, but nothing is written."""
        if not self.config.exists():
            return False
        differing = config_differences(yaml.safe_load(self.config.read_text()), config)
        if differing:
            raise RunError(
                f"run {self.root.name!r} exists with another config; choose another run.id or undo:\n"
                + "\n".join(f"  {line}" for line in differing)
            )
        return True

    def write_status(self, state: str, **details: Any) -> None:
        """state: running, finished, stopped or failed."""
        content = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details}
        write_atomically(self.status, json.dumps(content, indent=2) + "\n")


def config_differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lines "key: earlier -> now" for every key that differs and may not change within a run."""
    before, after = _flatten(earlier), _flatten(now)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if any(key == free or key.startswith(free + ".") for free in MAY_CHANGE):
            continue
        if before.get(key) != after.get(key):
            lines.append(f"{key}: {before.get(key)} -> {after.get(key)}")
    return lines


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, whole."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
