"""Detects silent corruption: replicas must hold the same bits, so they periodically compare hashes of all they hold.

A processor that gives wrong results without signalling a fault makes one replica drift; its gradients then reach all
others. With `dp_replicate` groups each shard of weights and moments exists that many times. Three or more copies
outvote a wrong one; of two, both are named.
"""

from __future__ import annotations

import socket
from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import RunError
from train.engine.engine import Engine
from train.engine.optim import local
from train.parallel.collectives import gather
from train.parallel.mesh import Layout


def compare_replicas(engine: Engine, layout: Layout, step: int) -> None:
    """Compare weights and moments over `dp_replicate`, bit for bit. All ranks call. Without replicas nothing happens.

    Raises RunError on all ranks, naming the nodes, ranks and tensors that differ.
    """
    if layout.dp_replicate == 1:
        return
    tensors = engine.tensors()
    names = sorted(tensors)
    # Moments that lie on the host visit the device for it: there is nothing faster to hash them.
    shards = (local(tensors[name]).to(layout.device, non_blocking=True) for name in names)
    mine = torch.stack([bit_hash(shard) for shard in shards])  # [tensors] int64
    group = layout.groups()["dp_replicate"]
    everyone = mine.new_empty(layout.dp_replicate, len(names))
    dist.all_gather_into_tensor(everyone, mine.unsqueeze(0), group=group)
    differing = outvoted(everyone.cpu(), dist.get_rank(group))
    mine_is_wrong = f"rank {dist.get_rank()} on {socket.gethostname()} ({_list(differing, names)})"
    found = gather([mine_is_wrong] if differing else [])
    if found:
        raise RunError(
            f"step {step}: replicas of the same weights differ: {'; '.join(found)}; the hardware there gives "
            "wrong results: exclude that node before resuming. No checkpoint has it: all are compared before a save",
            retry=True,
        )


def outvoted(hashes: Tensor, position: int) -> list[int]:
    """Tensors in which the copy at `position` is not that of the majority. hashes: [copies, tensors], on the host.

    Where no value has the majority, every copy counts as differing.
    """
    differing = []
    for column in range(hashes.shape[1]):
        values = hashes[:, column].tolist()
        value, votes = Counter(values).most_common(1)[0]
        if votes < len(values) and (values[position] != value or 2 * votes <= len(values)):
            differing.append(column)
    return differing


def bit_hash(tensor: Tensor) -> Tensor:
    """A scalar int64 of a tensor's bits and their positions, the same on any device: sum of bits · (2 position + 1)."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(whole).flatten().to(torch.int64)
    return (bits * torch.arange(1, 2 * bits.numel() + 1, 2, device=bits.device)).sum()


def _list(columns: list[int], names: list[str]) -> str:
    first = ", ".join(names[column] for column in columns[:2])
    return first if len(columns) < 3 else f"{first} and {len(columns) - 2} more"
