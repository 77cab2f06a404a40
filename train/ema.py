"""An exponential moving average of the weights, in float32 beside each rank's shard of them.

    average = Average(0.9999, shards, group=tower_of)
    average.update(stepped, applied)          # after the optimizer's step
    with average.swapped(): validate(model)   # the averages in the place of the weights

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

K = TypeVar("K")


@dataclass
class EmaConfig:
    """`decay` of the average per update of a parameter (0: no average is kept, and no memory for it). The n-th update
    (from 0) decays by min(decay, (1 + n) / (10 + n)), so that an average does not remember where it started."""

    decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"ema.decay is {self.decay}; give 0 for no average, or a number below 1, as 0.9999")


def tower_of(name: str) -> str:
    """The parameters that are stepped together: "video_dit", "video_dit_2", "audio_dit", "dual_tower_bridge"."""
    return name.split(".")[0]


class Average(Generic[K]):
    """Averages of `weights`, the local shards that an optimizer updates in place; `group` names what steps together.

    They have the weights' dtype, float32 (float64 in a run that computes in it), and lie where the weights lie.
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
        """Take in the weights that a step has moved. The others stay as they are.

        `applied`: 1 where the step was applied, 0 where it was suppressed, on the device (by group, or one for all):
        nothing changes then, and the host does not wait to know.
        """
        rates: dict[str, Tensor] = {}
        for key in stepped:
            group = self._group(key)
            if group not in rates:
                count = self._counts[group]
                moved = (applied if isinstance(applied, Tensor) else applied[group]).to(torch.float64)
                rates[group] = (1 - ((1 + count) / (10 + count)).clamp(max=self._decay)) * moved
                count += moved
            value = self.values[key]
            value.lerp_(self._weights[key], rates[group].to(value.dtype))

    def counts(self) -> dict[str, int]:
        """Updates of each group. Waits for the device."""
        return {group: int(count) for group, count in self._counts.items()}

    def set_counts(self, counts: Mapping[str, int]) -> None:
        """Go on counting from here, by group."""
        for group, count in self._counts.items():
            count.fill_(counts[group])

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew, from the weights as they are."""
        for key, value in self.values.items():
            value.copy_(self._weights[key])
        for count in self._counts.values():
            count.zero_()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages stand where the weights stand, and the weights come back, to the bit. Takes the memory of one
        shard more."""
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
