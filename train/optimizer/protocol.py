"""The protocol between engines and optimizers. An optimizer is one file; adamw.py is the pattern.

The engines shard, clip, average and save; an optimizer moves the weights that it is given. It is a torch optimizer,
so that DeepSpeed can drive it, with a few additions:

- `KEYS`: the tensors of a shard's shape that it keeps from update to update. They are saved as `optim.<name>.<key>`,
  may live in host memory, and are counted where memory is planned. Beside them `state[shard]` holds "step", a float32
  scalar that counts updates. All of them begin as zeros.
- `SHARD`: what it needs of a parameter to update it, see SHARDS. An engine that cannot give it refuses.
- `update`: one update that can be suppressed on the device.
- `moved`: how far the last update went.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from torch import Tensor

# What a rank holds of a parameter, from what is always there to what only an unsharded one has.
SHARDS = ("elements", "rows", "all")


class Optimizer(Protocol):
    """A torch.optim.Optimizer over shards, some or all of which have a gradient."""

    KEYS: ClassVar[tuple[str, ...]]
    SHARD: ClassVar[str]

    param_groups: list[dict[str, Any]]
    state: Any  # by shard: "step" and KEYS; nothing before the first update

    @classmethod
    def make(cls, groups: list[dict[str, Any]], settings: Any) -> Self:
        """One over `groups`, each with "params", "lr" and "weight_decay". `settings`: train/engine/optim_config.py's
        OptimConfig."""

    def step(self, closure: Any = None) -> Any:
        """torch's: one update of every shard that has a gradient. The others are not touched at all."""

    def update(self, suppressed: Tensor) -> None:
        """As `step`, but where the scalar `suppressed` is 1, weights, KEYS and counts stay as they were to the bit. It
        lies on the device, and the host must not wait for it."""

    def moved(self, shards: Sequence[LocalShard]) -> Tensor:
        """The 2-norm (a float64 scalar on the device) of what the last update took away from shards that have a state,
        weight decay not counted. They are of one tower, with one LR, and so have had equally many updates. The host
        must not wait for it."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's."""


class LocalShard(NamedTuple):
    """A part of the weights on this rank with its optimizer state (None before its first update)."""

    tower: str  # see train.engine.ema.tower_of
    weights: Tensor
    state: dict[str, Tensor] | None
    lr: float  # of the last update


def refusal(kind: type[Optimizer], given: str, by: str) -> str | None:
    """A message if an optimizer needs more of a parameter than an engine provides (one of SHARDS), else None.

    `by`: the engine, with the remedy.
    """
    if SHARDS.index(kind.SHARD) <= SHARDS.index(given):
        return None
    return f"{kind.__name__} needs {kind.SHARD} of each parameter, {by}"
