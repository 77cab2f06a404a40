"""The configuration of a training run; every part is a dataclass beside the code that reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf

from core.compose import Schema, compose
from core.errors import RunError
from core.ranges import bounded, seed_field
from core.secrets import without_secrets
from data.batch import MASK_CHANNELS
from data.clip import AUDIO_CHANNELS, VIDEO_CHANNELS
from model.joint import JointConfig
from model.tower import TowerConfig
from train.checkpoint.checkpoint import CheckpointConfig
from train.data_config import DataConfig
from train.engine.ema import EmaConfig
from train.engine.optim_config import OptimConfig
from train.faults.config import GuardConfig
from train.monitor.log import MonitorConfig
from train.monitor.profiler import ProfilerConfig
from train.objective.objective import ObjectiveConfig
from train.objective.validate import ValidationConfig
from train.parallel.mesh import ParallelConfig
from train.parallel.parts import idle_experts
from train.start.config import InitConfig
from train.start.model import with_model


@dataclass
class RunConfig:
    """The identity of a run.

    id: name of the run: its folder and its id in W&B; starting with the same id resumes the run
    root: folder that contains the runs
    new_schedule: let `steps` change on resume although the learning rate then jumps (train/engine/schedule.py)
    """

    id: str = MISSING
    root: str = "runs"
    new_schedule: bool = False


@dataclass
class TrainConfig:
    """The config of a training run.

    steps: total number of attempted batches
    seed: of weights, sample order, noise and dropouts
    """

    run: RunConfig = field(default_factory=RunConfig)
    steps: int = bounded(1000, "[1, inf)")
    seed: int = seed_field()
    model: JointConfig = MISSING
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    inspect: ProfilerConfig = field(default_factory=ProfilerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


SCHEMA = Schema("train", TrainConfig)


def default_values() -> dict[str, Any]:
    """Every key that has a default, with it, as nested plain values (mandatory keys hold OmegaConf's "???")."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(TrainConfig))
    model: Any = OmegaConf.to_container(OmegaConf.structured(JointConfig))
    tower: Any = OmegaConf.to_container(OmegaConf.structured(TowerConfig))
    return {**plain, "model": {**model, "video": tower, "audio": tower}}


def compose_train(
    overrides: Sequence[str], also: Sequence[str] = (), coming: Mapping[str, JointConfig] | None = None
) -> tuple[TrainConfig, dict[str, Any]]:
    """The typed config that these key=value arguments describe, and its plain form for the run directory, checkpoints
    and W&B, in which addresses have no passwords and tokens. `also`: further keys that a typo may have meant; `coming`:
    models of runs that will be there as sources of weights. UserError for the first argument that is wrong."""
    composed = compose(SCHEMA, with_model(SCHEMA, overrides, coming), also)
    typed = composed.typed()
    check_channels(typed.model)
    check_trained(typed)
    return typed, without_secrets(composed.plain())


def check_channels(model: JointConfig) -> None:
    """RunError for a model whose latents have other channels than a dataset's."""
    video, audio = model.video, model.audio
    for name, found, wanted in (
        ("video.in_dim", video.in_dim, 2 * VIDEO_CHANNELS + MASK_CHANNELS),
        ("video.out_dim", video.out_dim, VIDEO_CHANNELS),
        ("audio.in_dim", audio.in_dim, AUDIO_CHANNELS),
        ("audio.out_dim", audio.out_dim, AUDIO_CHANNELS),
    ):
        if found != wanted:
            raise RunError(f"model.{name} is {found}, latents of datasets need {wanted}")


def check_trained(config: TrainConfig) -> None:
    """RunError if `optim.train` names an expert that the model lacks, or leaves nothing to train in an expert's
    steps."""
    experts, cycle = config.model.experts, config.objective.expert_cycle
    idle = idle_experts(config.optim.train, experts)
    if taken := [expert for expert in idle if expert in cycle and len(experts) > 1]:
        raise RunError(
            f"optim.train=[{','.join(config.optim.train)}] leaves nothing to train in steps of the {taken[0]} expert; "
            f"leave it out of objective.expert_cycle, which is [{','.join(cycle)}]"
        )
