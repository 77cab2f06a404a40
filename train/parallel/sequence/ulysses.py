"""Ulysses: all-to-all of heads for tokens before attention, and of tokens for heads behind it (arXiv 2309.14509).

Tokens and heads may be uneven over the ranks, and a rank may have no head. Each tensor is copied once on its way: where
heads are split or joined; with one clip, parts along the tokens lie one after the other in memory and are sent and
received in place.

v and q leave as soon as they are there (`send_heads`) and travel while q and k are still projected, normed and turned;
`receive_heads` exchanges k and waits for all. In backward it sends all three gradients, of which those of q and v
travel while k's goes back through its projection, and are waited for by the backward of `send_heads`. Each operator
that sends depends on the one before, also where a backward computes and sends again, so that a compiler can change the
order of exchanges on no rank.

A compiled block splits the heads itself, where every rank has as many: in backward the kernel that turns q and k reads
what arrives as it lies, and in forward a compiler may write it so. In eager mode that would be one more tensor to
compute again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import register_autograd

from train.parallel.sequence.operators import LIBRARY, define, group_of

Shape = tuple[int, ...]


class Sent(NamedTuple):
    """What `receive_heads` needs of a tensor that travels. ticket [1]: names it; held: what is being sent, if a
    compiler might otherwise use its memory for something else."""

    ticket: Tensor
    held: list[Tensor]


def send_heads(
    x: Tensor, tokens: list[int], heads: list[int], rank: int, group: str, after: Sent | None = None
) -> Sent:
    """Begin to exchange [B, l, H, D] of this rank's tokens for [B, sum(tokens), h, D] of this rank's heads.

    tokens and heads: those of every rank of the group, in which this one is `rank`; after: what was sent before.
    """
    x = _split(x, heads)
    held = [x.detach()] if torch.compiler.is_compiling() else []
    return Sent(SEND_HEADS(x, None if after is None else after.ticket, tokens, heads, rank, group), held)


def receive_heads(
    q: Sent, k: Tensor, v: Sent, tokens: list[int], heads: list[int], rank: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q and v, which `send_heads` sent, and k [B, l, H, D]: each as [B, sum(tokens), h, D]."""
    out: tuple[Tensor, Tensor, Tensor] = RECEIVE_HEADS(
        q.ticket, _split(k, heads), v.ticket, [*q.held, *v.held], tokens, heads, rank, group
    )
    return out


def _split(x: Tensor, heads: list[int]) -> Tensor:
    """In a compiled block [ranks, B, l, h, D], if every rank has as many heads; else x [B, l, H, D]."""
    if torch.compiler.is_compiling() and len(set(heads)) == 1:
        x = x.unflatten(2, (len(heads), heads[0])).movedim(2, 0).contiguous()
    return x


def tokens_for_heads(x: Tensor, tokens: list[int], heads: list[int], rank: int, group: str) -> Tensor:
    """The way back: [B, sum(tokens), h, D] -> [B, l, H, D]."""
    out: Tensor = TOKENS_FOR_HEADS(x, tokens, heads, rank, group)
    return out


class _Exchange(NamedTuple):
    """One tensor under way. sent lives until it is received; received [N]: the ranks' parts, one after the other, of
    these shapes."""

    work: dist.Work
    sent: Tensor
    received: Tensor
    shapes: list[Shape]

    def finish(self) -> tuple[Tensor, list[Shape]]:
        """What has come, with its shapes."""
        self.work.wait()
        return self.received, self.shapes


_travelling: dict[int, _Exchange] = {}  # by the storage of the ticket, which names no other while it lives


def travelling() -> bool:
    """Whether a tensor that was sent has not been received yet."""
    return bool(_travelling)


def _ticket(exchange: _Exchange) -> Tensor:
    ticket = exchange.sent.new_empty(1)
    _travelling[ticket.untyped_storage()._cdata] = exchange
    return ticket


def _finish(ticket: Tensor) -> tuple[Tensor, list[Shape]]:
    return _travelling.pop(ticket.untyped_storage()._cdata).finish()


