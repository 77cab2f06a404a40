"""The layout of a run: parallelism degrees, validated, and the device mesh that follows from them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from core.errors import RankError, RunError
from core.ranges import bounded
from model.backends.choice import BACKENDS, Choice, choose
from model.backends.interface import Needs
from model.backends.sdpa import Sdpa
from train.parallel.float8 import LINEARS, obstacle
from train.parallel.recompute import KINDS
from train.parallel.sequence.cores import SequenceGroup

ENGINES = ("fsdp2", "zero1", "zero2", "zero3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
COPY = 64  # ranks of a copy of the model where dp_replicate=-1 and dp_shard=-1: gathers stay within a few nodes
BFLOAT16_FROM = (8, 0)  # least compute capability whose matrix units multiply bfloat16


@dataclass
class ParallelConfig:
    """How a run is laid out over its ranks.

    engine: what shards weights, gradients and optimizer state: "fsdp2", or DeepSpeed's "zero1", "zero2", "zero3" (over
        all ranks, not in float64)
    dp_replicate: number of replicas of the model, each on its own group of ranks; -1: as many as
        dp_shard leaves room for; with dp_shard=-1 too, one for every 64 ranks
    dp_shard: ranks over which each group shards it, times ring and ulysses; -1: all remaining ranks
    ring: ranks that share the tokens of each sample by ring attention
    ulysses: ranks that share the tokens of each sample by Ulysses; ring x ulysses is a sequence-parallel group
    compute_dtype: dtype of weights and activations within a step ("auto": bfloat16 on GPUs that have it, else float32);
        master weights, optimizer state and the reduction of gradients stay float32 (float64 if it is float64)
    residual: dtype of the hidden states from block to block, of what is added to them, modulation and gates:
        "compute", that of compute_dtype, or at least "float32", as in the original Wan
    linear: dtype in which the large linears of the video side multiply: "compute", "float8" (torchao, on GPUs that have
        it, compiled; FSDP2 only), or "float8_emulated", the same roundings on any device, slower, to try what float8
        does to a model (train/parallel/float8.py)
    attention: backend of attention (model/backends/choice.py); "auto": the fastest that works here
    deterministic: the same step gives the same bits on a GPU too, at a cost (train/engine/deterministic.py)
    recompute: activation checkpointing: "none", "full", "attention", "outputs", "selective" or "budget" (see
        train/parallel/recompute.py)
    recompute_gib: GiB that a rank may keep for backward, with recompute=budget
    compile: backend of torch.compile for each block ("inductor"; "aot_eager" to find out quickly whether it compiles),
        or "none"
    accumulate: gradients of several micro-batches are summed "sharded" (reduced in each of them) or "unsharded"
        (reduced in the last only: fewer bytes, but every rank holds a whole gradient; FSDP2 only)
    optimizer_state: kept on the "device" or on the "host" (FSDP2 only; train/engine/optim.py)
    replica_check: steps between comparisons of the replicas' weights and moments (0: never;
    train/faults/replica_check.py)
    """

    engine: str = "fsdp2"
    dp_replicate: int = bounded(1, "[1, inf)", also=-1)
    dp_shard: int = bounded(-1, "[1, inf)", also=-1)
    ring: int = bounded(1, "[1, inf)")
    ulysses: int = bounded(1, "[1, inf)")
    compute_dtype: str = "auto"
    residual: str = "compute"
    linear: str = "compute"
    attention: str = "auto"
    deterministic: bool = False
    recompute: str = "none"
    recompute_gib: float | None = bounded(None, "[0, inf)")
    compile: str = "none"
    accumulate: str = "sharded"
    optimizer_state: str = "device"
    replica_check: int = bounded(500, "[0, inf)")

    def __post_init__(self) -> None:
        choices = {
            "engine": ENGINES, "compute_dtype": ("auto", *DTYPES), "attention": BACKENDS,
            "residual": ("compute", "float32"), "linear": LINEARS,
            "recompute": (*KINDS, "budget"), "accumulate": ("sharded", "unsharded"),
            "optimizer_state": ("device", "host"),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"parallel.{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if (self.recompute == "budget") != (self.recompute_gib is not None):
            raise ValueError(
                f"parallel.recompute={self.recompute} and parallel.recompute_gib={self.recompute_gib}: a budget in GiB "
                "and recompute=budget go together"
            )
        if self.linear == "float8" and self.compile == "none":
            raise ValueError(
                "parallel.linear=float8 needs parallel.compile=inductor: not compiled, its casts take longer than its "
                "products save"
            )
        if self.linear == "float8" and self.compute_dtype not in ("auto", "bfloat16"):
            raise ValueError(f"parallel.linear=float8 needs parallel.compute_dtype=bfloat16, not {self.compute_dtype}")
        if self.engine != "fsdp2":
            if self.linear != "compute":
                raise ValueError(f"parallel.linear={self.linear} needs fsdp2, not {self.engine}")
            if self.optimizer_state == "host":
                raise ValueError(f"parallel.optimizer_state=host needs fsdp2, not {self.engine}")
            if self.dp_replicate != 1:
                raise ValueError(
                    f"parallel.dp_replicate={self.dp_replicate} needs fsdp2; {self.engine} has no replicas"
                )
            if self.compute_dtype == "float64":
                raise ValueError(f"parallel.compute_dtype=float64 needs fsdp2; {self.engine} has float32 masters")
        if self.engine == "zero3" and self.compile != "none":
            raise ValueError(f"parallel.compile={self.compile} needs fsdp2, zero1 or zero2")


@dataclass(frozen=True)
class Layout:
    """The layout of this process group, with this rank's position in it."""

    mesh: DeviceMesh  # ("dp_replicate", "fsdp"): what FSDP runs on; fsdp = dp_shard x ring x ulysses
    device: torch.device
    dp_replicate: int
    dp_shard: int
    dp_rank: int  # this rank's position among those that get different samples; equal within a sequence-parallel group
    sequence: SequenceGroup
    compute: torch.dtype = torch.float32  # of weights and activations within a step
    compute_reason: str = ""  # the reason, if "auto" chose it
    engine: str = "fsdp2"
    attention: Choice = field(default_factory=lambda: Choice(Sdpa()))

    @property
    def dp_world(self) -> int:
        """Groups of ranks that get different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """All ranks: the engine averages gradients over them."""
        return self.dp_world * self.sequence.size

    @property
    def alone(self) -> bool:
        """Whether this is the only rank and computes in the dtype of its weights: FSDP2 would share nothing and cast
        nothing, only copy."""
        return self.world == 1 and self.compute == torch.promote_types(self.compute, torch.float32)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
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
    """(dp_replicate, dp_shard, ring, ulysses) for this many ranks. RunError if their product is not that number."""
    replicate = _copies(config, world)
    fixed = replicate * config.ring * config.ulysses
    given = f"parallel.dp_replicate={replicate}"
    for name in ("ring", "ulysses"):
        given += f" x parallel.{name}={getattr(config, name)}" if getattr(config, name) > 1 else ""
    if world % fixed:
        raise RunError(f"{given} = {fixed} does not divide the {world} ranks of this run")
    shard = world // fixed if config.dp_shard == -1 else config.dp_shard
    if shard < 1 or fixed * shard != world:
        raise RunError(
            f"{given} x parallel.dp_shard={shard} = {fixed * shard}, but the run has {world} ranks; "
            "set dp_shard=-1 to use the remaining ranks"
        )
    return replicate, shard, config.ring, config.ulysses


def _copies(config: ParallelConfig, world: int) -> int:
    """The dp_replicate that -1 means on so many ranks. RunError where there is none."""
    if config.dp_replicate != -1:
        return config.dp_replicate
    sequence = config.ring * config.ulysses
    ranks = min(COPY, world) if config.dp_shard == -1 else config.dp_shard * sequence
    if world % ranks:
        raise RunError(
            f"parallel.dp_replicate=-1 makes copies of {ranks} ranks each, which do not divide the {world} ranks of "
            f"this run; give a multiple of {ranks}, or parallel.dp_replicate=1"
        )
    return world // ranks


def start_process_group(timeout: timedelta | None = None) -> torch.device:
    """Join the process group of torchrun, or be a group of one without it. Returns this rank's device.

    `timeout`: after which a collective gives up on its peers (default: torch's).

    A single process uses an in-memory store: nothing listens on any address. On GPUs this group of all ranks has gloo
    too, for objects and tensors on the host; it is not bound to a device, since torch 2.11 then waits for ever when a
    gloo group of some of the ranks is made (pytorch issue 145376).
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


def group_timeout(group: dist.ProcessGroup) -> timedelta | None:
    """The time after which a collective of this group gives up on its peers; None if its backend has none."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if isinstance(timeout := getattr(options, "_timeout", None), timedelta):
            return timeout
    return None


def spread_timeout() -> None:
    """Give all process groups of this rank the time-out of the first one, which the user chose: those that meshes and
    engines make would have torch's own, of 10 or 30 minutes."""
    c10d = dist.distributed_c10d
    timeout = group_timeout(c10d._get_default_group())
    for group in c10d._world.pg_map:
        if timeout is not None and group_timeout(group) not in (None, timeout):
            c10d._set_pg_timeout(timeout, group)


def make_layout(config: ParallelConfig, device: torch.device, timeout: timedelta | None = None) -> Layout:
    """The layout over the running process group. Raises RunError when the degrees do not fit its size.

    Ranks of a Ulysses row are neighbours (all-to-all stays within a node where it can), then the ring, then dp_shard.
    `timeout`: after which a collective of one of its groups gives up on its peers (default: torch's).
    """
    replicate, shard, ring, ulysses = check_degrees(config, dist.get_world_size())
    sequence, data = ring * ulysses, replicate * shard
    compute, reason = _choose_compute(config, device)
    check_compute(compute, sequence, device.type == "cuda")
    _check_linear(config, device, compute)
    attention = _choose_attention(config, device, compute, sequence)
    ranks = torch.arange(dist.get_world_size())  # three views of them, in the same order
    fsdp, groups, rows = ranks.view(replicate, -1), ranks.view(data, sequence), ranks.view(data, ring, ulysses)
    axes = (fsdp.T, fsdp, groups, rows.flatten(0, 1), rows.transpose(1, 2).flatten(0, 1))
    over_replicas, over_shards, over_sequence, over_row, over_ring = (_group(axis, device, timeout) for axis in axes)
    mesh = DeviceMesh.from_group(
        [over_replicas, over_shards], device.type, fsdp, mesh_dim_names=("dp_replicate", "fsdp")
    )
    group = SequenceGroup(over_sequence, over_row, over_ring, ulysses, ring)
    dp_rank = dist.get_rank() // sequence
    return Layout(mesh, device, replicate, shard, dp_rank, group, compute, reason, config.engine, attention)


def _group(rows: Tensor, device: torch.device, timeout: timedelta | None) -> dist.ProcessGroup:
    """The group of this rank, whose ranks are one of `rows` [groups, size]. On GPUs of NCCL alone: gloo would take a
    socket for each peer in each group."""
    if rows.shape[1] == dist.get_world_size():
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    nccl = "nccl" in dist.get_backend()
    own = None
    for ranks in rows.tolist():
        made = dist.new_group(
            ranks, timeout=timeout, backend="nccl" if nccl else None, device_id=device if nccl else None
        )
        own = made if dist.get_rank() in ranks else own
    assert own is not None
    result: dist.ProcessGroup = own
    return result


def host_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks in the same order for tensors in host memory; it describes placement, and has no groups to
    communicate over."""
    return DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names, _init_backend=False)


def sockets(config: ParallelConfig, world: int, on_gpus: bool) -> int:
    """The most sockets that a rank's process groups hold: one for each peer in a gloo group and one that listens, and
    those of the store. NCCL's own, of which there are few a node where it has a fast network, come on top."""
    replicate, shard, ring, ulysses = check_degrees(config, world)
    sequence = ring * ulysses
    gloo = [world, world]  # of all ranks: objects and tensors on the host; checkpoints (train/checkpoint/saver.py)
    gloo += [sequence] if sequence > 1 else []  # samples that a group shares (train/dataloader.py)
    if not on_gpus:
        gloo += [size for size in (replicate, shard * sequence, sequence, ulysses, ring) if size != world]
    return sum(gloo) + world + 1  # the first rank has the store: a connection from each, and one that listens


def check_compute(compute: torch.dtype, sequence: int, on_gpus: bool) -> None:
    """RunError when ranks that share the tokens of a sample cannot compute in this dtype."""
    if on_gpus and sequence > 1 and compute not in (torch.bfloat16, torch.float16):
        raise RunError(
            f"parallel.compute_dtype={str(compute).removeprefix('torch.')} with parallel.ring x parallel.ulysses = "
            f"{sequence} on GPUs: their attention kernels over parts of a sample need bfloat16; set "
            "parallel.compute_dtype=bfloat16, or ring=1 ulysses=1"
        )


def check_linear(config: ParallelConfig, on_gpus: bool) -> None:
    """RunError for float8 without GPUs."""
    if config.linear == "float8" and not on_gpus:
        raise RunError(
            "parallel.linear=float8 needs GPUs of compute capability 8.9 or more; set parallel.linear=compute, or "
            "float8_emulated to try its roundings here"
        )


def _check_linear(config: ParallelConfig, device: torch.device, compute: torch.dtype) -> None:
    """RunError on all ranks where one of them cannot multiply in float8."""
    if config.linear != "float8":
        return
    check_linear(config, device.type == "cuda")
    found = obstacle(device, compute)
    able = torch.tensor([int(not found), -int(not found)])
    dist.all_reduce(able, dist.ReduceOp.MIN)
    none, some = not able[1].item(), not able[0].item()
    if found:
        refusal = f"parallel.linear=float8 {found}; or set parallel.linear=compute"
        raise RunError(refusal) if none or dist.get_rank() == 0 else RankError(refusal)
    if some:
        raise RunError("parallel.linear=float8 cannot run on every rank; set parallel.linear=compute")


def _choose_compute(config: ParallelConfig, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype, equal on all ranks, and for "auto" the reason."""
    if config.compute_dtype != "auto":
        return DTYPES[config.compute_dtype], ""
    if device.type != "cuda":
        return torch.float32, f"auto: on {device.type}"
    able = torch.tensor(int(torch.cuda.get_device_capability(device) >= BFLOAT16_FROM))
    dist.all_reduce(able, dist.ReduceOp.MIN)
    capability = ".".join(map(str, BFLOAT16_FROM))
    if able.item():
        return torch.bfloat16, f"auto: every GPU has compute capability {capability} or more"
    return torch.float32, f"auto: a GPU has a compute capability below {capability}"


def _choose_attention(config: ParallelConfig, device: torch.device, compute: torch.dtype, sequence: int) -> Choice:
    """The backend of all ranks: those of one run must compute alike. RunError where one cannot."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    needs = Needs(device.type, compute, capability, blocks=sequence > 1, deterministic=config.deterministic)
    choice, refusal = None, ""
    try:
        choice = choose(config.attention, needs)
    except RuntimeError as error:
        refusal = f"parallel.attention={config.attention}: {error}"
    mine = -1 if choice is None else BACKENDS.index(choice.backend.name)
    ends = torch.tensor([mine, -mine])
    dist.all_reduce(ends, dist.ReduceOp.MIN)
    least, most = ends[0].item(), -ends[1].item()
    if choice is None:
        raise RunError(refusal) if most < 0 or dist.get_rank() == 0 else RankError(refusal)
    if least < 0:
        raise RunError(f"parallel.attention={config.attention} cannot run on every rank")
    if least != most:
        raise RankError(
            f"parallel.attention={config.attention} would be {choice.describe()} on rank {dist.get_rank()}, and another"
            " one elsewhere; install the same packages everywhere, or name a backend that all ranks have"
        )
    return choice
