"""The log of a run: metrics.jsonl (authoritative), Weights & Biases as its copy, and a progress line."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from core.durable import write_atomically
from core.errors import describe
from core.jsonl import JsonLines
from core.ranges import bounded
from core.run_dir import RunDir
from train.monitor.wandb_log import WandbLog

WANDB_MODES = ("offline", "online", "disabled")
ALERTS = ("not finite", "went back", "checkpoint failed", "stopped")  # events that W&B sends messages about


@dataclass
class MonitorConfig:
    """Metrics, progress and W&B of a run.

    wandb: offline, online or disabled; the run id is the name of the run directory
    project: W&B project
    progress_seconds: seconds between progress lines if there is no terminal
    every: steps between measurements of norms by module group, of the Bridge's contribution, and of memory (0: never)
    peak_tflops: peak of one device, dense bfloat16, for MFU and HFU if train/monitor/throughput.py does not know the
        device
    count_collectives: steps between counts of what this rank sends, by mesh axis and collective (0: never); such a step
        is slightly slower
    """

    wandb: str = "offline"
    project: str = "mova"
    progress_seconds: float = bounded(5.0, "[0, inf)")
    every: int = bounded(10, "[0, inf)")
    peak_tflops: float | None = bounded(None, "(0, inf)")
    count_collectives: int = bounded(0, "[0, inf)")

    def __post_init__(self) -> None:
        if self.wandb not in WANDB_MODES:
            raise ValueError(f"monitor.wandb {self.wandb!r} is not one of {', '.join(WANDB_MODES)}")


class Monitor:
    """Metrics of one run, on its first rank; on the other ranks every method does nothing."""

    def __init__(
        self,
        run: RunDir,
        config: MonitorConfig,
        resolved: dict[str, Any],
        steps: int,
        active: bool,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """`facts`: what W&B shows beside the config."""
        self.active = active
        if not active:
            return
        self._steps = steps
        self._name = run.root.name
        self._seconds = config.progress_seconds
        self._last_line = 0.0
        self._metrics = JsonLines(run.metrics)
        self._events = JsonLines(run.root / "events.jsonl")
        self._bad_steps = JsonLines(run.root / "bad_steps.jsonl")
        self._wandb: WandbLog | None = None
        if config.wandb != "disabled":
            self._wandb = WandbLog(run, config.wandb, config.project, resolved, facts)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task("train", total=steps, text="")
            self._bar.start()
        self._begin: tuple[float, int] | None = None

    def step(self, step: int, metrics: dict[str, float | str]) -> None:
        """Metrics of step `step` (from 0): to the file, to W&B, to the display."""
        if not self.active:
            return
        self._metrics.append({"step": step, **metrics})
        if self._wandb is not None:
            self._wandb.begin()
        if self._wandb is not None and self._wandb.trouble is not None:
            text, self._wandb = self._wandb.trouble, None
            self.event("W&B off", step, f"WARNING: {text}")
        text = (
            f"loss {metrics['train/loss']:.4f} ({_by_modality(metrics)}, {metrics['train/expert']})  "
            f"{metrics['perf/tokens_per_s']:,.0f} tokens/s"
        )
        now = time.monotonic()
        if self._begin is None:
            self._begin = (now, step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, text=text)
        elif now - self._last_line >= self._seconds or step + 1 == self._steps:
            self._last_line = now
            begin, first = self._begin
            left = (now - begin) / (step - first) * (self._steps - step - 1) if step > first else math.nan
            self.say(f"step {step + 1}/{self._steps}  {text}  {_clock(left)} left")

    def validation(self, step: int, losses: dict[str, float]) -> None:
        """Validation losses of the model after `step` updates."""
        if not self.active:
            return
        self._metrics.append({"step": step, **{f"valid/{k}": v for k, v in losses.items()}})
        names = {"loss": "validation loss", "video": "video", "audio": "audio", "ema/loss": "of averaged weights"}
        shown = ", ".join(f"{text} {losses[name]:.4f}" for name, text in names.items() if name in losses)
        self.say(f"after {step} steps: {shown}")

    def event(self, kind: str, step: int, text: str, **details: Any) -> None:
        """Log an event, and record it in events.jsonl with its time."""
        if not self.active:
            return
        self._events.append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": kind, "step": step, **details})
        if self._wandb is not None and kind in ALERTS:
            self._wandb.alert(f"{self._name}: {kind}", text)
        self.say(text)

    def bad_step(self, step: int, details: dict[str, Any]) -> None:
        """Record a bad step with its samples in bad_steps.jsonl. A repeated step is recorded again."""
        if self.active:
            self._bad_steps.append({"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details})

    def sync(self) -> None:
        """Write all metrics through to the disk. OSError if that fails."""
        if self.active:
            self._metrics.sync()

    def say(self, line: str) -> None:
        """Print a line, beside the progress display."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Flush everything; afterwards W&B's offline folder is complete, with the error that ended the run."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._wandb is not None:
            if error is not None:
                self._wandb.alert(f"{self._name}: failed", describe(error), "ERROR")
            folder = self._wandb.close()
            if folder is not None:
                self.say(f"W&B (offline): wandb sync {folder}")
        for lines in (self._metrics, self._events, self._bad_steps):
            lines.close()


def cut_metrics(run: RunDir, step: int) -> None:
    """Remove the lines of metrics.jsonl for steps that a run resuming at `step` will repeat, and a truncated line.

    Validation entries carry the number of updates done, so those at `step` itself stay, but for the first one: a run
    that starts anew validates anew.
    """
    if not run.metrics.exists():
        return
    kept = []
    for line, record in _records(run):
        if record["step"] < step or (_is_validation(record) and record["step"] == step > 0):
            kept.append(line)
    write_atomically(run.metrics, "".join(line + "\n" for line in kept))


def was_validated(run: RunDir, step: int) -> bool:
    """Whether metrics.jsonl has the validation of the weights after `step` updates."""
    return run.metrics.exists() and any(
        record["step"] == step and _is_validation(record) for _, record in _records(run)
    )


def _records(run: RunDir) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each complete line of metrics.jsonl, and its content."""
    for line in run.metrics.read_text().splitlines():
        try:
            yield line, json.loads(line)
        except ValueError:
            continue


def _is_validation(record: dict[str, Any]) -> bool:
    return any(key.startswith("valid/") for key in record)


def _by_modality(metrics: dict[str, Any]) -> str:
    losses = {modality: metrics[f"train/loss_{modality}"] for modality in ("video", "audio")}
    return ", ".join(f"{modality} {loss:.4f}" for modality, loss in losses.items() if not math.isnan(loss)) or "nothing"


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
