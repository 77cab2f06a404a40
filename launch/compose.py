"""The config of a launch: the training config, composed and checked as `python -m train` will, and the cluster's.

Everything that can be known before a process starts is checked here, so that a mistyped key costs a second and not a
place in a queue.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.errors import DataError
from launch.local import LocalConfig
from train.config import TrainConfig, register, to_dataclass
from train.errors import RunError
from train.feed import close_data, open_data, open_dataset
from train.mesh import check_degrees
from train.run_dir import RunDir


@dataclass
class LaunchConfig:
    """conf/launch.yaml: where the run's processes live."""

    cluster: LocalConfig = MISSING


@dataclass(frozen=True)
class Launch:
    """A checked launch. `overrides`: those of conf/train.yaml, as they were given."""

    cluster: LocalConfig
    train: TrainConfig
    overrides: list[str]

    @property
    def run_dir(self) -> RunDir:
        """Where the run lies."""
        return RunDir.of(self.train.run.root, self.train.run.id)


def compose_launch(arguments: Sequence[str]) -> Launch:
    """The launch that these key=value arguments describe: `cluster` and `cluster.*` are the launch's, all others the
    training run's. RunError for an unknown key, an impossible value, a missing dataset, or processes that the layout
    does not fit."""
    for argument in arguments:
        if argument.startswith("-"):
            raise RunError(f"{argument} is no option; everything is given as key=value (python -m launch --help)")
    mine = [argument for argument in arguments if argument.lstrip("+~").split("=")[0].split(".")[0] == "cluster"]
    overrides = [argument for argument in arguments if argument not in mine]
    ConfigStore.instance().store(name="launch_schema", node=LaunchConfig)
    register()
    cluster = _to_object(_compose("launch", mine)).cluster
    config, _ = to_dataclass(_compose("train", overrides))
    launch = Launch(cluster, config, overrides)
    _check(launch)
    return launch


def _check(launch: Launch) -> None:
    launch.run_dir  # noqa: B018  refuses an id that is no plain name
    check_degrees(launch.train.parallel, launch.cluster.world)
    data = launch.train.data
    try:
        close_data(open_data(data, launch.train.model.video.text_dim))
        if data.valid_path is not None:
            open_dataset(data.valid_path, launch.train.model.video.text_dim, data.places).close()
    except DataError as error:
        raise RunError(str(error)) from None


def _compose(name: str, overrides: list[str]) -> DictConfig:
    """RunError when an override does not fit, with the nearest keys that exist."""
    with initialize_config_module("conf", version_base=None):
        try:
            return compose(name, overrides)
        except (HydraException, OmegaConfBaseException) as error:
            said = str(error).partition("\nConfig search path:")[0]
            message = " ".join(line.strip() for line in said.splitlines() if line.strip())
            cause = error.__cause__
            wrong = getattr(cause, "full_key", None)
            if isinstance(cause, OmegaConfBaseException) and wrong:
                given = next((o for o in overrides if o.lstrip("+~").split("=")[0] == wrong), wrong)
                message = f"{given}: {str(cause).splitlines()[0]}"
                message += _nearest(wrong, compose(name))
            raise RunError(message) from None


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


def _to_object(config: DictConfig) -> LaunchConfig:
    try:
        launch = OmegaConf.to_object(config)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise RunError(str(error).splitlines()[0]) from None
    assert isinstance(launch, LaunchConfig)
    return launch
