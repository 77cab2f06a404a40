"""The config of a launch: the training config, composed and checked as `mova train` does, and the launcher's own.

Everything that can be known before a process starts is checked here, so that a mistyped key costs a second and not the
wait in a queue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from core.compose import Schema, compose
from core.errors import RunError, UserError
from core.ranges import bounded
from core.run_dir import RunDir
from core.typed import override
from data.errors import DataError
from launch.cluster import ClusterConfig
from launch.local.local import LocalConfig
from launch.slurm.slurm import SlurmConfig
from launch.slurm.watch import WatchJobConfig
from train.checkpoint.resume import check_run
from train.config import TrainConfig, compose_train, default_values
from train.dataloader import close_data, open_data, open_dataset
from train.parallel.mesh import DTYPES, check_compute, check_degrees, check_linear

OWN = ("cluster", "launch", "job", "phases", "watch")
JOBS = ("train", "prepare")


@dataclass
class SubmitConfig:
    """How the launch is carried out.

    dry_run: print the script without submitting it
    test_only: ask SLURM when and where it would run
    plan: plan the run first (mova plan) and refuse one that does not fit the memory of its GPUs
    gpu: kind of GPU for the plan: a file of conf/gpu by its name, or the path of a sheet of your own
    units: with job=prepare: parts of the work, each a task of an array; 0: one for 32 files
    max_parallel_units: with job=prepare: maximum number of tasks that run at a time; 0: no limit
    """

    dry_run: bool = False
    test_only: bool = False
    plan: bool = False
    gpu: str | None = None
    units: int = bounded(0, "[0, inf)")
    max_parallel_units: int = bounded(0, "[0, inf)")

    def __post_init__(self) -> None:
        if self.dry_run and self.test_only:
            raise ValueError("launch.dry_run and launch.test_only are both true: choose one")
        if self.plan and self.gpu is None:
            raise ValueError("launch.plan=true needs the kind of GPU: launch.gpu=h100, or the path of a sheet")


@dataclass
class PhaseConfig:
    """One phase of a chain of runs.

    train: its arguments of `mova train`, as ["steps=1000"]
    cluster: its arguments of the launcher, as ["cluster.nodes=4"]
    """

    train: list[str] = field(default_factory=list)
    cluster: list[str] = field(default_factory=list)


@dataclass
class LaunchConfig:
    """The work to launch. Every other key belongs to `mova train`, or to `mova prepare` with job=prepare.

    job: "train", or "prepare" for `mova prepare`
    phases: {name: {train: [...], cluster: [...]}}: runs that follow each other, each from the last one's weights, named
        <run.id>-<name>; {}: one run
    """

    cluster: ClusterConfig = MISSING
    launch: SubmitConfig = field(default_factory=SubmitConfig)
    job: str = "train"
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    watch: WatchJobConfig = field(default_factory=WatchJobConfig)

    def __post_init__(self) -> None:
        if self.job not in JOBS:
            raise ValueError(f"job {self.job!r} is not one of {', '.join(JOBS)}")


SCHEMA = Schema("launch", LaunchConfig, variants={"cluster": {"local": LocalConfig, "slurm": SlurmConfig}})


@dataclass(frozen=True)
class Launch:
    """A checked launch of one run. `overrides`: of conf/train.yaml, as they were given; `resolved`: `train`, plain."""

    cluster: ClusterConfig
    submit: SubmitConfig
    train: TrainConfig
    resolved: dict[str, Any]
    overrides: list[str]
    watch: WatchJobConfig
    follows: RunDir | None = None  # the run whose weights it starts from
    planned: str | None = None  # plan.json of its folder

    @property
    def run_dir(self) -> RunDir:
        """The run's folder."""
        return RunDir.of(self.train.run.root, self.train.run.id)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the launcher's own, the others) of key=value arguments. RunError for any other argument."""
    for argument in arguments:
        if argument.startswith("-"):
            raise RunError(f"{argument} is not an option; everything is given as key=value (mova launch --help)")
    mine = [argument for argument in arguments if _key(argument).split(".")[0] in OWN]
    return mine, [argument for argument in arguments if argument not in mine]


def compose_own(mine: list[str]) -> LaunchConfig:
    """The launcher's own config. RunError for an unknown key or an impossible value."""
    own = compose(SCHEMA, mine).typed()
    assert isinstance(own, LaunchConfig)
    return own


def compose_phases(arguments: Sequence[str], own: LaunchConfig | None = None) -> list[Launch]:
    """The launches that these arguments describe: one, or one per phase, in order; `own`: the launcher's own config, if
    it is composed already. RunError as compose_launch."""
    mine, overrides = split(arguments)
    own = compose_own(mine) if own is None else own
    if not own.phases:
        return [_compose(own, overrides)]
    names = [given.partition("=")[2] for given in overrides if _key(given) == "run.id"]
    if not names:
        raise RunError("run.id is missing: give it on the command line, run.id=...")
    common = [given for given in overrides if _key(given) != "run.id"]
    launches: list[Launch] = []
    for name, phase in own.phases.items():
        before = launches[-1] if launches else None
        source = []
        if before is not None:  # what was given for the first phase's start is not for this one's
            common = [one for one in common if not _key(one).startswith("init.")]
            source = [override("init.source", str(before.run_dir.root))]
        given = [*mine, *phase.cluster, *common, *phase.train, f"run.id={names[-1]}-{name}", *source]
        try:
            launches.append(compose_launch(given, before))
        except UserError as error:
            raise RunError(f"phase {name}: {error}") from None
    return launches


def compose_launch(arguments: Sequence[str], follows: Launch | None = None) -> Launch:
    """The launch of one run that these key=value arguments describe; `follows`: one whose run will be there when it
    starts. RunError for an unknown key, an impossible value, a missing dataset or source of weights, processes that the
    layout does not fit, or a run that exists with another config.
    """
    mine, overrides = split(arguments)
    return _compose(compose_own(mine), overrides, follows)


def _compose(own: LaunchConfig, overrides: list[str], follows: Launch | None = None) -> Launch:
    coming = {} if follows is None else {str(follows.run_dir.root): follows.train.model}
    config, resolved = compose_train(overrides, SCHEMA.paths(""), coming)
    before = None if follows is None else follows.run_dir
    launch = Launch(own.cluster, own.launch, config, resolved, overrides, own.watch, before)
    launch.run_dir  # noqa: B018  refuses an id that is no plain name
    _, _, ring, ulysses = check_degrees(config.parallel, own.cluster.world)
    if config.parallel.compute_dtype != "auto":
        check_compute(DTYPES[config.parallel.compute_dtype], ring * ulysses, own.cluster.on_gpus)
    check_linear(config.parallel, own.cluster.on_gpus)
    _check_data(config)
    begun = launch.run_dir.committed_step() > 0  # such a run goes on from its own weights
    if config.init.given() and follows is None and not begun:
        from train.start.sources import open_sources  # torch's format of checkpoints: 0.2 s

        open_sources(config.init).check(config.model)
    check_run(launch.run_dir, resolved, default_values())
    return launch


def _check_data(config: TrainConfig) -> None:
    try:
        close_data(open_data(config.data, config.model.video.text_dim))
        if config.data.valid_path is not None:
            open_dataset(config.data.valid_path, config.model.video.text_dim, config.data.storage).close()
    except DataError as error:
        raise RunError(str(error)) from None


def _key(override: str) -> str:
    return override.lstrip("+~").split("=")[0]
