"""Ring attention: local queries over the keys of all ranks; keys and values move on by one rank per turn
(arXiv 2310.01889), partial results merge by log-sum-exp.

Backward sends the keys round again, followed by the gradients that they collect, which are back on their own rank after
a full round. What sums parts is at least float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import register_autograd

from model.attention import merge_attention
from model.backends.operator import backend_of
from train.parallel.sequence.operators import LIBRARY, define, group_of


def ring_attention(q: Tensor, k: Tensor, v: Tensor, blocks: list[int], group: str, backend: str) -> Tensor:
    """q, k, v [B, l, H, D] of this rank -> [B, l, H, D]. `blocks`: tokens of every rank of the ring; H may be 0."""
    out: Tensor = RING(q, k, v, blocks, group, backend)[0]
    return out


def _ring(q: Tensor, k: Tensor, v: Tensor, blocks: list[int], group: str, backend: str) -> tuple[Tensor, Tensor]:
    ranks, kernel = group_of(group), backend_of(backend)
    turns, rank = len(blocks), dist.get_rank(ranks)
    out, lse = q.clone(), _empty_lse(q)
    held = [k, v]  # of the block that is here
    for turn in range(turns):
        last = turn == turns - 1
        rotation = None if last else _start_rotation(held, blocks[(rank - turn - 1) % turns], ranks)
        if q.shape[2]:
            part, part_lse = kernel.with_lse(q, *held)
            first = part.to(_wide(part.dtype)), part_lse
            out, lse = first if turn == 0 else merge_attention(out, lse, part, part_lse)
        held = held if rotation is None else _finish_rotation(rotation)
    return out.to(q.dtype).contiguous(), lse.contiguous()


def _ring_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, blocks: list[int], group: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    ranks, kernel, grad = group_of(group), backend_of(backend), grad.contiguous()
    turns, rank = len(blocks), dist.get_rank(ranks)
    held = [k, v]
    dq = torch.zeros_like(q, dtype=_wide(q.dtype))
    collected = [torch.zeros_like(x, dtype=_wide(x.dtype)) for x in held]  # gradients of the block that is here
    for turn in range(turns):
        last, coming = turn == turns - 1, blocks[(rank - turn - 1) % turns]
        rotation = None if last else _start_rotation(held, coming, ranks)
        if q.shape[2]:
            parts = kernel.backward(grad, q, held[0], held[1], out, lse)
            dq += parts[0]
            for total, part in zip(collected, parts[1:], strict=True):
                total += part
        held = held if rotation is None else _finish_rotation(rotation)
        collected = _finish_rotation(_start_rotation(collected, coming, ranks))
    dk, dv = (x.to(k.dtype).contiguous() for x in collected)
    return dq.to(q.dtype).contiguous(), dk, dv


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=_wide(q.dtype))


Rotation = tuple[list[Tensor], list[Tensor], list[dist.Work]]  # received, sent, what is under way


def _start_rotation(held: list[Tensor], length: int, group: dist.ProcessGroup) -> Rotation:
    """Start sending the local block (each [B, L, H, D]) to the next rank and receiving `length` tokens from the
    previous one."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    sent = [x.contiguous() for x in held]
    received = [x.new_empty(x.shape[0], length, *x.shape[2:]) for x in held]
    if sent[0].numel() == 0:
        return received, sent, []
    operations = [dist.P2POp(dist.isend, x, after, group) for x in sent]
    operations += [dist.P2POp(dist.irecv, x, before, group) for x in received]
    return received, sent, dist.batch_isend_irecv(operations)


def _finish_rotation(rotation: Rotation) -> list[Tensor]:
    received, _, works = rotation
    for work in works:
        work.wait()
    return received


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fake_ring(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _empty_lse(q)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.set_materialize_grads(False)
    ctx.where = inputs[3:]


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *RING_BACKWARD(grad, *ctx.saved_tensors, *ctx.where), None, None, None


_QKV, _WHERE = "Tensor q, Tensor k, Tensor v", "SymInt[] blocks, str group, str backend"
RING = define("ring", f"({_QKV}, {_WHERE}) -> (Tensor, Tensor)", _ring, _fake_ring)
RING_BACKWARD = define(
    "ring_backward",
    f"(Tensor grad, {_QKV}, Tensor out, Tensor lse, {_WHERE}) -> (Tensor, Tensor, Tensor)",
    _ring_backward,
    _fake_backward,
)
register_autograd(RING, _gradients, setup_context=_save, lib=LIBRARY)
