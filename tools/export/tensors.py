"""The tensors that an export takes from a checkpoint, with their dtypes and names."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.errors import RunError
from model.weights.names import to_diffusers
from model.weights.parts import MODULES
from train.start.checkpoint_tensors import CheckpointTensors

PART_OF = {module: part for part, module in MODULES.items()}
# What loaders keep in float32 beside bfloat16: diffusers its time_embedder, scale_shift_table and norm2 (norm3 here),
# original Wan its modulation; MOVA casts all of them itself, and loses nothing.
KEPT = ("modulation", "time_embedding.", "norm3.")
DIFFUSERS = {"video_dit": "transformer", "video_dit_2": "transformer_2"}


@dataclass(frozen=True)
class ExportedTensor:
    """One tensor of an export. `key`: in the checkpoint."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes that it occupies in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def choose(
    tensors: CheckpointTensors, state: dict[str, Any], weights: str | None, dtype: str
) -> dict[str, dict[str, ExportedTensor]]:
    """{module: {own name: tensor}} of a checkpoint whose STATE is `state`. RunError for averages that it lacks.

    weights: "ema", "raw", or None: averages where there are any. dtype: "bfloat16", "float32" or "source".
    """
    averages = state.get("averages") or {}
    if weights == "ema" and not averages:
        raise RunError("weights=ema: the run keeps no averages (ema.decay is 0); give weights=raw")
    chosen: dict[str, dict[str, ExportedTensor]] = {}
    stored = set(tensors.names())
    for name in state["parameters"]:
        module, _, own = name.partition(".")
        average = f"ema.{name}"
        key = average if weights != "raw" and module in averages and average in stored else f"model.{name}"
        kind = _dtype(module, own, dtype, state.get("origin") or {})
        chosen.setdefault(module, {})[own] = ExportedTensor(key, tensors.shape(key), kind)
    return {module: chosen[module] for module in MODULES.values() if module in chosen}


def reader(tensors: CheckpointTensors, named: dict[str, ExportedTensor]) -> Callable[[str], Tensor]:
    """A function that gives a tensor of an export by its name there."""

    def read(name: str) -> Tensor:
        one = named[name]
        return tensors.read(one.key, 0, math.prod(one.shape)).view(one.shape).to(one.dtype)

    return read


def folders(format: str, chosen: dict[str, dict[str, ExportedTensor]]) -> dict[str, dict[str, ExportedTensor]]:
    """{folder: {name in its files: tensor}}; "" is the export's own folder."""
    if format == "safetensors":
        return {"": {f"{module}.{name}": one for module, named in chosen.items() for name, one in named.items()}}
    if format == "mova":
        return chosen
    return {
        DIFFUSERS.get(module, module): {
            to_diffusers(name) if module in DIFFUSERS else name: one for name, one in named.items()
        }
        for module, named in chosen.items()
    }


def _dtype(module: str, name: str, dtype: str, origin: dict[str, Any]) -> torch.dtype:
    if dtype == "source":
        part = origin.get(PART_OF[module]) or {}
        if "dtype" not in part or name in part["fresh"]:
            return torch.float32  # it was never read
        stored: torch.dtype = getattr(torch, part["dtypes"].get(name, part["dtype"]))
        return stored
    if dtype == "bfloat16" and not (module != "dual_tower_bridge" and any(word in name for word in KEPT)):
        return torch.bfloat16
    return torch.float32
