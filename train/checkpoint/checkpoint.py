"""Checkpoints on disk: `checkpoints/step-00001000/`, complete only if it contains `COMMITTED` (written last).

Keys are the reference's parameter names (`model.<name>`, `ema.<name>`, `optim.<name>.exp_avg`, ...), so any engine at
any world size can load them. `state.json` holds everything that is not a tensor: step, data state, optimizer steps,
parameters with their groups, config, layout. The marker holds size and checksum of every file. A step uses no global
RNG, so none is saved. train/checkpoint/saver.py writes them; docs/recovery.md describes what happens after a failure.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import threading
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from core.durable import write_atomically
from core.errors import RunError, missing
from core.locks import lock_now
from core.ranges import bounded
from core.renamed_keys import translated
from core.run_dir import STEP
from data.loader.state import DataState, Seen
from train.checkpoint.resume import config_differences
from train.encoders import encoders_of_start
from train.engine.optim_config import group_of
from train.parallel.collectives import gather, on_first_rank

if TYPE_CHECKING:  # engines import FSDP2; a launcher, which reads the config alone, starts without it
    from train.engine.engine import Engine

MARKER = "COMMITTED"
STATE = "state.json"
SHOWN = 8  # differences in one message

logger = logging.getLogger(__name__)


@dataclass
class CheckpointConfig:
    """When checkpoints are saved, besides at the end and at a stop.

    minutes: time since the last checkpoint, by the first rank's clock (0: never)
    every: steps between checkpoints (0: never)
    keep: number of newest checkpoints that are kept
    permanent_every: steps between checkpoints that are never deleted (0: none)
    max_failures: consecutive failed saves (such as on a full disk) after which the run ends
    upload: a command with its arguments that runs for each checkpoint after its commit, in the background; "{path}"
        becomes its folder
    timeout_minutes: how far apart ranks may be within one save, on a loaded file system
    upload_seconds: uploads still unfinished this long after the last save wait for the next attempt
    """

    minutes: float = bounded(8.0, "[0, 1000000]")
    every: int = bounded(0, "[0, inf)")
    keep: int = bounded(2, "[1, inf)")
    permanent_every: int = bounded(5000, "[0, inf)")
    max_failures: int = bounded(3, "[0, inf)")
    upload: list[str] = field(default_factory=list)
    timeout_minutes: float = bounded(30.0, "(0, 1000000]")
    upload_seconds: float = bounded(120.0, "[0, 100000000]")

    def __post_init__(self) -> None:
        if self.upload and not any("{path}" in word for word in self.upload):
            raise ValueError(f"checkpoint.upload is {self.upload}; write {{path}} where the checkpoint's folder goes")

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is saved, regardless of the clock."""
        return any(every > 0 and step % every == 0 for every in (self.every, self.permanent_every))


@dataclass
class TrainState:
    """All that a checkpoint holds. `step`: attempted batches so far, the index of the next one; `history`: the last
    ordinary steps, by which train/faults/bad_steps.py judges the next ones; `balance`: the means of
    train/objective/balance.py; `encoders`: fingerprints of the data's codecs; `origin`: where the weights of the first
    step came from, by part (train/start)."""

    engine: Engine
    data: DataState
    step: int = 0
    history: list[list[Any]] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    balance: dict[str, Any] = field(default_factory=dict)
    encoders: dict[str, str] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)


