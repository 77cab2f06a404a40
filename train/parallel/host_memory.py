"""Host memory: page-locked allocations for GPU runs, how much a layout needs, how much is available; freed memory.

torch's allocator of page-locked memory rounds each tensor up to a power of two: 548 GiB where 365 are needed. Here all
tensors of one purpose lie in one ordinary allocation, which is page-locked as it is.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from model.joint import JointConfig, JointTransformer
from train.optimizer.adamw import AdamW
from train.optimizer.protocol import Optimizer
from train.parallel.mesh import ParallelConfig, check_degrees
from train.parallel.parts import ALL, tower_of

ALIGNMENT = 64  # bytes, of each tensor
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
MOST_IN_HEAP = 2**25  # bytes; the largest threshold that glibc takes
MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")

K = TypeVar("K", bound=Hashable)


def allocate(like: Mapping[K, Tensor], page_locked: bool) -> dict[K, Tensor]:
    """Tensors in host memory with the shapes and dtypes of `like`, uninitialised, all in one allocation.

    `page_locked`: for copies to and from a GPU that do not wait. RuntimeError if the system cannot lock more pages.
    """
    starts, end = {}, 0
    for key, tensor in like.items():
        starts[key] = end
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    whole = torch.empty(end, dtype=torch.uint8, device="cpu")
    if page_locked and end:
        lock_pages(whole)
    return {
        key: whole[starts[key] : starts[key] + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for key, tensor in like.items()
    }


def keep_freed_memory() -> bool:
    """For a run on a CPU: let this process's allocator keep what is freed, since the next step needs as much again.

    glibc would return it to the kernel, which hands out each page anew, filled with zeros. Tensors of more than
    MOST_IN_HEAP still go there: in the heap, where each asks for a little more than its size, one that was freed would
    not fit the next of the same size. Returns whether the C library can do so (mallopt of glibc).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(M_MMAP_THRESHOLD, MOST_IN_HEAP))


def lock_pages(whole: Tensor) -> None:
    """Page-lock a tensor's memory for as long as it lives."""
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)
    if int(error) != 0:
        raise RuntimeError(
            f"{whole.nbytes / 2**30:.1f} GiB of host memory cannot be page-locked (CUDA error {int(error)}): check "
            "ulimit -l and the memory granted to the job"
        )
    weakref.finalize(whole.untyped_storage(), cudart.cudaHostUnregister, whole.data_ptr()).atexit = False


def host_bytes(
    model: JointConfig,
    parallel: ParallelConfig,
    world: int,
    average: bool,
    kind: type[Optimizer] = AdamW,
    trained: Collection[str] = ALL,
) -> dict[str, int]:
    """Host memory that the first rank, whose shards are the largest, needs for its part of the state, by purpose: the
    copy from which checkpoints are written, the optimizer's state on the host, and ZeRO's intermediate copy.
    `trained`: the towers that are not frozen."""
    with torch.device("meta"):
        return host_bytes_of(JointTransformer(model), parallel, world, average, kind, trained)


def host_bytes_of(
    model: JointTransformer,
    parallel: ParallelConfig,
    world: int,
    average: bool,
    kind: type[Optimizer] = AdamW,
    trained: Collection[str] = ALL,
) -> dict[str, int]:
    """`host_bytes` of a whole model that is there, on any device."""
    replicate, *_ = check_degrees(parallel, world)
    shards = world // replicate
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    element = 8 if parallel.compute_dtype == "float64" else 4
    held = {name: element * -(-shape[0] // shards) * math.prod(shape[1:]) for name, shape in shapes.items()}
    whole, learned = sum(held.values()), sum(size for name, size in held.items() if tower_of(name) in trained)
    copy = whole + (len(kind.KEYS) + average) * learned
    return {
        "copy for checkpoints": copy,
        "moments": len(kind.KEYS) * learned if parallel.optimizer_state == "host" else 0,
        "ZeRO's gathered state": copy if parallel.engine != "fsdp2" else 0,
    }


def available_bytes() -> int | None:
    """Bytes still available on this node according to the kernel, the control group and SLURM; None if none reports
    it."""
    limits = []
    for line in _lines(MEMINFO):
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    for folder in _control_groups():
        limit, used = (_number(folder / name) for name in ("memory.max", "memory.current"))
        if limit is not None:
            limits.append(limit - (used or 0))
    if (given := os.environ.get("SLURM_MEM_PER_NODE", "")).isdigit() and int(given):  # MB
        limits.append(int(given) * 2**20)
    return max(0, min(limits)) if limits else None


def host_memory(parts: Mapping[str, int]) -> str:
    """One line: what a rank and this node need of `host_bytes`, and what is available."""
    ranks, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), available_bytes()
    named = ", ".join(f"{what} {size / 2**30:.3g}" for what, size in parts.items() if size)
    free = "" if there is None else f" of {there / 2**30:.3g} available"
    needed = sum(parts.values())
    return f"{needed / 2**30:.3g} GiB a rank ({named}), {ranks * needed / 2**30:.3g} on this node{free}"


def shortage(needed: int, ranks: int) -> str | None:
    """Why `ranks` processes that need so many bytes each do not fit this node, or None."""
    there = available_bytes()
    if there is None or ranks * needed <= there:
        return None
    return (
        f"{ranks} ranks need {ranks * needed / 2**30:.1f} GiB of host memory for checkpoints and moments "
        f"({needed / 2**30:.1f} GiB each), {there / 2**30:.1f} GiB are available: request more (--mem), shard over "
        "more ranks, or set parallel.optimizer_state=device"
    )


def _control_groups() -> list[Path]:
    """The folders of this process's control group and those above it (version 2)."""
    for line in _lines(Path("/proc/self/cgroup")):
        if line.startswith("0::"):
            folder = CGROUP / line[3:].strip().lstrip("/")
            return [each for each in (folder, *folder.parents) if each.is_relative_to(CGROUP)]
    return []


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
