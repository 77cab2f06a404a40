"""An exponential moving average of the weights, in float32 beside each rank's shard of them.

    average = Average(0.9999, shards, group=tower_of)
    average.update(stepped, applied)          # after the optimizer's step
    with average.swapped(): validate(model)   # with the averages as weights

Each group of parameters that are stepped together (a tower, the Bridge) counts its own updates, and its decay follows
that count: an expert that idles keeps its average to the bit, and does not come out of its warm-up by waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from core.ranges import bounded

K = TypeVar("K")
VISIT = 2**26  # elements that are worked on at a time, where a copy of them is made: 256 MiB in float32


@dataclass
class EmaConfig:
    """An average of the weights over the updates.

    decay: of the average per update of a parameter (0: no average, and no memory for one); the n-th update (from 0)
        decays by min(decay, (1 + n) / (10 + n)), so that the average forgets where it started
    """

    decay: float = bounded(0.0, "[0, 1)")


def visits(keys: Iterable[K], sizes: Iterable[int]) -> Iterator[list[K]]:
    """The keys of tensors in groups of at most VISIT elements (a larger tensor alone)."""
    visit: list[K] = []
    held = 0
    for key, size in zip(keys, sizes, strict=True):
        if visit and held + size > VISIT:
            yield visit
            visit, held = [], 0
        visit.append(key)
        held += size
    if visit:
        yield visit


class Average(Generic[K]):
    """Averages of `weights`, the local shards that an optimizer updates in place; `group` names what is stepped
    together.

    They have the weights' dtype, float32 (float64 in a run that computes in it), and the weights' device.
    """

    def __init__(self, decay: float, weights: Mapping[K, Tensor], group: Callable[[K], str]) -> None:
        self._decay, self._group = decay, group
        self._weights = {key: weight.detach() for key, weight in weights.items()}
        self.values = {key: weight.clone() for key, weight in self._weights.items()}
        self._counts: dict[str, Tensor] = {}  # updates of each group, on the device
        for key, weight in self._weights.items():
            self._counts.setdefault(group(key), torch.zeros((), dtype=torch.float64, device=weight.device))

    @torch.no_grad()
    def update(self, stepped: Iterable[K], applied: Mapping[str, Tensor] | Tensor) -> None:
        """Include the weights that a step has moved. The other averages do not change.

        `applied`: 1 where the step was applied, 0 where it was suppressed, on the device (by group, or one for all):
        nothing changes then, and the host does not wait to know.
        """
        groups: dict[str, list[K]] = {}
        for key in stepped:
            groups.setdefault(self._group(key), []).append(key)
        for group, keys in groups.items():
            count = self._counts[group]
            moved = (applied if isinstance(applied, Tensor) else applied[group]).to(torch.float64)
            rate = (1 - ((1 + count) / (10 + count)).clamp(max=self._decay)) * moved
            count += moved
            for some in visits(keys, [self.values[key].numel() for key in keys]):
                values = [self.values[key] for key in some]
                away = torch._foreach_sub([self._weights[key] for key in some], values)
                torch._foreach_mul_(away, rate.to(values[0].dtype))
                torch._foreach_add_(values, away)

    def counts(self) -> dict[str, int]:
        """Updates of each group. Waits for the device, once."""
        counts = torch.stack([*self._counts.values()]).tolist()
        return {group: int(count) for group, count in zip(self._counts, counts, strict=True)}

    def set_counts(self, counts: Mapping[str, int]) -> None:
        """Continue counting from these numbers, by group."""
        for group, count in self._counts.items():
            count.fill_(counts[group])

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew, from the current weights."""
        for key, value in self.values.items():
            value.copy_(self._weights[key])
        for count in self._counts.values():
            count.zero_()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """While entered the weights are the averages; afterwards they are restored to the bit. Needs the memory of one
        more shard."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for key, value in self.values.items():
            weight = self._weights[key]
            kept = weight.clone()
            weight.copy_(value)
            value.copy_(kept)
