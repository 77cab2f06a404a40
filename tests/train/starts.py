"""Checkpoints of weights that runs start from, without data and without a step."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.loader.state import DataState
from model.joint import JointTransformer
from train.checkpoint.checkpoint import CheckpointConfig, TrainState
from train.checkpoint.saver import Saver
from train.engine.engine import build_engine
from train.engine.optim_config import OptimConfig
from train.objective.objective import ObjectiveConfig
from train.parallel.mesh import ParallelConfig, make_layout
from train.start.config import FRESH, ZERO, InitConfig
from train.start.sources import open_sources
from train.start.weights import StartingWeights, start_weights

HEAD = 48  # as in tests/weights.py


def start_and_save(run: Path, init: dict[str, str], parallel: dict[str, Any], ema: float = 0.0) -> dict[str, Any]:
    """A run's checkpoint of step 1 that holds what `init` names. All ranks of the test call. Returns the record. A
    Bridge that is drawn has heads of HEAD channels."""
    config, settings = InitConfig(**init), ParallelConfig(**parallel)
    layout = make_layout(settings, torch.device("cpu"))
    model = open_sources(config).model
    assert model is not None
    if config.bridge in (FRESH, ZERO):
        model.bridge.head_dim = HEAD
    engine = build_engine(model, settings, OptimConfig(), layout, None, ema_decay=ema)
    origin = start_weights(engine, config, model, 0)
    resolved = {"model": asdict(model), "objective": asdict(ObjectiveConfig()), "data": {}}
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    saver = Saver(run / "checkpoints", CheckpointConfig(), resolved, layout.describe())
    saver.begin(TrainState(engine, DataState.start("0" * 8, [1], 0, 1), step=1, origin=origin))
    saver.finish()
    return origin


def whole_model(**init: str) -> JointTransformer:
    """The model of some sources in one process, with the weights of a start."""
    sources = open_sources(InitConfig(**init))
    assert sources.model is not None
    sources.model.bridge.head_dim = HEAD
    model, part = JointTransformer(sources.model).eval(), StartingWeights(sources, sources.model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(part(name, shape, 0, parameter.numel()).view(shape))
    assert part.fault is None
    return model
