"""Attention of a backend as an operator of torch: one whole for checkpointing, the compiler and fake tensors.

    torch.ops.mova.attention(q, k, v, key_of(backend))           # (output, log-sum-exp)

A flash-attn package's autograd function hides its kernel from torch; as an operator, its output can be named in a
checkpoint's list of what is kept. Operators take numbers, texts and tensors only, so a backend is passed by its key.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from model.backends.interface import Backend

_LIBRARY = Library("mova", "DEF")  # noqa: TOR901
_BACKENDS: dict[str, Backend] = {}


class KernelBackend(Backend, Protocol):
    """A backend whose calls are this operator: it has a function for the kernel alone."""

    def kernel(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp, without gradients. See Backend."""


def key_of(backend: Backend) -> str:
    """The text that names this backend to an operator."""
    for key, known in _BACKENDS.items():
        if known is backend:
            return key
    key = f"{backend.name} {len(_BACKENDS)}"
    _BACKENDS[key] = backend
    return key


def backend_of(key: str) -> Backend:
    """The backend of this key."""
    return _BACKENDS[key]


def _attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    out, lse = cast(KernelBackend, _BACKENDS[backend]).kernel(q, k, v)
    return out.contiguous(), lse.contiguous()


def _fake_attention(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _width = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=wide)


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, backend: str
) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in _BACKENDS[backend].backward(grad, q, k, v, out, lse))


def _fake_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.set_materialize_grads(False)
    ctx.backend = inputs[3]


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *ATTENTION_BACKWARD(grad, *ctx.saved_tensors, ctx.backend), None


_QKV = "Tensor q, Tensor k, Tensor v"
_LIBRARY.define(f"attention({_QKV}, str backend) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"attention_backward(Tensor grad, {_QKV}, Tensor out, Tensor lse, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
_LIBRARY.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
register_fake("mova::attention", _fake_attention, lib=_LIBRARY)
register_fake("mova::attention_backward", _fake_gradients, lib=_LIBRARY)
ATTENTION: Any = torch.ops.mova.attention.default
ATTENTION_BACKWARD: Any = torch.ops.mova.attention_backward.default
register_autograd("mova::attention", _gradients, setup_context=_save, lib=_LIBRARY)
