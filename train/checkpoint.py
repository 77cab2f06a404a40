"""Checkpoints on disk: `checkpoints/step-00001000/`, complete only when `COMMITTED` is there (written last).

Keys are the reference's parameter names (`model.<name>`, `ema.<name>`, `optim.<name>.exp_avg`, ...), so any engine at
any world size can load them. `state.json` holds what is no tensor: step, data state, optimizer steps, parameters with
their groups, config, layout. The marker holds size and checksum of every file. A step uses no global RNG, so none is
saved. train/saver.py writes them; docs/recovery.md tells what happens when something goes wrong.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from data.state import DataState
from train.engine import Engine
from train.errors import RunError
from train.guard import gather, on_first_rank
from train.optim import group_of
from train.pace import Seen
from train.run_dir import config_differences

MARKER = "COMMITTED"
STATE = "state.json"
NAME = re.compile(r"step-(\d{8,})")
SHOWN = 8  # differences in one message

logger = logging.getLogger(__name__)


@dataclass
class CheckpointConfig:
    """When to save: `minutes` after the last one (by the first rank's clock; 0: never), every `every` steps (0: never),
    always when the run ends or is stopped. The newest `keep` stay; those of every `keep_every`-th step (0: none), which
    are saved too, are never deleted.

    `max_failures`: saves that may fail in a row (disk full, say) before the run ends. `upload`: a command with its
    arguments that is run for each one after its commit, in the background; "{path}" becomes its folder.
    """

    minutes: float = 8.0
    every: int = 0
    keep: int = 2
    keep_every: int = 5000
    max_failures: int = 3
    upload: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep is {self.keep}; at least the newest one must stay")
        for name, what in (("every", "steps"), ("keep_every", "steps"), ("minutes", "minutes")):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name} is {getattr(self, name)}; give a number of {what}, or 0 for never")
        if self.max_failures < 0:
            raise ValueError(f"checkpoint.max_failures is {self.max_failures}; give 0 or more")
        if self.upload and not any("{path}" in word for word in self.upload):
            raise ValueError(f"checkpoint.upload is {self.upload}; write {{path}} where the checkpoint's folder goes")

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is saved, whatever the clock says."""
        return any(every > 0 and step % every == 0 for every in (self.every, self.keep_every))


@dataclass
class TrainState:
    """All that a checkpoint holds. `step`: attempted batches so far, the index of the next one; `history`: the last
    ordinary steps, by which train/bad_steps.py judges the next ones."""

    engine: Engine
    data: DataState
    step: int = 0
    history: list[list] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)


def newest(folder: Path, up_to: int | None = None) -> Path | None:
    """The newest committed, intact checkpoint (of at most `up_to` steps), or None where none was ever committed.

    All ranks call, and share the reading of checksums. One that is damaged is set aside under another name, which is
    said. Raises RunError when all that were committed are damaged: starting anew would throw the run away.
    """
    while True:
        path = on_first_rank(lambda: _newest_whole(folder, up_to))
        if path is None:
            return None
        files = on_first_rank(partial(_names, path))
        faults = gather(
            [fault for name in files[dist.get_rank() :: dist.get_world_size()] if (fault := _rotten(path, name))]
        )
        if not faults:
            return path
        on_first_rank(partial(_set_aside, path, faults[0]))


def clean(folder: Path) -> None:
    """Delete what saves left that never came to their commit. Only when no save is in flight; first rank only."""
    for path in _paths(folder):
        if not (path / MARKER).exists():
            logger.warning("checkpoint %s was never committed (the run died while it was written): deleted", path)
            shutil.rmtree(path, ignore_errors=True)


def committed(folder: Path) -> list[Path]:
    """Checkpoints with a marker, the oldest first."""
    return [path for path in _paths(folder) if (path / MARKER).exists()]


