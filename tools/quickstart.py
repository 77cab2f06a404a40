"""Runs every step once at a small size: clips, shards, a run (stopped and resumed), curves, a clip, a report page.

    make quickstart                  # or: mova quickstart
    make quickstart CLIPS=folder     # with your own video files

All output is in ./quickstart: the clips, and for each source of clips a folder with its shards, runs and picture.
Finished steps are not repeated. Each step is a separate command, printed so that it can be typed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.markup import escape

from core.child import arguments, command, environment
from core.compose import Schema
from core.errors import UserError
from core.jsonl import read_lines
from core.locks import lock_now
from core.program import Call, Program
from core.ranges import bounded

console = Console(highlight=False, soft_wrap=True)
AGAIN = "the same command continues from there"
CLEAN = "`make clean-quickstart` removes everything for a new start"
LAST_ONLY = 1_000_000  # steps between sampled checkpoints: only the last one is
_locks: list[IO[Any]] = []  # every command holds them as well: a launcher that outlives this process keeps the folder


class QuickstartError(UserError):
    """A step that failed, in one line."""


@dataclass
class QuickstartConfig:
    """Sizes of the quickstart.

    clips: a folder of video files; "": synthetic clips (`make quickstart CLIPS=folder` sets it)
    root: folder of all output
    synthetic: number of synthetic clips
    holdout: share of the files that is held out
    processes: number of training processes
    stop_at: step after which the run is stopped once
    least_fall: percent by which the validation loss must fall, checked where the clips are synthetic (of one's own
        clips
        it is not known beforehand)
    """

    clips: str = '${oc.env:CLIPS,""}'
    root: str = "quickstart"
    synthetic: int = bounded(128, "[1, inf)")
    holdout: float = bounded(0.2, "(0, 1)")
    processes: int = bounded(2, "[1, inf)")
    stop_at: int = bounded(120, "[1, inf)")
    least_fall: float = bounded(30.0, "(-inf, 100)")


def quickstart(config: QuickstartConfig) -> None:
    """All steps. QuickstartError when one fails."""
    begin = time.monotonic()
    root = Path(config.root)
    own = bool(config.clips)
    if own and not Path(config.clips).is_dir():
        raise QuickstartError(f"CLIPS={config.clips} is not a folder; give a folder of video files")
    _lock(root)
    clips = Path(config.clips) if own else root / "clips"
    work = root / folder_name(clips) if own else root / "synthetic"

    if own:
        _title(1, f"clips: your own, {escape(str(clips))}")
    else:
        _title(1, f"clips: {config.synthetic} of balls and pendulums, each event with its sound")
        _run("synthesize", {"output": clips, "clips": config.synthetic})
        _made("clips", clips, "mp4 with sound; beside each its events (.json) and its caption (.txt)")

    _title(2, "shards: pictures and sound encoded, a fifth of the files held out")
    shards = work / "shards"
    _run("prepare", {"source": clips, "output": shards, "holdout": config.holdout})
    train, valid = shards / "train", shards / "valid"
    for part in (train, valid):
        if not (part / "index").is_dir():
            raise QuickstartError(
                f"{part} is empty: {clips} holds a single usable file, and one must be held out; add another "
                "and `make clean-quickstart`"
            )
    _made("shards", shards, "train/ and valid/: WebDataset tars and their index")

    # The run belongs to these shards: after a change of the clips it is another run, never the old one on new data.
    run_id = "tiny-" + fingerprint(train)[:8]
    run = work / "runs" / run_id
    values = {
        "cluster.processes": config.processes, "experiment": "quickstart", "run.id": run_id,
        "run.root": work / "runs", "data.path": train, "data.valid_path": valid,
    }  # fmt: skip
    _title(3, f"training: the tiny model on {config.processes} processes; stopped once, after step {config.stop_at}")
    if last_step(run) + 1 < config.stop_at:
        _train(values, run, stop_after=config.stop_at)
        if last_step(run) + 1 < config.stop_at:
            raise QuickstartError(f"the run was stopped from outside at step {status(run).get('step')}; {AGAIN}")
        _made("checkpoint", newest_checkpoint(run), f"the run was stopped and saved at step {status(run).get('step')}")
    _title(4, "training: the same command resumes the run")
    if status(run).get("state") == "finished":
        console.print(f"run {run} has already finished: nothing to do")
    else:
        _train(values, run)
        if status(run).get("state") != "finished":
            raise QuickstartError(f"the run was stopped from outside at step {status(run).get('step')}; {AGAIN}")
    _made("run", run, "config.yaml, metrics.jsonl, checkpoints/, wandb/ (offline), status.json")

    _title(5, "curves")
    picture = work / "losses.png"
    _run("curves", {"run": run, "output": picture})
    _made("picture", picture, "training and validation losses")

    _title(6, "a generated clip, from the caption and the first frame of a held-out clip")
    _run("watch", {"run": run, "every": LAST_ONLY, "clips": 1, "sampler.steps": 25})
    clip = newest_clip(run)
    _made("clip", clip, "picture and sound; so small a model shows movement at best, this early in training")
    _run("report", {"run": run})
    page = run / "report.html"
    _made("report", page, "one page about the run that needs no network: curves, speed, the clip with its sound")

    before, after = validation_losses(run)
    fall = 100 * (1 - after / before)
    _title(7, "did it learn?")
    console.print(f"validation loss at fixed noise: {before:.3f} -> {after:.3f}, [bold]{fall:.0f} % lower[/]")
    if not own and fall < config.least_fall:
        raise QuickstartError(
            f"the validation loss fell by {fall:.1f} %, less than the {config.least_fall:g} % that this run always "
            f"reaches; something in this checkout is broken (losses: {run / 'metrics.jsonl'})"
        )
    console.print(f"done in {_clock(time.monotonic() - begin)}. Look at [bold]{escape(str(page))}[/] in a browser,")
    console.print(f"and play [bold]{escape(str(clip))}[/] (losses alone: {escape(str(picture))})")
    console.print(f"`make quickstart` again makes only what is missing; `make clean-quickstart` deletes {root}")


def _lock(root: Path) -> None:
    """Lock `root`: two processes writing one run directory would corrupt it."""
    root.mkdir(parents=True, exist_ok=True)
    file = open(root / ".lock", "a")  # noqa: SIM115  held until this process ends
    if not lock_now(file):
        raise QuickstartError(f"another quickstart is running in {root}; wait for it, or stop it")
    _locks.append(file)


def folder_name(clips: Path) -> str:
    """A folder name for the user's clips: readable, and unique for each of their folders."""
    path = clips.resolve()
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", path.name).strip("-") or "clips"
    return f"own-{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def fingerprint(dataset: Path) -> str:
    """The fingerprint that the dataset's index states."""
    content = json.loads((dataset / "index" / "dataset.json").read_text())
    return str(content["fingerprint"])


