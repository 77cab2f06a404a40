"""Ulysses: all-to-all of heads for tokens before attention, and of tokens for heads behind it (arXiv 2309.14509).

Tokens and heads may be uneven over the ranks, and a rank may have no head. Each tensor is copied once on its way: where
heads are split or joined; with one clip, parts along the tokens lie one after the other in memory and are sent and
received in place. All tensors of an operator are under way at once, in the same order on every rank.

A compiled block splits the heads itself, where every rank has as many: in backward the kernel that turns q and k reads
what arrives as it lies, and in forward a compiler may write it so. In eager mode that would be one more tensor to
compute again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import register_autograd

from train.parallel.sequence.operators import LIBRARY, define, group_of

Shape = tuple[int, ...]


def heads_for_tokens(x: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str) -> list[Tensor]:
    """Each [B, l, H, D] of this rank's tokens -> [B, sum(tokens), h, D] of this rank's heads.

    tokens and heads: those of every rank of the group, in which this one is `rank`.
    """
    if torch.compiler.is_compiling() and len(set(heads)) == 1:
        x = [one.unflatten(2, (len(heads), heads[0])).movedim(2, 0).contiguous() for one in x]  # [ranks, B, l, h, D]
    out: list[Tensor] = HEADS_FOR_TOKENS(x, tokens, heads, rank, group)
    return out


def tokens_for_heads(x: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str) -> list[Tensor]:
    """The way back: each [B, sum(tokens), h, D] -> [B, l, H, D]."""
    out: list[Tensor] = TOKENS_FOR_HEADS(x, tokens, heads, rank, group, False)
    return out


def _heads_for_tokens(x: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str) -> list[Tensor]:
    """As `heads_for_tokens`, or each from [ranks, B, l, h, D], the heads of every rank apart."""

    def leaving(one: Tensor) -> tuple[Tensor, list[int], list[Shape]]:
        is_split = one.ndim == 5
        batch, width = one.shape[is_split], one.shape[-1]
        away = [batch * tokens[rank] * size * width for size in heads]
        sent = one.contiguous().flatten() if is_split else _in_parts(one, 2, heads)
        return sent, away, [(batch, size, heads[rank], width) for size in tokens]

    return [_joined(*received, dim=1) for received in _exchange(map(leaving, x), group)]


def _tokens_for_heads(
    x: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str, is_split: bool
) -> list[Tensor]:
    """As `tokens_for_heads`; if `is_split`, each to [ranks, B, l, h, D], the heads of every rank apart."""

    def leaving(one: Tensor) -> tuple[Tensor, list[int], list[Shape]]:
        batch, _, mine, width = one.shape
        away = [batch * size * mine * width for size in tokens]
        return _in_parts(one, 1, tokens), away, [(batch, tokens[rank], size, width) for size in heads]

    exchanged = _exchange(map(leaving, x), group)
    if is_split:
        return [received.view(len(shapes), *shapes[0]) for received, shapes in exchanged]
    return [_joined(*received, dim=2) for received in exchanged]


def _exchange(leaving: Iterable[tuple[Tensor, list[int], list[Shape]]], group: str) -> list[tuple[Tensor, list[Shape]]]:
    """Exchange tensors with all ranks; each is sent before the next is asked for.

    leaving: a tensor [N] of parts one after the other, how many numbers go to each rank, and the shape of what each
    rank sends. Returns for each what has come [M], the ranks' one after the other, with its shapes.
    """
    under_way = []
    for sent, away, shapes in leaving:
        lengths = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(lengths))
        work = dist.all_to_all_single(received, sent, lengths, away, group=group_of(group), async_op=True)
        under_way.append((work, sent, received, shapes))  # what is sent lives until it is
    for work, *_ in under_way:
        work.wait()
    return [(received, shapes) for _, _, received, shapes in under_way]


def _joined(received: Tensor, shapes: list[Shape], dim: int) -> Tensor:
    """The parts of these shapes, which lie one after the other, along a dimension. No copy where they lie so."""
    whole = [*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :]]
    if received.numel() == 0 or math.prod(whole[:dim]) == 1:
        return received.view(whole)
    parts = zip(received.split([math.prod(shape) for shape in shapes]), shapes, strict=True)
    return torch.cat([part.view(shape) for part, shape in parts], dim=dim)


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
    return [one.new_empty(one.shape[one.ndim == 5], sum(tokens), heads[rank], one.shape[-1]) for one in x]


def _fake_tokens(
    x: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str, is_split: bool
) -> list[Tensor]:
    if is_split:
        return [one.new_empty(len(heads), one.shape[0], tokens[rank], heads[0], one.shape[3]) for one in x]
    return [one.new_empty(one.shape[0], tokens[rank], sum(heads), one.shape[3]) for one in x]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.where, ctx.is_split = inputs[1:5], inputs[0][0].ndim == 5


def _heads_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return TOKENS_FOR_HEADS(grads, *ctx.where, ctx.is_split), None, None, None, None


def _tokens_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return HEADS_FOR_TOKENS(grads, *ctx.where), None, None, None, None, None


_SIGNATURE = "(Tensor[] x, SymInt[] tokens, SymInt[] heads, int rank, str group{}) -> Tensor[]"
HEADS_FOR_TOKENS = define("heads_for_tokens", _SIGNATURE.format(""), _heads_for_tokens, _fake_heads)
TOKENS_FOR_HEADS = define("tokens_for_heads", _SIGNATURE.format(", bool is_split"), _tokens_for_heads, _fake_tokens)
# An exchange only moves numbers, so its gradient goes the way back.
register_autograd(HEADS_FOR_TOKENS, _heads_backward, setup_context=_save, lib=LIBRARY)
register_autograd(TOKENS_FOR_HEADS, _tokens_backward, setup_context=_save, lib=LIBRARY)
