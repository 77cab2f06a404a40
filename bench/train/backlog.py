"""Cost of sending a run's whole history to W&B again, as an offline start does after a kill.

    python -m bench.train.backlog                    # 200,000 steps; 5 minutes; writes bench/results/backlog.md

The history is sent without the pauses that a start makes between two slices (train/monitor/wandb_log.py), so that CPU
time is measured without waiting.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from core.compose import Schema
from core.errors import UserError
from core.program import Call, Program
from core.ranges import bounded
from core.run_dir import RunDir
from tools.bench.record import write_record
from train.monitor.wandb_log import SHARE, WandbLog


@dataclass
class BacklogBench:
    """Size of the history.

    steps: of the run
    values: of each step
    output: folder of the record
    """

    steps: int = bounded(200_000, "[1, inf)")
    values: int = bounded(40, "[0, inf)")
    output: str = "bench/results"


class Unhurried(WandbLog):
    """Follows to the end without pauses, and remembers what its thread and W&B's processes have used."""

    cpu = 0.0
    theirs = 0.0

    def _work(self) -> None:
        self._ended.set()
        super()._work()
        self.cpu = time.thread_time()

    def _send_held(self, merge: bool = True) -> None:
        used = [process.cpu_times() for process in self._processes if process.is_running()]
        self.theirs = sum(one.user + one.system for one in used)
        super()._send_held(merge)


def measure(bench: BacklogBench) -> list[tuple[str, str]]:
    """Send a history once; returns the table."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "backlog")
        run.root.mkdir()
        row = {f"metric/{number}": number / 7 for number in range(bench.values)}
        with open(run.metrics, "w") as file:
            for step in range(bench.steps):
                file.write(json.dumps({"step": step, "train/loss": 1 / (step + 1), **row}) + "\n")
        begin = time.monotonic()
        log = Unhurried(run, "offline", "mova", {}, None)
        log.begin()
        log._thread.join()
        seconds = time.monotonic() - begin
        if log.trouble is not None or log._sent != bench.steps - 1:
            raise UserError(f"{log._sent + 1} of {bench.steps} steps were sent: {log.trouble}")
        written = sum(path.stat().st_size for path in (run.root / "wandb").rglob("run-*.wandb"))
        return [
            ("steps, values of each", f"{bench.steps:,}, {bench.values + 1}"),
            ("metrics.jsonl", f"{run.metrics.stat().st_size / 1e6:.0f} MB"),
            ("written by W&B", f"{written / 1e6:.0f} MB"),
            ("CPU of the thread in the trainer", f"{log.cpu:.1f} s, {1e6 * log.cpu / bench.steps:.0f} µs a step"),
            ("CPU of W&B's processes before the end", f"{log.theirs:.1f} s"),
            ("wall time without pauses", f"{seconds:.0f} s"),
            ("largest resident memory of this process", f"{_largest() / 1e6:.0f} MB"),
        ]


def _largest() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(call: Call[BacklogBench]) -> None:
    """Measure and write the record."""
    path = Path(call.config.output) / "backlog.md"
    write_record(path, "What W&B's backlog costs at a restart", call.command, measure(call.config), NOTES)


NOTES = (
    f"A start takes {SHARE:.0%} of its thread's time for it during training, and all of it once the run ends, "
    "for 60 s at most (what is left then, the next start sends). CPU seconds hold on a loaded machine; wall time "
    "depends on what else runs."
)


PROGRAM = Program(
    "backlog",
    __doc__,
    run,
    schema=Schema("bench_backlog", BacklogBench, ()),
    command="python -m bench.train.backlog",
)

if __name__ == "__main__":
    PROGRAM.start()
