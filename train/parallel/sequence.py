"""Sequence parallelism of this model, applied from outside: the attention cores for sharded tokens.

Every rank of a sequence-parallel group holds a contiguous part of the video tokens (parts may differ by one token, none
is padded) and the whole audio.

- video self-attention: Ulysses (heads for tokens by all-to-all, uneven heads allowed), ring (keys and values go round,
  partial results merge by log-sum-exp, own exact backward), or both: Ulysses inside, ring outside.
- audio tower: replicated. 403 tokens are under 1 % more FLOPs at 8 ranks, and nothing is sent.
- Bridge, video asks audio: local, the audio is here. Bridge, audio asks video: every rank answers from its own keys,
  the answers merge by log-sum-exp; pooled AdaLN's per-frame attention likewise. Video is never sent.

Gradients: the ranks' shares of the loss sum to the loss, and every collective here has its exact transpose as backward.
A rank's audio tower then carries a part of the audio's gradient, and the sum over ranks that FSDP forms anyway is the
whole. Nothing is scaled by the degree anywhere.

Precision: every part is computed by the run's attention backend, which rounds it to the compute dtype. What sums parts
(answers, their log-sum-exp, gradients of queries, and of keys and values on their way round) is at least float32.

torch.compile works around the cores here, not into them: what it makes of exchanges within an autograd function has
wrong gradients (torch 2.11), and there is nothing to fuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.attention import DenseCore, merge_attention
from model.backends.interface import Backend
from model.block import Block
from model.bridge import Conditioner
from model.joint import JointTransformer


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share the tokens of one sample: `ring` rows of `ulysses` ranks each.

    `ranks`: all of them; `ulysses_group` and `ring_group` are this rank's row and column. A rank's position in `ranks`
    is ring position · ulysses + ulysses position.
    """

    ranks: dist.ProcessGroup
    ulysses_group: dist.ProcessGroup
    ring_group: dist.ProcessGroup
    ulysses: int
    ring: int

    @property
    def size(self) -> int:
        """Ranks that share a sample."""
        return self.ulysses * self.ring

    @property
    def position(self) -> int:
        """This rank's position among them."""
        return dist.get_rank(self.ranks)


class TokenShard:
    """Which rank holds which tokens of the current sample. The model calls it once per forward, the cores read the
    result."""

    def __init__(self, group: SequenceGroup) -> None:
        self.group = group
        self.lengths: list[int] = []  # tokens of every rank of the group

    def __call__(self, count: int) -> slice:
        """This rank's tokens of `count`. ValueError when there are fewer tokens than ranks."""
        if count < self.group.size:
            raise ValueError(f"{count} video tokens are too few for {self.group.size} sequence-parallel ranks")
        self.lengths = shares(count, self.group.size)
        return self.mine

    @property
    def mine(self) -> slice:
        """This rank's tokens."""
        ends = list(accumulate(self.lengths))
        return slice(ends[self.group.position] - self.lengths[self.group.position], ends[self.group.position])


