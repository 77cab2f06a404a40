"""Everything once, small: clips -> shards -> a training run that is stopped and resumed -> its curves -> did it learn?

    make quickstart                  # or: python -m tools.quickstart
    make quickstart CLIPS=folder     # with your own video files

All lies under ./quickstart: the clips, and for each source of clips a folder with its shards, its runs and its picture.
What is finished is not made again. Each step is a command of its own, printed as it can be typed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape

console = Console(highlight=False, soft_wrap=True)
AGAIN = "the same command goes on from there"
CLEAN = "`make clean-quickstart` clears the way for a new start"
_lock_fds: list[int] = []  # held by every command as well: a launcher that outlives this process keeps the folder


class QuickstartError(Exception):
    """A step that failed, in one line."""


@dataclass
class QuickstartConfig:
    """conf/quickstart.yaml. `clips`: a folder of video files, "" for synthetic clips (`synthetic` of them).

    `processes` train; the run is stopped once, after `stop_at` steps. `least_fall`: percent by which the validation
    loss must fall, checked where the clips are synthetic (of one's own clips nobody knows beforehand).
    """

    clips: str = ""
    root: str = "quickstart"
    synthetic: int = 128
    holdout: float = 0.2
    processes: int = 2
    stop_at: int = 120
    least_fall: float = 30.0


def quickstart(config: QuickstartConfig) -> None:
    """All steps. QuickstartError when one fails."""
    begin = time.monotonic()
    root = Path(config.root)
    own = bool(config.clips)
    if own and not Path(config.clips).is_dir():
        raise QuickstartError(f"CLIPS={config.clips} is not a folder; give one that holds video files")
    _lock(root)
    clips = Path(config.clips) if own else root / "clips"
    place = root / place_name(clips) if own else root / "synthetic"

    if own:
        _title(1, f"clips: your own, {escape(str(clips))}")
    else:
        _title(1, f"clips: {config.synthetic} of balls and pendulums, each event with its sound")
        _run("data.synthesize", f"output={_quote(clips)}", f"clips={config.synthetic}")
        _made("clips", clips, "mp4 with sound; beside each its events (.json) and its caption (.txt)")

    _title(2, "shards: pictures and sound encoded, a fifth of the files held out")
    shards = place / "shards"
    _run("data.prepare", f"source={_quote(clips)}", f"output={_quote(shards)}", f"holdout={config.holdout}")
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
    run = place / "runs" / run_id
    arguments = [
        f"cluster.processes={config.processes}", "experiment=quickstart", f"run.id={run_id}",
        f"run.root={_quote(place / 'runs')}", f"data.path={_quote(train)}", f"data.valid_path={_quote(valid)}",
    ]  # fmt: skip
    _title(3, f"training: the tiny model on {config.processes} processes; stopped once, after step {config.stop_at}")
    if last_step(run) + 1 < config.stop_at:
        _train(arguments, run, stop_after=config.stop_at)
        if last_step(run) + 1 < config.stop_at:
            raise QuickstartError(f"the run was stopped from outside at step {status(run).get('step')}; {AGAIN}")
        _made("checkpoint", newest_checkpoint(run), f"the run was stopped and saved at step {status(run).get('step')}")
    _title(4, "training: the same command resumes the run")
    if status(run).get("state") == "finished":
        console.print(f"run {run} is finished already: nothing to do")
    else:
        _train(arguments, run)
        if status(run).get("state") != "finished":
            raise QuickstartError(f"the run was stopped from outside at step {status(run).get('step')}; {AGAIN}")
    _made("run", run, "config.yaml, metrics.jsonl, checkpoints/, wandb/ (offline), status.json")

    _title(5, "curves")
    picture = place / "losses.png"
    _run("tools.curves", f"run={_quote(run)}", f"output={_quote(picture)}")
    _made("picture", picture, "training and validation losses")

    before, after = validation_losses(run)
    fall = 100 * (1 - after / before)
    _title(6, "did it learn?")
    console.print(f"validation loss at fixed noise: {before:.3f} -> {after:.3f}, [bold]{fall:.0f} % lower[/]")
    if not own and fall < config.least_fall:
        raise QuickstartError(
            f"the validation loss fell by {fall:.1f} %, less than the {config.least_fall:g} % that this run always "
            f"reaches; something in this checkout is broken (losses: {run / 'metrics.jsonl'})"
        )
    console.print(f"done in {_clock(time.monotonic() - begin)}. Look at {picture}")
    console.print(f"`make quickstart` again makes only what is missing; `make clean-quickstart` deletes {root}")


def _lock(root: Path) -> None:
    """Keep `root` to ourselves: two runs writing one run directory would spoil it."""
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise QuickstartError(f"another quickstart is at work in {root}; wait for it, or stop it") from None
    _lock_fds.append(descriptor)


def place_name(clips: Path) -> str:
    """The folder name for one's own clips: readable, and another one for every other folder."""
    path = clips.resolve()
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", path.name).strip("-") or "clips"
    return f"own-{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def fingerprint(dataset: Path) -> str:
    """The fingerprint that the dataset's index states."""
    content = json.loads((dataset / "index" / "dataset.json").read_text())
    return str(content["fingerprint"])


def status(run: Path) -> dict[str, object]:
    """What status.json says; {} where there is none."""
    try:
        content = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def last_step(run: Path) -> int:
    """The last training step in metrics.jsonl, -1 where there is none."""
    return max((int(record["step"]) for record in _metrics(run) if "train/loss" in record), default=-1)


def validation_losses(run: Path) -> tuple[float, float]:
    """The first and the last validation loss of a run."""
    losses = [record["valid/loss"] for record in _metrics(run) if record.get("valid/loss") is not None]
    if len(losses) < 2:
        raise QuickstartError(f"{run / 'metrics.jsonl'} holds no validation loss at the start and at the end")
    return losses[0], losses[-1]


def newest_checkpoint(run: Path) -> Path:
    """The newest checkpoint's folder."""
    found = sorted((run / "checkpoints").glob("step-*"))
    if not found:
        raise QuickstartError(f"{run / 'checkpoints'} holds no checkpoint, though the run was stopped and should save")
    return found[-1]


def _metrics(run: Path) -> list[dict[str, float]]:
    records = []
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # the line that is being written
            continue
    return records


def _train(arguments: Sequence[str], run: Path, stop_after: int | None = None) -> None:
    """Run the launcher to its end; after `stop_after` steps it is asked to stop, as a scheduler would."""
    process = _start("launch", *arguments)
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
            f"training failed: python -m launch ended with exit status {code}; its message is above ({CLEAN})"
        )


