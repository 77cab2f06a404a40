"""Runs a function on several processes of this machine that form one process group, for benchmarks."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


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
    GPU of its own. An error in one is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with context.Pool(world) as pool:
            settings = (world, f"{folder}/store", together, threads, backend)
            return pool.starmap(_run, [(rank, *settings, function, arguments) for rank in range(world)], chunksize=1)


def _run(
    rank: int,
    world: int,
    store: str,
    together: bool,
    threads: int,
    backend: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Any:
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if together:
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
