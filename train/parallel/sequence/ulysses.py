"""Ulysses: all-to-all of heads for tokens before attention, and of tokens for heads behind it (arXiv 2309.14509).

Tokens and heads may be uneven over the ranks, and a rank may have no head. Each tensor is copied once on its way: where
heads are split or joined; with one clip, parts along the tokens lie one after the other in memory and are sent and
received in place. All tensors of an operator are under way at once, in the same order on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import register_autograd

from train.parallel.sequence.operators import LIBRARY, define, group_of


def heads_for_tokens(x: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str) -> list[Tensor]:
    """Each [B, l, H, D] of this rank's tokens -> [B, sum(tokens), h, D] of this rank's heads.

    tokens and heads: those of every rank of the group, in which this one is `rank`.
    """
    out: list[Tensor] = HEADS_FOR_TOKENS(x, tokens, heads, rank, group)
    return out


def tokens_for_heads(x: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str) -> list[Tensor]:
    """The way back: each [B, sum(tokens), h, D] -> [B, l, H, D]."""
    out: list[Tensor] = TOKENS_FOR_HEADS(x, tokens, heads, rank, group)
    return out


def _heads_for_tokens(x: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str) -> list[Tensor]:
    return _exchange(x, 2, heads, 1, tokens, rank, group)


def _tokens_for_heads(x: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str) -> list[Tensor]:
    return _exchange(x, 1, tokens, 2, heads, rank, group)


def _exchange(
    tensors: list[Tensor], split: int, sizes: list[int], join: int, others: list[int], rank: int, group: str
) -> list[Tensor]:
    """Split each tensor along one dimension into parts for the ranks, and join what they send along another."""
    under_way = []
    for x in tensors:
        shapes = [list(x.shape) for _ in others]  # of what each rank sends
        for shape, size in zip(shapes, others, strict=True):
            shape[split], shape[join] = sizes[rank], size
        lengths = [torch.Size(shape).numel() for shape in shapes]
        away = [x.numel() // x.shape[split] * size for size in sizes]
        sent, received = _in_parts(x, split, sizes), x.new_empty(sum(lengths))
        work = dist.all_to_all_single(received, sent, lengths, away, group=group_of(group), async_op=True)
        under_way.append((work, sent, received, shapes, lengths))
    out = []
    for work, _, received, shapes, lengths in under_way:
        work.wait()
        whole = [*shapes[0][:join], sum(others), *shapes[0][join + 1 :]]
        if received.numel() == 0 or torch.Size(whole[:join]).numel() == 1:
            out.append(received.view(whole))
        else:
            parts = zip(received.split(lengths), shapes, strict=True)
            out.append(torch.cat([part.view(shape) for part, shape in parts], dim=join))
    return out


def _in_parts(x: Tensor, dim: int, sizes: list[int]) -> Tensor:
    """The parts of x along `dim`, each contiguous, one after the other: [x.numel()]. No copy where they lie so."""
    if x.shape[:dim].numel() == 1:
        return x.contiguous().flatten()
    if len(set(sizes)) == 1:  # one kernel for all parts
        out: Tensor = x.unflatten(dim, (len(sizes), sizes[0])).movedim(dim, 0).flatten()
        return out
    parts = x.split(sizes, dim)
    flat = x.new_empty(x.numel())
    for place, part in zip(flat.split([part.numel() for part in parts]), parts, strict=True):
        place.view(part.shape).copy_(part)
    return flat


def _fake_heads(x: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str) -> list[Tensor]:
    return [one.new_empty(one.shape[0], sum(tokens), heads[rank], one.shape[3]) for one in x]


def _fake_tokens(x: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str) -> list[Tensor]:
    return [one.new_empty(one.shape[0], tokens[rank], sum(heads), one.shape[3]) for one in x]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.where = inputs[1:]


def _heads_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return TOKENS_FOR_HEADS(grads, *ctx.where), None, None, None, None


def _tokens_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return HEADS_FOR_TOKENS(grads, *ctx.where), None, None, None, None


_SIGNATURE = "(Tensor[] x, SymInt[] tokens, SymInt[] heads, int rank, str group) -> Tensor[]"
HEADS_FOR_TOKENS = define("heads_for_tokens", _SIGNATURE, _heads_for_tokens, _fake_heads)
TOKENS_FOR_HEADS = define("tokens_for_heads", _SIGNATURE, _tokens_for_heads, _fake_tokens)
# An exchange only moves numbers, so its gradient goes the way back.
register_autograd(HEADS_FOR_TOKENS, _heads_backward, setup_context=_save, lib=LIBRARY)
register_autograd(TOKENS_FOR_HEADS, _tokens_backward, setup_context=_save, lib=LIBRARY)
