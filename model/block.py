"""The transformer block that both towers are made of, and its modulation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.fused import LayerNorm, add_gated, modulate
from model.rope import Rotary


class Block(nn.Module):
    """Self-attention and feed-forward, both modulated by time, with unmodulated text cross-attention between.

    Reference: DiTBlock (MOVA, after Wan 2.1).
    """

    def __init__(self, dim: int, num_heads: int, ffn_dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = Attention(dim, num_heads, eps)
        self.cross_attn = Attention(dim, num_heads, eps)
        self.norm3 = LayerNorm(dim, eps=eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Tensor, text: Tensor, time: Tensor, rotary: Rotary) -> Tensor:
        """x [B, L, d] tokens, text [B, Lt, d], time [B, 6, d] in at least float32. Returns [B, L, d].

        x may be wider than the weights: norms, modulation, gates and sums are then computed in its dtype, and what the
        linears are given is rounded to theirs.
        """
        dtype = self.norm3.weight.dtype
        modulation = (self.modulation + time).to(x.dtype).unsqueeze(2)  # [B, 6, 1, d]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)
        attended = modulate(x, shift_a, scale_a, self.eps, dtype)
        x = add_gated(x, gate_a, self.self_attn(attended, attended, rotary, rotary))
        x = x + self.cross_attn(self.norm3(x), text)
        return add_gated(x, gate_m, self.ffn(modulate(x, shift_m, scale_m, self.eps, dtype)))
