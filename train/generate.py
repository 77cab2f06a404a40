"""A trained model for sampling: loaded from a checkpoint under any layout, with whole velocities on every rank.

model, config = load_model(path, ParallelConfig(compute_dtype="bfloat16", ulysses=2), layout)        # or load_folder
video, audio = sample(WholeField(model, layout), as_trained(SamplerConfig(), config), ...)     # of model/sampler.py
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import RunError
from model.joint import JointConfig, JointTransformer, Velocities
from model.sampler import SamplerConfig
from model.tower import unpatchify
from model.weights.files import LayoutError, read_json
from train.checkpoint.checkpoint import committed, damage, read_state
from train.checkpoint.dcp_metadata import read_tensors
from train.objective.objective import ObjectiveConfig
from train.parallel.mesh import Layout, ParallelConfig
from train.parallel.parallelize import fill_weights, place_model
from train.parallel.parts import tower_of
from train.parallel.sequence.cores import shares
from train.start.checkpoint_tensors import model_of
from train.start.config import TRAINING, InitConfig
from train.start.sources import open_sources
from train.start.weights import StartingWeights, raise_any


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at a path, or the newest one of a run directory. RunError if none is usable."""
    if (path / "checkpoints").is_dir():
        found = committed(path / "checkpoints")
        if not found:
            raise RunError(f"run {path} has no checkpoint yet (checkpoint.minutes and checkpoint.every set when)")
        path = found[-1]
    fault = damage(path)
    if fault is not None:
        raise RunError(f"{path} is not a usable checkpoint: {fault}")
    return path


def load_model(
    path: Path, parallel: ParallelConfig, layout: Layout, weights: str | None = None
) -> tuple[JointTransformer, dict[str, Any]]:
    """The model of a checkpoint, and the config of its run. All ranks call. RunError when it cannot be read.

    `weights`: "ema", their average over training; "raw"; None: the average if the checkpoint has one.
    """
    content = read_state(path)
    if weights not in (None, "ema", "raw"):
        raise RunError(f"weights={weights}: give ema or raw, or null for ema if the checkpoint has it")
    has_average = bool(content.get("averages"))
    if weights == "ema" and not has_average:
        raise RunError(f"weights=ema: checkpoint {path} has no averages (ema.decay was 0): give weights=raw")
    averaged = content["averages"] if has_average and weights != "raw" else ()  # what is frozen is its own average
    model = _placed(model_of(content), parallel, layout)
    tensors = {
        f"{'ema' if tower_of(name) in averaged else 'model'}.{name}": parameter.detach()
        for name, parameter in model.named_parameters()
    }
    read_tensors(tensors, path)
    return model.eval(), content["config"]


def load_folder(path: Path, parallel: ParallelConfig, layout: Layout) -> JointTransformer:
    """The model of a folder of weights, each rank reading what it keeps. All ranks call. RunError if the folder does
    not hold all parts of a model."""
    sources = open_sources(InitConfig(source=str(path)))
    assert sources.model is not None  # no part is made, or it would have been refused
    model = _placed(sources.model, parallel, layout)
    part = StartingWeights(sources, sources.model, seed=0)
    fill_weights(model, part)
    raise_any(part.fault)
    return model.eval()


def folder_config(path: Path) -> dict[str, Any]:
    """What a folder of weights tells, in the form of a run's config: "model", "objective", and "data" with the
    "buckets" and "encoders" of its training.json. RunError if the folder does not hold all parts of a model."""
    sources = open_sources(InitConfig(source=str(path)))
    assert sources.model is not None
    return {"model": asdict(sources.model), **trained_as(path)}


def trained_as(path: Path) -> dict[str, Any]:
    """What a folder of weights tells about its training: see `folder_config`. Without training.json, from MOVA's index
    and the reference's defaults."""
    try:
        if (path / TRAINING).is_file():
            facts = read_json(path / TRAINING)
            if not isinstance(facts["encoders"], dict):
                raise RunError(f"{path / TRAINING}: encoders is {facts['encoders']!r}, expected texts by kind")
            shifts = {name: facts[name] for name in ("shift_video", "shift_audio", "boundary")}
            return {"objective": shifts, "data": {name: facts[name] for name in ("buckets", "encoders")}}
        index = read_json(path / "model_index.json") if (path / "model_index.json").is_file() else {}
    except LayoutError as error:
        raise RunError(str(error)) from None
    except KeyError as error:
        raise RunError(f"{path / TRAINING} lacks the key {error}") from None
    ratio = index.get("boundary_ratio")
    return {"objective": {} if ratio is None else {"boundary": 1000 * ratio}, "data": {}}


def _placed(config: JointConfig, parallel: ParallelConfig, layout: Layout) -> JointTransformer:
    """A model under a layout, its weights unset."""
    with torch.device("meta"):
        model = JointTransformer(config)
    model.to(torch.float32)
    place_model(model, parallel, layout)
    model.to_empty(device=layout.device)
    return model


def as_trained(sampler: SamplerConfig, run: dict[str, Any]) -> SamplerConfig:
    """The sampler, completed with the shifts and the boundary of a run's objective. `run`: the run's config."""
    trained = asdict(ObjectiveConfig()) | run["objective"]
    names = ("shift_video", "shift_audio", "boundary")
    return replace(sampler, **{name: trained[name] for name in names if getattr(sampler, name) is None})


class WholeField:
    """The joint model's forward with the whole video velocity on every rank, even if its tokens are sharded."""

    def __init__(self, model: JointTransformer, layout: Layout) -> None:
        self._model, self._group = model, layout.sequence

    def __call__(self, **inputs: Any) -> Velocities:
        if self._group.size == 1 or inputs["video"] is None:
            result: Velocities = self._model(**inputs)
            return result
        out = self._model(**inputs, as_patches=True)
        assert out.video is not None
        patch = self._model.config.video.patch_size
        grid = tuple(n // p for n, p in zip(inputs["video"].shape[2:], patch, strict=True))
        return Velocities(unpatchify(self._gather(out.video, grid), grid, patch), out.audio)

    def _gather(self, mine: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[B, l, P] of each rank's tokens -> [B, L, P]."""
        count = grid[0] * grid[1] * grid[2]
        lengths = shares(count, self._group.size)
        padded = mine.new_zeros(mine.shape[0], max(lengths), mine.shape[2])
        padded[:, : mine.shape[1]] = mine
        everyone = padded.new_empty(self._group.size, *padded.shape)
        dist.all_gather_into_tensor(everyone.flatten(0, 1), padded, group=self._group.ranks)
        return torch.cat([part[:, :length] for part, length in zip(everyone, lengths, strict=True)], dim=1)
