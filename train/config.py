"""The whole configuration of a training run; every part is a dataclass beside the code that reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from model.joint import JointConfig
from train.bad_steps import GuardConfig
from train.checkpoint import CheckpointConfig
from train.ema import EmaConfig
from train.errors import RunError
from train.feed import DataConfig
from train.inspect import InspectConfig
from train.mesh import ParallelConfig
from train.monitor import MonitorConfig
from train.objective import ObjectiveConfig
from train.optim import OptimConfig
from train.validate import ValidationConfig


@dataclass
class RunConfig:
    """`id` names the run (folder and W&B id; the same id again resumes); `root` holds the runs. `start_from`: folder of
    another run, or of one checkpoint, whose weights a run takes that has no checkpoint of its own yet."""

    id: str = MISSING
    root: str = "runs"
    start_from: str | None = None


@dataclass
class TrainConfig:
    """conf/train.yaml, checked: an unknown key or a wrong type is an error. `steps`: attempted batches in all."""

    run: RunConfig = field(default_factory=RunConfig)
    steps: int = 1000
    seed: int = 0
    model: JointConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


def register() -> None:
    """Make the schema known to Hydra, under the name that conf/train.yaml builds on."""
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def to_dataclass(config: DictConfig) -> tuple[TrainConfig, dict[str, Any]]:
    """The typed config and its plain form for the run directory. RunError for missing or impossible values."""
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        typed = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "a mandatory key"
        raise RunError(f"{key} is missing: give it on the command line, {key}=...") from None
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise RunError(str(error).splitlines()[0]) from None
    assert isinstance(typed, TrainConfig) and isinstance(plain, dict)
    return typed, {str(key): value for key, value in plain.items()}
