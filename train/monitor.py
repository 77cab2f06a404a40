"""What a user sees of a run: metrics.jsonl (the truth), Weights & Biases after it, and a line of progress."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from train.lines import Lines
from train.run_dir import RunDir, write_atomically
from train.wandb_log import WandbLog

WANDB_MODES = ("offline", "online", "disabled")
ALERTS = ("not finite", "went back", "checkpoint failed", "stopped")  # events that W&B sends messages about


@dataclass
class MonitorConfig:
    """`wandb`: offline (default), online or disabled; its run id is the run directory's name. Lines of progress come
    every `progress_seconds` where there is no terminal. Every `every` steps (0: never) the metrics hold norms by module
    group, what the Bridge adds, and memory. `count_collectives`: every so many steps they hold what this rank sent, by
    mesh axis and collective (0: never); such a step is a little slower. `peak_tflops`: of one device, dense bfloat16,
    for MFU and HFU where train/pace.py does not know the device."""

    wandb: str = "offline"
    project: str = "mova"
    progress_seconds: float = 5.0
    every: int = 10
    peak_tflops: float | None = None
    count_collectives: int = 0

    def __post_init__(self) -> None:
        if self.wandb not in WANDB_MODES:
            raise ValueError(f"monitor.wandb {self.wandb!r} is not one of {', '.join(WANDB_MODES)}")
        for name in ("count_collectives", "every"):
            if getattr(self, name) < 0:
                raise ValueError(f"monitor.{name} is {getattr(self, name)}; give steps, or 0 for never")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"monitor.peak_tflops is {self.peak_tflops}; give TFLOP/s above 0, or null")


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
        self._metrics = Lines(run.metrics)
        self._events = Lines(run.root / "events.jsonl")
        self._bad_steps = Lines(run.root / "bad_steps.jsonl")
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
        text = (
            f"loss {metrics['train/loss']:.4f} (video {metrics['train/loss_video']:.4f}, "
            f"audio {metrics['train/loss_audio']:.4f}, {metrics['train/expert']})  "
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
        """Something that happened beside the steps: said, and kept in events.jsonl with its time."""
        if not self.active:
            return
        self._events.append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": kind, "step": step, **details})
        if self._wandb is not None and kind in ALERTS:
            self._wandb.alert(f"{self._name}: {kind}", text)
        self.say(text)

    def bad_step(self, step: int, details: dict[str, Any]) -> None:
        """A step that went wrong, with its samples, to bad_steps.jsonl. One that is done again is written again."""
        if self.active:
            self._bad_steps.append({"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **details})

    def sync(self) -> None:
        """The metrics are on the disk when it returns. OSError when they can't be."""
        if self.active:
            self._metrics.sync()

    def say(self, line: str) -> None:
        """A line for the user, beside the progress display."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Flush everything; W&B's offline folder is complete afterwards, and tells of the error that ended the run."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._wandb is not None:
            if error is not None:
                self._wandb.alert(f"{self._name}: failed", str(error) or type(error).__name__, "ERROR")
            folder = self._wandb.close()
            if folder is not None:
                self.say(f"W&B (offline): wandb sync {folder}")
        for lines in (self._metrics, self._events, self._bad_steps):
            lines.close()


def cut_metrics(run: RunDir, step: int) -> None:
    """Drop what metrics.jsonl says of steps that a run resuming at `step` will do again, and a line cut off by death.

    Validation entries carry the number of updates done, so those at `step` itself stay, but for the first one: a run
    that starts anew validates anew.
    """
    if not run.metrics.exists():
        return
    kept = []
    for line in run.metrics.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        is_validation = any(key.startswith("valid/") for key in record)
        if record["step"] < step or (is_validation and record["step"] == step > 0):
            kept.append(line)
    write_atomically(run.metrics, "".join(line + "\n" for line in kept))


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
