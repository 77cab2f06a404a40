"""A trained model for sampling: loaded from a checkpoint under any layout, its velocities whole on every rank.

model, config = load_model(path, ParallelConfig(compute="bfloat16", ulysses=2), layout)
video, audio = sample(WholeField(model, layout), SamplerConfig(), ...)     # of model/sampler.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from model.joint import JointConfig, JointTransformer, Velocities
from model.tower import unpatchify
from train.checkpoint import STATE, committed, damage
from train.errors import RunError
from train.mesh import Layout, ParallelConfig
from train.parallelize import place_model
from train.sequence import shares


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at a path, or the newest one of a run directory. RunError where none can be used."""
    if (path / "checkpoints").is_dir():
        found = committed(path / "checkpoints")
        if not found:
            raise RunError(f"run {path} has no checkpoint yet (checkpoint.minutes, checkpoint.every say when)")
        path = found[-1]
    fault = damage(path)
    if fault is not None:
        raise RunError(f"{path} is no checkpoint that can be used: {fault}")
    return path


def load_model(
    path: Path, parallel: ParallelConfig, layout: Layout, weights: str | None = None
) -> tuple[JointTransformer, dict[str, Any]]:
    """The model of a checkpoint, and the config of its run. All ranks call. RunError when it cannot be read.

    `weights`: "ema", their average over training; "raw"; None: the average where the checkpoint has one.
    """
    content = json.loads((path / STATE).read_text())
    if weights not in (None, "ema", "raw"):
        raise RunError(f"weights={weights}: give ema or raw, or null for ema where the checkpoint has it")
    has_average = bool(content.get("averages"))
    if weights == "ema" and not has_average:
        raise RunError(f"weights=ema: checkpoint {path} has no averages (ema.decay was 0): give weights=raw")
    kind = "ema" if has_average and weights != "raw" else "model"
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(JointConfig), content["config"]["model"]))
    assert isinstance(config, JointConfig)
    with torch.device("meta"):
        model = JointTransformer(config)
    model.to(torch.float32)
    place_model(model, parallel, layout)
    model.to_empty(device=layout.device)
    tensors = {f"{kind}.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    try:
        dcp.load(tensors, checkpoint_id=path)
    except (Exception, CheckpointException) as error:
        raise RunError(f"checkpoint {path} cannot be read: {error}") from error
    return model.eval(), content["config"]


class WholeField:
    """The joint model's forward with the whole video velocity on every rank, also where its tokens are sharded."""

    def __init__(self, model: JointTransformer, layout: Layout) -> None:
        self._model, self._group = model, layout.sequence

    def __call__(self, **inputs: Any) -> Velocities:
        if self._group.size == 1 or inputs["video"] is None:
            return self._model(**inputs)
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
