"""Proof that synchronization is learned: a small model from scratch on synthetic clips, scored by what it generates.

    make learn-sync                                 # or: python -m bench.learn_sync            set=easy
    python -m bench.learn_sync set=hard

Clips and shards; a run of the real trainer for each seed, and one without the Bridge; of each run the checkpoint that
is best on a validation set; its scores on a test set, with the Bridge and with it cut (tools/sync_score.py); a record
of each run in bench/results/learn-sync/<set>/, and a table and a picture of all records of the same recipe. Finished
parts are not repeated: the same command continues where it was interrupted, and seeds may be measured one by one, also
on different machines.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from bench.sync_clips import INK, SOFT, draw_clips, read_clips, write_film
from core.child import command, environment
from core.compose import Schema
from core.durable import write_atomically
from core.errors import UserError
from core.program import Call, Program
from core.ranges import LARGEST, bounded
from tools.bench.record import hardware, write_record
from tools.sync_score import TASKS
from train.checkpoint.checkpoint import committed, step_of

console = Console(highlight=False, soft_wrap=True)
SETS = {  # kind of clip, steps, thresholds of F1 by task
    "easy": ("bounce", 1500, (0.95, 0.95, 0.85)),
    "hard": ("juggle", 6000, (0.85, 0.80, 0.60)),
}
CONTROL = "no-bridge"  # the run that is trained without it
CORES = 2  # that the times of a run are given for
SCORED = 6  # checkpoints of a run, at equal distances
SHOWN = 2  # clips of a task in the picture and the film
BATCH = 12  # of conf/experiment/sync.yaml
SPLITS = {"train": 0, "valid": 1, "test": 2}  # seeds of the clips
COLOURS = {"video to audio": "#2e7da6", "audio to video": "#d1495b", "joint": "#7a4fa3"}


class LearnSyncError(UserError):
    """A step that failed, in one line."""


@dataclass
class LearnSyncConfig:
    """The set of clips, and the runs.

    set: easy or hard
    root: folder of all output
    clips: of the training set
    valid: clips of the validation set
    test: clips of the test set
    processes: number of training processes
    ulysses: how many of them share each sequence
    seeds: seeds, with a run for each
    control: also a run without the Bridge, or only that one where seeds is empty
    overrides: more arguments of `mova train`
    bench: folder of the records
    """

    set: str = "easy"
    root: str = "learn-sync"
    clips: int = bounded(6000, "[1, inf)")
    valid: int = bounded(32, "[1, inf)")
    test: int = bounded(128, "[1, inf)")
    processes: int = bounded(2, "[1, inf)")
    ulysses: int = bounded(1, "[1, inf)")
    seeds: list[int] = bounded([0, 1, 2], f"[0, {LARGEST}]")
    control: bool = True
    overrides: list[str] = field(default_factory=list)
    bench: str = "bench/results"

    def __post_init__(self) -> None:
        if self.set not in SETS:
            raise ValueError(f"set={self.set}: choose from {', '.join(SETS)}")
        if not self.seeds and not self.control:
            raise ValueError("seeds=[] control=false: nothing is left to train; give a seed, or leave control on")
        if self.processes % self.ulysses:
            raise ValueError(f"ulysses={self.ulysses}: it must divide processes={self.processes}")
        if BATCH % (self.processes // self.ulysses):
            raise ValueError(f"processes={self.processes}: the batch of {BATCH} must divide into as many parts")


def learn_sync(config: LearnSyncConfig) -> None:
    """All steps. LearnSyncError when one fails."""
    place = Path(config.root) / config.set
    kind, steps, _ = SETS[config.set]
    for split, seed in SPLITS.items():
        count = {"train": config.clips, "valid": config.valid, "test": config.test}[split]
        clips = place / "clips" / split
        what = (f"clips={count}", f"seed={seed}", f"kinds=[{kind}]", "sample_rate=16000")
        _run("synthesize", f"output={clips}", *what)
        _run("prepare", f"source={clips}", f"output={place / split}")
    runs = {f"seed-{seed}": (seed, 0.0) for seed in config.seeds}
    if config.control:
        runs[CONTROL] = (config.seeds[0] if config.seeds else 0, 1.0)
    for name, (seed, dropout) in runs.items():
        train(config, place, name, seed, steps, dropout)
        keep(config, place, name, evaluate(config, place, name))
        report(config, place)


def steps_between(steps: int) -> int:
    """Of two checkpoints that are scored, in a run of so many steps."""
    return steps // SCORED


def train(config: LearnSyncConfig, place: Path, name: str, seed: int, steps: int, bridge_dropout: float) -> None:
    """The run `name`, to its end; nothing where it has finished."""
    status = place / "runs" / name / "status.json"
    if status.exists() and json.loads(status.read_text())["state"] == "finished":
        return
    replicas, every = config.processes // config.ulysses, steps_between(steps)
    _run(
        "launch", "experiment=sync", f"cluster.processes={config.processes}", f"parallel.dp_replicate={replicas}",
        f"parallel.ulysses={config.ulysses}", f"data.micro_batch={BATCH // replicas}",
        f"run.root={place / 'runs'}", f"run.id={name}",
        f"checkpoint.every={every}", f"checkpoint.permanent_every={every}",
        f"data.path={place / 'train'}", f"data.valid_path={place / 'valid'}", f"seed={seed}", f"steps={steps}",
        f"objective.bridge_dropout={bridge_dropout}", *config.overrides,
    )  # fmt: skip


def evaluate(config: LearnSyncConfig, place: Path, name: str) -> dict[str, Any]:
    """Scores of every checkpoint on the validation set, and of the best one on the test set; the latter also with the
    Bridge cut, where there is one.
    """
    run = place / "runs" / name
    every = steps_between(SETS[config.set][1])  # those of the clock, which a resume needs, are not scored
    checkpoints = [path for path in committed(run / "checkpoints") if step_of(path) and step_of(path) % every == 0]
    with ThreadPoolExecutor(CORES) as pool:  # the work is in processes of their own
        scores = pool.map(lambda path: score(config, place, run, path, "valid", True), checkpoints)
        curve = {step_of(path): found for path, found in zip(checkpoints, scores, strict=True)}
    best = max(curve, key=lambda step: (min(curve[step][task]["f1"] for task in TASKS), step))
    path = next(path for path in checkpoints if step_of(path) == best)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(record.get("perf/step_time", 0.0) for record in records)
    ways = {"test": True} if name == CONTROL else {"test": True, "cut": False}
    with ThreadPoolExecutor(CORES) as pool:
        tests = pool.map(lambda bridge: score(config, place, run, path, "test", bridge), ways.values())
        found = dict(zip(ways, tests, strict=True))
    return {"curve": curve, "best": best, "minutes": seconds / 60, **found}


def score(config: LearnSyncConfig, place: Path, run: Path, checkpoint: Path, split: str, bridge: bool) -> Any:
    """What tools.sync_score measures, kept in a file beside the run."""
    out = run / "scores" / f"{checkpoint.name}-{split}{'' if bridge else '-cut'}.json"
    if not out.exists():
        samples = [f"samples={samples_of(place, run.name, bridge)}"] if split == "test" else []
        _run(
            "sync-score", f"checkpoint={checkpoint}", f"dataset={place / split}", f"out={out}",
            f"bridge={bridge}", f"voices={config.set == 'hard'}", *samples,
        )  # fmt: skip
    return json.loads(out.read_text())


def samples_of(place: Path, name: str, bridge: bool) -> Path:
    """Folder with some of the test clips that the run `name` has made, TASK-NUMBER.mp4."""
    return place / "samples" / (name if bridge else f"{name}-cut")


def records_of(config: LearnSyncConfig) -> Path:
    """Folder with a record of each run, NAME.json."""
    return Path(config.bench) / "learn-sync" / config.set


def recipe(config: LearnSyncConfig) -> str:
    """Changes whenever what is trained does: the experiment, its model, steps, clips, keys beside the layout."""
    conf = Path(__file__).parent.parent / "conf"
    texts = [(conf / name / "sync.yaml").read_text() for name in ("experiment", "model")]
    keys = [key for key in config.overrides if not key.startswith("parallel.")]
    return hashlib.sha256(repr((texts, SETS[config.set][:2], config.clips, keys)).encode()).hexdigest()[:12]


def keep(config: LearnSyncConfig, place: Path, name: str, result: dict[str, Any]) -> None:
    """What was measured of the run `name`, with its circumstances. A record of the same result stays as it is."""
    trained = json.loads((place / "runs" / name / "code.json").read_text())["commit"]  # the checkout may have moved on
    path = records_of(config) / f"{name}.json"
    result = json.loads(json.dumps({**result, "recipe": recipe(config)}))  # keys as they are read back
    if path.exists() and {**json.loads(path.read_text()), "measured": None} == {**result, "measured": None}:
        return
    how = [f"processes={config.processes}", f"ulysses={config.ulysses}", *config.overrides]
    result["measured"] = (
        f"{', '.join(how)}; {hardware()}; commit {trained[:7] or 'unknown'}; {time.strftime('%Y-%m-%d')}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")


def report(config: LearnSyncConfig, place: Path) -> None:
    """bench/results/learn-sync-<set>.md and .png, of all records of the set that were made as now."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(records_of(config).glob("*.json"))}
    results = {name: record for name, record in records.items() if record["recipe"] == recipe(config)}
    if left_out := sorted(records.keys() - results.keys()):
        console.print(f"ignored, made by another recipe: {', '.join(left_out)} in {records_of(config)}", markup=False)
    results |= {CONTROL: results.pop(CONTROL)} if CONTROL in results else {}  # the control stands last
    seeds = [result for name, result in results.items() if name != CONTROL]
    rows = []
    for task, bar in zip(TASKS, SETS[config.set][2], strict=True):
        values = [result["test"][task]["f1"] for result in seeds]
        if not values:
            break  # nothing but the control yet
        chance = mean(result["test"][task]["chance"] for result in seeds)
        scores = f"F1 {mean(values):.3f} ({min(values):.3f} to {max(values):.3f}; asked {bar})"
        rows.append((task, f"{scores}; chance {chance:.2f}"))
        for name, result in results.items():
            rows.append((f"- {name}", _line(result["test"][task])))
            if "cut" in result:
                rows.append((f"- {name}, Bridge cut at sampling", _line(result["cut"][task])))
    for name, result in results.items():
        spent = (
            f"{result['minutes']:.1f} minutes; best on validation after {result['best']} steps; {result['measured']}"
        )
        rows.append((f"{name}: training", spent))
    path = Path(config.bench) / f"learn-sync-{config.set}.md"
    command = shlex.join(["python", "-m", "bench.learn_sync", *sys.argv[1:]])
    write_record(path, f"Synchronization learned from scratch: the {config.set} set", command, rows, NOTES)
    draw(path.with_suffix(".png"), results)
    console.print(f"written: {path}, {path.with_suffix('.png')}; clips to watch and hear: {place / 'samples'}")
    for name in results:
        whole, cut = (samples_of(place, name, bridge) for bridge in (True, False))
        if whole.is_dir() and cut.is_dir():  # made here, not on another machine; of the control nothing is cut
            show(path.with_name(f"{path.stem}-clips.png"), whole, cut, config.set == "hard")
            break


