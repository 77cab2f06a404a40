"""AdamW on the local shards, LR groups, LR schedule, clipping by the norm of the true global gradient.

The optimizer holds plain tensors that share storage with the shards: no DTensor dispatch, and a rank's state is exactly
what its shard needs. LR is a function of the step index only (invariant 8).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.ema import Average, tower_of
from train.probes import Piece, squares_by_group

SCHEDULES = ("constant", "cosine", "wsd")
MOMENTS = ("exp_avg", "exp_avg_sq")
VISIT = 2**26  # elements whose moments are on the device at a time when they lie on the host: 512 MiB


@dataclass
class OptimConfig:
    """AdamW. Learning rates and decay are the paper's (Table 7); what it leaves open has the field's usual values.

    `schedule` after `warmup` steps: "constant", "cosine" down to `final_ratio`, or "wsd": constant, then linear down to
    `final_ratio` over the last `decay` steps. `clip`: largest global gradient norm.
    """

    lr_tower: float = 1e-5
    lr_bridge: float = 2e-5
    weight_decay: float = 0.001
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    clip: float = 1.0
    warmup: int = 1000
    schedule: str = "constant"
    final_ratio: float = 0.1
    decay: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas is {self.betas}; give two numbers in 0..1")
        if self.clip <= 0:
            raise ValueError(f"optim.clip is {self.clip}; a norm is above 0 (a huge one switches clipping off)")
        if self.schedule == "wsd" and self.decay < 1:
            raise ValueError("optim.schedule=wsd needs optim.decay, the steps of its last, falling part")


def lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """What multiplies every group's LR at step `step` (from 0) of `steps`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "cosine":
        progress = min(1.0, (step - config.warmup) / max(1, steps - config.warmup))
        return config.final_ratio + (1 - config.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "wsd" and step >= steps - config.decay:
        progress = min(1.0, (step + 1 - (steps - config.decay)) / config.decay)
        return 1 + (config.final_ratio - 1) * progress
    return 1.0


def group_of(name: str) -> str:
    """The LR group of a parameter by its full name."""
    return "bridge" if name.startswith("dual_tower_bridge.") else "tower"


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies on this rank (the tensor itself when it is whole), sharing storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedOptimizer:
    """A torch optimizer over the local shards of a model's parameters, by name."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        shard_group: dist.ProcessGroup | None,
        state_on_host: bool = False,
        ema_decay: float = 0.0,
    ) -> None:
        """`shard_group`: the ranks among which a parameter is split, over which the norm is summed (None: whole).

        `state_on_host`: the moments lie in (pinned) host memory and visit the device in a step, some at a time.
        `ema_decay`: above 0, `average` holds averages of the shards (train/ema.py).
        """
        self.config = config
        self.limit = math.inf  # see `step`
        self.squares: Tensor | None = None  # of the last global gradient, by group of train/probes.py
        self.state_on_host = state_on_host
        self.parameters = dict(model.named_parameters())
        self.shard_group = shard_group
        self.shards = {name: nn.Parameter(local(p.detach())) for name, p in self.parameters.items()}
        self.average = Average(ema_decay, self.shards, tower_of) if ema_decay else None
        rates = {"tower": config.lr_tower, "bridge": config.lr_bridge}
        self.base_rates = list(rates.values())
        groups = [
            {"params": [shard for name, shard in self.shards.items() if group_of(name) == group], "lr": rate}
            for group, rate in rates.items()
        ]
        self.adamw = torch.optim.AdamW(
            groups,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def global_norm(self) -> Tensor:
        """2-norm of the gradient of the whole model (a scalar on the device); collect gradients first.

        Replicas hold equal gradients, so the squares are summed over one shard group only: each element counts once.
        """
        gradients = [(name, local(p.grad)) for name, p in self.parameters.items() if p.grad is not None]
        self.squares = squares_by_group(gradients, gradients[0][1].device)
        if self.shard_group is not None:
            dist.all_reduce(self.squares, group=self.shard_group)
        return self.squares.sum().sqrt()

    def pieces(self) -> Iterator[Piece]:
        """The shards with their moments."""
        rates = {group: rate["lr"] for group, rate in zip(("tower", "bridge"), self.adamw.param_groups, strict=True)}
        for name, shard in self.shards.items():
            yield Piece(tower_of(name), shard.detach(), self.adamw.state.get(shard), rates[group_of(name)])

    def step(self, factor: float, norm: Tensor) -> None:
        """Clip by the global `norm`, update at `factor` times each group's LR, and drop the gradients.

        A gradient that is not finite, or above `limit`, suppresses the whole update on the device: weights, moments and
        step counts stay.
        Parameters without a gradient (the idle expert) are not touched at all.
        """
        scale = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            self.shards[name].grad = None if gradient is None else local(gradient)
            parameter.grad = None
        gradients = [shard.grad for shard in self.shards.values() if shard.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, scale.to(gradients[0].dtype))
        for group, rate in zip(self.adamw.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        # The fused kernel's own switch: torch reads both attributes off the optimizer, as GradScaler sets them.
        adamw: Any = self.adamw
        suppressed = (~torch.isfinite(norm) | (norm > self.limit)).to(torch.float32)
        adamw.found_inf, adamw.grad_scale = suppressed, None
        if self.state_on_host:
            self._step_from_host()
        else:
            adamw.step()
        if self.average is not None:
            stepped = [name for name, shard in self.shards.items() if shard.grad is not None]
            self.average.update(stepped, 1 - suppressed)
        self.adamw.zero_grad(set_to_none=True)

    def host_moment(self, shard: Tensor) -> Tensor:
        """Zeros in host memory, pinned where that speeds up copies, for a moment of a shard."""
        return torch.zeros(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda)

    def _step_from_host(self) -> None:
        """AdamW over the shards that have a gradient, with the moments of a few of them on the device at a time."""
        groups = self.adamw.param_groups
        state = self.adamw.state
        try:
            for group in groups:
                for visit in _visits([shard for shard in group["params"] if shard.grad is not None]):
                    waiting = {shard: dict(state[shard]) for shard in visit if shard in state}
                    for shard, moments in waiting.items():
                        for key in MOMENTS:
                            state[shard][key] = moments[key].to(shard.device, copy=True, non_blocking=True)
                    self.adamw.param_groups = [{**group, "params": visit}]
                    self.adamw.step()
                    for shard in visit:
                        for key in MOMENTS:
                            place = waiting[shard][key] if shard in waiting else self.host_moment(shard)
                            state[shard][key] = place.copy_(state[shard][key], non_blocking=True)
        finally:
            self.adamw.param_groups = groups


def _visits(shards: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The shards in runs of at most VISIT elements (of one shard where that has more)."""
    visit: list[nn.Parameter] = []
    for shard in shards:
        if visit and sum(x.numel() for x in (*visit, shard)) > VISIT:
            yield visit
            visit = []
        visit.append(shard)
    if visit:
        yield visit
