"""The optimizer on the local shards, LR groups, clipping by the norm of the true global gradient.

It holds plain tensors that share storage with the shards: no DTensor dispatch, and a rank's state is exactly
what its shard needs. train/engine/schedule.py has the LR of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from core.errors import RunError
from train.engine.ema import Average, visits
from train.engine.norms import squares_by_group
from train.engine.optim_config import OptimConfig, decay_of, rate_of
from train.optimizer.adamw import AdamW
from train.optimizer.protocol import LocalShard, Optimizer, refusal
from train.parallel.host_memory import allocate
from train.parallel.parts import GROUPS, PLACES, tower_of


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (the tensor itself if it is whole), sharing storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedOptimizer:
    """An optimizer over the local shards of a model's parameters that require a gradient, by name."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        shard_group: dist.ProcessGroup | None,
        state_on_host: bool = False,
        ema_decay: float = 0.0,
        kind: type[Optimizer] = AdamW,
    ) -> None:
        """`shard_group`: the ranks among which a parameter is split, over which the norm is summed (None: whole).

        `state_on_host`: its state lies in (pinned) host memory and is copied to the device in a step, a part at a time.
        `ema_decay`: above 0, `average` holds averages of the shards (train/engine/ema.py).
        RunError when this kind of optimizer needs more of a parameter than a shard.
        """
        whole = shard_group is None or shard_group.size() == 1
        if fault := refusal(kind, "all" if whole else "rows", "of which FSDP2 gives each rank some rows"):
            raise RunError(fault)
        self.config = config
        self.limit = math.inf  # see `step`
        self.squares: Tensor | None = None  # of the last global gradient, by group of train/engine/norms.py
        self.state_on_host = state_on_host
        self._host_state: dict[tuple[Tensor, str], Tensor] = {}  # by shard and key
        self.parameters = dict(model.named_parameters())
        self.shard_group = shard_group
        self.shards = {n: nn.Parameter(local(p.detach())) for n, p in self.parameters.items() if p.requires_grad}
        self.average = Average(ema_decay, self.shards, tower_of) if ema_decay else None
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, shard in self.shards.items():
            rate, decay = rate_of(name, config), decay_of(name, config)
            fresh = {"params": [], "lr": rate, "base_rate": rate, "weight_decay": decay}
            groups.setdefault((rate, decay), fresh)["params"].append(shard)
        self.inner = kind.make(list(groups.values()), config)

    def global_norm(self) -> Tensor:
        """2-norm of the gradient of the whole model (a scalar on the device); collect gradients first.

        Replicas hold equal gradients, so the squares are summed over one shard group only: each element counts once.
        """
        gradients = [(name, local(p.grad)) for name, p in self.parameters.items() if p.grad is not None]
        self.squares = squares_by_group(gradients, next(iter(self.shards.values())).device)
        if self.shard_group is not None:
            dist.all_reduce(self.squares, group=self.shard_group)
        return self.squares.sum().sqrt()

    def held(self) -> Iterator[LocalShard]:
        """The shards that are trained, with their state."""
        rates = {group["base_rate"]: group["lr"] for group in self.inner.param_groups}
        for name, shard in self.shards.items():
            rate = rates[rate_of(name, self.config)]
            yield LocalShard(tower_of(name), shard.detach(), self.inner.state.get(shard), rate)

    def step(self, factor: float, norm: Tensor) -> None:
        """Clip by the global `norm`, update at `factor` times each group's LR, and drop the gradients.

        A gradient that is not finite, or above `limit`, suppresses the whole update on the device: weights, state and
        step counts stay.
        Parameters without a gradient (the idle expert, an absent modality's tower, all in a step that has nothing to
        train) are not touched at all.
        """
        scale = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
        for name, shard in self.shards.items():
            gradient = self.parameters[name].grad
            shard.grad = None if gradient is None else local(gradient)
            self.parameters[name].grad = None
        gradients = [shard.grad for shard in self.shards.values() if shard.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
        for group in self.inner.param_groups:
            group["lr"] = group["base_rate"] * factor
        suppressed = (~torch.isfinite(norm) | (norm > self.limit)).to(torch.float32)
        if self.state_on_host:
            self._update_from_host(suppressed)
        else:
            self.inner.update(suppressed)
        if self.average is not None:
            stepped = [name for name, shard in self.shards.items() if shard.grad is not None]
            self.average.update(stepped, 1 - suppressed)
        self.inner.zero_grad(set_to_none=True)

    def host_state(self, shard: Tensor, key: str) -> Tensor:
        """Zeros in host memory, page-locked where that speeds up copies, for what the optimizer keeps of a shard."""
        if not self._host_state:
            wanted: dict[tuple[Tensor, str], Tensor] = {
                (one, name): one.detach() for one in self.shards.values() for name in self.inner.KEYS
            }
            self._host_state = allocate(wanted, page_locked=shard.is_cuda)
        return self._host_state[shard, key].zero_()

    def _update_from_host(self, suppressed: Tensor) -> None:
        """Update the shards that have a gradient, with the state of a few of them on the device at a time."""
        groups, state, keys = self.inner.param_groups, self.inner.state, self.inner.KEYS
        try:
            for group in groups:
                moved = [shard for shard in group["params"] if shard.grad is not None]
                for visit in visits(moved, [shard.numel() for shard in moved]):
                    waiting = {shard: dict(state[shard]) for shard in visit if shard in state}
                    for shard, kept in waiting.items():
                        for key in keys:
                            state[shard][key] = kept[key].to(shard.device, copy=True, non_blocking=True)
                    self.inner.param_groups = [{**group, "params": visit}]
                    self.inner.update(suppressed)
                    for shard in visit:
                        for key in keys:
                            buffer = waiting[shard][key] if shard in waiting else self.host_state(shard, key)
                            state[shard][key] = buffer.copy_(state[shard][key], non_blocking=True)
        finally:
            self.inner.param_groups = groups


@torch.no_grad()
def update_squares(shards: Iterable[LocalShard], optimizer: Optimizer, device: torch.device) -> Tensor:
    """Sums of squares [groups of train/engine/norms.py] float64 of what the optimizer's last update took away."""
    found = torch.zeros(len(GROUPS), dtype=torch.float64, device=device)
    together: dict[tuple[str, float], list[LocalShard]] = {}
    for shard in shards:
        if shard.state is None or shard.state[optimizer.KEYS[0]].device != shard.weights.device:
            continue  # what lies on the host would have to visit the device for this alone
        together.setdefault((shard.tower, shard.lr), []).append(shard)
    for (tower, _), some in together.items():
        for visit in visits(some, [shard.weights.numel() for shard in some]):
            found[PLACES[tower]] += optimizer.moved(visit).square()
    return found
