"""One attention function over all backends, and the module that every attention of the model is.

    out = attention(q, k, v)                               # [B, L, H, D]
    out, lse = attention(q, k, v, return_lse=True)         # lse [B, H, L] float32 (float64 for float64 inputs)

Backends: ``sdpa`` (torch, everywhere), ``cudnn`` (torch's cuDNN kernel, CUDA), ``flash2``, ``flash3``, ``flash4``
(the flash-attn packages, CUDA). ``auto`` takes the fastest one that the device and the installed packages allow.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from model.rope import Rotary

BACKENDS = ("auto", "sdpa", "cudnn", "flash2", "flash3", "flash4")
_PACKAGE = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
# Compute capabilities (major) that each kernel is built for, fastest first.
_CAPABILITY = {"flash4": (9, 10), "flash3": (9,), "flash2": (8, 9, 10, 12), "cudnn": (9, 10)}


class AttentionCore(Protocol):
    """What an attention holds between its projections: the one seam that sequence parallelism replaces."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, Lq, H, D], k and v [B, Lk, H, D] -> [B, Lq, H, D]."""
        ...


class DenseCore:
    """Attention of one process over the whole sequence."""

    def __init__(self, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise ValueError(f"attention backend {backend!r} is not one of {', '.join(BACKENDS)}")
        self.backend = backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, backend=self.backend)
        assert isinstance(out, Tensor)
        return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, backend: str = "auto", return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Unmasked softmax attention with scale 1/sqrt(D).

    q [B, Lq, H, D]; k, v [B, Lk, H, D], same dtype and device. Returns [B, Lq, H, D]; with ``return_lse`` also the
    log-sum-exp of the scaled scores [B, H, Lq]. The log-sum-exp carries no gradient: who merges partial results
    writes the backward of the merge.

    Raises ValueError for an unknown backend and RuntimeError for one that cannot run here (says why).
    """
    name = select_backend(backend, q.device.type, q.dtype, _capability(q.device))
    if name.startswith("flash"):
        return _flash_package(name, q, k, v, return_lse)
    if return_lse:
        return _sdpa_with_lse(name, q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    if name == "cudnn":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial attentions of the same queries over disjoint keys by their log-sum-exp.

    out_* [B, L, H, D], lse_* [B, H, L]. Returns the attention over both key sets and its log-sum-exp.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = (torch.exp(x - lse).transpose(1, 2).unsqueeze(-1) for x in (lse_a, lse_b))  # [B, L, H, 1]
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v for a block of keys, given the output and log-sum-exp over *all* keys of these queries.

    grad, q, out [B, Lq, H, D]; k, v [B, Lk, H, D]; lse [B, H, Lq]. The sum of dq over the blocks is the whole dq:
    P = exp(S - lse) and rowsum(dO·O) are those of the whole row, whatever keys the block holds. This is what a ring
    or a merge over ranks needs (arXiv 2205.14135, appendix B.2).
    """
    heads_first = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
    aten = torch.ops.aten
    if q.device.type == "cpu":
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(*heads_first, lse, 0.0, False)
    elif q.dtype in (torch.bfloat16, torch.float16):
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that is off
        gradients = aten._scaled_dot_product_flash_attention_backward(
            *heads_first, lse, None, None, q.shape[1], k.shape[1], 0.0, False, seed, seed[0]
        )
    else:
        raise RuntimeError(f"attention over blocks of keys needs bfloat16 or float16 on {q.device}, not {q.dtype}")
    dq, dk, dv = (x.transpose(1, 2) for x in gradients[:3])
    return dq, dk, dv


@lru_cache(maxsize=64)
def select_backend(requested: str, device: str, dtype: torch.dtype, capability: int) -> str:
    """Name of the backend that runs: the requested one, or for ``auto`` the fastest that is possible.

    ``capability`` is the major compute capability, 0 without CUDA. Raises ValueError (unknown name) and RuntimeError
    (asked for one that is not possible here; the message says what is missing).
    """
    if requested not in BACKENDS:
        raise ValueError(f"attention backend {requested!r} is not one of {', '.join(BACKENDS)}")
    if requested == "auto":
        fastest_first = ("flash4", "flash3", "cudnn", "flash2") if device == "cuda" else ()
        return next((name for name in fastest_first if not _obstacle(name, device, dtype, capability)), "sdpa")
    obstacle = _obstacle(requested, device, dtype, capability)
    if obstacle:
        raise RuntimeError(f"attention backend {requested!r} cannot run here: {obstacle}; use 'auto' or 'sdpa'")
    return requested


def _obstacle(name: str, device: str, dtype: torch.dtype, capability: int) -> str:
    """Why this backend cannot run, or an empty string."""
    if name == "sdpa":
        return ""
    if device != "cuda":
        return f"it needs a CUDA device, the tensors are on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, the tensors are {dtype}"
    if capability not in _CAPABILITY[name]:
        return f"it is built for compute capabilities {_CAPABILITY[name]}, this device has {capability}.x"
    if name in _PACKAGE and not _installed(_PACKAGE[name]):
        return f"the package {_PACKAGE[name]!r} is not installed (pip install -e '.[cuda]' brings flash-attn 2)"
    return ""


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name is missing
        return False


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _sdpa_with_lse(name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The aten kernels behind scaled_dot_product_attention, which also give the log-sum-exp they hold back there."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, L, D]
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif name == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        lse = lse.reshape(q.shape[:3])
    elif q.dtype in (torch.bfloat16, torch.float16):
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        lse = lse[..., : q.shape[2]]  # the kernel pads the row count
    return out.transpose(1, 2), lse.detach()


def _flash_package(name: str, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    if name == "flash2":
        from flash_attn import flash_attn_func

        if not return_lse:
            return flash_attn_func(q, k, v)
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
        return out, lse.detach()
    if name == "flash3":
        from flash_attn_interface import flash_attn_func as flash3_func

        result = flash3_func(q, k, v, return_attn_probs=True) if return_lse else flash3_func(q, k, v)
    else:
        from flash_attn.cute import flash_attn_func as flash4_func

        result = flash4_func(q, k, v, return_lse=True) if return_lse else flash4_func(q, k, v)
    if return_lse:
        return result[0], result[1].detach()
    return result[0] if isinstance(result, tuple) else result


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
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)
        self.core: AttentionCore = DenseCore()

    def forward(self, x: Tensor, y: Tensor, rotary_q: Rotary | None = None, rotary_k: Rotary | None = None) -> Tensor:
        """x [B, Lq, dim] asks, y [B, Lk, kv_dim] answers; tables turn q and k by position. Returns [B, Lq, dim]."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.num_heads, -1))  # [B, Lq, H, D]
        k = self.norm_k(self.k(y)).unflatten(-1, (self.num_heads, -1))  # [B, Lk, H, D]
        v = self.v(y).unflatten(-1, (self.num_heads, -1))
        if rotary_q is not None:
            q = rotary_q.turn(q)
        if rotary_k is not None:
            k = rotary_k.turn(k)
        return self.o(self.core(q, k, v).flatten(2))
