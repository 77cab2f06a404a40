"""One rank of a group reads, the others receive: every sample is read once per sequence-parallel group.

The group's first rank sends what it read, step by step: the batches before chance and damage, so that all ranks draw
the same noise themselves and agree on what is damaged without further communication.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import Batch
from data.clip import Bucket

TENSORS = tuple(field.name for field in fields(Batch) if field.type == "Tensor")


class Share(Protocol):
    """How a group passes on what its leader read. All ranks of a group make the same calls in the same order."""

    leader: bool

    def send(self, note: dict[str, Any], batches: list[Batch]) -> None:
        """Leader only. `note`: json values."""

    def receive(self) -> tuple[dict[str, Any], list[Batch]]:
        """The others: what the leader's next `send` was given."""


class GroupShare:
    """Broadcasts in a process group of CPU tensors (gloo). The group must serve nothing else.

    group: the ranks that share; its first rank reads. Collectives run in the stream's background thread, and one group
    can't serve two threads: make it for this purpose (`dist.new_group(ranks, backend="gloo")`).
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._source = dist.get_global_rank(group, 0)
        self.leader = dist.get_rank(group) == 0

    def send(self, note: dict[str, Any], batches: list[Batch]) -> None:
        """A header of json, then the tensors as they lie in memory."""
        header = json.dumps({"note": note, "batches": [_header(batch) for batch in batches]}).encode()
        self._broadcast(torch.tensor([len(header)], dtype=torch.int64))
        self._broadcast(torch.frombuffer(bytearray(header), dtype=torch.uint8))
        for batch in batches:
            for name in TENSORS:
                self._broadcast(_octets(getattr(batch, name)))

    def receive(self) -> tuple[dict[str, Any], list[Batch]]:
        """See Share."""
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        header = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(header)
        content = json.loads(header.numpy().tobytes())
        return content["note"], [self._receive_batch(values) for values in content["batches"]]

    def _receive_batch(self, values: dict[str, Any]) -> Batch:
        tensors = {}
        for name, (dtype, shape) in values["tensors"].items():
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            self._broadcast(_octets(tensors[name]))
        return Batch(
            step=values["step"],
            bucket=Bucket.from_dict(values["bucket"]),
            keys=values["keys"],
            sample_numbers=np.array(values["sample_numbers"], dtype=np.int64),
            total_weight=values["total_weight"],
            **tensors,
        )

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, self._source, group=self._group)


def _header(batch: Batch) -> dict[str, Any]:
    tensors = {name: getattr(batch, name) for name in TENSORS}
    return {
        "step": batch.step,
        "bucket": batch.bucket.to_dict(),
        "keys": batch.keys,
        "sample_numbers": batch.sample_numbers.tolist(),
        "total_weight": batch.total_weight,
        "tensors": {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()},
    }


def _octets(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, [n] uint8 over the same memory."""
    return tensor.contiguous().view(-1).view(torch.uint8)
