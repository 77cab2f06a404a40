"""AdamW (arXiv 1711.05101): torch's fused kernel over a rank's shards. See protocol.py beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from train.optimizer.protocol import LocalShard


class Settings(Protocol):
    """What AdamW reads from OptimConfig (train/engine/optim_config.py), besides the settings of each group."""

    betas: list[float]
    eps: float


class AdamW(torch.optim.AdamW):
    """Decoupled weight decay; two moments for each element."""

    KEYS: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    SHARD: ClassVar[str] = "elements"

    @classmethod
    def make(cls, groups: list[dict[str, Any]], settings: Settings) -> Self:
        """See Optimizer."""
        return cls(groups, betas=(settings.betas[0], settings.betas[1]), eps=settings.eps, fused=True)

    def update(self, suppressed: Tensor) -> None:
        """See Optimizer. The fused kernel's own switch: torch reads both attributes, as GradScaler sets them."""
        switch: Any = self
        switch.found_inf, switch.grad_scale = suppressed, None
        self.step()

    @torch.no_grad()
    def moved(self, shards: Sequence[LocalShard]) -> Tensor:
        """See Optimizer: lr·m̂ / (√v̂ + eps)."""
        (first, second), eps = self.defaults["betas"], self.defaults["eps"]
        states = [shard.state for shard in shards if shard.state is not None]
        steps = states[0]["step"].to(torch.float64)
        bias = (1 - second**steps).clamp(min=1e-12).sqrt()
        moves = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
        torch._foreach_div_(moves, bias.to(moves[0].dtype))
        torch._foreach_add_(moves, eps)
        torch._foreach_reciprocal_(moves)  # in place: a division would need the memory twice
        torch._foreach_mul_(moves, [state["exp_avg"] for state in states])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(moves))).to(torch.float64) * shards[0].lr
        unbiased: Tensor = norm / (1 - first**steps).clamp(min=1e-12)
        return unbiased
