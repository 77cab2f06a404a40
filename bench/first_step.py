"""CPU of a start: from `mova launch` on this machine to the first step, new and resumed; and of what only prints.

    python -m bench.first_step                       # writes bench/results/first_step.md; ten minutes
    python -m bench.first_step before=../other       # and the same of another checkout, in turn with this one

Seconds of the processor, user and system, of all processes of a launch: the launcher, its workers and what they start.
They say the same on a machine that does other work, where seconds of a clock say nothing.
"""

from __future__ import annotations

import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from core.child import ROOT
from core.compose import Schema
from core.errors import RunError
from core.program import Call, Program
from data.clip import Bucket
from tools.bench.read import make_shards
from tools.bench.record import commit, write_record

BUCKET = Bucket(frames=3, height=8, width=8, audio_steps=25, fps=24.0, has_video=True, has_audio=True)
TEXT = (32, 256)  # of conf/model/tiny.yaml
POLL = 0.02  # seconds between two looks at the processes
LONGEST = 300.0  # seconds for a start
PRINTING = (("--help",), ("train", "--help"), ("launch", "--help"), ("status", "{run}"))
Found = dict[str, list[float]]


@dataclass
class FirstStepBench:
    """What is started, and how often.

    rounds: of all starts
    processes: of a launch
    before: folder of another checkout, which is measured in turn with this one
    folder: for temporary files
    output: folder of the record
    """

    rounds: int = 3
    processes: int = 2
    before: str | None = None
    folder: str | None = None
    output: str = "bench/results"


def _environment(code: Path) -> dict[str, str]:
    paths = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}


def _command(code: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-P", "-m", "tools.mova", *arguments], _environment(code)


def seconds_of(code: Path, *arguments: str) -> float:
    """Of `mova` with these arguments and the code in that folder, from its start to its end."""
    command, environment = _command(code, *arguments)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RunError(f"mova {' '.join(arguments)} of {code} failed: {done.stderr.strip()}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start(code: Path, arguments: Sequence[str], metrics: Path, step: int) -> dict[str, float]:
    """{who: seconds} of one launch until `step` steps stand in its metrics. RunError if it fails before."""
    command, environment = _command(code, "launch", *arguments)
    launcher = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + LONGEST
    try:
        while not metrics.exists() or metrics.read_text().count('"train/loss"') < step:
            if launcher.poll() is not None or time.monotonic() > end:
                launcher.kill()
                raise RunError(f"mova launch of {code} came to no step: {launcher.communicate()[1][-2000:]}")
            time.sleep(POLL)
        return _seconds(launcher)
    finally:
        with suppress(psutil.NoSuchProcess):
            launcher.send_signal(signal.SIGTERM)
        launcher.communicate()


def _seconds(launcher: psutil.Popen) -> dict[str, float]:
    """Of the launcher, and of its workers with what these have started."""
    found = {"launcher": 0.0, "workers": 0.0}
    children = launcher.children()
    for process in (launcher, *launcher.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            worker = any(process == child or child in process.parents() for child in children)
            found["workers" if worker else "launcher"] += sum(process.cpu_times()[:4])
    return found | {"all": sum(found.values())}


def one_round(code: Path, bench: FirstStepBench, folder: Path) -> dict[str, float]:
    """{what: seconds} of one start of each kind, in a run of its own."""
    found: dict[str, float] = {}
    root = tempfile.mkdtemp(dir=folder)
    given = [
        f"cluster.processes={bench.processes}", "model=tiny", "run.id=run", f"run.root={root}", "data.batch_size=2",
        f"data.path={folder / 'data'}", "run.new_schedule=true",
    ]  # fmt: skip
    run = Path(root) / "run"
    for name, steps in (("new", 1), ("resumed", 2)):
        parts = start(code, [*given, f"steps={steps}"], run / "metrics.jsonl", steps)
        found |= {f"{name}, {who}": seconds for who, seconds in parts.items()}
    for arguments in PRINTING:
        filled = [argument.format(run=run) for argument in arguments]
        found[f"`mova {' '.join(arguments).format(run='RUN')}`"] = seconds_of(code, *filled)
    return found


def measure(bench: FirstStepBench) -> tuple[list[Path], list[Found]]:
    """The checkouts, and what was found in each."""
    checkouts = [ROOT] if bench.before is None else [Path(bench.before).resolve(), ROOT]
    found: list[Found] = [{} for _ in checkouts]
    with tempfile.TemporaryDirectory(dir=bench.folder) as temporary:
        folder = Path(temporary)
        make_shards(folder / "data", BUCKET, 8, TEXT)
        for code in checkouts:
            for program in ("train", "launch", "status"):
                seconds_of(code, program, "--help")  # writes its bytecode
        for number in range(bench.rounds):
            for code, gathered in zip(checkouts, found, strict=True):
                for what, seconds in one_round(code, bench, folder).items():
                    gathered.setdefault(what, []).append(seconds)
                print(
                    f"round {number + 1}, {code}: " + str({k: round(v[-1], 2) for k, v in gathered.items()}), flush=True
                )
    return checkouts, found


def rows_of(found: list[Found]) -> list[tuple[str, str]]:
    """The table: medians, with the least and the most; before -> after where there are two checkouts."""
    rows = []
    for what in found[0]:
        cells = [
            f"{statistics.median(one[what]):.2f} s ({min(one[what]):.2f} to {max(one[what]):.2f})" for one in found
        ]
        share = f", {statistics.median(found[1][what]) / statistics.median(found[0][what]):.0%}" if found[1:] else ""
        rows.append((what, " -> ".join(cells) + share))
    return rows


def run(call: Call[FirstStepBench]) -> None:
    """Measure and write the record."""
    bench = call.config
    load = os.getloadavg()[0]
    checkouts, found = measure(bench)
    notes = f"{NOTES} Load of the machine at the start, one minute: {load:.1f}."
    if bench.before is not None:
        asked = ["git", "-C", str(checkouts[0]), "rev-parse", "--short", "HEAD"]
        other = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        notes += f" Before: commit {other or 'unknown'}; after: {commit()}."
    title = f"From `mova launch` to the first step of `tiny` on {bench.processes} processes: seconds of the processor"
    write_record(Path(bench.output) / "first_step.md", title, call.command, rows_of(found), notes)


NOTES = (
    "Medians (least to most). All processes of the launch, user and system, until the first step stands in "
    "metrics.jsonl; one thread each. `new`: into an empty folder, with the copy of the code; `resumed`: the same run "
    "from its checkpoint. W&B offline, as by default. Python's bytecode of the checkout and the files of the "
    "libraries are in the file cache."
)


PROGRAM = Program(
    "first_step", __doc__, run, schema=Schema("bench_first_step", FirstStepBench, ()),
    command="python -m bench.first_step",
)  # fmt: skip

if __name__ == "__main__":
    PROGRAM.start()
