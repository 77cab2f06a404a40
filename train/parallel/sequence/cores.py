"""Sequence parallelism of this model, applied from outside: the attention cores for sharded tokens.

Every rank of a sequence-parallel group holds a contiguous part of the video tokens (parts may differ by one token, none
is padded) and the whole audio.

- video self-attention: Ulysses (heads for tokens by all-to-all, uneven heads allowed), ring (keys and values go round,
  partial results merge by log-sum-exp, own exact backward), or both: Ulysses inside, ring outside.
- audio tower: replicated. 403 tokens are under 1 % more FLOPs at 8 ranks, and nothing is sent.
- Bridge, video asks audio: local, the audio is here. Bridge, audio asks video: every rank answers from its own keys,
  the answers merge by log-sum-exp; pooled AdaLN's per-frame attention likewise. Video is never sent.

Gradients: the ranks' shares of the loss sum to the loss, and every collective has its exact transpose as backward.
A rank's audio tower then carries a part of the audio's gradient, and the sum over ranks that FSDP forms anyway is the
whole. Nothing is scaled by the degree anywhere.

Precision: every part is computed by the run's attention backend, which rounds it to the compute dtype. What sums parts
(answers, their log-sum-exp, gradients of queries, and of keys and values on their way round) is at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor

from model.attention import AttentionCore, DenseCore
from model.backends.interface import Backend
from model.backends.operator import key_of
from model.block import Block
from model.bridge import Conditioner
from model.joint import JointTransformer
from train.parallel.sequence.merge import merged_attention, merged_frames
from train.parallel.sequence.ring import ring_attention
from train.parallel.sequence.ulysses import receive_heads, send_heads, tokens_for_heads


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


class VideoCore(AttentionCore):
    """Video self-attention over sharded tokens: q, k, v [B, l, H, D] of this rank's tokens -> [B, l, H, D]."""

    def __init__(self, shard: TokenShard, backend: Backend) -> None:
        group = shard.group
        self.shard, self.dense, self.backend = shard, DenseCore(backend), key_of(backend)
        self.ulysses, self.ring = group.ulysses, group.ring
        self.row, self.column = divmod(group.position, group.ulysses)
        self.ulysses_group, self.ring_group = group.ulysses_group.group_name, group.ring_group.group_name

    def start(self, x: Tensor, after: Any = None) -> Any:
        """With Ulysses, v and q travel from now on."""
        return send_heads(x, *self._where(x.shape[2]), after) if self.ulysses > 1 else x

    def __call__(self, q: Any, k: Tensor, v: Any) -> Tensor:
        where = self._where(k.shape[2])
        if self.ulysses > 1:
            q, k, v = receive_heads(q, k, v, *where)
        if self.ring > 1:
            out = ring_attention(q, k, v, [sum(row) for row in self._rows()], self.ring_group, self.backend)
        elif q.shape[2]:
            out = self.dense(q, k, v)
        else:  # more ranks than heads: this one has none, but takes part in the exchanges of backward
            out = q
        return tokens_for_heads(out, *where) if self.ulysses > 1 else out

    def _rows(self) -> list[list[int]]:
        """Tokens of the ranks of each Ulysses row."""
        return [self.shard.lengths[i * self.ulysses : (i + 1) * self.ulysses] for i in range(self.ring)]

    def _where(self, heads: int) -> tuple[list[int], list[int], int, str]:
        """Tokens and heads of the ranks of this Ulysses row, where this rank is among them, and their group."""
        return self._rows()[self.row], shares(heads, self.ulysses), self.column, self.ulysses_group


class MergeCore(AttentionCore):
    """Replicated queries over sharded keys: q [B, Lq, H, D] equal on all ranks, k and v [B, l, H, D] of this rank's
    tokens -> [B, Lq, H, D], equal on all ranks."""

    def __init__(self, group: SequenceGroup, backend: Backend) -> None:
        self.group, self.backend = group.ranks.group_name, key_of(backend)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return merged_attention(q, k, v, self.group, self.backend)


class FrameMergeCore:
    """One query over the tokens of each frame, where a frame's tokens may lie on several ranks."""

    def __init__(self, shard: TokenShard, backend: Backend) -> None:
        self.shard, self.backend = shard, key_of(backend)
        self.rank, self.group = shard.group.position, shard.group.ranks.group_name

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
        """q [1, 1, H, D], k and v [B, l, H, D] -> [B, frames, H, D]."""
        return merged_frames(q, k, v, frames, self.shard.lengths, self.rank, self.group, self.backend)
