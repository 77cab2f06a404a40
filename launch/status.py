"""Shows the state of runs: step, loss, speed, time left, restarts, last checkpoint, and where the logs are.

    mova status runs/try1               # one run, in full
    mova status runs/*                  # a table

The content of status.json is compared with the actual processes: the lock that a training process holds, and SLURM's
queue. A run that is "running" according to status.json without any process is shown as "dead". Exit status 1 if a
folder is not a run.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from core.errors import RunError
from core.jsonl import read_lines, records_in
from core.program import Command, refuse_options
from core.run_dir import RunDir
from core.terminal import clock
from launch.attempts import Attempts
from launch.slurm.slurm import queued

SILENT = 600.0  # seconds without a metric after which a live run is shown as silent
RECENT = 50  # steps that speed is averaged over
TAIL = 1 << 16  # bytes of metrics.jsonl that are read
WORKING = ("starting", "running")


@dataclass(frozen=True)
class Standing:
    """What is known about a run. nan or None: unknown."""

    run: RunDir
    state: str
    note: str  # why it is in this state, or ""
    step: int
    steps: int | None
    loss: float
    step_seconds: float
    tokens_per_s: float
    restarts: int
    checkpoint: int | None
    checkpoint_age: float
    jobs: list[str]

    @property
    def left(self) -> float:
        """Seconds to the end at the recent speed."""
        return (self.steps - self.step) * self.step_seconds if self.steps is not None else math.nan


def standing(run: RunDir) -> Standing:
    """Examine one run. RunError if the folder is not a run."""
    if not run.config.exists():
        raise RunError(f"{run.root} is not a run: it has no config.yaml")
    steps = run.read_config().get("steps")
    recent = _recent(run)
    attempts = Attempts(run)
    step = max(run.committed_step(), recent[-1]["step"] + 1 if recent else 0)
    state, note, jobs = _state(run, attempts)
    times = [record["perf/step_time"] for record in recent[-RECENT:] if record.get("perf/step_time")]
    speeds = [record["perf/tokens_per_s"] for record in recent[-RECENT:] if record.get("perf/tokens_per_s")]
    loss = recent[-1].get("train/loss") if recent else None
    committed = run.checkpoints / f"step-{run.committed_step():08d}" / "COMMITTED"
    there = committed.exists()
    return Standing(
        run, state, note, step, steps, math.nan if loss is None else loss,
        sum(times) / len(times) if times else math.nan, sum(speeds) / len(speeds) if speeds else math.nan,
        attempts.restarts(), run.committed_step() if there else None,
        time.time() - committed.stat().st_mtime if there else math.nan, jobs,
    )  # fmt: skip


def _state(run: RunDir, attempts: Attempts) -> tuple[str, str, list[str]]:
    """(state, reason, jobs in the queue): from status.json, corrected by what is actually running."""
    said = run.read_status()
    state, error = said.get("state"), str(said.get("error", ""))
    jobs = [job for job in attempts.jobs() if job.isdigit()]
    try:
        waiting = queued(jobs, run)
        asked = ""
    except RunError as error_of_queue:
        waiting, asked = {}, str(error_of_queue)
    numbers = list(waiting)
    alive = run.holder()
    if alive is not None:
        age = time.time() - max(path.stat().st_mtime for path in (run.metrics, run.status) if path.exists())
        note = f"by {alive}"
        if age > SILENT:
            return "silent", f"{note}; nothing recorded for {clock(age)}: see logs/stacks-*", numbers
        return "running", note, numbers
    for number, (job_state, reason) in waiting.items():
        if job_state == "RUNNING" and state == "running":
            return "running", f"by job {number} (its lock is not visible from this machine)", numbers
        if job_state == "RUNNING":
            return "starting", f"job {number} runs, but the workers do not train yet", numbers
        if job_state == "PENDING":
            before = f", after {state}" if state else ""
            return "queued", f"job {number} waits ({reason}){before}", numbers
        return "ending", f"job {number} is {job_state.lower()}", numbers
    if state == "waiting":
        return state, error, numbers
    if state in WORKING:
        why = f"status.json contains {state}, but no process holds the run"
        why += f" and none of its jobs is in the queue ({', '.join(jobs)})" if jobs and not asked else ""
        return "dead", why + (f"; {asked}" if jobs and asked else ""), numbers
    if state is None:
        return "new", "it was never started" + (f"; {asked}" if asked else ""), numbers
    return state, error, numbers


def wandb_trouble(run: RunDir) -> str | None:
    """A message if W&B is off in the run's newest attempt, or None."""
    for event in reversed(read_lines(run.root / "events.jsonl")):
        if event.get("event") == "W&B off":
            return f"off since step {event['step']}, {event['time']}; the next start sends what it lacks"
        if event.get("event") == "resumed":
            break
    return None


def _recent(run: RunDir) -> list[dict[str, Any]]:
    """The last training records."""
    if not run.metrics.exists():
        return []
    with open(run.metrics, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - TAIL))
        records = records_in(file.read())
    return [record for record in records if "train/loss" in record]


def _cells(one: Standing) -> dict[str, str]:
    steps = "?" if one.steps is None else f"{one.steps:,}"
    speed = "?" if math.isnan(one.step_seconds) else f"{one.step_seconds:.2f} s"
    busy = one.state in ("running", "silent")
    checkpoint = "none" if one.checkpoint is None else f"{one.checkpoint:,} ({clock(one.checkpoint_age)} ago)"
    return {
        "state": one.state,
        "step": f"{one.step:,} of {steps}",
        "loss": "?" if math.isnan(one.loss) else f"{one.loss:.4f}",
        "a step": speed,
        "time left": clock(one.left) if busy else ("0 s" if one.state == "finished" else "-"),
        "restarts": str(one.restarts),
        "checkpoint": checkpoint,
    }


def show_one(one: Standing, console: Console) -> None:
    """Print everything about one run."""
    table = Table(box=None, show_header=False, pad_edge=False)
    cells = _cells(one)
    rows = {"run": str(one.run.root), "state": cells["state"]}
    if one.note:
        rows["why"] = one.note
    if (trouble := wandb_trouble(one.run)) is not None:
        rows["W&B"] = trouble
    rows |= {name: cells[name] for name in ("step", "loss", "a step")}
    if not math.isnan(one.tokens_per_s):
        rows["tokens a second"] = f"{one.tokens_per_s:,.0f}"
    rows |= {name: cells[name] for name in ("time left", "restarts", "checkpoint")}
    if one.jobs:
        rows["jobs in the queue"] = ", ".join(one.jobs)
    rows["logs"] = str(one.run.logs) if one.run.logs.exists() else "where it was started"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)


def show_many(all_of_them: list[Standing], console: Console) -> None:
    """Print one line per run."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("state", "step", "loss", "a step", "time left", "restarts", "checkpoint"):
        table.add_column(name, no_wrap=True)
    for one in all_of_them:
        table.add_row(one.run.root.name, *_cells(one).values())
    console.print(table, highlight=False, markup=False)


def _main(arguments: list[str]) -> None:
    refuse_options("mova status", arguments, least=1)
    found = [standing(RunDir(Path(argument))) for argument in arguments]
    console = Console(width=None if sys.stdout.isatty() else 200)
    if len(found) == 1:
        show_one(found[0], console)
    else:
        show_many(found, console)


PROGRAM = Command("status", __doc__, _main)

if __name__ == "__main__":
    PROGRAM.start()
