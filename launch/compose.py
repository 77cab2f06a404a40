"""The config of a launch: the training config, composed and checked as `python -m train` will, and the launcher's own.

Everything that can be known before a process starts is checked here, so that a mistyped key costs a second and not a
place in a queue.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import DataError
from launch.cluster import ClusterConfig
from launch.local import LocalConfig
from launch.slurm import SlurmConfig
from launch.watch import WatchJobConfig
from train.config import TrainConfig, register, to_dataclass
from train.errors import RunError
from train.feed import close_data, open_data, open_dataset
from train.mesh import check_degrees
from train.run_dir import RunDir

OWN = ("cluster", "launch", "job", "phases", "watch")
JOBS = ("train", "prepare")


@dataclass
class SubmitConfig:
    """`dry_run`: print the script and do nothing; `test_only`: ask SLURM when and where it would run.

    Of job=prepare: `units` (parts of the work, each a task of an array; 0: one for 32 files), `at_once` (most of them
    that run together; 0: all that find room).
    """

    dry_run: bool = False
    test_only: bool = False
    units: int = 0
    at_once: int = 0

    def __post_init__(self) -> None:
        if self.dry_run and self.test_only:
            raise ValueError("launch.dry_run and launch.test_only are both true: choose one")
        for name in ("units", "at_once"):
            if getattr(self, name) < 0:
                raise ValueError(f"launch.{name} is {getattr(self, name)}; give 0 or more")


@dataclass
class PhaseConfig:
    """One phase: `train`: overrides of conf/train.yaml; `cluster`: arguments of the launcher ("cluster.nodes=4")."""

    train: list[str] = field(default_factory=list)
    cluster: list[str] = field(default_factory=list)


@dataclass
class LaunchConfig:
    """conf/launch.yaml. `job`: "train", or "prepare" for data.prepare; `phases`: runs that follow each other, each from
    the last one's weights, `<run.id>-<name>` by name (empty: one run); `watch`: a job that makes clips beside each."""

    cluster: ClusterConfig = MISSING
    launch: SubmitConfig = field(default_factory=SubmitConfig)
    job: str = "train"
    phases: dict[str, PhaseConfig] = field(default_factory=dict)
    watch: WatchJobConfig = field(default_factory=WatchJobConfig)

    def __post_init__(self) -> None:
        if self.job not in JOBS:
            raise ValueError(f"job {self.job!r} is not one of {', '.join(JOBS)}")


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

    @property
    def run_dir(self) -> RunDir:
        """Where the run lies."""
        return RunDir.of(self.train.run.root, self.train.run.id)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the launcher's own, the others) of key=value arguments. RunError for what is no such argument."""
    for argument in arguments:
        if argument.startswith("-"):
            raise RunError(f"{argument} is no option; everything is given as key=value (python -m launch --help)")
    mine = [argument for argument in arguments if _key(argument).split(".")[0] in OWN]
    return mine, [argument for argument in arguments if argument not in mine]


def compose_own(mine: list[str]) -> LaunchConfig:
    """The launcher's own config. RunError for an unknown key or an impossible value."""
    store = ConfigStore.instance()
    store.store(name="launch_schema", node=LaunchConfig)
    store.store(group="cluster", name="local_schema", node=LocalConfig)
    store.store(group="cluster", name="slurm_schema", node=SlurmConfig)
    try:
        launch = OmegaConf.to_object(compose_plain("launch", mine))
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise RunError(str(error).splitlines()[0]) from None
    assert isinstance(launch, LaunchConfig)
    return launch


def compose_phases(arguments: Sequence[str]) -> list[Launch]:
    """The launches that these arguments describe: one, or one a phase, in order. RunError as compose_launch."""
    mine, overrides = split(arguments)
    own = compose_own(mine)
    if not own.phases:
        return [compose_launch(arguments)]
    names = [override.partition("=")[2] for override in overrides if _key(override) == "run.id"]
    if not names:
        raise RunError("run.id is missing: give it on the command line, run.id=...")
    common = [override for override in overrides if _key(override) != "run.id"]
    launches: list[Launch] = []
    for name, phase in own.phases.items():
        given = [*mine, *phase.cluster, *common, *phase.train, f"run.id={names[-1]}-{name}"]
        before = launches[-1].run_dir if launches else None
        if before is not None:
            given.append(f"run.start_from={quote(str(before.root))}")
        try:
            launches.append(replace(compose_launch(given), follows=before))
        except RunError as error:
            raise RunError(f"phase {name}: {error}") from None
    return launches


def quote(text: str) -> str:
    """A value in Hydra's grammar, whatever characters it has."""
    if re.fullmatch(r"[A-Za-z0-9_./:@-]*", text):
        return text
    return "'" + text.replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def compose_launch(arguments: Sequence[str]) -> Launch:
    """The launch of one run that these key=value arguments describe. RunError for an unknown key, an impossible value,
    a missing dataset, processes that the layout does not fit, or a run that exists with another config.
    """
    mine, overrides = split(arguments)
    own = compose_own(mine)
    register()
    config, resolved = to_dataclass(compose_plain("train", overrides))
    launch = Launch(own.cluster, own.launch, config, resolved, overrides, own.watch)
    launch.run_dir  # noqa: B018  refuses an id that is no plain name
    check_degrees(config.parallel, own.cluster.world)
    _check_data(config)
    launch.run_dir.check(resolved)
    return launch


def _check_data(config: TrainConfig) -> None:
    try:
        close_data(open_data(config.data, config.model.video.text_dim))
        if config.data.valid_path is not None:
            open_dataset(config.data.valid_path, config.model.video.text_dim, config.data.places).close()
    except DataError as error:
        raise RunError(str(error)) from None


def compose_plain(name: str, overrides: list[str]) -> DictConfig:
    """A config of conf/. RunError when an override does not fit, with the nearest keys that exist."""
    with initialize_config_module("conf", version_base=None):
        try:
            return compose(name, overrides)
        except (HydraException, OmegaConfBaseException) as error:
            said = str(error).partition("\nConfig search path:")[0]
            message = " ".join(line.strip() for line in said.splitlines() if line.strip())
            cause = error.__cause__
            wrong = getattr(cause, "full_key", None)
            if isinstance(cause, OmegaConfBaseException) and wrong:
                given = next((o for o in overrides if _key(o) == wrong), wrong)
                message = f"{given}: {str(cause).splitlines()[0]}"
                groups = [override for override in overrides if _key(override) == "cluster"]
                message += _nearest(wrong, compose(name, groups))
            raise RunError(message) from None


def _key(override: str) -> str:
    return override.lstrip("+~").split("=")[0]


def _nearest(wrong: str, config: DictConfig) -> str:
    """A question that names the keys most like the wrong one, or "" when none is near."""
    near = difflib.get_close_matches(wrong, _keys(config), n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(near)}?" if near and wrong not in near else ""


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in map(str, config):
        if OmegaConf.is_missing(config, key) or not isinstance(config[key], DictConfig):
            keys.append(prefix + key)
        else:
            keys += _keys(config[key], f"{prefix}{key}.")
    return keys
