"""The attention module that the whole model uses, and the replaceable core between its projections."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.backends.interface import Backend
from model.backends.sdpa import Sdpa
from model.fused import RMSNorm
from model.rope import Rotary


class AttentionCore(Protocol):
    """What an attention computes between its projections: the one seam that sequence parallelism replaces."""

    def start(self, x: Tensor, after: Any = None) -> Any:
        """Called for v, then for q with `after` = what v became, as soon as each is there [B, L, H, D]: what it returns
        takes the tensor's place in the call. A core that moves tensors between ranks begins to."""
        return x

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, Lq, H, D], k and v [B, Lk, H, D] -> [B, Lq, H, D]."""
        ...


class DenseCore(AttentionCore):
    """Attention of one process over the whole sequence."""

    def __init__(self, backend: Backend | None = None) -> None:
        """`backend`: None for torch's own."""
        self.backend = backend or Sdpa()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.backend(q, k, v)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial attentions of the same queries over disjoint keys by their log-sum-exp.

    out_* [B, L, H, D], lse_* [B, H, L]. Returns the attention over both key sets, in the dtype of the log-sum-exp (at
    least float32: a sum over many parts must not be rounded at each of them), and its log-sum-exp.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(x - lse).transpose(1, 2).unsqueeze(-1) for x in (lse_a, lse_b))  # [B, L, H, 1]
    return out_a * weight_a + out_b * weight_b, lse


class Attention(nn.Module):
    """Multi-head attention with RMSNorm of q and k over the whole width (all heads together) before the head split.

    ``dim`` is the width of queries and output, ``kv_dim`` that of keys and values (self-attention: the same).
    Reference: WanModel's SelfAttention and CrossAttention, and the Bridge's inner attention.
    """

    def __init__(self, dim: int, num_heads: int, eps: float, kv_dim: int | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} does not split into {num_heads} heads")
        kv_dim = dim if kv_dim is None else kv_dim
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(kv_dim, dim)
        self.v = nn.Linear(kv_dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps=eps)
        self.norm_k = RMSNorm(dim, eps=eps)
        self.core: AttentionCore = DenseCore()

    def forward(self, x: Tensor, y: Tensor, rotary_q: Rotary | None = None, rotary_k: Rotary | None = None) -> Tensor:
        """x [B, Lq, dim] gives queries, y [B, Lk, kv_dim] keys and values; tables rotate q and k by position. Returns
        [B, Lq, dim]."""
        v = self.core.start(self.v(y).unflatten(-1, (self.num_heads, -1)))  # [B, Lk, H, D]
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))  # [B, Lq, H, D]
        if rotary_q is not None:
            q = rotary_q.turn(q)
        q = self.core.start(q, after=v)
        k = self.norm_k(self.k(y)).unflatten(-1, (self.num_heads, -1))  # [B, Lk, H, D]
        if rotary_k is not None:
            k = rotary_k.turn(k)
        out: Tensor = self.o(self.core(q, k, v).flatten(2))
        return out
