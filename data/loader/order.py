"""The order of the samples: a pure function of (selections, weights, batch sizes, seed, window) and of the step.

Each dataset has, in each of its buckets, an endless stream of samples, pass after pass over its shards. A pass permutes
the shards, cuts the permuted list into windows of `window` shards and shuffles the kept samples inside each window, so
that at any time only a few tars are read. Streams of equal geometry share the batches of one bucket: slot by slot they
are merged by exact integer arithmetic, and so are the buckets, batch by batch. Nothing is walked and no state is kept:
`Order.batch(step)` finds its place in any pass directly, for any step, in any process. docs/data-order.md states what
holds exactly.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    datasets: np.ndarray  # [G] int64, the source of each slot
    rows: np.ndarray  # [G] int64, rows of that source's index
    passes: np.ndarray  # [G] int64, the pass of that source's bucket to which each slot belongs


@dataclass(frozen=True)
class DatasetRows:
    """What the order needs to know of one dataset (or of a selection from it).

    fingerprint: part of every key, so that two sources never share an order; shard_start [S+1]: first row of each
    shard, and the number of rows; shard_bucket [S]: bucket of each shard; kept [rows] bool: rows that take part (None:
    all); weight: share of the samples that come from here, relative to the other sources; common: the order's bucket
    for each bucket of this source (None: the same numbers).
    """

    fingerprint: str
    shard_start: np.ndarray
    shard_bucket: np.ndarray
    kept: np.ndarray | None = None
    weight: Fraction = field(default_factory=lambda: Fraction(1))
    common: Sequence[int] | None = None


@dataclass(frozen=True)
class _Stream:
    """One source in one bucket."""

    source: int
    bucket: int  # the source's own number of it
    shards: np.ndarray  # its shards there
    samples: int  # of one pass


@dataclass(frozen=True)
class _Pass:
    shards: np.ndarray  # the stream's shards in this pass's order
    window_start: np.ndarray  # offset in the pass of each window's first sample, and the end


def permutation(count: int, *key: object) -> np.ndarray:
    """Permutation of range(count), [count] int64, fixed by `key`.

    Philox's raw output and a stable sort are the same in every numpy version. `Generator.permutation` is not promised
    to be, and an order that changed with an upgrade in mid-run would silently repeat and drop samples.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return np.argsort(bits, kind="stable")


