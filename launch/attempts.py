"""How often a run was started, how each attempt ended, and whether another one is worth it.

    runs/<id>/attempts.jsonl    one line a submission, a beginning, an ending

A job that its cluster kills writes no ending, so what an attempt gained is read off the checkpoint that the next one
finds. Only one process writes at a time: the launcher, or the batch script of the one job that runs.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Any

import yaml

from train.errors import EXIT_FAILED, EXIT_OK
from train.run_dir import RunDir

FINISHED, STOPPED, CANCELLED, REFUSED, CRASHED = "finished", "stopped", "cancelled", "refused", "crashed"
MARK = "signal"  # how a stop file begins that a batch script wrote; a user's is another one


@dataclass(frozen=True)
class Limits:
    """`restarts` in all since the submission; `fruitless`: attempts in a row that gained no step and were not stopped
    as asked, after which the run is given up (a crash loop)."""

    restarts: int
    fruitless: int


class Attempts:
    """The record of one run."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.path = run.root / "attempts.jsonl"

    def read(self) -> list[dict[str, Any]]:
        """All lines, the oldest first."""
        lines = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:
                    continue  # cut off by a death
        return lines

    def current(self) -> list[dict[str, Any]]:
        """The lines since the last submission."""
        lines = self.read()
        last = max((i for i, line in enumerate(lines) if line["event"] == "submitted"), default=-1)
        return lines[last + 1 :]

    def jobs(self) -> list[str]:
        """Numbers of the jobs of the last submission, and of those that took their place."""
        lines = self.read()
        last = max((i for i, line in enumerate(lines) if line["event"] == "submitted"), default=0)
        return [job for line in lines[last:] for job in line.get("jobs", [])]

    def submitted(self) -> None:
        """A user has asked for the run (again): limits count from here."""
        self._write("submitted")

    def queued(self, job: str) -> None:
        """A job of this submission is in the queue."""
        self._write("queued", jobs=[job])

    def replaced(self, job: str, by: str, nodes: list[str]) -> None:
        """A job made place for another one, which avoids these nodes."""
        self._write("replaced", job=job, jobs=[by], nodes=nodes)

    def begin(self, job: str, restart: int, nodes: str = "") -> None:
        """An attempt starts. From here on status.json speaks of this attempt."""
        self.run.write_status("starting", step=self.run.committed_step())
        self._write("begin", job=job, restart=restart, nodes=nodes, step=self.run.committed_step())

    def end(self, job: str, restart: int, ended: str, status: int) -> None:
        """An attempt has ended; `ended`: one of the five words above."""
        self._write("end", job=job, restart=restart, ended=ended, status=status, step=self.run.committed_step())

    def restarts(self) -> int:
        """Attempts of the last submission but the first."""
        return max(0, sum(line["event"] == "begin" for line in self.current()) - 1)

    def fruitless(self) -> int:
        """Attempts in a row, up to the last one, that gained no step and did not stop as asked."""
        tried: list[dict[str, Any]] = []
        for line in self.current():
            if line["event"] == "begin":
                tried.append({"step": line["step"], "ended": None})
            elif line["event"] == "end" and tried:
                tried[-1]["ended"] = line["ended"]
        count = 0
        after = self.run.committed_step()
        for attempt in reversed(tried):
            if attempt["step"] < after or attempt["ended"] == STOPPED:
                break
            count += 1
            after = attempt["step"]
        return count

    def objection(self, limits: Limits) -> str | None:
        """Why no other attempt should begin, or None."""
        begun = sum(line["event"] == "begin" for line in self.current())
        if begun > limits.restarts:
            return f"it was restarted {limits.restarts} times, which is the limit (cluster.max_restarts)"
        if begun and self.fruitless() >= limits.fruitless:
            return (
                f"{self.fruitless()} attempts in a row gained no step (the last checkpoint is of step "
                f"{self.run.committed_step()}): a crash loop"
            )
        return None

    def _write(self, event: str, **details: Any) -> None:
        self.run.root.mkdir(parents=True, exist_ok=True)
        cut_off = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with open(self.path, "a") as file:
            line = json.dumps({"event": event, "time": round(time.time(), 3), **details})
            file.write(("\n" if cut_off and self.path.stat().st_size else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())


def is_finished(run: RunDir) -> bool:
    """Whether the run has done all steps that its config asks for."""
    if run.read_status().get("state") != FINISHED or not run.config.exists():
        return False
    return run.committed_step() >= int(yaml.safe_load(run.config.read_text())["steps"])


def how_it_ended(run: RunDir, status: int) -> str:
    """What the exit status of all workers together and status.json say of an attempt."""
    if status == EXIT_OK:
        return FINISHED if is_finished(run) else STOPPED
    said = run.read_status()
    if said.get("state") == "failed":  # workers that only lost a peer end with other statuses than the cause
        status = said.get("exit_status", status)
    return REFUSED if status == EXIT_FAILED else CRASHED
