"""torch's own kernels: ``sdpa`` on every device, ``cudnn`` with cuDNN's attention first.

On CUDA each call goes to the first kernel of an ordered list that can compute it: no kernel is the only one allowed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from model.backends.interface import Needs, needs_cuda

HALF = (torch.bfloat16, torch.float16)


class Sdpa:
    """scaled_dot_product_attention, and the aten kernels behind it that give and take the log-sum-exp."""

    def __init__(self, name: str = "sdpa") -> None:
        """`name`: "sdpa", or "cudnn" to prefer that kernel."""
        self.name = name
        self._first = [SDPBackend.CUDNN_ATTENTION] if name == "cudnn" else []

    def obstacle(self, needs: Needs) -> str:
        """See Backend."""
        if self.name == "cudnn":
            obstacle = needs_cuda(needs, (9, 10))
            return obstacle or ("has no deterministic backward" if needs.deterministic else "")
        if needs.device == "cuda" and needs.blocks:
            return needs_cuda(needs, tuple(range(8, 20)))
        return ""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See Backend."""
        q, k, v = _heads_first(q, k, v)
        if q.device.type != "cuda":
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)
        order = [*self._first, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        order += [] if q.dtype in HALF else [SDPBackend.MATH]  # it keeps all scores: never for long sequences
        with sdpa_kernel(order, set_priority=True):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See Backend."""
        shape = (q.shape[0], q.shape[2], q.shape[1])
        q, k, v = _heads_first(q, k, v)
        aten = torch.ops.aten
        if q.device.type != "cuda":
            out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        elif self._takes_cudnn(q, k, v):
            out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        else:
            out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
        return out.transpose(1, 2), lse.reshape(shape)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Backend."""
        grad, q, k, v, out = _heads_first(grad, q, k, v, out)
        aten, sizes = torch.ops.aten, (q.shape[2], k.shape[2])
        if q.device.type != "cuda":
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, False)
            return _heads_last(*found[:3])
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that is off
        if self._takes_cudnn(q, k, v):
            found = aten._scaled_dot_product_cudnn_attention_backward(
                grad, q, k, v, out, lse.unsqueeze(-1), seed, seed[0], None, None, None, *sizes, 0.0, False
            )
        else:
            found = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse, None, None, *sizes, 0.0, False, seed, seed[0]
            )
        return _heads_last(*found[:3])

    def _takes_cudnn(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether cuDNN is wanted and can compute these shapes."""
        if not self._first:
            return False
        with sdpa_kernel([*self._first, SDPBackend.FLASH_ATTENTION], set_priority=True):
            return torch._fused_sdp_choice(q, k, v) == SDPBackend.CUDNN_ATTENTION.value


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, L, H, D] -> [B, H, L, D]"""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _heads_last(dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