def show(path: Path, whole: Path, cut: Path, voices: bool) -> None:
    """Clips of each task, and joint ones of which the Bridge was cut: a picture, and beside it a film."""
    columns = [read_clips(whole, [f"{task.replace(' ', '-')}-{number}" for number in range(SHOWN)]) for task in TASKS]
    apart = read_clips(cut, [f"joint-{number}" for number in range(SHOWN)])
    columns.append([replace(clip, title=f"{clip.title}, Bridge cut") for clip in apart])
    draw_clips(path, columns, voices)
    write_film(path.with_suffix(".mp4"), [clip for column in columns for clip in column])
    console.print(f"written: {path}, {path.with_suffix('.mp4')}")


def draw(path: Path, results: dict[str, dict[str, Any]]) -> None:
    """F1 on the validation set over training, a line a run; dotted: chance."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(TASKS), sharey=True), TASKS, strict=True):
        for name, result in results.items():
            steps = sorted(result["curve"], key=int)
            control = name == CONTROL
            colour = SOFT if control else COLOURS[task]
            f1 = [result["curve"][step][task]["f1"] for step in steps]
            axes.plot(
                list(map(int, steps)),
                f1,
                color=colour,
                marker="o",
                markersize=3,
                label="no Bridge" if control else name,
            )
            chance = [result["curve"][step][task]["chance"] for step in steps]
            axes.plot(list(map(int, steps)), chance, color=colour, linestyle=":", linewidth=1)
        axes.set_title(task, loc="left", color=INK, fontsize=10)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("steps", color=SOFT)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("F1 within 0.1 s", color=SOFT)
    figure.axes[0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _line(found: dict[str, Any]) -> str:
    return (
        f"F1 {found['f1']:.3f}, chance {found['chance']:.3f}; {found['matched']} matched of {found['seen']} seen and "
        f"{found['heard']} heard"
    )


def _run(program: str, *arguments: str) -> None:
    console.print("$ " + shlex.join(["mova", program, *arguments]), style="dim", markup=False)
    begin = time.monotonic()
    # The launcher shares the cores among its processes; of the others, what needs more cores starts more processes.
    threads = {} if program == "launch" else {"OMP_NUM_THREADS": "1"}
    if subprocess.run(command("tools.mova", more=[program, *arguments]), env=environment(**threads)).returncode:
        raise LearnSyncError(f"mova {program} failed; its message is above")
    console.print(f"({time.monotonic() - begin:.0f} s)", style="dim")


def _main(call: Call[LearnSyncConfig]) -> None:
    learn_sync(call.config)


NOTES = (
    "F1 of impacts in the decoded pixels and in the decoded sound, matched one to one within 0.1 s; on the hard set "
    "only with the right pitch. Chance: pictures paired with the sounds of other generated clips. Thresholds of the "
    "measure were fixed on codec round trips before the first model was scored (data/sync/impacts.py); the checkpoint "
    "is the best on a validation set of its own, by the lowest of the three scores. 25 Euler steps, EMA weights, no "
    "guidance. Audio to video is made without the first frame, joint clips with it. No-bridge: trained without it."
)

PROGRAM = Program(
    "learn-sync",
    __doc__,
    _main,
    schema=Schema("learn_sync", LearnSyncConfig, ()),
    interrupted="interrupted; the same command continues from there",
    command="python -m bench.learn_sync",
)

if __name__ == "__main__":
    PROGRAM.start()