def shares(count: int, parts: int) -> list[int]:
    """`count` things over `parts` ranks, as evenly as possible, the first ones taking the remainder."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def shard_sequence(model: JointTransformer, group: SequenceGroup, backend: Backend) -> None:
    """Let the model work on this rank's video tokens. Call before checkpointing, compile and FSDP.

    `backend`: computes every part of every attention here.
    """
    _hide_from_compiler()
    shard = TokenShard(group)
    model.token_range = shard
    for tower in (model.video_dit, model.video_dit_2):
        for block in tower.blocks if tower is not None else ():
            assert isinstance(block, Block)
            block.self_attn.core = VideoCore(shard, backend)
    for conditioner in model.dual_tower_bridge.video_to_audio_conditioners.values():
        assert isinstance(conditioner, Conditioner)
        conditioner.inner.core = MergeCore(group, backend)
        if conditioner.per_frame_pooling is not None:
            conditioner.per_frame_pooling.attention.core = FrameMergeCore(shard, backend)


def _hide_from_compiler() -> None:
    """Keep torch.compile out of the cores (see the module's last paragraph). Not by a decorator: torch.compiler.disable
    imports the compiler, which takes a fifth of a program's start, and few programs share tokens."""
    for kind in (VideoCore, MergeCore, FrameMergeCore):
        if not hasattr(kind.__call__, "_torchdynamo_disable"):
            kind.__call__ = torch.compiler.disable(kind.__call__)  # type: ignore[method-assign]


class VideoCore:
    """Video self-attention over sharded tokens: q, k, v [B, l, H, D] of this rank's tokens -> [B, l, H, D]."""

    def __init__(self, shard: TokenShard, backend: Backend) -> None:
        self.shard, self.group, self.dense = shard, shard.group, DenseCore(backend)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ulysses, ring = self.group.ulysses, self.group.ring
        rows = [self.shard.lengths[i * ulysses : (i + 1) * ulysses] for i in range(ring)]
        mine = rows[self.group.position // ulysses]  # tokens of the ranks of this Ulysses row
        heads = shares(q.shape[2], ulysses)
        if ulysses > 1:
            q, k, v = heads_for_tokens(torch.stack((q, k, v)), mine, heads, self.group.ulysses_group).unbind(0)
        if ring > 1:
            out: Tensor = _Ring.apply(q, k, v, [sum(row) for row in rows], self.group.ring_group, self.dense.backend)  # type: ignore[no-untyped-call]
        elif q.shape[2]:
            out = self.dense(q, k, v)
        else:  # more ranks than heads: this one has none, but takes part in the exchanges of backward
            out = q
        if ulysses > 1:
            out = tokens_for_heads(out.unsqueeze(0), mine, heads, self.group.ulysses_group).squeeze(0)
        return out


class MergeCore:
    """Replicated queries over sharded keys: q [B, Lq, H, D] equal on all ranks, k and v [B, l, H, D] of this rank's
    tokens -> [B, Lq, H, D], equal on all ranks."""

    def __init__(self, group: SequenceGroup, backend: Backend) -> None:
        self.group, self.backend = group, backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _Merge.apply(q, k, v, self.group.ranks, self.backend)  # type: ignore[no-untyped-call]
        return out


class FrameMergeCore:
    """One query over the tokens of each frame, where a frame's tokens may lie on several ranks."""

    def __init__(self, shard: TokenShard, backend: Backend) -> None:
        self.shard, self.backend = shard, backend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
        """q [1, 1, H, D], k and v [B, l, H, D] -> [B, frames, H, D]."""
        mine, size = self.shard.mine, sum(self.shard.lengths) // frames
        pieces = []  # (frame, first, last) in local tokens
        for frame in range(mine.start // size, -(-mine.stop // size)):
            first, last = max(frame * size, mine.start), min((frame + 1) * size, mine.stop)
            pieces.append((frame, first - mine.start, last - mine.start))
        out: Tensor = _FrameMerge.apply(q, k, v, frames, pieces, self.shard.group.ranks, self.backend)  # type: ignore[no-untyped-call]
        return out


# --- Ulysses ---------------------------------------------------------------------------------------------------------


def heads_for_tokens(x: Tensor, tokens: list[int], heads: list[int], group: dist.ProcessGroup) -> Tensor:
    """[n, B, l, H, D] of this rank's tokens -> [n, B, sum(tokens), h, D] of this rank's heads.

    tokens and heads: those of every rank of the group; both may be uneven, heads may be 0.
    """
    rank = dist.get_rank(group)
    parts = [part.flatten() for part in x.split(heads, dim=3)]
    sizes = [x.shape[0] * x.shape[1] * t * heads[rank] * x.shape[4] for t in tokens]
    flat = _AllToAll.apply(torch.cat(parts), [p.numel() for p in parts], sizes, group)  # type: ignore[no-untyped-call]
    shape = (*x.shape[:2], -1, heads[rank], x.shape[4])
    if heads[rank] == 0:
        out: Tensor = x.new_zeros(*x.shape[:2], sum(tokens), 0, x.shape[4]) + 0 * flat.sum()
        return out
    return torch.cat([part.view(shape) for part in flat.split(sizes)], dim=2)


def tokens_for_heads(x: Tensor, tokens: list[int], heads: list[int], group: dist.ProcessGroup) -> Tensor:
    """The way back: [n, B, sum(tokens), h, D] -> [n, B, l, H, D]."""
    rank = dist.get_rank(group)
    parts = [part.flatten() for part in x.split(tokens, dim=2)]
    sizes = [x.shape[0] * x.shape[1] * tokens[rank] * h * x.shape[4] for h in heads]
    flat = _AllToAll.apply(torch.cat(parts), [p.numel() for p in parts], sizes, group)  # type: ignore[no-untyped-call]
    shape = (*x.shape[:2], tokens[rank], -1, x.shape[4])
    return torch.cat([part.view(shape) for part in flat.split(sizes) if part.numel()], dim=3)


class _AllToAll(torch.autograd.Function):
    """all_to_all_single with uneven sizes; its transpose is the same with the sizes swapped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes_in: list[int], sizes_out: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (sizes_in, sizes_out), group
        out: Tensor = x.new_empty(sum(sizes_out))
        dist.all_to_all_single(out, x.contiguous(), sizes_out, sizes_in, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sizes_in, sizes_out = ctx.sizes
        out = grad.new_empty(sum(sizes_in))
        dist.all_to_all_single(out, grad.contiguous(), sizes_in, sizes_out, group=ctx.group)
        return out, None, None, None


# --- ring ------------------------------------------------------------------------------------------------------------


class _Ring(torch.autograd.Function):
    """Attention of local queries over the keys of all ranks of a ring; keys and values move on by one rank per turn.

    Backward sends the keys round again, followed by the gradients that they collect, which are back on their own rank
    after a full round.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[int], group: dist.ProcessGroup, backend: Backend
    ) -> Tensor:
        turns, rank = len(blocks), dist.get_rank(group)
        out, lse = q, _no_lse(q)
        held = torch.stack((k, v))  # [2, B, L, H, D] of the block that is here
        for turn in range(turns):
            last = turn == turns - 1
            rotation = None if last else _start_rotation(held, blocks[(rank - turn - 1) % turns], group)
            if q.shape[2]:
                part, part_lse = backend.with_lse(q, *held)
                first = part.to(_wide(part.dtype)), part_lse
                out, lse = first if turn == 0 else merge_attention(out, lse, part, part_lse)
            held = held if rotation is None else _finish_rotation(rotation)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.group, ctx.backend = blocks, group, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        blocks, group, grad = ctx.blocks, ctx.group, grad.contiguous()
        turns, rank = len(blocks), dist.get_rank(group)
        held = torch.stack((k, v))
        dq = torch.zeros_like(q, dtype=_wide(q.dtype))
        dkv = torch.zeros_like(held, dtype=_wide(k.dtype))  # of the block that is here, accumulated so far
        for turn in range(turns):
            last, coming = turn == turns - 1, blocks[(rank - turn - 1) % turns]
            rotation = None if last else _start_rotation(held, coming, group)
            if q.shape[2]:
                parts = ctx.backend.backward(grad, q, *held, out, lse)
                dq += parts[0]
                dkv += torch.stack(parts[1:])
            held = held if rotation is None else _finish_rotation(rotation)
            dkv = _finish_rotation(_start_rotation(dkv, coming, group))
        dk, dv = dkv.to(k.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None


def _no_lse(q: Tensor) -> Tensor:
    return q.new_zeros(q.shape[0], 0, q.shape[1])


def _start_rotation(held: Tensor, length: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, list[dist.Work]]:
    """Start sending the local block ([n, B, L, H, D]) to the next rank and receiving `length` tokens from the previous
    one."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
    sent = held.contiguous()
    buffer = held.new_empty(*held.shape[:2], length, *held.shape[3:])
    if sent.numel() == 0:
        return buffer, sent, []
    operations = [dist.P2POp(dist.isend, sent, after, group), dist.P2POp(dist.irecv, buffer, before, group)]
    return buffer, sent, dist.batch_isend_irecv(operations)


def _finish_rotation(rotation: tuple[Tensor, Tensor, list[dist.Work]]) -> Tensor:
    buffer, _, works = rotation
    for work in works:
        work.wait()
    return buffer


# --- merges over the group -------------------------------------------------------------------------------------------


class _Merge(torch.autograd.Function):
    """Each rank's partial attention of the same queries, merged on all ranks.

    The output is the same value on every rank, so its gradient is the sum of what arrives on each. With that sum and
    the global log-sum-exp, a rank's own keys give its part of dq and the whole of its own dk and dv.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, backend: Backend) -> Tensor:
        part, part_lse = backend.with_lse(q, k, v)
        out, lse = _merge_ranks(part, part_lse.transpose(1, 2), group)
        lse = lse.transpose(1, 2).contiguous()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.backend = group, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = _sum(grad, ctx.group)
        return *ctx.backend.backward(grad, q, k, v, out, lse), None, None


class _FrameMerge(torch.autograd.Function):
    """`_Merge` with one query a frame, over the pieces of frames that lie here."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        frames: int,
        pieces: list[tuple[int, int, int]],
        group: dist.ProcessGroup,
        backend: Backend,
    ) -> Tensor:
        batch, _, heads, width = k.shape
        out = k.new_zeros(batch, frames, heads, width)
        lse = torch.full((batch, frames, heads), -torch.inf, dtype=_wide(k.dtype), device=k.device)
        query = q.expand(batch, -1, -1, -1)
        for frame, first, last in pieces:
            part, part_lse = backend.with_lse(query, k[:, first:last], v[:, first:last])
            out[:, frame], lse[:, frame] = part[:, 0], part_lse[:, :, 0]
        out, lse = _merge_ranks(out, lse, group)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces, ctx.group, ctx.backend = pieces, group, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = _sum(grad, ctx.group)
        query = q.expand(k.shape[0], -1, -1, -1).contiguous()
        dq, dk, dv = torch.zeros_like(q, dtype=_wide(q.dtype)), torch.zeros_like(k), torch.zeros_like(v)
        for frame, first, last in ctx.pieces:
            row = slice(frame, frame + 1)
            parts = ctx.backend.backward(
                grad[:, row], query, k[:, first:last], v[:, first:last], out[:, row],
                lse[:, row].transpose(1, 2).contiguous(),
            )  # fmt: skip
            dq += parts[0].sum(0, keepdim=True, dtype=dq.dtype)
            dk[:, first:last], dv[:, first:last] = parts[1], parts[2]
        return dq.to(q.dtype), dk, dv, None, None, None, None


def _merge_ranks(part: Tensor, lse: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """part [B, L, H, D] and its lse [B, L, H] on each rank -> the merge of all, equal on every rank."""
    highest = lse.clone()
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
