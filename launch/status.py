"""How runs stand: state, step, loss, speed, time left, restarts, last checkpoint, and where the logs lie.

    python -m launch.status runs/try1               # one run, in full
    python -m launch.status runs/*                  # a table

What status.json says is compared with what lives: the lock that a training process holds, and SLURM's queue. A run that
calls itself running while nothing runs is told as "dead". Exit status 1 when a folder is no run.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from launch.attempts import Attempts
from launch.slurm import queued
from train.errors import RunError
from train.run_dir import RunDir

SILENT = 600.0  # seconds without a metric after which a run that lives is told as silent
RECENT = 50  # steps that speed is averaged over
TAIL = 1 << 16  # bytes of metrics.jsonl that are read
WORKING = ("starting", "running")


@dataclass(frozen=True)
class Standing:
    """What is known of a run. nan or None: not known."""

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
        """Seconds to the end at the speed of late."""
        return (self.steps - self.step) * self.step_seconds if self.steps is not None else math.nan


def standing(run: RunDir) -> Standing:
    """Look at one run. RunError when the folder is none."""
    if not run.config.exists():
        raise RunError(f"{run.root} is no run: it holds no config.yaml")
    steps = yaml.safe_load(run.config.read_text()).get("steps")
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
    """(state, why, jobs in the queue): what status.json says, corrected by what lives."""
    said = run.read_status()
    state, error = said.get("state"), str(said.get("error", ""))
    jobs = [job for job in attempts.jobs() if job.isdigit()]
    try:
        waiting = queued(jobs)
        asked = ""
    except RunError as error_of_queue:
        waiting, asked = {}, str(error_of_queue)
    numbers = list(waiting)
    alive = run.holder()
    if alive is not None:
        age = time.time() - max(path.stat().st_mtime for path in (run.metrics, run.status) if path.exists())
        note = f"by {alive}"
        if age > SILENT:
            return "silent", f"{note}; nothing was recorded for {clock(age)}: see logs/stacks-*", numbers
        return "running", note, numbers
    for number, (job_state, reason) in waiting.items():
        if job_state == "RUNNING" and state == "running":
            return "running", f"by job {number} (its lock is not seen from this machine)", numbers
        if job_state == "RUNNING":
            return "starting", f"job {number} runs, the workers do not train yet", numbers
        if job_state == "PENDING":
            before = f", after {state}" if state else ""
            return "queued", f"job {number} waits ({reason}){before}", numbers
        return "ending", f"job {number} is {job_state.lower()}", numbers
    if state in WORKING:
        why = f"status.json says {state}, but no process holds the run"
        why += f" and none of its jobs is in the queue ({', '.join(jobs)})" if jobs and not asked else ""
        return "dead", why + (f"; {asked}" if jobs and asked else ""), numbers
    if state is None:
        return "new", "it was never started" + (f"; {asked}" if asked else ""), numbers
    return state, error, numbers


def _recent(run: RunDir) -> list[dict]:
    """The last training records."""
    if not run.metrics.exists():
        return []
    with open(run.metrics, "rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - TAIL))
        lines = file.read().splitlines()
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut off at either end
        if "train/loss" in record:
            records.append(record)
    return records


def clock(seconds: float) -> str:
    """A duration for people: "3 d 4 h", "2 h 05 min", "40 s"; "?" when it is not known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


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
    """All about one run."""
    table = Table(box=None, show_header=False, pad_edge=False)
    cells = _cells(one)
    rows = {"run": str(one.run.root), "state": cells["state"]}
    if one.note:
        rows["why"] = one.note
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
    """One line a run."""
    table = Table(box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for name in ("state", "step", "loss", "a step", "time left", "restarts", "checkpoint"):
        table.add_column(name, no_wrap=True)
    for one in all_of_them:
        table.add_row(one.run.root.name, *_cells(one).values())
    console.print(table, highlight=False, markup=False)


def main(arguments: list[str]) -> int:
    """The program."""
    if not arguments or any(argument.startswith("-") for argument in arguments):
        print(__doc__.strip())
        return 0 if {"-h", "--help"} & set(arguments) else 1
    try:
        found = [standing(RunDir(Path(argument))) for argument in arguments]
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 200)
    if len(found) == 1:
        show_one(found[0], console)
    else:
        show_many(found, console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
