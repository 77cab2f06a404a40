"""Sums of squares by module group: of weights, of gradients, of the last update.

Everything here is a sum that ranks add up in the vector of train/parallel/step_sums.py, so nothing waits for the
device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from train.parallel.parts import GROUPS, PLACES, tower_of


@torch.no_grad()
def squares_by_group(tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> Tensor:
    """Sums of squares [groups] float64 of (parameter name or tower, values)."""
    found = torch.zeros(len(GROUPS), dtype=torch.float64, device=device)
    grouped: dict[int, list[Tensor]] = {}
    for name, values in tensors:
        grouped.setdefault(PLACES[tower_of(name)], []).append(values)
    for index, parts in grouped.items():  # a tensor of places would come from the host, and wait for the device
        found[index] = torch.stack(torch._foreach_norm(parts)).to(torch.float64).square().sum()
    return found