class Interleave:
    """An endless sequence of members that come in exact proportion to their rates.

    Member m's i-th turn has the time (2i+1)/rate_m; the sequence sorts all turns by time, ties by member. With M
    members and share_m = rate_m/total, the turns of m among the first n stay within 1/2 + max(M-2, 0)/2 · share_m of
    n · share_m: its own rounding and the others'. Over a period of total/gcd turns the counts are exact.
    """

    def __init__(self, rates: Sequence[Fraction | int]) -> None:
        """Rates are positive; only their ratios count."""
        exact = [Fraction(rate) for rate in rates]
        scale = math.lcm(*(rate.denominator for rate in exact))
        whole = [int(rate * scale) for rate in exact]
        shared = math.gcd(*whole)
        self.rates = [rate // shared for rate in whole]
        self.total = sum(self.rates)
        common = math.lcm(*self.rates)
        self._pace = [common // rate for rate in self.rates]  # times in integers: (2i+1) · pace

    def counts(self, turn: int) -> list[int]:
        """Turns of each member before `turn` (they sum to it), in O(members · log members)."""
        return self._merge(turn)[0]

    def take(self, turn: int, count: int) -> tuple[list[int], list[int]]:
        """Each member's turns before `turn`, and the members of the turns from there on, `count` of them."""
        before, heap = self._merge(turn)
        if len(heap) == 1:
            return before, [0] * count
        members = []
        for _ in range(count):
            time, member = heap[0]
            members.append(member)
            heapq.heapreplace(heap, (time + 2 * self._pace[member], member))
        return before, members

    def _merge(self, turn: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Counts before `turn`, and the heap of each member's next time."""
        turn = int(turn)  # exact integers from here on
        if turn < 0:
            raise ValueError(f"step is {turn}: it counts from 0")
        # All turns before the time (2·turn - M)/total are certainly before `turn`: rounding adds less than 1/2 a
        # member, so they are at most `turn` and at least turn - M. The rest is merged one by one.
        early = 2 * turn - len(self.rates)
        counts = [max(0, -(-(early * rate - self.total) // (2 * self.total))) for rate in self.rates]
        heap = [((2 * counts[m] + 1) * pace, m) for m, pace in enumerate(self._pace)]
        heapq.heapify(heap)
        for _ in range(turn - sum(counts)):
            time, member = heap[0]
            counts[member] += 1
            heapq.heapreplace(heap, (time + 2 * self._pace[member], member))
        return counts, heap


class Order:
    """The sequence of global batches of one or several datasets.

    Args:
        sources: the datasets, with the buckets that they have in common.
        batch_sizes: samples of a global batch, per bucket. Buckets without samples take no part.
        seed: of the whole order.
        window: shards of a stream that are mixed (and read) at a time.

    A source's share of the samples is its weight; its buckets share that in proportion to their samples, so that all
    of them finish a pass together. `bucket_streams[b]` are the sources that have samples in bucket b.

    Raises DataError where the sizes are not positive, don't match the buckets, or a source has no sample at all.
    """

    def __init__(self, sources: Sequence[DatasetRows], batch_sizes: Sequence[int], seed: int, window: int) -> None:
        self.sources = list(sources)
        self.seed = int(seed)
        self.window = int(window)
        self.batch_sizes = [int(size) for size in batch_sizes]
        if self.window < 1:
            raise DataError(f"window is {window}: it counts the shards mixed at a time, give 1 or more")
        if min(self.batch_sizes, default=0) < 1:
            raise DataError(f"batch sizes are {self.batch_sizes}: every bucket needs a global batch of 1 or more")
        self._first_row = [np.asarray(source.shard_start[:-1], dtype=np.int64) for source in self.sources]
        self._size = [kept_per_shard(source.shard_start, source.kept) for source in self.sources]
        streams: list[list[_Stream]] = [[] for _ in self.batch_sizes]  # per bucket
        shares: list[list[Fraction]] = [[] for _ in self.batch_sizes]
        for number, source in enumerate(self.sources):
            self._add_dataset(number, source, streams, shares)
        self.bucket_streams = [[stream.source for stream in bucket] for bucket in streams]
        # Samples of one pass, per bucket (of all sources).
        self.samples = [sum(stream.samples for stream in bucket) for bucket in streams]
        self._streams = streams
        self._active = [bucket for bucket, members in enumerate(streams) if members]
        if not self._active:
            raise DataError("there is no dataset to train on: name one")
        # Batches of a bucket come in proportion to its share of the samples over its batch size.
        self._buckets = Interleave([sum(shares[b], Fraction(0)) / self.batch_sizes[b] for b in self._active])
        self._slots = {bucket: Interleave(shares[bucket]) for bucket in self._active}
        # A batch touches one or two passes and windows of a stream; a few more serve several readers at a time.
        number = sum(map(len, streams))
        self._pass = lru_cache(maxsize=2 * number + 4)(self._make_pass)
        self._window_rows = lru_cache(maxsize=2 * number + 4)(self._make_window_rows)

    def _add_dataset(
        self, number: int, source: DatasetRows, streams: list[list[_Stream]], shares: list[list[Fraction]]
    ) -> None:
        """Enter one source into the buckets it has samples in."""
        bucket_of = np.asarray(source.shard_bucket, dtype=np.int64)
        size = self._size[number]
        common = range(len(self.batch_sizes)) if source.common is None else source.common
        if len(bucket_of) != len(size) or bucket_of.max(initial=-1) >= len(common):
            raise DataError(
                f"{len(common)} batch sizes for {len(size)} shards whose buckets go up to "
                f"{int(bucket_of.max(initial=-1))}: give one batch size per bucket of the dataset"
            )
        if source.weight <= 0:
            raise DataError(f"weight {source.weight} of dataset {source.fingerprint}: give a number above 0")
        total = int(size.sum())
        if not total:
            raise DataError(
                f"the dataset {source.fingerprint} has no samples: prepare it again from clips that are kept, or "
                "loosen its thresholds"
            )
        for own, bucket in enumerate(common):
            shards = np.flatnonzero(bucket_of == own)
            samples = int(size[shards].sum())
            if samples:
                streams[bucket].append(_Stream(number, own, shards, samples))
                shares[bucket].append(source.weight * samples / total)

    def counts(self, step: int) -> list[int]:
        """Batches that each bucket has had before `step` (they sum to `step`); see Interleave for how exact."""
        counts = [0] * len(self.batch_sizes)
        for bucket, count in zip(self._active, self._buckets.counts(step), strict=True):
            counts[bucket] = count
        return counts

    def first_sample(self, step: int) -> int:
        """Samples of all batches before `step`."""
        return sum(count * size for count, size in zip(self.counts(step), self.batch_sizes, strict=True))

    def drawn(self, step: int) -> list[int]:
        """Samples that each source has given before `step`."""
        drawn = [0] * len(self.sources)
        for bucket, count in enumerate(self.counts(step)):
            if count:
                turns = self._slots[bucket].counts(count * self.batch_sizes[bucket])
                for stream, turn in zip(self._streams[bucket], turns, strict=True):
                    drawn[stream.source] += turn
        return drawn

    def batch(self, step: int) -> GlobalBatch:
        """The batch of `step` (from 0): a pure function of the constructor's arguments and the step."""
        step = int(step)  # one spelling in the keys
        before, [active] = self._buckets.take(step, 1)
        bucket = self._active[active]
        size = self.batch_sizes[bucket]
        turns, members = self._slots[bucket].take(before[active] * size, size)
        member = np.array(members, dtype=np.int64)
        datasets, rows, passes = (np.empty(size, dtype=np.int64) for _ in range(3))
        for number, (stream, turn) in enumerate(zip(self._streams[bucket], turns, strict=True)):
            slots = np.flatnonzero(member == number)
            datasets[slots] = stream.source
            rows[slots], passes[slots] = self._take(bucket, number, turn, len(slots))
        first = sum(count * self.batch_sizes[b] for b, count in zip(self._active, before, strict=True))
        return GlobalBatch(step, bucket, first, datasets, rows, passes)

    def _take(self, bucket: int, number: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` samples of an endless stream from position `start`: rows and passes, [count] each."""
        rows = np.empty(count, dtype=np.int64)
        passes = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            turn, offset = divmod(start + done, self._streams[bucket][number].samples)
            starts = self._pass(bucket, number, turn).window_start
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            inside = offset - int(starts[window])
            part = self._window_rows(bucket, number, turn, window)[inside : inside + count - done]
            rows[done : done + len(part)] = part
            passes[done : done + len(part)] = turn
            done += len(part)
        return rows, passes

    # The keys name neither the other sources nor the weights: a source's own order stays when these change.

    def _key(self, bucket: int, number: int, kind: str) -> tuple[object, ...]:
        stream = self._streams[bucket][number]
        return self.seed, self.sources[stream.source].fingerprint, kind, stream.bucket

    def _make_pass(self, bucket: int, number: int, turn: int) -> _Pass:
        stream = self._streams[bucket][number]
        shards = stream.shards[permutation(len(stream.shards), *self._key(bucket, number, "shards"), turn)]
        ends = np.concatenate([[0], np.cumsum(self._size[stream.source][shards])])
        return _Pass(shards, np.append(ends[:-1][:: self.window], ends[-1]))

    def _make_window_rows(self, bucket: int, number: int, turn: int, window: int) -> np.ndarray:
        source = self._streams[bucket][number].source
        shards = self._pass(bucket, number, turn).shards[window * self.window : (window + 1) * self.window]
        starts, kept = self.sources[source].shard_start, self.sources[source].kept
        parts = []
        for shard in shards:
            first, end = int(starts[shard]), int(starts[shard + 1])
            own = np.arange(first, end, dtype=np.int64)
            parts.append(own if kept is None else own[kept[first:end]])
        rows = np.concatenate(parts)
        values: np.ndarray = rows[permutation(len(rows), *self._key(bucket, number, "window"), turn, window)]
        return values


def kept_per_shard(shard_start: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
    """[S] int64: the kept rows of each shard (all rows where `kept` is None)."""
    starts = np.asarray(shard_start, dtype=np.int64)
    sizes = np.diff(starts)
    if kept is None:
        return sizes
    # Counted in place: a reduceat or cumsum would widen the whole column to eight bytes a row.
    counts = (np.count_nonzero(kept[first:end]) for first, end in zip(starts[:-1], starts[1:], strict=True))
    return np.fromiter(counts, dtype=np.int64, count=len(sizes))
