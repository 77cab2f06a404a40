"""Records the attempts of a run: how each ended, and whether another one is allowed.

    runs/<id>/attempts.jsonl    one line per submission, beginning and end

A job that its cluster kills writes no end, so the progress of an attempt is taken from the checkpoint that the next one
finds. Only one process writes at a time: the launcher, or the batch script of the one job that runs.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

from core.errors import EXIT_FAILED, EXIT_OK, NO_ROOM
from core.jsonl import read_lines
from core.run_dir import RunDir
from launch.room import obstacle

FINISHED, STOPPED, CANCELLED, REFUSED, CRASHED = "finished", "stopped", "cancelled", "refused", "crashed"
# Events of attempts.jsonl, and the keys that a line of each must have; other lines are ignored.
NEEDED: dict[str, set[str]] = {
    "submitted": set(), "queued": {"jobs"}, "replaced": {"job", "jobs"}, "begin": {"job", "restart", "step"},
    "end": {"job", "restart", "ended", "step"},
}  # fmt: skip
MARK = "signal"  # beginning of a stop file written by a batch script; a user's differs

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """`restarts`: total since the submission; `max_failed_restarts`: consecutive attempts that gained no step and were
    not stopped on request, after which the run is given up (a crash loop). Attempts that ended because nothing could be
    written count for neither."""

    restarts: int
    max_failed_restarts: int


class Attempts:
    """The record of one run. A line that cannot be written is kept and written with the next one."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.path = run.root / "attempts.jsonl"
        self._waiting: list[str] = []  # to be written

    def read(self) -> list[dict[str, Any]]:
        """All lines, the oldest first."""
        lines = read_lines(self.path) + [json.loads(line) for line in self._waiting]
        return [line for line in lines if line.keys() >= NEEDED.get(str(line.get("event")), {"none of ours"})]

    def current(self) -> list[dict[str, Any]]:
        """The lines since the last submission."""
        lines = self.read()
        last = max((i for i, line in enumerate(lines) if line["event"] == "submitted"), default=-1)
        return lines[last + 1 :]

    def jobs(self) -> list[str]:
        """Numbers of the jobs of the last submission, and of those that replaced them."""
        lines = self.read()
        last = max((i for i, line in enumerate(lines) if line["event"] == "submitted"), default=0)
        return [job for line in lines[last:] for job in line.get("jobs", [])]

    def submitted(self) -> None:
        """Record that a user has submitted the run (again): limits count from here."""
        self._write("submitted")

    def queued(self, job: str) -> None:
        """Record that a job of this submission is in the queue."""
        self._write("queued", jobs=[job])

    def replaced(self, job: str, by: str, nodes: list[str]) -> None:
        """Record that another job, which avoids these nodes, replaces a job."""
        self._write("replaced", job=job, jobs=[by], nodes=nodes)

    def begin(self, job: str, restart: int, nodes: str = "") -> None:
        """Record that an attempt starts. From here on status.json describes this attempt."""
        self.run.write_status("starting", step=self.committed_step())
        self._write("begin", job=job, restart=restart, nodes=nodes, step=self.committed_step())

    def end(self, job: str, restart: int, ended: str, status: int) -> None:
        """Record how an attempt ended; `ended`: one of the five words above, or NO_ROOM."""
        step = max([self.committed_step(), *(step for step, _ in self._tried())])
        self._write("end", job=job, restart=restart, ended=ended, status=status, step=step)

    def committed_step(self) -> int:
        """Step of the newest committed checkpoint; 0 if there is none, or none is visible."""
        try:
            return self.run.committed_step()
        except OSError:
            return 0

    def restarts(self) -> int:
        """Attempts of the last submission except the first."""
        number: int = max(0, sum(line["event"] == "begin" for line in self.current()) - 1)
        return number

    def failed_restarts(self) -> int:
        """Consecutive attempts, up to the last one, that gained no step and did not stop on request."""
        count = 0
        after = self.run.committed_step()
        for step, ended in reversed(self._tried()):
            if step < after or ended == STOPPED:
                break
            count += ended != NO_ROOM
            after = step
        return count

    def _tried(self) -> list[tuple[int, str | None]]:
        """(step at its beginning, how it ended) of each attempt of the last submission."""
        tried: list[tuple[int, str | None]] = []
        for line in self.current():
            if line["event"] == "begin":
                tried.append((line["step"], None))
            elif line["event"] == "end" and tried:
                tried[-1] = (tried[-1][0], line["ended"])
        return tried

    def objection(self, limits: Limits) -> str | None:
        """Why no further attempt may begin, or None."""
        begun = sum(ended != NO_ROOM for _, ended in self._tried())
        if begun > limits.restarts:
            return f"it was restarted {limits.restarts} times, which is the limit (cluster.max_restarts)"
        if begun and self.failed_restarts() >= limits.max_failed_restarts:
            return (
                f"{self.failed_restarts()} attempts in a row gained no step (the last checkpoint is at step "
                f"{self.run.committed_step()}): a crash loop"
            )
        return None

    def _write(self, event: str, **details: Any) -> None:
        self._waiting.append(json.dumps({"event": event, "time": round(time.time(), 3), **details}))
        try:
            with open(self.path, "ab+", buffering=0) as file:
                size = file.seek(0, os.SEEK_END)
                cut_off = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"  # by a death
                text = ("\n" if cut_off else "") + "".join(f"{line}\n" for line in self._waiting)
                if file.write(text.encode()) != len(text.encode()):
                    file.truncate(size)  # else what fits would stand there twice
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            self._waiting = []
        except OSError as error:
            logger.warning("%s cannot be written (%s): %s", self.path, error.strerror, self._waiting[-1])


def is_finished(run: RunDir) -> bool:
    """Whether the run has done all steps of its config."""
    if run.read_status().get("state") != FINISHED or not run.config.exists():
        return False
    return run.committed_step() >= int(run.read_config()["steps"])


def how_it_ended(run: RunDir, status: int) -> str:
    """How an attempt ended, from the exit status of all workers together, status.json and the run's folder."""
    try:
        if status == EXIT_OK:
            return FINISHED if is_finished(run) else STOPPED
        said = run.read_status()
    except OSError:
        said = {}
    if obstacle(run) is not None or said.get("state") == "failed" and said.get("cause") == NO_ROOM:
        return NO_ROOM
    if said.get("state") == "failed":  # workers that only lost a peer end with other statuses than the cause
        status = said.get("exit_status", status)
    return REFUSED if status == EXIT_FAILED else CRASHED
