"""The layout of a run: how many ranks share what, validated, and the device mesh that follows from it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from train.errors import RunError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class ParallelConfig:
    """How a run is laid out over its ranks.

    `dp_replicate` groups hold the model each, sharded over `dp_shard` ranks (-1: all ranks that are left).
    `compute` is the dtype of weights and activations within a step; master weights, optimizer state and the reduction
    of gradients stay float32 (float64 when `compute` is float64). `attention`: a backend of model.attention.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    compute: str = "float32"
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.compute not in DTYPES:
            raise ValueError(f"parallel.compute {self.compute!r} is not one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Layout:
    """The layout of this process group, with this rank's place in it."""

    mesh: DeviceMesh  # ("dp_replicate", "dp_shard")
    device: torch.device
    dp_replicate: int
    dp_shard: int
    dp_rank: int  # this rank's place among the ranks that get different samples

    @property
    def dp_world(self) -> int:
        """Ranks that get different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks among which each parameter is split."""
        return self.mesh["dp_shard"].get_group()

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"{self.dp_world} ranks on {self.device.type} = dp_replicate {self.dp_replicate} x dp_shard {self.dp_shard}"
        )


def check_degrees(config: ParallelConfig, world: int) -> tuple[int, int]:
    """(dp_replicate, dp_shard) for this many ranks. Raises RunError when the product is not the number of ranks."""
    replicate, shard = config.dp_replicate, config.dp_shard
    if replicate < 1 or world % replicate:
        raise RunError(f"parallel.dp_replicate={replicate} does not divide the {world} ranks of this run")
    if shard == -1:
        shard = world // replicate
    if shard < 1 or replicate * shard != world:
        raise RunError(
            f"parallel.dp_replicate={replicate} x parallel.dp_shard={shard} = {replicate * shard}, "
            f"but the run has {world} ranks; set dp_shard=-1 to take those that are left"
        )
    return replicate, shard


def start_process_group() -> torch.device:
    """Join the process group of torchrun, or be a group of one without it. Returns this rank's device.

    One process alone uses an in-memory store: nothing listens on any address.
    """
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def make_layout(config: ParallelConfig, device: torch.device) -> Layout:
    """The layout over the running process group. Raises RunError when the degrees do not fit its size."""
    replicate, shard = check_degrees(config, dist.get_world_size())
    mesh = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard"))
    return Layout(mesh, device, replicate, shard, dist.get_rank())
