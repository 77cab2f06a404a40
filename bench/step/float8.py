"""The loss of a small model with float8's roundings beside that in bfloat16: the same seed, clips, noise and steps.

    python -m bench.step.float8                     # writes bench/results/float8.md and .png, about 25 CPU minutes

Runs of the real trainer on the synchronization experiment (conf/experiment/sync.yaml), one after the other, on one
core: in float32, in bfloat16, and in bfloat16 with the products of the video side rounded as float8 rounds them
(parallel.linear=float8_emulated). All draw the same numbers, so that losses are compared step by step. Finished runs
are not repeated. Nothing is learned here about speed: emulation is slower than what it emulates.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from core.child import command, environment
from core.compose import Schema
from core.errors import UserError
from core.program import Call, Program
from core.ranges import bounded, seed_field
from tools.bench.record import write_record

RUNS = {  # settings of parallel, colour
    "bfloat16": (("compute_dtype=bfloat16",), "#2e7da6"),
    "float8": (("compute_dtype=bfloat16", "linear=float8_emulated"), "#d1495b"),
    "float32": (("compute_dtype=float32",), "#999999"),
}
PLAIN = "bfloat16"  # what the others are compared with
WINDOW = 20  # steps whose mean loss is compared
LOSSES = ("train/loss_video", "train/loss_audio")


@dataclass
class Float8Bench:
    """What is trained.

    steps: of each run
    clips: of the training set
    seed: of all runs
    root: folder of clips, shards and runs
    output: folder of the record
    """

    steps: int = bounded(300, "[40, inf)")
    clips: int = bounded(600, "[24, inf)")
    seed: int = seed_field()
    root: str = "float8"
    output: str = "bench/results"


def train_all(bench: Float8Bench) -> dict[str, list[dict[str, Any]]]:
    """Records of every step, by run. UserError when a program fails."""
    place, found = Path(bench.root), {}
    for split, clips, seed in (("train", bench.clips, 0), ("valid", 32, 1)):
        if not (place / split).exists():
            what = (f"clips={clips}", f"seed={seed}", "kinds=[bounce]", "sample_rate=16000")
            _mova("synthesize", f"output={place / 'clips' / split}", *what)
            _mova("prepare", f"source={place / 'clips' / split}", f"output={place / split}")
    every = max(1, bench.steps // 3)
    for name, (settings, _) in RUNS.items():
        metrics = place / "runs" / name / "metrics.jsonl"
        if not metrics.exists() or sum("train/loss" in one for one in read(metrics)) < bench.steps:
            _mova(
                "train", "experiment=sync", f"data.path={place / 'train'}", f"data.valid_path={place / 'valid'}",
                f"run.root={place / 'runs'}", f"run.id={name}", f"seed={bench.seed}", f"steps={bench.steps}",
                "optim.decay_steps=100", f"validation.every={every}", "monitor.wandb=disabled", "checkpoint.every=0",
                *(f"parallel.{setting}" for setting in settings),
            )  # fmt: skip
        found[name] = read(metrics)
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a run's steps and validations."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def windows(records: list[dict[str, Any]], key: str) -> list[float]:
    """Means of a metric over WINDOW steps each, over the steps that have it."""
    values = [record[key] for record in records if record.get(key) is not None]
    return [mean(values[begin : begin + WINDOW]) for begin in range(0, len(values) - WINDOW + 1, WINDOW)]


def apart(records: dict[str, list[dict[str, Any]]], name: str, key: str) -> list[float]:
    """By how much each window of a run lies above the plain run's, relative to it."""
    return [one / other - 1 for one, other in zip(*(windows(records[run], key) for run in (name, PLAIN)), strict=True)]


def rows(records: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    """The table."""
    found = []
    for name, steps in records.items():
        ends = [f"{key.rpartition('_')[2]} {windows(steps, key)[-1]:.4f}" for key in LOSSES]
        found.append((f"{name}: training loss, mean of the last {WINDOW} steps", ", ".join(ends)))
    for name, steps in records.items():
        curve = [f"{one['step']}: {one['valid/loss']:.4f}" for one in steps if one.get("valid/loss") is not None]
        found.append((f"{name}: validation loss after steps", ", ".join(curve)))
    for name in records:
        if name != PLAIN:
            for key in LOSSES:
                gaps = apart(records, name, key)
                signs = (
                    f"mean {mean(gaps):+.2%}, least {min(gaps):+.2%}, largest {max(gaps):+.2%}, last {gaps[-1]:+.2%}"
                )
                found.append((f"{name} over {PLAIN}: {key}, means of {WINDOW} steps", signs))
    return found


def draw(path: Path, records: dict[str, list[dict[str, Any]]]) -> None:
    """Above the losses, below how far apart they are."""
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(LOSSES), sharex=True, height_ratios=(2, 1))
    for column, key in enumerate(LOSSES):
        above, below = panels[0][column], panels[1][column]
        for name, steps in records.items():
            colour, curve = RUNS[name][1], windows(steps, key)
            middles = [WINDOW * (place + 0.5) for place in range(len(curve))]
            style = "--" if name == "float8" else "-"
            above.plot(middles, curve, color=colour, linestyle=style, linewidth=1.6, label=name)
            if name != PLAIN:
                below.plot(middles, [100 * gap for gap in apart(records, name, key)], color=colour, linewidth=1.6)
        above.set_title(f"training loss, {key.rpartition('_')[2]}", loc="left", fontsize=10)
        above.set_yscale("log")
        below.axhline(0, color=RUNS[PLAIN][1], linewidth=1)
        below.set_ylabel(f"% above {PLAIN}", fontsize=9)
        below.set_xlabel("steps")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _mova(program: str, *arguments: str) -> None:
    print("$ " + shlex.join(["mova", program, *arguments]), flush=True)
    threads = environment(OMP_NUM_THREADS="1")
    if subprocess.run(command("tools.mova", more=[program, *arguments]), env=threads).returncode:
        raise UserError(f"mova {program} failed; its message is above")


NOTES = (
    "Not measured on a GPU: float8 is emulated (`parallel.linear=float8_emulated`), with the roundings of torchao's "
    'recipe "rowwise" in all three products of every linear that is applied to video tokens, and float32 sums. '
    "Weights, moments and reductions are float32 in all runs. The runs have the same seed, clips, noise and steps, so "
    "windows of the same steps are compared. The float32 run shows how far rounding alone moves a loss from one dtype "
    "to another. The network is 128 wide; sums over 5,120 products are not shown here.\n\n"
    "![Training losses of the runs lie on each other; below, their differences in percent](float8.png)"
)


def _main(call: Call[Float8Bench]) -> None:
    records = train_all(call.config)
    path = Path(call.config.output) / "float8.md"
    draw(path.with_suffix(".png"), records)
    write_record(path, "Loss with float8's roundings, beside bfloat16", call.command, rows(records), NOTES)


PROGRAM = Program(
    "float8-bench",
    __doc__,
    _main,
    schema=Schema("float8_bench", Float8Bench, ()),
    interrupted="interrupted; the same command continues from there",
    command="python -m bench.step.float8",
)

if __name__ == "__main__":
    PROGRAM.start()
