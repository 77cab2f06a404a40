"""The layout of a run: how many ranks share what, validated, and the device mesh that follows from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from model.attention import BACKENDS
from train.errors import RunError
from train.recompute import KINDS
from train.sequence import SequenceGroup

ENGINES = ("fsdp2", "zero1", "zero2", "zero3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class ParallelConfig:
    """How a run is laid out over its ranks.

    `engine`: who shards weights, gradients and optimizer state: "fsdp2", or DeepSpeed's "zero1", "zero2", "zero3" (over
    all ranks, not in float64). `dp_replicate` groups hold the model each, sharded over `dp_shard` x `ring` x `ulysses`
    ranks (dp_shard -1: all that are left). The `ring` x `ulysses` ranks of a sequence-parallel group share the tokens
    of each sample. `compute` is the dtype of weights and activations within a step; master weights, optimizer state and
    the reduction of gradients stay float32 (float64 when `compute` is float64). `attention`: a backend of
    model.attention. `recompute`: activation checkpointing, see train/recompute.py; for "budget" `recompute_gib` is what
    a rank may keep for backward. `compile`: a backend of
    torch.compile for each block ("inductor"; "aot_eager" to find out quickly whether it compiles), or "none".
    `accumulate`: gradients of several micro-batches are summed "sharded" (reduced in each of them) or "unsharded"
    (reduced in the last only: fewer bytes, but every rank holds a whole gradient; FSDP2 only).
    `optimizer_state` lies on the "device" or on the "host" (FSDP2 only; see train/optim.py). `replica_check`: every so
    many steps the replicas compare their weights and moments (0: never; see train/corruption.py).
    """

    engine: str = "fsdp2"
    dp_replicate: int = 1
    dp_shard: int = -1
    ring: int = 1
    ulysses: int = 1
    compute: str = "float32"
    attention: str = "auto"
    recompute: str = "none"
    recompute_gib: float | None = None
    compile: str = "none"
    accumulate: str = "sharded"
    optimizer_state: str = "device"
    replica_check: int = 500

    def __post_init__(self) -> None:
        choices = {
            "engine": ENGINES, "compute": tuple(DTYPES), "attention": BACKENDS, "recompute": (*KINDS, "budget"),
            "accumulate": ("sharded", "unsharded"), "optimizer_state": ("device", "host"),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"parallel.{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        for name in ("dp_replicate", "ring", "ulysses"):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; a degree is 1 or more")
        if (self.recompute == "budget") != (self.recompute_gib is not None):
            raise ValueError(
                f"parallel.recompute={self.recompute} and parallel.recompute_gib={self.recompute_gib}: a budget in GiB "
                "belongs to recompute=budget, and to no other"
            )
        if self.replica_check < 0:
            raise ValueError(f"parallel.replica_check is {self.replica_check}; give steps, or 0 for never")
        if self.engine != "fsdp2":
            if self.optimizer_state == "host":
                raise ValueError(f"parallel.optimizer_state=host needs fsdp2, not {self.engine}")
            if self.dp_replicate > 1:
                raise ValueError(
                    f"parallel.dp_replicate={self.dp_replicate} needs fsdp2; {self.engine} has no replicas"
                )
            if self.compute == "float64":
                raise ValueError(f"parallel.compute=float64 needs fsdp2; {self.engine} has float32 masters")
        if self.engine == "zero3" and self.compile != "none":
            raise ValueError(f"parallel.compile={self.compile} needs fsdp2, zero1 or zero2")


@dataclass(frozen=True)
class Layout:
    """The layout of this process group, with this rank's place in it."""

    mesh: DeviceMesh  # ("dp_replicate", "fsdp"): what FSDP runs on; fsdp = dp_shard x ring x ulysses
    device: torch.device
    dp_replicate: int
    dp_shard: int
    dp_rank: int  # this rank's place among those that get different samples; equal within a sequence-parallel group
    sequence: SequenceGroup
    engine: str = "fsdp2"

    @property
    def dp_world(self) -> int:
        """Groups of ranks that get different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """All ranks: the engine averages gradients over them."""
        return self.dp_world * self.sequence.size

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return dist.get_rank() == 0

    @property
    def shard_group(self) -> dist.ProcessGroup:
        """The ranks among which each parameter is split."""
        return self.mesh["fsdp"].get_group()

    def groups(self) -> dict[str, dist.ProcessGroup]:
        """The groups in which this rank exchanges tensors, by mesh axis. "sequence" is ring x ulysses."""
        groups = {"dp_replicate": self.mesh["dp_replicate"].get_group(), "fsdp": self.shard_group}
        sequence = self.sequence
        return groups | {"sequence": sequence.ranks, "ulysses": sequence.ulysses_group, "ring": sequence.ring_group}

    def describe(self) -> str:
        """One line for the log."""
        degrees = {
            "dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "ring": self.sequence.ring,
            "ulysses": self.sequence.ulysses,
        }  # fmt: skip
        product = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1 or name == "dp_shard")
        return f"{counted(self.world, 'rank')} on {self.device.type} = {product}, {self.engine}"


def counted(number: int, one: str, several: str | None = None) -> str:
    """1 rank, 2 ranks."""
    return f"{number} {one if number == 1 else several or one + 's'}"


def check_degrees(config: ParallelConfig, world: int) -> tuple[int, int, int, int]:
    """(dp_replicate, dp_shard, ring, ulysses) for this many ranks. RunError when the product is not their number."""
    fixed = config.dp_replicate * config.ring * config.ulysses
    given = f"parallel.dp_replicate={config.dp_replicate}"
    for name in ("ring", "ulysses"):
        given += f" x parallel.{name}={getattr(config, name)}" if getattr(config, name) > 1 else ""
    if world % fixed:
        raise RunError(f"{given} = {fixed} does not divide the {world} ranks of this run")
    shard = world // fixed if config.dp_shard == -1 else config.dp_shard
    if shard < 1 or fixed * shard != world:
        raise RunError(
            f"{given} x parallel.dp_shard={shard} = {fixed * shard}, but the run has {world} ranks; "
            "set dp_shard=-1 to take those that are left"
        )
    return config.dp_replicate, shard, config.ring, config.ulysses


def start_process_group(timeout: timedelta | None = None) -> torch.device:
    """Join the process group of torchrun, or be a group of one without it. Returns this rank's device.

    `timeout`: after which a collective gives its peers up (default: torch's).

    One process alone uses an in-memory store: nothing listens on any address.
    """
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def make_layout(config: ParallelConfig, device: torch.device) -> Layout:
    """The layout over the running process group. Raises RunError when the degrees do not fit its size.

    Ranks of a Ulysses row are neighbours (all-to-all stays within a node where it can), then the ring, then dp_shard.
    """
    replicate, shard, ring, ulysses = check_degrees(config, dist.get_world_size())
    sequence, data = ring * ulysses, replicate * shard
    # Three views of the same ranks, in the same order.
    fsdp = init_device_mesh(device.type, (replicate, shard * sequence), mesh_dim_names=("dp_replicate", "fsdp"))
    groups = init_device_mesh(device.type, (data, sequence), mesh_dim_names=("data", "sequence"))
    rows = init_device_mesh(device.type, (data, ring, ulysses), mesh_dim_names=("data", "ring", "ulysses"))
    group = SequenceGroup(
        groups["sequence"].get_group(), rows["ulysses"].get_group(), rows["ring"].get_group(), ulysses, ring
    )
    return Layout(fsdp, device, replicate, shard, dist.get_rank() // sequence, group, config.engine)
