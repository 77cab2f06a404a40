"""The order of the samples: a pure function of (dataset, batch sizes, seed, window) and of the step.

Each bucket has an endless stream of samples, pass after pass over its shards. A pass permutes the shards, cuts the
permuted list into windows of `window` shards and shuffles the samples inside each window, so that at any time only a
few tars are read. The buckets' batches are merged by exact integer arithmetic in proportion to their sizes. Nothing is
walked and no state is kept: `Order.batch(step)` finds its place in any pass directly, for any step, in any process.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from data.errors import DataError


@dataclass(frozen=True)
class GlobalBatch:
    """One step's samples over all ranks, all of one bucket; G is that bucket's batch size."""

    step: int
    bucket: int
    first_sample: int  # global number of the batch's first sample: slot s holds sample number first_sample + s
    rows: np.ndarray  # [G] int64, rows of the index
    passes: np.ndarray  # [G] int64, the pass of the bucket to which each slot belongs


@dataclass(frozen=True)
class _Pass:
    shards: np.ndarray  # the bucket's shards in this pass's order
    window_start: np.ndarray  # offset in the pass of each window's first sample, and the end


def permutation(count: int, *key: object) -> np.ndarray:
    """Permutation of range(count), [count] int64, fixed by `key`.

    Philox's raw output and a stable sort are the same in every numpy version. `Generator.permutation` is not promised
    to be, and an order that changed with an upgrade in mid-run would silently repeat and drop samples.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return np.argsort(bits, kind="stable")


