"""Plan a run before it is paid for: memory of a GPU, seconds of a step, days, money, storage, and the best layout.

    mova plan experiment=mova_phase1_360p cluster.nodes=128 cluster.gpus=8 gpu=h100
    mova plan ... search=true out=plan.json page=plan.html     # the best layouts beside it; as JSON, and to look at
    mova plan model=small cluster=local cluster.processes=2 gpu=machine.yaml   # a sheet that `mova bench matmul` wrote

Keys that are not listed are those of `mova train`. Neither data nor weights nor GPUs are needed. Memory, FLOPs and
bytes are counted on the real program with fake tensors; seconds come from a model of the GPU's rates and are
predictions (docs/planning.md states their errors). The exit status is 0 also where the run does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from core.compose import Schema, compose
from core.durable import write_atomically
from core.errors import RunError, UserError
from core.program import Command
from core.ranges import bounded
from launch.cluster import ClusterConfig
from launch.local.local import LocalConfig
from launch.slurm.slurm import SlurmConfig
from tools.plan.page import render_page
from tools.plan.text import render_text
from train.config import compose_train
from train.plan.gpu import RATES
from train.plan.plan import KnownCounts, Plan, plan_run
from train.plan.question import Assumptions, Question, clip_of, find_sheet
from train.plan.search import cheapest_change, row, search


@dataclass
class PlanConfig:
    """What is planned.

    gpu: a file of conf/gpu by its name, or the path of a sheet of one's own
    rate: which of the sheet's rates count: "low", "middle" or "high"
    search: whether other layouts on the same GPUs are planned too
    processes: that count side by side in a search
    out: file for the plan as JSON (null: none)
    page: file for the plan as an HTML page (null: none)
    frames: of the largest clip (null: of the data where that can be read, else what the model was made for)
    height: of that clip, pixels
    width: of that clip, pixels
    hours: of video in the data, seen once (null: the config's steps count)
    """

    cluster: ClusterConfig = MISSING
    gpu: str = MISSING
    rate: str = "middle"
    search: bool = False
    processes: int = bounded(2, "[1, 64]")
    out: str | None = None
    page: str | None = None
    frames: int | None = bounded(None, "[1, 100000]")
    height: int | None = bounded(None, "[16, 100000]")
    width: int | None = bounded(None, "[16, 100000]")
    hours: float | None = bounded(None, "(0, 800000]")
    assume: Assumptions = field(default_factory=Assumptions)

    def __post_init__(self) -> None:
        if self.rate not in RATES:
            raise ValueError(f"rate {self.rate!r} is not one of {', '.join(RATES)}")
        if self.frames is not None and (self.frames - 1) % 4:
            raise ValueError(f"frames={self.frames} is not 1 + 4k: the video VAE takes the first frame, then fours")
        for name in ("height", "width"):
            if (value := getattr(self, name)) is not None and value % 16:
                raise ValueError(f"{name}={value} is no multiple of 16 (8 of the VAE, 2 of a token)")


SCHEMA = Schema(
    "plan", PlanConfig, (("cluster", "slurm"),), variants={"cluster": {"local": LocalConfig, "slurm": SlurmConfig}}
)
OWN = tuple(one.name for one in dataclasses.fields(PlanConfig))
PLACEHOLDERS = {"run.id": "plan", "data.path": "not-needed-by-a-plan"}


def main(arguments: list[str]) -> None:
    """Plan, print, and write what was asked for."""
    for argument in arguments:
        if argument.startswith("-") or "=" not in argument:
            raise UserError(f"{argument}: this is no key=value (mova plan --help lists the keys)")
    mine = [given for given in arguments if _key(given).split(".")[0] in OWN]
    others = [given for given in arguments if given not in mine]
    own: PlanConfig = compose(SCHEMA, mine).typed()
    files = {name: Path(given) for name in ("out", "page") if (given := getattr(own, name)) is not None}
    for name, path in files.items():
        if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
            raise UserError(f"{name}={path}: no file can be written there; name one in a folder that exists")
    question, why = ask(own, others)
    plan, plans = _plans(question, own)
    others_first = plans if own.search else []
    print(render_text(plan, why, others_first, cheapest_change(plans)))
    for name, path in files.items():
        if name == "out":
            content = json.dumps(as_json(plan, others_first), indent=1) + "\n"
        else:
            content = render_page(plan, why, others_first, cheapest_change(plans))
        try:
            write_atomically(path, content)
        except OSError as error:
            raise UserError(f"{name}={path}: it can't be written ({error.strerror or error})") from None
        print(f"written to {path}")


def _plans(question: Question, own: PlanConfig) -> tuple[Plan, list[Plan]]:
    """The plan, and those of other layouts where they were asked for or this one does not fit. In a search a layout
    that these GPUs do not allow gives way to the best one; without one it is a RunError."""
    counted = KnownCounts()
    try:
        plan = plan_run(question, counted)
        if plan.fits and not own.search:
            return plan, []
    except RunError as error:
        if not own.search:
            raise RunError(f"{error} (search=true finds layouts for {question.world} GPUs)") from None
        print(f"the config's layout is impossible here: {error}; the best one is planned instead", flush=True)
        plan = None
    plans = search(question, counted, own.processes, lambda line: print(line, flush=True))
    if plan is None and not plans:
        raise RunError(f"no layout of {question.world} GPUs shares {question.config.data.batch_size} clips a step")
    return plan or plans[0], plans


def ask(own: PlanConfig, overrides: Sequence[str]) -> tuple[Question, str]:
    """The question, and where the size of its clips comes from. UserError as compose_train."""
    given = {_key(one) for one in overrides}
    data = {"data", "data.path", "data.datasets"} & given
    holders = [f"{key}={value}" for key, value in PLACEHOLDERS.items() if key not in given and not (
        key == "data.path" and data)]  # fmt: skip
    config, _ = compose_train([*holders, *overrides], SCHEMA.paths(""))
    clip, why = clip_of(config, overrides)
    sizes = {name: getattr(own, name) for name in ("frames", "height", "width") if getattr(own, name) is not None}
    if sizes:
        clip, why = dataclasses.replace(clip, **sizes), "as given" if len(sizes) == 3 else f"{why}, and as given"
    cluster = own.cluster
    if isinstance(cluster, SlurmConfig):
        per_node = cluster.per_node
        if not cluster.gpus and not cluster.processes:
            raise UserError("cluster.gpus is 0: say how many GPUs a node has, cluster.gpus=8")
    else:
        per_node = cluster.world
    gpu = find_sheet(own.gpu)
    return Question(config, cluster.world, per_node, gpu, clip, own.assume, own.rate, own.hours), why


def as_json(plan: Plan, plans: Sequence[Plan]) -> dict[str, Any]:
    """The file that `out` names."""
    return plan.as_dict() | {"search": [row(one, plans[0]) for one in plans]}


def _key(override: str) -> str:
    return override.lstrip("+~").split("=")[0]


PROGRAM = Command("plan", __doc__, main, schema=SCHEMA, interrupted="interrupted: nothing was written")

if __name__ == "__main__":
    PROGRAM.start()
