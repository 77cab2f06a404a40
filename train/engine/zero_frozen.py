"""Frozen parts under ZeRO: their float32 weights, which DeepSpeed does not keep.

DeepSpeed holds what is frozen only in the dtype that computes, whole on every rank (ZeRO 1 and 2) or in parts (ZeRO 3).
Checkpoints hold float32, so the float32 weights wait in host memory, split over the ranks as FSDP2 splits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from train.parallel.parallelize import Part


class FrozenWeights:
    """The weights of `parameters`, by name; nothing ever updates them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], mesh: DeviceMesh) -> None:
        """`mesh`: the ranks, for tensors in host memory. The weights are not set before `fill` or `publish`."""
        self._parameters, self._mesh = parameters, mesh
        self.values = {name: self._empty(parameter) for name, parameter in parameters.items()}

    @torch.no_grad()
    def fill(self, part: Part) -> None:
        """Set them all, reading only what this rank holds."""
        for name, value in self.values.items():
            shape, mine = tuple(value.shape), value.to_local()
            _, offsets = compute_local_shape_and_global_offset(shape, self._mesh, [Shard(0)])
            first = offsets[0] * math.prod(shape[1:])
            if mine.numel():
                mine.copy_(part(name, shape, first, first + mine.numel()).view_as(mine))
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy them into the parameters used for computing."""
        for name, value in self.values.items():
            parameter: Any = self._parameters[name]
            whole = value.full_tensor()
            if not hasattr(parameter, "ds_tensor"):
                parameter.copy_(whole)
                continue
            size = parameter.ds_tensor.numel()  # of each rank's part of ZeRO 3; the last ones may be shorter
            mine = whole.flatten()[size * dist.get_rank() : size * (dist.get_rank() + 1)]
            parameter.ds_tensor.data[: mine.numel()].copy_(mine)

    def _empty(self, parameter: Any) -> DTensor:
        shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO 3 leaves it empty between uses
        local, _ = compute_local_shape_and_global_offset(shape, self._mesh, [Shard(0)])
        stride = torch.empty(shape, device="meta").stride()
        held: Tensor = torch.zeros(local, dtype=torch.float32)
        return DTensor.from_local(held, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