class Order:
    """The sequence of global batches of one dataset.

    Args:
        fingerprint: of the dataset; part of every key, so that two datasets never share an order.
        shard_start: [S+1] first row of each shard, and the number of rows.
        shard_bucket: [S] bucket of each shard.
        batch_sizes: samples of a global batch, per bucket. Buckets without samples take no part.
        seed: of the whole order.
        window: shards that are mixed (and read) at a time.

    Raises DataError where the sizes are not positive, don't match the buckets, or there is no sample at all.
    """

    def __init__(
        self,
        fingerprint: str,
        shard_start: np.ndarray,
        shard_bucket: np.ndarray,
        batch_sizes: Sequence[int],
        seed: int,
        window: int,
    ) -> None:
        self.fingerprint = str(fingerprint)
        self.seed = int(seed)
        self.window = int(window)
        self.batch_sizes = [int(size) for size in batch_sizes]
        self._first_row = np.asarray(shard_start[:-1], dtype=np.int64)
        self._size = np.diff(np.asarray(shard_start, dtype=np.int64))
        bucket_of = np.asarray(shard_bucket, dtype=np.int64)
        if self.window < 1:
            raise DataError(f"window is {window}: it counts the shards mixed at a time, give 1 or more")
        if min(self.batch_sizes, default=0) < 1:
            raise DataError(f"batch sizes are {self.batch_sizes}: every bucket needs a global batch of 1 or more")
        if len(bucket_of) != len(self._size) or (len(bucket_of) and bucket_of.max() >= len(self.batch_sizes)):
            raise DataError(
                f"{len(self.batch_sizes)} batch sizes for {len(self._size)} shards whose buckets go up to "
                f"{int(bucket_of.max(initial=-1))}: give one batch size per bucket of the dataset"
            )
        self._shards = [np.flatnonzero(bucket_of == bucket) for bucket in range(len(self.batch_sizes))]
        # Samples of one pass, per bucket.
        self.samples = [int(self._size[shards].sum()) for shards in self._shards]
        self._active = [bucket for bucket, samples in enumerate(self.samples) if samples]
        if not self._active:
            raise DataError(f"the dataset {self.fingerprint} has no samples: prepare it again from clips that are kept")
        # Batches per pass are N_b / G_b; over the common multiple of the G_b they become integers.
        common = math.lcm(*(self.batch_sizes[bucket] for bucket in self._active))
        self._rate = {bucket: self.samples[bucket] * (common // self.batch_sizes[bucket]) for bucket in self._active}
        self._total_rate = sum(self._rate.values())
        # A batch touches one or two passes and windows; two of each bucket make the sequential case free.
        self._pass = lru_cache(maxsize=2 * len(self._active))(self._make_pass)
        self._window_rows = lru_cache(maxsize=2 * len(self._active))(self._make_window_rows)

    def counts(self, step: int) -> list[int]:
        """Batches that each bucket has had before `step` (they sum to `step`), in O(buckets · log buckets).

        Batch i of bucket b has the time (2i+1)/rate_b; the merge sorts by time, ties by bucket. With B buckets and
        share_b = rate_b/total, a count stays within 1/2 + (B-2)/2 · share_b of step · share_b: its own rounding and the
        others'.
        """
        counts, _ = self._merge(step)
        return counts

    def _merge(self, step: int) -> tuple[list[int], int]:
        """Counts before `step`, and the bucket of `step`."""
        step = int(step)  # exact integers from here on, and one spelling in the keys
        if step < 0:
            raise ValueError(f"step is {step}: it counts from 0")
        # All batches before the time (2·step - B)/total are certainly before `step`: rounding adds less than 1/2 a
        # bucket, so they are at most `step` and at least step - B. The rest is merged one by one.
        counts = [0] * len(self.batch_sizes)
        early = 2 * step - len(self._active)
        for bucket in self._active:
            numerator = early * self._rate[bucket] - self._total_rate
            counts[bucket] = max(0, -(-numerator // (2 * self._total_rate)))
        heap = [(Fraction(2 * counts[bucket] + 1, self._rate[bucket]), bucket) for bucket in self._active]
        heapq.heapify(heap)
        for _ in range(step - sum(counts)):
            bucket = heap[0][1]
            counts[bucket] += 1
            heapq.heapreplace(heap, (Fraction(2 * counts[bucket] + 1, self._rate[bucket]), bucket))
        return counts, heap[0][1]

    def first_sample(self, step: int) -> int:
        """Samples of all batches before `step`."""
        return sum(count * size for count, size in zip(self.counts(step), self.batch_sizes, strict=True))

    def batch(self, step: int) -> GlobalBatch:
        """The batch of `step` (from 0): a pure function of the constructor's arguments and the step."""
        counts, bucket = self._merge(step)
        size = self.batch_sizes[bucket]
        rows, passes = self._take(bucket, counts[bucket] * size, size)
        first = sum(count * samples for count, samples in zip(counts, self.batch_sizes, strict=True))
        return GlobalBatch(step, bucket, first, rows, passes)

    def _take(self, bucket: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` samples of the bucket's endless stream from position `start`: rows and passes, [count] each."""
        rows = np.empty(count, dtype=np.int64)
        passes = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            number, offset = divmod(start + done, self.samples[bucket])
            starts = self._pass(bucket, number).window_start
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            inside = offset - int(starts[window])
            part = self._window_rows(bucket, number, window)[inside : inside + count - done]
            rows[done : done + len(part)] = part
            passes[done : done + len(part)] = number
            done += len(part)
        return rows, passes

    def _make_pass(self, bucket: int, number: int) -> _Pass:
        shards = self._shards[bucket]
        shards = shards[permutation(len(shards), self.seed, self.fingerprint, "shards", bucket, number)]
        ends = np.concatenate([[0], np.cumsum(self._size[shards])])
        return _Pass(shards, np.append(ends[:-1][:: self.window], ends[-1]))

    def _make_window_rows(self, bucket: int, number: int, window: int) -> np.ndarray:
        shards = self._pass(bucket, number).shards[window * self.window : (window + 1) * self.window]
        rows = np.concatenate([np.arange(self._size[s], dtype=np.int64) + self._first_row[s] for s in shards])
        return rows[permutation(len(rows), self.seed, self.fingerprint, "window", bucket, number, window)]