def step_of(path: Path) -> int:
    """The number of steps after which a checkpoint was written."""
    match = NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, by its marker and the sizes of its files, or None."""
    try:
        files = _files(path)
    except (OSError, ValueError, KeyError):
        return "it has no commit marker"
    for name, entry in files.items():
        there = (path / name).stat().st_size if (path / name).is_file() else None
        if there != entry["bytes"]:
            return f"its file {name} has {there} bytes, {entry['bytes']} were written"
    return None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb", buffering=0) as file:
        while part := file.read(1 << 22):
            value = zlib.crc32(part, value)
    return value


def load(state: TrainState, path: Path, config: dict[str, Any]) -> None:
    """Restore `state` in place from a committed checkpoint, at any number of ranks. All ranks call.

    Raises RunError, with the differing values side by side, when the checkpoint's config of model, objective or
    optimizer differs, or its parameters, their shapes or groups.
    """
    content = on_first_rank(lambda: json.loads((path / STATE).read_text()))
    parts = ("model", "objective", "optim")
    differing = config_differences(*({part: c.get(part) for part in parts} for c in (content["config"], config)))
    if differing:
        lines = "\n".join(f"  {line}" for line in differing)
        raise RunError(f"checkpoint {path} was written under another config (checkpoint -> now):\n{lines}")
    load_weights_and_moments(state.engine, path, content)
    state.step, state.history = content["step"], content["history"]
    state.seen = Seen(*content.get("seen", Seen()))
    restored = DataState.from_json(content["data"])
    state.data.segments, state.data.position = restored.segments, restored.position
    state.data.quarantine = restored.quarantine


def go_back(state: TrainState, path: Path) -> None:
    """Take weights and optimizer state of an earlier checkpoint of this run; step and data go on where they are."""
    content = on_first_rank(lambda: json.loads((path / STATE).read_text()))
    load_weights_and_moments(state.engine, path, content)
    state.history[:] = [entry for entry in state.history if entry[0] < content["step"]]


def load_weights_and_moments(engine: Engine, path: Path, content: dict[str, Any]) -> None:
    """What an engine holds, from a checkpoint whose STATE is `content`. All ranks call. RunError: see `load`."""

    def read(tensors: dict[str, Tensor]) -> None:
        _check_parameters(path, content["parameters"], parameters_of(tensors))
        try:
            dcp.load(tensors, checkpoint_id=path)
        except (Exception, CheckpointException) as error:
            raise RunError(f"checkpoint {path} cannot be read: {error}", retry=True) from error

    engine.restore(content["optimizer_steps"], read, content.get("averages"))


def load_weights(engine: Engine, path: Path) -> Path:
    """Take the weights of a run's newest checkpoint (`path`: its folder), or those of one checkpoint; the optimizer
    starts anew. Returns the checkpoint. All ranks call. RunError when there is none, or when its parameters differ."""
    if on_first_rank(lambda: (path / MARKER).exists() or not path.is_dir()):
        chosen, fault = path, on_first_rank(lambda: damage(path))
    else:
        found = newest(path / "checkpoints")
        chosen, fault = (path, "it holds no committed checkpoint") if found is None else (found, None)
    if fault is not None:
        raise RunError(f"run.start_from={path} cannot be used: {fault}")
    content = on_first_rank(lambda: json.loads((chosen / STATE).read_text()))

    def read(tensors: dict[str, Tensor]) -> None:
        _check_parameters(chosen, content["parameters"], parameters_of(tensors))
        try:
            dcp.load({key: one for key, one in tensors.items() if key.startswith("model.")}, checkpoint_id=chosen)
        except (Exception, CheckpointException) as error:
            raise RunError(f"checkpoint {chosen} cannot be read: {error}", retry=True) from error

    engine.restore({}, read)
    return chosen


def parameters_of(tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """{name: whole shape and LR group} of the parameters among an engine's tensors."""
    names = [key.removeprefix("model.") for key in tensors if key.startswith("model.")]
    return {name: {"shape": list(tensors[f"model.{name}"].shape), "group": group_of(name)} for name in names}


def _check_parameters(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    lines = [
        f"{name}: {then.get(name, 'not there')} -> {now.get(name, 'not there')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if lines:
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        shown = "\n".join(f"  {line}" for line in lines[:SHOWN] + more)
        raise RunError(f"checkpoint {path} holds other parameters than the model (checkpoint -> now):\n{shown}")


def _paths(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if NAME.fullmatch(path.name)), key=step_of)


def _files(path: Path) -> dict[str, dict[str, int]]:
    return json.loads((path / MARKER).read_text())["files"]


def _names(path: Path) -> list[str]:
    return sorted(_files(path))


def _newest_whole(folder: Path, up_to: int | None) -> Path | None:
    for path in reversed(committed(folder)):
        if up_to is not None and step_of(path) > up_to:
            continue
        fault = damage(path)
        if fault is None:
            return path
        _set_aside(path, fault)
    aside = sorted(folder.glob("damaged-*"))
    if aside and up_to is None:
        raise RunError(
            f"no checkpoint under {folder} can be used: all of {', '.join(path.name for path in aside)} are damaged. "
            "Restore one from a copy under its name step-..., or delete them all to start the run anew"
        )
    return None


def _rotten(path: Path, name: str) -> str | None:
    """What is wrong with the bytes of a file, or None."""
    expected, there = _files(path)[name]["crc32"], checksum(path / name)
    return None if there == expected else f"its file {name} has checksum {there:08x}, {expected:08x} was written"


def _set_aside(path: Path, fault: str) -> None:
    """Rename a damaged checkpoint, so that it stands in nobody's way; it is left for the user to look at."""
    aside = path.with_name(path.name.replace("step-", "damaged-"))
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    logger.warning("checkpoint %s is damaged: %s; set aside as %s, the one before it is used", path, fault, aside.name)
