"""Replicated queries over sharded keys: every rank answers from its own keys, the answers merge by log-sum-exp.

The output is the same value on every rank, so its gradient is the sum of what arrives on each. With that sum and the
global log-sum-exp, a rank's own keys give its part of dq and the whole of its own dk and dv. What sums parts is at
least float32.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import register_autograd

from model.backends.operator import backend_of
from train.parallel.sequence.operators import LIBRARY, define, group_of


def merged_attention(q: Tensor, k: Tensor, v: Tensor, group: str, backend: str) -> Tensor:
    """q [B, Lq, H, D], equal on all ranks; k and v [B, l, H, D] of this rank's tokens -> [B, Lq, H, D], equal on all
    ranks."""
    out: Tensor = MERGE(q, k, v, group, backend)[0]
    return out


def merged_frames(
    q: Tensor, k: Tensor, v: Tensor, frames: int, tokens: list[int], rank: int, group: str, backend: str
) -> Tensor:
    """One query over the tokens of each frame, where a frame's tokens may lie on several ranks.

    q [1, 1, H, D], equal on all ranks; k and v [B, l, H, D] of this rank's tokens -> [B, frames, H, D], equal on all
    ranks. `tokens`: those of every rank of the group, in which this one is `rank`.
    """
    out: Tensor = FRAMES(q, k, v, frames, tokens, rank, group, backend)[0]
    return out


def _merge(q: Tensor, k: Tensor, v: Tensor, group: str, backend: str) -> tuple[Tensor, Tensor]:
    part, part_lse = backend_of(backend).with_lse(q, k, v)
    out, lse = _merge_ranks(part, part_lse.transpose(1, 2), group_of(group))
    return out.contiguous(), lse.transpose(1, 2).contiguous()


def _merge_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, group: str, backend: str
) -> tuple[Tensor, ...]:
    grad = _sum(grad, group_of(group))
    return tuple(x.contiguous() for x in backend_of(backend).backward(grad, q, k, v, out, lse))


def _frames(
    q: Tensor, k: Tensor, v: Tensor, frames: int, tokens: list[int], rank: int, group: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Output [B, frames, H, D] and log-sum-exp [B, frames, H]."""
    batch, _, heads, width = k.shape
    out = k.new_zeros(batch, frames, heads, width)
    lse = torch.full((batch, frames, heads), -torch.inf, dtype=_wide(k.dtype), device=k.device)
    query = q.expand(batch, -1, -1, -1)
    for frame, first, last in _pieces(frames, tokens, rank):
        part, part_lse = backend_of(backend).with_lse(query, k[:, first:last], v[:, first:last])
        out[:, frame], lse[:, frame] = part[:, 0], part_lse[:, :, 0]
    out, lse = _merge_ranks(out, lse, group_of(group))
    return out.contiguous(), lse.contiguous()


def _frames_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    frames: int, tokens: list[int], rank: int, group: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad = _sum(grad, group_of(group))
    query = q.expand(k.shape[0], -1, -1, -1).contiguous()
    dq, dk, dv = torch.zeros_like(q, dtype=_wide(q.dtype)), torch.zeros_like(k), torch.zeros_like(v)
    for frame, first, last in _pieces(frames, tokens, rank):
        row = slice(frame, frame + 1)
        parts = backend_of(backend).backward(
            grad[:, row], query, k[:, first:last], v[:, first:last], out[:, row],
            lse[:, row].transpose(1, 2).contiguous(),
        )  # fmt: skip
        dq += parts[0].sum(0, keepdim=True, dtype=dq.dtype)
        dk[:, first:last], dv[:, first:last] = parts[1], parts[2]
    return dq.to(q.dtype), dk, dv


def _pieces(frames: int, tokens: list[int], rank: int) -> list[tuple[int, int, int]]:
    """(frame, first, last) of every frame that has tokens here, in this rank's tokens."""
    stop = [*accumulate(tokens)][rank]
    start, size = stop - tokens[rank], sum(tokens) // frames
    return [
        (frame, max(frame * size, start) - start, min((frame + 1) * size, stop) - start)
        for frame in range(start // size, -(-stop // size))
    ]


def _merge_ranks(part: Tensor, lse: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """part [B, L, H, D] and its lse [B, L, H] on each rank -> the merge of all, equal on every rank."""
    highest = lse.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    weight = torch.exp(lse - highest).unsqueeze(-1)  # [B, L, H, 1], 0 where a rank had no key
    summed = torch.cat((part.to(weight.dtype) * weight, weight), dim=-1).contiguous()
    dist.all_reduce(summed, group=group)
    total = summed[..., -1]
    return (summed[..., :-1] / total.unsqueeze(-1)).to(part.dtype), highest + torch.log(total)


def _sum(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group in at least float32."""
    wide = grad.to(_wide(grad.dtype), copy=True).contiguous()
    dist.all_reduce(wide, group=group)
    return wide.to(grad.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _fake_merge(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _width = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=_wide(q.dtype))


def _fake_frames(q: Tensor, k: Tensor, v: Tensor, frames: int, *_: Any) -> tuple[Tensor, Tensor]:
    batch, _length, heads, width = k.shape
    return k.new_empty(batch, frames, heads, width), k.new_empty(batch, frames, heads, dtype=_wide(k.dtype))


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.set_materialize_grads(False)
    ctx.where = inputs[3:]


def _merge_gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *MERGE_BACKWARD(grad, *ctx.saved_tensors, *ctx.where), None, None


def _frames_gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *FRAMES_BACKWARD(grad, *ctx.saved_tensors, *ctx.where), None, None, None, None, None


_QKV, _SAVED = "Tensor q, Tensor k, Tensor v", "Tensor out, Tensor lse"
_WHERE = "SymInt frames, SymInt[] tokens, int rank, str group, str backend"
MERGE = define("merge", f"({_QKV}, str group, str backend) -> (Tensor, Tensor)", _merge, _fake_merge)
MERGE_BACKWARD = define(
    "merge_backward",
    f"(Tensor grad, {_QKV}, {_SAVED}, str group, str backend) -> (Tensor, Tensor, Tensor)",
    _merge_backward,
    _fake_backward,
)
FRAMES = define("frames", f"({_QKV}, {_WHERE}) -> (Tensor, Tensor)", _frames, _fake_frames)
FRAMES_BACKWARD = define(
    "frames_backward",
    f"(Tensor grad, {_QKV}, {_SAVED}, {_WHERE}) -> (Tensor, Tensor, Tensor)",
    _frames_backward,
    _fake_backward,
)
register_autograd(MERGE, _merge_gradients, setup_context=_save, lib=LIBRARY)
register_autograd(FRAMES, _frames_gradients, setup_context=_save, lib=LIBRARY)
