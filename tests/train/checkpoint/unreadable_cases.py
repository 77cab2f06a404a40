"""What ranks do in test_unreadable.py: look for the newest checkpoint where one can't be looked at."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from core.errors import RunError, exit_status
from tests.train.checkpoint.save_cases import CONFIG, state_at
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import CheckpointConfig
from train.checkpoint.saver import Saver
from train.checkpoint.uncommitted import set_aside


@contextlib.contextmanager
def failing_call(name: str, code: int, suffix: str) -> Iterator[None]:
    """The call of `os` fails for paths that end so, as where a directory forbids it or a disk is broken."""
    real = getattr(os, name)

    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith(suffix):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *args, **kwargs)

    with mock.patch.object(os, name, call):
        yield


@contextlib.contextmanager
def broken_shard(step: int) -> Iterator[None]:
    """The second rank can't read its share of a checkpoint's files."""
    real = checkpoint._rotten

    def read(path: Path, name: str) -> str | None:
        if dist.get_rank() == 1 and checkpoint.step_of(path) == step:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path / name))
        return real(path, name)

    with mock.patch.object(checkpoint, "_rotten", read):
        yield


def on_disk(change: Callable[[Path], None], folder: Path) -> contextlib.AbstractContextManager[None]:
    if dist.get_rank() == 0:
        change(folder)
    dist.barrier()
    return contextlib.nullcontext()


def file_in_place(folder: Path) -> None:
    (folder / "step-00000003").write_text("no folder")


def link_to_nowhere(folder: Path) -> None:
    (folder / "step-00000003").symlink_to(folder / "away")


def look(folder: Path, way: str, *arguments: Any) -> dict[str, Any]:
    """Two checkpoints, and what is in the way; what is found, and what lies there afterwards."""
    state, keeper = state_at(1, 1.0), Saver(folder, CheckpointConfig(), CONFIG, "two ranks")
    for step in (1, 2):
        state.step = step
        keeper.begin(state)
    keeper.finish()
    ways = {"call": failing_call, "shard": broken_shard}
    with on_disk(arguments[0], folder) if way == "disk" else ways[way](*arguments):
        try:
            path = checkpoint.newest(folder)
            outcome: dict[str, Any] = {"found": path and path.name}
            if dist.get_rank() == 0:
                set_aside(folder)
            dist.barrier()
        except RunError as error:
            outcome = {"error": str(error), "status": exit_status(error)}
    return outcome | {"left": sorted(entry.name for entry in os.scandir(folder))}


def again(folder: Path) -> dict[str, Any]:
    """A second save of a step that has been saved."""
    state, keeper = state_at(1, 1.0), Saver(folder, CheckpointConfig(), CONFIG, "two ranks")
    keeper.begin(state)
    keeper.finish()
    keeper.begin(state)
    try:
        keeper.finish()
        error = ""
    except RunError as caught:
        error = str(caught)
    dist.barrier()
    path = folder / "step-00000001"
    return {"error": error, "whole": path.is_dir() and checkpoint.damage(path) is None}


def pruned(folder: Path) -> list[str]:
    """The marker of an old checkpoint is damaged while the run goes on."""
    state, keeper = state_at(1, 1.0), Saver(folder, CheckpointConfig(keep=1), CONFIG, "two ranks")
    for step in (1, 2, 3, 4):
        state.step = step
        keeper.begin(state)
        keeper.settle()
        if step == 1 and dist.get_rank() == 0:
            (folder / "step-00000001" / checkpoint.MARKER).write_text("[]")
    keeper.finish()
    return sorted(entry.name for entry in os.scandir(folder))