def _run(module: str, *arguments: str) -> None:
    process = _start(module, *arguments)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)  # where there is no terminal that sent it one too
        process.wait()
        raise
    if code:
        raise QuickstartError(f"python -m {module} ended with exit status {code}; its message is above ({CLEAN})")


def _start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    console.print("$ " + shlex.join(["python", "-m", module, *arguments]), style="dim", markup=False)
    return subprocess.Popen([sys.executable, "-m", module, *arguments], pass_fds=_lock_fds)


def _quote(path: Path) -> str:
    """A path as a value of a Hydra override; plain where that is safe."""
    text = str(path)
    if re.fullmatch(r"[A-Za-z0-9_./-]+", text):
        return text
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    return f"'{escaped}'"


def _title(number: int, text: str) -> None:
    console.print(f"\n[bold]{number}. {text}[/]")


def _made(what: str, path: Path, text: str) -> None:
    console.print(f"[green]made[/] {what}: [bold]{escape(str(path))}[/]  ({escape(text)})")


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def main() -> None:
    """The program: reads the command line, prints errors without a traceback."""
    ConfigStore.instance().store(name="quickstart_schema", node=QuickstartConfig)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the command under way ends first
    _main()


@hydra.main(version_base=None, config_path="pkg://conf", config_name="quickstart")
def _main(config: DictConfig) -> None:
    try:
        typed = OmegaConf.to_object(config)
        assert isinstance(typed, QuickstartConfig)
        quickstart(typed)
    except (QuickstartError, OmegaConfBaseException, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"interrupted; {AGAIN}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
