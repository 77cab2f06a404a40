"""The run directory: which file of a run is where.

runs/<id>/  config.yaml  code/  submit.sh  logs/  checkpoints/  metrics.jsonl  samples/  wandb/  status.json
            layout.json  plan.json  inspect/  attempts.jsonl (launch/attempts.py)
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from core.durable import write_atomically
from core.errors import RunError
from core.jsonl import read_lines
from core.locks import lock_now
from core.renamed_keys import translated

LOOK = 2.0  # seconds: a process that only asks who holds the lock never takes that long
STEP = re.compile(r"step-(\d{8,})")  # name of a checkpoint's folder
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunDir:
    """The folder of one run. The id is also the W&B run id; starting with the same id resumes the run."""

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
        """One folder per checkpoint."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The authoritative metrics: one JSON object per line."""
        return self.root / "metrics.jsonl"

    @property
    def status(self) -> Path:
        """The state of the run, see `write_status`."""
        return self.root / "status.json"

    @property
    def layout(self) -> Path:
        """The layout table of the newest attempt: an object, in the order of its rows."""
        return self.root / "layout.json"

    @property
    def plan(self) -> Path:
        """What was planned for the run (mova plan), where it was."""
        return self.root / "plan.json"

    @property
    def stop_file(self) -> Path:
        """Create this file to ask the run to save and stop."""
        return self.root / "stop"

    @property
    def logs(self) -> Path:
        """The output of the run's processes."""
        return self.root / "logs"

    def read_config(self) -> dict[str, Any]:
        """The resolved config with today's key names, whatever version wrote it. OSError if it cannot be read,
        RunError if it holds no keys."""
        try:
            config = yaml.safe_load(self.config.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RunError(f"{self.config} cannot be read: {str(error).splitlines()[0]}") from None
        if not isinstance(config, dict):
            raise RunError(f"{self.config} holds no keys")
        return translated(config)

    def read_status(self) -> dict[str, Any]:
        """The content of status.json; {} if it does not exist."""
        try:
            content = json.loads(self.status.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def committed_step(self) -> int:
        """Step of the newest committed checkpoint, 0 if there is none."""
        names = [STEP.fullmatch(marker.parent.name) for marker in self.checkpoints.glob("step-*/COMMITTED")]
        return max((int(name[1]) for name in names if name), default=0)

    def known_commit(self) -> int | None:
        """The newest step whose checkpoint was committed according to status.json, attempts.jsonl or events.jsonl,
        whether the checkpoint still exists or not. None if there is no such record. Metrics alone prove no commit."""
        steps = [_committed_in(self.read_status())]
        for name, kinds in (("attempts.jsonl", ("begin", "end")), ("events.jsonl", ("checkpoint", "resumed"))):
            lines = [line for line in read_lines(self.root / name) if line.get("event") in kinds]
            steps += [step for line in lines if isinstance(step := line.get("step"), int)]
        return max(steps) or None

    def has_begun(self) -> bool:
        """Whether anything ever ran here: else the folder holds what a launch wrote that came to nothing."""
        records = (self.status, self.metrics, self.root / "events.jsonl")
        attempts = read_lines(self.root / "attempts.jsonl")
        return (
            any(path.exists() for path in records)
            or any(line.get("event") == "begin" for line in attempts)
            or self.checkpoints.is_symlink()
            or (self.checkpoints.exists() and any(self.checkpoints.iterdir()))
        )

    def holder(self) -> str | None:
        """The process that trains here now, as recorded in its lock; None if there is none, as far as can be known."""
        try:
            with open(self.root / "lock") as file:
                return None if lock_now(file, shared=True) else _name_in(file)
        except OSError:
            return None

    def lock(self, name: str = "lock") -> IO[str]:
        """Lock this folder for as long as the returned file is open (or this process lives).

        name: "lock" for the one that trains, "launch.lock" for the one that launches. Raises RunError, which names the
        holder, if another process has it. Waits for a process that only asks for the holder (`holder`).
        """
        self.root.mkdir(parents=True, exist_ok=True)
        file = open(self.root / name, "a+")  # noqa: SIM115  the caller holds it
        deadline = time.monotonic() + LOOK
        while not lock_now(file):
            if time.monotonic() > deadline:
                holder = _name_in(file)
                file.close()
                raise RunError(
                    f"run {self.root.name!r} is already being trained by {holder}; wait for it, stop it "
                    f"(touch {self.stop_file}), or choose another run.id"
                )
            time.sleep(0.02)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file

    def write_status(self, state: str, **details: Any) -> None:
        """state: starting, running, waiting, finished, stopped or failed. The newest committed step is
        carried over. If the file cannot be written, a warning is logged and the run continues."""
        try:
            known = max(self.committed_step(), _committed_in(self.read_status()))
            details |= {"committed": known} if known else {}
            content = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details}
            write_atomically(self.status, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            logger.warning("%s cannot be written (%s); its content would be: %s", self.status, error.strerror, state)


def _name_in(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "another process"


def _committed_in(status: dict[str, Any]) -> int:
    """The committed step that a status.json records, 0 for none. Earlier versions recorded none; there the step at
    which a run finished or stopped was committed."""
    ended = status.get("state") in ("finished", "stopped", "starting")
    step = status.get("committed", status.get("step") if ended else 0)
    return step if isinstance(step, int) else 0