def _begin(sent: Tensor, away: list[int], shapes: list[Shape], group: str) -> _Exchange:
    """Send [N], of which `away` numbers go to each rank, and receive parts of these shapes."""
    lengths = [math.prod(shape) for shape in shapes]
    received = sent.new_empty(sum(lengths))
    work = dist.all_to_all_single(received, sent, lengths, away, group=group_of(group), async_op=True)
    assert work is not None
    return _Exchange(work, sent, received, shapes)


def _begin_heads(x: Tensor, tokens: list[int], heads: list[int], rank: int, group: str) -> _Exchange:
    """x [B, l, H, D], or [ranks, B, l, h, D], the heads of every rank apart."""
    is_split = x.ndim == 5
    batch, width = x.shape[is_split], x.shape[-1]
    away = [batch * tokens[rank] * size * width for size in heads]
    sent = x.contiguous().flatten() if is_split else _in_parts(x, 2, heads)
    return _begin(sent, away, [(batch, size, heads[rank], width) for size in tokens], group)


def _begin_tokens(
    x: Tensor, tokens: list[int], heads: list[int], rank: int, group: str, copied: bool = False
) -> _Exchange:
    """x [B, sum(tokens), h, D]. copied: its memory may be written to at once."""
    batch, _, mine, width = x.shape
    away = [batch * size * mine * width for size in tokens]
    sent = _in_parts(x, 1, tokens)
    if copied and sent.untyped_storage()._cdata == x.untyped_storage()._cdata:
        sent = sent.clone()
    return _begin(sent, away, [(batch, tokens[rank], size, width) for size in heads], group)


def _tokens(received: Tensor, shapes: list[Shape], is_split: bool) -> Tensor:
    """What came of all heads: [B, l, H, D], or if `is_split` [ranks, B, l, h, D]."""
    return received.view(len(shapes), *shapes[0]) if is_split else _joined(received, shapes, dim=2)


def _send_heads(x: Tensor, after: Tensor | None, tokens: list[int], heads: list[int], rank: int, group: str) -> Tensor:
    return _ticket(_begin_heads(x, tokens, heads, rank, group))


