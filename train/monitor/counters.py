"""Counts what a rank sends: calls and bytes by mesh axis and collective.

    with CollectiveCounter(layout) as counter:
        forward_backward(...)
    counter.bytes["fsdp", "all_gather"]

Bytes are those that leave the rank under the bandwidth-optimal algorithm of each collective over n ranks: all-gather
and reduce-scatter (n-1)/n of the whole, all-reduce twice that, all-to-all the parts for other ranks, a send its
message.

Blocks that torch.compile has compiled run eagerly while a counter is entered (torch skips them under any dispatch
mode): what they send is the same, the step is slower.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.parallel.mesh import Layout
from train.parallel.sequence.operators import BODIES, run_body

# Operators of torch.distributed by their usual names. Receives and barriers send nothing.
KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "reduce_": "reduce",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "send": "send",
    "broadcast_": "broadcast",
}

# What each axis is used for. Axes that span the same ranks share one group in torch: the first that fits is counted.
USES = {
    "ulysses": ("all_to_all",),
    "ring": ("send",),
    "sequence": ("all_reduce",),
    "dp_replicate": ("all_reduce",),
    "fsdp": ("all_gather", "reduce_scatter", "all_reduce", "reduce", "broadcast"),
}


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that are issued while it is entered, forward and backward, on this rank."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        groups = layout.groups()
        self._axes = {axis: groups[axis].group_name for axis in USES if groups[axis].size() > 1}
        self.bytes: Counter[tuple[str, str]] = Counter()  # by (axis, collective)
        self.calls: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in BODIES:
            return run_body(self, func, args, kwargs)
        if func.namespace == "c10d":
            self._count(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def axis_bytes(self, axis: str) -> int:
        """All bytes over one mesh axis."""
        return sum(count for (name, _), count in self.bytes.items() if name == axis)

    def metrics(self) -> dict[str, float]:
        """All counts, under metric names: "perf/comm/fsdp/all_gather_bytes", "..._calls"."""
        found: dict[str, float] = {}
        for axis, kind in sorted(self.calls):
            found[f"perf/comm/{axis}/{kind}_bytes"] = float(self.bytes[axis, kind])
            found[f"perf/comm/{axis}/{kind}_calls"] = float(self.calls[axis, kind])
        return found

    def _count(self, name: str, args: Any) -> None:
        kind = KINDS.get(name)
        if kind is None:
            return
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        ranks = group.size()
        called = group.group_name
        axis = next((a for a, known in self._axes.items() if known == called and kind in USES[a]), "world")
        # The whole that is gathered is the output, the whole that is scattered or exchanged the input.
        size = _nbytes(args[1] if kind in ("reduce_scatter", "all_to_all") else args[0])
        factor = {"all_reduce": 2 * (ranks - 1) / ranks, "send": 1.0}.get(kind, (ranks - 1) / ranks)
        if name == "alltoall_base_" and args[4]:  # uneven: what this rank keeps is one part of many sizes
            rows = args[1].shape[0]
            factor = 1 - args[4][group.rank()] / rows if rows else 0.0
        self.calls[axis, kind] += 1
        self.bytes[axis, kind] += round(size * factor)


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(_nbytes(item) for item in value) if isinstance(value, (list, tuple)) else 0