def status(run: Path) -> dict[str, object]:
    """The content of status.json; {} if there is none."""
    try:
        content = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def last_step(run: Path) -> int:
    """The last training step in metrics.jsonl, -1 where there is none."""
    return max(
        (int(record["step"]) for record in read_lines(run / "metrics.jsonl") if "train/loss" in record), default=-1
    )


def validation_losses(run: Path) -> tuple[float, float]:
    """The first and the last validation loss of a run."""
    losses = [
        record["valid/loss"] for record in read_lines(run / "metrics.jsonl") if record.get("valid/loss") is not None
    ]
    if len(losses) < 2:
        raise QuickstartError(f"{run / 'metrics.jsonl'} holds no validation loss at the start and at the end")
    return losses[0], losses[-1]


def newest_checkpoint(run: Path) -> Path:
    """The newest checkpoint's folder."""
    found = sorted((run / "checkpoints").glob("step-*"))
    if not found:
        raise QuickstartError(
            f"{run / 'checkpoints'} holds no checkpoint, although the run was stopped and should have saved one"
        )
    return found[-1]


def newest_clip(run: Path) -> Path:
    """The generated clip of the last checkpoint."""
    found = sorted((run / "samples").glob("step-*/*.mp4"))
    if not found:
        raise QuickstartError(f"{run / 'samples'} holds no clip, although one should have been generated ({CLEAN})")
    return found[-1]


def _train(values: Mapping[str, Any], run: Path, stop_after: int | None = None) -> None:
    """Run the launcher to its end; after `stop_after` steps it is asked to stop, as a scheduler would."""
    process = _start("launch", values)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if stop_after is not None and last_step(run) + 1 >= stop_after:
                console.print(f"[bold]SIGTERM[/] to the launcher, process {process.pid}: save and stop")
                process.send_signal(signal.SIGTERM)
                break
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)  # where there is no terminal that sent it one too
        process.wait()
        raise
    if code:
        raise QuickstartError(
            f"training failed: mova launch ended with exit status {code}; its message is above ({CLEAN})"
        )


def _run(program: str, values: Mapping[str, Any]) -> None:
    process = _start(program, values)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # where there is no terminal that sent it one too
        process.wait()
        raise
    if code:
        raise QuickstartError(f"mova {program} ended with exit status {code}; its message is above ({CLEAN})")


def _start(program: str, values: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    typed = [program, *arguments(values)]
    console.print("$ " + shlex.join(["mova", *typed]), style="dim", markup=False)
    files = [file.fileno() for file in _locks]
    return subprocess.Popen(command("tools.mova", more=typed), env=environment(), pass_fds=files)


def _title(number: int, text: str) -> None:
    console.print(f"\n[bold]{number}. {text}[/]")


def _made(what: str, path: Path, text: str) -> None:
    console.print(f"[green]made[/] {what}: [bold]{escape(str(path))}[/]  ({escape(text)})")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _begin() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the command under way ends first


def _main(call: Call[QuickstartConfig]) -> None:
    quickstart(call.config)


PROGRAM = Program(
    "quickstart",
    __doc__,
    _main,
    schema=Schema("quickstart", QuickstartConfig, ()),
    before=_begin,
    interrupted=f"interrupted; {AGAIN}",
)

if __name__ == "__main__":
    PROGRAM.start()
