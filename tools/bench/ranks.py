"""Runs a function on several processes of this machine that form one process group, for benchmarks."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from core.errors import UserError
from train.parallel.host_memory import keep_freed_memory

GRACE = 5.0  # seconds that ranks have to end once one has failed, and again after SIGTERM


def on_ranks(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    together: bool = True,
    threads: int = 1,
    backend: str = "gloo",
) -> list[Any]:
    """function(*arguments) on `world` fresh processes, `threads` each; returns what each gave.

    `together` False: they run at the same time, but each is a process group of its own. `backend` "nccl": each has a
    GPU of its own. The first error of one, or its death, is raised here (a UserError as it is), after the others are
    ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = (world, folder, together, threads, backend, function, arguments)
        context = torch.multiprocessing.spawn(_run, settings, nprocs=world, join=False)
        assert context is not None
        try:
            while not context.join(grace_period=GRACE):
                pass
        except torch.multiprocessing.ProcessRaisedException as raised:
            outcome = _outcome(folder, raised.error_index)
            if outcome.exists():
                raise pickle.loads(outcome.read_bytes()) from None
            raise
        return [pickle.loads(_outcome(folder, rank).read_bytes()) for rank in range(world)]


def _outcome(folder: str, rank: int) -> Path:
    """File with what a rank gave, or the UserError that it ended with."""
    return Path(folder) / f"rank{rank}"


def _run(
    rank: int,
    world: int,
    folder: str,
    together: bool,
    threads: int,
    backend: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if backend == "nccl":
        torch.cuda.set_device(rank)
    else:
        keep_freed_memory()  # as `mova train` does
    if together:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        _outcome(folder, rank).write_bytes(pickle.dumps(function(*arguments)))
    except UserError as error:
        _outcome(folder, rank).write_bytes(pickle.dumps(error))
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a training run takes it over: nobody could end this rank by it
        dist.destroy_process_group()