class Newest:
    """The newest committed checkpoint (of at most `up_to` steps), whose checksums are compared in the background, so
    that a start builds its model meanwhile. All ranks make the same calls, and share the reading.

    path: what is being compared; None where none was ever committed. Nothing of it is to be used before `get`.
    """

    def __init__(self, folder: Path, up_to: int | None = None) -> None:
        """RunError as `newest`, for what the marker and the sizes of files tell."""
        self._folder, self._up_to = folder, up_to
        self.path: Path | None = None
        self._faults: list[str] = []
        self._unread: list[str] = []
        self._error: BaseException | None = None
        self._look()

    def _look(self) -> None:
        path = self.path = on_first_rank(lambda: _newest_whole(self._folder, self._up_to))
        if path is None:
            return
        files = on_first_rank(partial(_names, path))
        mine = files[dist.get_rank() :: dist.get_world_size()]
        self._faults, self._unread = [], []
        self._thread = threading.Thread(target=self._compare, args=(path, mine), name="checksums", daemon=True)
        self._thread.start()

    def _compare(self, path: Path, names: list[str]) -> None:
        for name in names:
            try:
                self._faults += [fault] if (fault := _rotten(path, name)) else []
            except OSError as error:
                self._unread.append(f"{path / name} cannot be read ({error.strerror or error})")
            except BaseException as error:
                self._error = error
                return

    def get(self) -> Path | None:
        """Wait for the checksums: the checkpoint, intact, or an older one that is."""
        while (path := self.path) is not None:
            self._thread.join()
            if self._error is not None:
                raise self._error
            faults, unread = gather(self._faults), gather(self._unread)
            if unread:  # on all ranks: the disk may give it at the next attempt
                raise RunError(f"{unread[0]}; to go on from the checkpoint before it, rename {path}", retry=True)
            if not faults:
                return path
            on_first_rank(partial(_set_aside, path, faults[0]))
            self._look()
        return None


def newest(folder: Path, up_to: int | None = None) -> Path | None:
    """The newest committed, intact checkpoint (of at most `up_to` steps), or None where none was ever committed.

    All ranks call, and share the reading of checksums. A damaged one is renamed, with a
    warning. Raises RunError if all committed ones are damaged: starting anew would discard the run; and if one cannot
    be read (no permission, an I/O error), which does not mean that it is damaged.
    """
    return Newest(folder, up_to).get()


def committed(folder: Path) -> list[Path]:
    """Checkpoints with a marker, the oldest first."""
    return [path for path in step_folders(folder) if has_marker(path)]


def has_marker(path: Path) -> bool:
    """Whether a folder was committed. An empty marker, as a crash of the file system leaves, does not count."""
    return bool(size_of(path / MARKER))


def size_of(path: Path) -> int | None:
    """Bytes of a file, None if there is none. OSError if that cannot be determined."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def step_folders(folder: Path) -> list[Path]:
    """Folders of checkpoints, committed or not, the oldest first. A file of such a name is none; RunError for a link
    that leads nowhere, OSError for a folder that can't be listed."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    found = []
    for path in sorted((folder / name for name in names if STEP.fullmatch(name)), key=step_of):
        if path.is_symlink() and not path.exists():
            raise missing(f"{path} is a link to {os.readlink(path)}, which does not exist: mount, restore or delete it")
        if path.is_dir():
            found.append(path)
    return found


def step_of(path: Path) -> int:
    """The number of steps after which a checkpoint was written."""
    match = STEP.fullmatch(path.name)
    assert match is not None, path
    return int(match[1])


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, by its marker and the sizes of its files, or None. OSError where that can't be
    known."""
    try:
        files = _files(path)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return "it has no commit marker"
    for name, entry in files.items():
        there = size_of(path / name)
        if there != entry["bytes"]:
            return f"its file {name} has {there} bytes instead of {entry['bytes']}"
    return None


def hold(path: Path) -> IO[str] | None:
    """Keep a checkpoint from being deleted for as long as the returned file is open. None if it is gone.

    On a file system without locks nothing is held; a warning is logged.
    """
    try:
        file = open(path / MARKER)  # noqa: SIM115  the caller holds it
    except FileNotFoundError:
        return None
    lock_now(file, shared=True)
    if has_marker(path):
        return file
    file.close()
    return None


def is_held(path: Path) -> bool:
    """Whether a reader that called `hold` is using a checkpoint, or may be."""
    try:
        with open(path / MARKER, "r+") as file:
            return not lock_now(file)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def write_marker(path: Path) -> None:
    """Commit a folder: its STATE, which is in place, records all other files."""
    state = path / STATE
    content = json.loads(state.read_bytes())
    files = {**content["files"], STATE: {"bytes": state.stat().st_size, "crc32": checksum(state)}}
    write_atomically(path / MARKER, json.dumps({"step": content["step"], "kept": content["kept"], "files": files}))


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb", buffering=0) as file:
        while part := file.read(1 << 22):
            value = zlib.crc32(part, value)
    return value


def read_state(path: Path) -> dict[str, Any]:
    """The STATE of a checkpoint; its config with today's key names."""
    content: dict[str, Any] = json.loads((path / STATE).read_text())
    return content | {"config": translated(content["config"])}


