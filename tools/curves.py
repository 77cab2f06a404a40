"""Draws the losses of a run, from its metrics.jsonl.

    mova curves run=runs/try1 output=losses.png

One panel for video and one for audio: the training loss of each expert (faint: every step, line: smoothed), and the
validation loss at fixed noise. A dashed line marks where the run was stopped and resumed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from omegaconf import MISSING

from core.compose import Schema
from core.errors import UserError
from core.jsonl import read_lines
from core.program import Call, Program

INK, QUIET, PAPER = "#23262b", "#8a9099", "#fcfcfa"
COLOURS = {"high": "#d1495b", "low": "#2e7da6"}  # of the experts
NAMES = {"high": "high-noise expert", "low": "low-noise expert"}
SMOOTHING = 0.06  # of the number of points: the width of the window of the smoothed line


class CurvesError(UserError):
    """A run whose losses cannot be drawn; the message tells why and what to do."""


@dataclass
class CurvesConfig:
    """The run, and the file of the picture.

    run: a run directory; `run=` may be omitted for the first argument
    output: the picture, .png, .svg or .pdf
    """

    run: str = MISSING
    output: str = MISSING


@dataclass
class Curves:
    """The losses of a run. Each curve is a list of (step, loss); modalities are "video" and "audio"."""

    train: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)  # modality -> expert -> curve
    valid: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # modality, or "loss" -> curve
    resumed: list[int] = field(default_factory=list)  # steps from which the run went on after a stop

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        curves = [*self.valid.values(), *(curve for experts in self.train.values() for curve in experts.values())]
        return max((curve[-1][0] for curve in curves if curve), default=0)


def read_curves(run: Path) -> Curves:
    """The losses of the run directory `run`. CurvesError when it has none.

    Non-finite losses (null in the file) and a truncated line are skipped.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise CurvesError(f"{path} does not exist; give the directory of a run that has trained, run=runs/ID")
    curves = Curves()
    for record in read_lines(path):
        for key, value in record.items():
            kind, _, name = key.partition("/")
            if value is not None and kind == "valid":
                curves.valid.setdefault(name, []).append((record["step"], value))
            elif value is not None and key in ("train/loss_video", "train/loss_audio"):
                experts = curves.train.setdefault(key.removeprefix("train/loss_"), {})
                experts.setdefault(record["train/expert"], []).append((record["step"], value))
    if not curves.train:
        raise CurvesError(f"{path} has no training step yet")
    curves.resumed = _stops(run, curves.last_step)
    return curves


def draw(curves: Curves, title: str) -> Figure:
    """The picture."""
    figure = Figure(figsize=(11, 4.8), dpi=150, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves.train), squeeze=False)[0]
    for axes, (modality, experts) in zip(panels, curves.train.items()):
        _prepare(axes, modality)
        for expert, curve in sorted(experts.items()):
            _draw_training(axes, expert, curve)
        _draw_validation(axes, curves.valid.get(modality, []))
        for number, step in enumerate(curves.resumed):
            axes.axvline(step, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            if number == 0:
                axes.annotate(
                    "resumed", (step, 1), (4, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
                    color=QUIET, fontsize=8, va="top",
                )  # fmt: skip
        axes.set_xlim(0, max(curves.last_step, 1) * 1.01)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, labelcolor=INK, fontsize=9
    )
    figure.suptitle(title, x=0.012, ha="left", color=INK, fontsize=13, fontweight="bold")
    return figure


def save(figure: Figure, output: Path) -> None:
    """Write the picture atomically. CurvesError for a file format that matplotlib does not know."""
    known = figure.canvas.get_supported_filetypes()
    if output.suffix.lstrip(".") not in known:
        raise CurvesError(f"output={output}: its name must end in .png, .svg or .pdf")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.stem}.partial{output.suffix}")
    figure.savefig(partial, facecolor=figure.get_facecolor())
    os.replace(partial, output)


def _prepare(axes: Axes, modality: str) -> None:
    axes.set_facecolor(PAPER)
    axes.set_title(f"{modality.capitalize()} loss", loc="left", color=INK, fontsize=11)
    axes.set_xlabel("step", color=QUIET, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e5e2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9ccc8")


def _draw_training(axes: Axes, expert: str, curve: list[tuple[int, float]]) -> None:
    steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
    colour = COLOURS.get(expert, QUIET)
    axes.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.22, zorder=2)
    axes.plot(steps, _smooth(losses), color=colour, linewidth=2, zorder=3, solid_capstyle="round",
              label=f"training, {NAMES.get(expert, expert)}")  # fmt: skip


def _draw_validation(axes: Axes, curve: list[tuple[int, float]]) -> None:
    if not curve:
        return
    steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
    axes.plot(steps, losses, color=INK, linewidth=1.6, marker="o", markersize=5.5, markeredgecolor=PAPER,
              markeredgewidth=1.2, zorder=4, clip_on=False, label="validation at fixed noise")  # fmt: skip
    if len(curve) > 1 and losses[0] > 0:
        change = f"{100 * (losses[-1] / losses[0] - 1):+.0f} %".replace("-", "\N{MINUS SIGN}")
        label = axes.annotate(change, (steps[-1], losses[-1]), (4, 9), textcoords="offset points", color=INK,
                              fontsize=10, fontweight="bold", ha="right", zorder=5)  # fmt: skip
        label.set_path_effects([withStroke(linewidth=3, foreground=PAPER)])


def _smooth(values: Sequence[float]) -> list[float]:
    """Moving mean; at both ends the window is cut off at the first and last value, so that no end is a single value."""
    half = max(1, round(SMOOTHING * len(values)))
    smoothed = []
    for i in range(len(values)):
        window = values[max(0, i - half) : i + half + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def _stops(run: Path, last_step: int) -> list[int]:
    """Steps of checkpoints off the run's interval: only a run that was asked to stop writes one there."""
    try:
        every = int(yaml.safe_load((run / "config.yaml").read_text())["checkpoint"]["every"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return []
    steps = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-????????")]
    return sorted(step for step in steps if 0 < step <= last_step - 1 and (every < 1 or step % every))


def _run(call: Call[CurvesConfig]) -> None:
    run, output = Path(call.config.run), Path(call.config.output)
    save(draw(read_curves(run), run.name), output)
    print(output)


PROGRAM = Program("curves", __doc__, _run, schema=Schema("curves", CurvesConfig, ()), first="run")

if __name__ == "__main__":
    PROGRAM.start()