def _receive_heads(
    q: Tensor, k: Tensor, v: Tensor, held: list[Tensor], tokens: list[int], heads: list[int], rank: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    last = _begin_heads(k, tokens, heads, rank, group)
    found_v, found_q = _joined(*_finish(v), dim=1), _joined(*_finish(q), dim=1)
    return found_q, _joined(*last.finish(), dim=1), found_v


def _send_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: list[int],
    heads: list[int],
    rank: int,
    group: str,
    is_split: bool,
    is_compiled: bool,
    needs_q: bool,
    needs_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients; k's is waited for, of those of q and v tickets are returned, and what nobody needs is waited for too.
    A compiled block uses their memory again."""
    first = _begin_tokens(k, tokens, heads, rank, group)
    others = [_begin_tokens(x, tokens, heads, rank, group, copied=is_compiled) for x in (q, v)]
    tickets = [
        _ticket(one) if needed else one.finish()[0].new_empty(1)
        for one, needed in zip(others, (needs_q, needs_v), strict=True)
    ]
    return tickets[0], _tokens(*first.finish(), is_split), tickets[1]


def _receive_tokens(
    ticket: Tensor, batch: int, width: int, tokens: list[int], heads: list[int], rank: int, is_split: bool
) -> Tensor:
    return _tokens(*_finish(ticket), is_split)


def _heads_for_tokens(x: Tensor, after: Tensor, tokens: list[int], heads: list[int], rank: int, group: str) -> Tensor:
    return _joined(*_begin_heads(x, tokens, heads, rank, group).finish(), dim=1)


def _tokens_for_heads(x: Tensor, tokens: list[int], heads: list[int], rank: int, group: str) -> Tensor:
    return _tokens(*_begin_tokens(x, tokens, heads, rank, group).finish(), is_split=False)


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


def _fake_heads(x: Tensor, tokens: list[int], heads: list[int], rank: int, group: str) -> Tensor:
    return x.new_empty(x.shape[x.ndim == 5], sum(tokens), heads[rank], x.shape[-1])


def _fake_tokens(
    x: Tensor, tokens: list[int], heads: list[int], rank: int, group: str, is_split: bool = False, *_: bool
) -> Tensor:
    return _empty_tokens(x, x.shape[0], x.shape[3], tokens, heads, rank, is_split)


def _empty_tokens(
    like: Tensor, batch: int, width: int, tokens: list[int], heads: list[int], rank: int, is_split: bool
) -> Tensor:
    if is_split:
        return like.new_empty(len(heads), batch, tokens[rank], heads[0], width)
    return like.new_empty(batch, tokens[rank], sum(heads), width)


def _fake_receive_heads(q: Tensor, k: Tensor, v: Tensor, held: list[Tensor], *where: Any) -> tuple[Tensor, ...]:
    return tuple(_fake_heads(k, *where) for _ in range(3))


def _fake_send_tokens(q: Tensor, k: Tensor, v: Tensor, *where: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(1), _fake_tokens(k, *where), v.new_empty(1)


def _save_sent(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, *ctx.where, _ = inputs
    ctx.is_split = x.ndim == 5
    ctx.shape = x.shape[ctx.is_split], x.shape[-1]


def _gradient_of_sent(ctx: Any, ticket: Tensor) -> tuple[Any, ...]:
    return RECEIVE_TOKENS(ticket, *ctx.shape, *ctx.where, ctx.is_split), None, None, None, None, None


def _save_received(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, k, _, held, *ctx.where = inputs
    ctx.held = len(held)
    ctx.is_split = k.ndim == 5


def _gradients_of_received(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Sent on every rank, whatever is needed of them here."""
    needs_q, _, needs_v, *_ = ctx.needs_input_grad
    q, k, v = SEND_TOKENS(*grads, *ctx.where, ctx.is_split, ctx.held > 0, needs_q, needs_v)
    return q if needs_q else None, k, v if needs_v else None, [None] * ctx.held, None, None, None, None


def _save_answers(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)  # the projection that follows keeps it anyway
    ctx.where = inputs[1:]


def _gradient_of_answers(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """After what was sent for the answers, where backward has computed them again."""
    return HEADS_FOR_TOKENS(grad, *ctx.saved_tensors, *ctx.where), None, None, None, None


_SHARES = "SymInt[] tokens, SymInt[] heads, int rank"
_WHERE = f"{_SHARES}, str group"
_QKV = "Tensor q, Tensor k, Tensor v"
_THREE = "(Tensor, Tensor, Tensor)"
SEND_HEADS = define(
    "send_heads", f"(Tensor x, Tensor? after, {_WHERE}) -> Tensor", _send_heads, lambda x, *_: x.new_empty(1)
)
RECEIVE_HEADS = define(
    "receive_heads", f"({_QKV}, Tensor[] held, {_WHERE}) -> {_THREE}", _receive_heads, _fake_receive_heads
)
SEND_TOKENS = define(
    "send_tokens",
    f"({_QKV}, {_WHERE}, bool is_split, bool is_compiled, bool needs_q, bool needs_v) -> {_THREE}",
    _send_tokens,
    _fake_send_tokens,
)
RECEIVE_TOKENS = define(
    "receive_tokens",
    f"(Tensor ticket, SymInt batch, SymInt width, {_SHARES}, bool is_split) -> Tensor",
    _receive_tokens,
    _empty_tokens,
)
HEADS_FOR_TOKENS = define(
    "heads_for_tokens", f"(Tensor x, Tensor after, {_WHERE}) -> Tensor", _heads_for_tokens,
    lambda x, _, *where: _fake_heads(x, *where),
)  # fmt: skip
TOKENS_FOR_HEADS = define("tokens_for_heads", f"(Tensor x, {_WHERE}) -> Tensor", _tokens_for_heads, _fake_tokens)
EXCHANGES = [SEND_HEADS, RECEIVE_HEADS, TOKENS_FOR_HEADS]  # of a forward
# An exchange only moves numbers, so its gradient goes the way back.
register_autograd(SEND_HEADS, _gradient_of_sent, setup_context=_save_sent, lib=LIBRARY)
register_autograd(RECEIVE_HEADS, _gradients_of_received, setup_context=_save_received, lib=LIBRARY)
register_autograd(TOKENS_FOR_HEADS, _gradient_of_answers, setup_context=_save_answers, lib=LIBRARY)