def load(state: TrainState, path: Path, config: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Restore `state` in place from a committed checkpoint, at any number of ranks. All ranks call.

    config, defaults: of this run, see `config_differences`.
    Raises RunError, with the differing values side by side, when the checkpoint's config of model, objective or
    optimizer differs, or its parameters, their shapes or groups, or the encoders of its data.
    """
    content = on_first_rank(lambda: read_state(path))
    parts = ("model", "objective", "optim")
    then, now, usual = ({part: c.get(part) for part in parts} for c in (content["config"], config, defaults))
    differing = config_differences(then, now, usual)
    if differing:
        lines = "\n".join(f"  {line}" for line in differing)
        raise RunError(f"checkpoint {path} was written under another config (checkpoint -> now):\n{lines}")
    ignore = config.get("data", {}).get("ignore_encoders", False)
    state.encoders = encoders_of_start(content.get("encoders"), f"checkpoint {path}", state.encoders, ignore)
    load_weights_and_moments(state.engine, path, content)
    state.step, state.history = content["step"], content["history"]
    state.balance = content.get("balance", {})
    state.seen, state.origin = Seen(*content.get("seen", Seen())), content.get("origin", {})
    restored = DataState.from_json(content["data"], content["config"].get("data", {}).get("captioner"))
    state.data.segments, state.data.position = restored.segments, restored.position
    state.data.quarantine, state.data.empty_captions = restored.quarantine, restored.empty_captions


def go_back(state: TrainState, path: Path) -> None:
    """Take weights and optimizer state of an earlier checkpoint of this run; step and data position do not change."""
    content = on_first_rank(lambda: read_state(path))
    load_weights_and_moments(state.engine, path, content)
    state.history[:] = [entry for entry in state.history if entry[0] < content["step"]]


def load_weights_and_moments(engine: Engine, path: Path, content: dict[str, Any]) -> None:
    """What an engine holds, from a checkpoint whose STATE is `content`. All ranks call. RunError: see `load`."""
    from train.checkpoint.dcp_metadata import read_tensors  # torch's format of checkpoints: 0.2 s

    def read(tensors: dict[str, Tensor]) -> None:
        _check_parameters(path, content["parameters"], parameters_of(tensors))
        read_tensors(tensors, path)

    engine.restore(content["optimizer_steps"], read, content.get("averages"))


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
        raise RunError(f"checkpoint {path} does not hold the model's parameters (checkpoint -> now):\n{shown}")


def _files(path: Path) -> dict[str, dict[str, int]]:
    content: dict[str, dict[str, int]] = json.loads((path / MARKER).read_text())["files"]
    return content


def _names(path: Path) -> list[str]:
    return sorted(_files(path))


def _newest_whole(folder: Path, up_to: int | None) -> Path | None:
    for path in reversed(step_folders(folder)):  # what is older than the one that is used may be out of reach
        if (up_to is not None and step_of(path) > up_to) or not has_marker(path):
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
    """What is wrong with the content of a file, or None."""
    expected, there = _files(path)[name]["crc32"], checksum(path / name)
    return None if there == expected else f"its file {name} has checksum {there:08x} instead of {expected:08x}"


def _set_aside(path: Path, fault: str) -> None:
    """Rename a damaged checkpoint, so that it is ignored; it is kept for the user to examine."""
    aside = path.with_name(path.name.replace("step-", "damaged-"))
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    logger.warning("checkpoint %s is damaged: %s; renamed to %s, the one before it is used", path, fault, aside.name)
