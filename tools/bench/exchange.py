"""Bandwidth and latency between the processes of this machine, or of several under torchrun.

    mova bench exchange sheet=my-machine.yaml     # all GPUs of this machine, or 2 processes on the CPU
    torchrun --nnodes 2 --nproc-per-node 8 ... -m tools.bench.exchange sheet=my-machine.yaml   # the network too

All-gather, reduce-scatter, all-to-all and all-reduce by NCCL on GPUs and gloo on the CPU. The rate of a process counts
the bytes that leave it, as nccl-tests' bus bandwidth does. A sheet's node_gb_s is that of an all-gather, a
reduce-scatter and an all-to-all of the largest size together; its network_gb_s is what enters a node in an all-gather
and a reduce-scatter over all nodes, all adapters together; its latency_us is an all-gather of a number. Each is timed
`rounds` times, on the slowest process; a sheet gets the 10th percentile, the median and the best.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from core.compose import Schema
from core.errors import UserError
from core.program import Call, Program
from core.ranges import bounded
from tools.bench import rates
from tools.bench.ranks import on_ranks

GPU_MIB, CPU_MIB = [1, 16, 128, 1024], [1, 4, 16]
KINDS = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce")
MIB = 2**20


@dataclass
class ExchangeBench:
    """What is measured.

    mebibytes: sizes of the whole tensor; []: by the device
    processes: of this machine; 0: all GPUs, or 2 on the CPU. torchrun's own are those that it started
    rounds: how often
    sheet: a YAML file that gets the rates; null: none
    """

    mebibytes: list[int] = bounded([], "[1, 65536]")
    processes: int = bounded(0, "[0, 4096]")
    rounds: int = bounded(20, "[1, inf)")
    sheet: str | None = None


def measure(mebibytes: list[int], rounds: int, local: int) -> dict[str, list[float]]:
    """By round, of the slowest process: "node" and "network" (GB/s; network only among several nodes), "latency" (us),
    and "KIND SIZE" (GB/s) within a node. All processes of the group call; `local`: those of a node."""
    world, rank = dist.get_world_size(), dist.get_rank()
    device = rates.the_device()
    groups = [dist.new_group(list(range(first, first + local))) for first in range(0, world, local)]
    mine = groups[rank // local]
    largest = max(mebibytes)

    def once() -> dict[str, float]:
        spent: dict[str, float] = {"latency": _seconds("all-gather", 4 * local, mine, local, device)}
        for size in mebibytes:
            for kind in KINDS:
                spent[f"{kind} {size}"] = _seconds(kind, size * MIB, mine, local, device)
        if world > local:
            for kind in KINDS[:2]:
                spent[f"network {kind}"] = _seconds(kind, largest * MIB, None, world, device)
        slowest: list[dict[str, float]] = [{} for _ in range(world)]
        dist.all_gather_object(slowest, spent)
        return _as_rates({name: max(one[name] for one in slowest) for name in spent}, mebibytes, local, world)

    return rates.in_rounds(rounds, once)


def _as_rates(spent: dict[str, float], mebibytes: list[int], local: int, world: int) -> dict[str, float]:
    """GB/s of seconds; latency in us."""
    found = {"latency": 1e6 * spent["latency"]}
    for size in mebibytes:
        for kind in KINDS:
            found[f"{kind} {size}"] = sent(kind, size * MIB, local) / spent[f"{kind} {size}"] / 1e9
    largest = max(mebibytes)
    three = KINDS[:3]
    moved = sum(sent(kind, largest * MIB, local) for kind in three)
    found["node"] = moved / sum(spent[f"{kind} {largest}"] for kind in three) / 1e9
    if world > local:
        entering = 2 * sent("all-gather", largest * MIB, world // local)
        found["network"] = entering / sum(spent[f"network {kind}"] for kind in KINDS[:2]) / 1e9
    return found


def sent(kind: str, size: int, members: int) -> float:
    """Bytes that leave each member in a collective over a tensor of `size` bytes (of each, where each has one)."""
    return size * (members - 1) / members * (2 if kind == "all-reduce" else 1)


def _seconds(kind: str, size: int, group: Any, members: int, device: torch.device) -> float:
    """Of one collective on a tensor of about `size` bytes in float32. Every member calls it as often as the others."""
    whole = torch.zeros(max(1, size // (4 * members)) * members, device=device)
    part, other = whole.chunk(members)[0].clone(), torch.zeros_like(whole)
    actions: dict[str, Callable[[], object]] = {
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all-to-all": lambda: dist.all_to_all_single(other, whole, group=group),
        "all-reduce": lambda: dist.all_reduce(whole, group=group),
    }
    times = 20 if size < MIB else 2
    dist.barrier(group=group)

    def several() -> None:
        for _ in range(times):
            actions[kind]()

    return rates.time_of(several, device, least=0.0) / times


def run(call: Call[ExchangeBench]) -> None:
    """Measure, print and merge into the sheet."""
    bench, gpus = call.config, torch.cuda.device_count()
    sizes = bench.mebibytes or (GPU_MIB if gpus else CPU_MIB)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        found, world = _under_torchrun(sizes, bench.rounds, local)
        if int(os.environ["RANK"]):
            return
    else:
        local = world = bench.processes or gpus or 2
        if gpus and world > gpus:
            raise UserError(f"processes is {world}, and this machine has {gpus} GPUs: give {gpus} at most")
        if local < 2:
            raise UserError("an exchange needs two processes: this machine has one GPU (processes=2 on two)")
        found = on_ranks(world, measure, sizes, bench.rounds, local, backend="nccl" if gpus else "gloo")[0]
    report(found, sizes, local, world, bool(gpus), call)


def _under_torchrun(sizes: list[int], rounds: int, local: int) -> tuple[dict[str, list[float]], int]:
    """What the processes find that torchrun has started, and how many they are."""
    if local < 2:
        raise UserError("an exchange needs two processes on each node: torchrun --nproc-per-node 2 or more")
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        return measure(sizes, rounds, local), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def report(
    found: dict[str, list[float]], sizes: list[int], local: int, world: int, on_gpu: bool, call: Call[ExchangeBench]
) -> None:
    """Print the table and write the sheet."""
    node, latency = rates.spread(found["node"]), rates.spread(found["latency"], times=True)
    network = rates.spread(found["network"]) if "network" in found else [local * value for value in node]
    names = [f"{kind} {size}" for kind in KINDS for size in sizes]
    rows = [(f"{name} MiB", rates.spread(found[name]), "GB/s") for name in names]
    rows += [("node_gb_s", node, f"GB/s of a process, {local} in a node"), ("latency_us", latency, "us")]
    rows += [("network_gb_s", network, f"GB/s of a node, {world // local} nodes")] if "network" in found else []
    rates.show(rows)
    keys = {
        "node_gpus": local if on_gpu else max(local, os.cpu_count() or 1),
        "node_gb_s": node, "network_gb_s": network, "latency_us": latency,
    }  # fmt: skip
    notes = {"network_gb_s": "assumed: one node was measured; its processes as fast to another node as within it"}
    rates.merge_sheet(call.config.sheet, keys, call.command, {} if "network" in found else notes)


PROGRAM = Program("bench exchange", __doc__, run, schema=Schema("bench_exchange", ExchangeBench, ()))

if __name__ == "__main__":
    PROGRAM.start()
