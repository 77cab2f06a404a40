"""Checkpoints: `checkpoints/step-00001000/`, complete only when `COMMITTED` is there (written last).

Keys are the reference's parameter names (`model.<name>`, `optim.<name>.exp_avg`, ...), so any engine at any world size
can load them. `state.json` holds what is no tensor: step, data state, optimizer steps by name, config, layout, code.
A step uses no global RNG, so none is saved.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from data.state import DataState
from train.engine import Engine
from train.errors import RunError
from train.guard import on_first_rank
from train.run_dir import config_differences, write_atomically

MARKER = "COMMITTED"
STATE = "state.json"


@dataclass
class CheckpointConfig:
    """`every` steps a checkpoint (0: only at the end and when stopped); the newest `keep` stay."""

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep is {self.keep}; at least the newest one must stay")
        if self.every < 0:
            raise ValueError(f"checkpoint.every is {self.every}; give a number of steps, or 0 for only at the end")


@dataclass
class TrainState:
    """All that a checkpoint holds. `step`: attempted batches so far, the index of the next one."""

    engine: Engine
    data: DataState
    step: int = 0


def save(state: TrainState, folder: Path, config: dict[str, Any], layout: str, keep: int) -> Path:
    """Write a checkpoint of `state` into a fresh directory under `folder`, commit it, delete old ones. All ranks call.

    Raises RunError when writing fails (disk full, say); an uncommitted directory then stays behind and is ignored.
    """
    path = folder / f"step-{state.step:08d}"
    on_first_rank(lambda: _fresh(path))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, state.data.quarantine)  # each rank sees only its own samples
    for quarantine in found:
        state.data.absorb(quarantine)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state.engine.tensors(), checkpoint_id=path)
    except Exception as error:
        raise RunError(f"checkpoint {path} could not be written: {error}") from error
    content = {
        "step": state.step,
        "data": state.data.to_json(),
        "optimizer_steps": state.engine.update_counts(),
        "config": config,
        "layout": layout,
        "torch": torch.__version__,
    }
    on_first_rank(lambda: _commit(path, content))
    on_first_rank(lambda: _prune(folder, keep))
    return path


def newest(folder: Path) -> Path | None:
    """The newest committed, intact checkpoint under a folder, or None. Says which ones it passes over, and why."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        fault = damage(path)
        if fault is None:
            return path
        logging.getLogger(__name__).warning("checkpoint %s is passed over: %s", path, fault)
    return None


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        files = json.loads((path / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "it was never committed (the run died while it was written)"
    for name, size in files.items():
        there = (path / name).stat().st_size if (path / name).is_file() else None
        if there != size:
            return f"its file {name} has {there} bytes, {size} were written"
    return None


def load(state: TrainState, path: Path, config: dict[str, Any]) -> None:
    """Restore `state` in place from a committed checkpoint, at any number of ranks. All ranks call.

    Raises RunError when the model or objective of the checkpoint's config differs (shown side by side).
    """
    content = on_first_rank(lambda: json.loads((path / STATE).read_text()))
    parts = ("model", "objective", "optim")
    differing = config_differences(*({part: c.get(part) for part in parts} for c in (content["config"], config)))
    if differing:
        lines = "\n".join(f"  {line}" for line in differing)
        raise RunError(f"checkpoint {path} was written under another config (checkpoint -> now):\n{lines}")

    def read(tensors: dict[str, Tensor]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(tensors, checkpoint_id=path)
        except Exception as error:
            raise RunError(f"checkpoint {path} cannot be read: {error}") from error

    state.engine.restore(content["optimizer_steps"], read)
    state.step = content["step"]
    restored = DataState.from_json(content["data"])
    state.data.segments, state.data.position = restored.segments, restored.position
    state.data.quarantine = restored.quarantine


def _fresh(path: Path) -> None:
    if damage(path) is None:
        raise RunError(f"checkpoint {path} exists already; a run never writes over one")
    shutil.rmtree(path, ignore_errors=True)  # left by a run that died while writing it
    path.mkdir(parents=True)


def _commit(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path / STATE, json.dumps(content))
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
    write_atomically(path / MARKER, json.dumps({"step": content["step"], "files": files}))
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _prune(folder: Path, keep: int) -> None:
    committed = [path for path in sorted(folder.glob("step-*")) if (path / MARKER).exists()]
    for path in committed[:-keep]:
        (path / MARKER).unlink()  # first, so that a half-deleted one is never taken for whole
        shutil.rmtree(path, ignore_errors=True)
