"""The order of samples: every sample once per pass, a pure function of the step, local reads, exact interleaving."""

import hashlib
import time
from fractions import Fraction

import numpy as np
import pytest

from data.errors import DataError
from data.loader.order import DatasetRows, GlobalBatch, Interleave, Order, kept_per_shard

# Buckets 0, 1, 3 in 23 shards of uneven size (one empty); bucket 2 has no shard.
SIZES = [7, 12, 5, 9, 0, 11, 3, 8, 8, 6, 13, 4, 10, 7, 5, 9, 2, 6, 8, 12, 1, 7, 9]
BUCKETS = [0, 1, 0, 0, 0, 3, 1, 0, 1, 0, 0, 3, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 1]
BATCHES = [8, 6, 5, 3]


def small(seed: int = 5, window: int = 3, fingerprint: str = "f0", batches: list[int] = BATCHES) -> Order:
    return single(fingerprint, np.concatenate([[0], np.cumsum(SIZES)]), np.array(BUCKETS), batches, seed, window)


def single(
    fingerprint: str, starts: np.ndarray, buckets: np.ndarray, batches: list[int], seed: int, window: int
) -> Order:
    return Order([DatasetRows(fingerprint, starts, buckets)], batches, seed, window)


def bucket_rows(bucket: int) -> set[int]:
    starts = np.concatenate([[0], np.cumsum(SIZES)])
    return {row for shard, b in enumerate(BUCKETS) if b == bucket for row in range(starts[shard], starts[shard + 1])}


def digest(order: Order, steps: range) -> str:
    total = hashlib.sha256()
    for step in steps:
        batch = order.batch(step)
        total.update(np.array([batch.step, batch.bucket, batch.first_sample], dtype="<i8").tobytes())
        total.update(batch.rows.astype("<i8").tobytes() + batch.passes.astype("<i8").tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("batches", [BATCHES, [1, 1, 1, 1], [500, 100, 1, 45]])
def test_every_sample_once_per_pass_and_remainders_carry(batches: list[int]) -> None:
    """Also with a batch larger than a pass."""
    order = small(batches=batches)
    rows: dict[int, list[int]] = {0: [], 1: [], 3: []}
    passes: dict[int, list[int]] = {0: [], 1: [], 3: []}
    first = 0
    for step in range(150):
        batch = order.batch(step)
        assert batch.first_sample == first == order.first_sample(step)
        first += len(batch.rows)
        assert len(batch.rows) == batches[batch.bucket]
        rows[batch.bucket] += batch.rows.tolist()
        passes[batch.bucket] += batch.passes.tolist()
    for bucket in rows:
        whole = bucket_rows(bucket)
        count = len(rows[bucket])
        assert count > len(whole) or batches == [1, 1, 1, 1]
        assert passes[bucket] == [i // len(whole) for i in range(count)]
        for start in range(0, count - len(whole) + 1, len(whole)):
            one = rows[bucket][start : start + len(whole)]
            assert set(one) == whole and len(one) == len(whole)
        tail = rows[bucket][count - count % len(whole) :]
        assert len(set(tail)) == len(tail) and set(tail) <= whole


def test_passes_and_seeds_differ() -> None:
    order = small(batches=[len(bucket_rows(0)), 6, 5, 3])
    whole = [b for b in map(order.batch, range(60)) if b.bucket == 0]
    assert not np.array_equal(whole[0].rows, whole[1].rows)
    assert digest(small(seed=5), range(9)) != digest(small(seed=6), range(9))
    assert digest(small(fingerprint="f0"), range(9)) != digest(small(fingerprint="f1"), range(9))


def test_batch_is_a_pure_function_of_the_step() -> None:
    walked = small()
    sequence = [walked.batch(step) for step in range(200)]
    jumping = small()
    for step in np.random.Generator(np.random.Philox(3)).permutation(200):  # numpy integers too
        for batch in (jumping.batch(step), small().batch(int(step))):
            expected = sequence[step]
            assert (batch.step, batch.bucket, batch.first_sample) == (step, expected.bucket, expected.first_sample)
            assert np.array_equal(batch.rows, expected.rows) and np.array_equal(batch.passes, expected.passes)


def test_order_never_changes() -> None:
    """A run of months must find the same order after every upgrade: this number only changes with the contract."""
    assert digest(small(), range(100)) == "7e29711acc8c614ff85e012e1cbd3fef1d4461d320fd61a119fcf311219cc66c"


@pytest.mark.parametrize("window", [1, 3, 5])
def test_reads_stay_inside_a_window_of_shards(window: int) -> None:
    """Each window's samples come from `window` shards, mixed; so a run of n samples touches few shards."""
    order = small(window=window)
    starts = np.concatenate([[0], np.cumsum(SIZES)])
    shards = [s for s, b in enumerate(BUCKETS) if b == 0]
    rows = np.concatenate([b.rows for b in map(order.batch, range(300)) if b.bucket == 0])
    touched = np.searchsorted(starts, rows, side="right") - 1
    for number in range(len(rows) // order.samples[0]):
        one = touched[number * order.samples[0] : (number + 1) * order.samples[0]]
        first = {s: int(np.flatnonzero(one == s)[0]) for s in set(one.tolist())}
        last = {s: int(np.flatnonzero(one == s)[-1]) for s in first}
        # Shards whose reading has begun and not ended, at every moment of the pass.
        opened = [sum(first[s] <= i <= last[s] for s in first) for i in range(len(one))]
        assert max(opened) <= window
        assert len(first) == len([s for s in shards if SIZES[s]])
        if window > 1:
            assert max(opened) == window  # and they are really mixed


def test_a_batch_crosses_at_most_one_boundary() -> None:
    """So it reads at most 2 · window shards, and the batches of one window's length at most as many."""
    window, shard, size = 4, 40, 8
    order = single("f", np.arange(0, 41 * shard, shard), np.zeros(40, dtype=int), [size], 0, window)
    rows = np.stack([order.batch(step).rows for step in range(400)])
    for length in (1, window * shard // size):
        for step in range(0, 400 - length):
            assert len(set((rows[step : step + length] // shard).flatten().tolist())) <= 2 * window


@pytest.mark.parametrize("batches", [BATCHES, [1, 7, 1, 2], [16, 1, 1, 1]])
def test_buckets_interleave_by_exact_shares(batches: list[int]) -> None:
    order = small(batches=batches)
    rates = {b: Fraction(order.samples[b], batches[b]) for b in (0, 1, 3)}
    total = sum(rates.values())
    # The merge written down naively: sort the times (2i+1) * G / (2 N).
    naive = sorted((Fraction(2 * i + 1) / (2 * rates[b]), b) for b in rates for i in range(1000))[:1000]
    counts = [0, 0, 0, 0]
    for step, (_, bucket) in enumerate(naive):
        assert order.counts(step) == counts
        assert order.batch(step).bucket == bucket
        for b, rate in rates.items():
            share = rate / total
            assert abs(counts[b] - step * share) <= Fraction(1, 2) + Fraction(len(rates) - 2, 2) * share < 1
        counts[bucket] += 1
    far = 10**15
    assert sum(order.counts(far)) == far
    assert all(abs(order.counts(far)[b] - far * rate / total) < 1 for b, rate in rates.items())


def test_many_buckets_keep_their_shares() -> None:
    rng = np.random.Generator(np.random.Philox(11))
    sizes, buckets = rng.integers(1, 60, 80), rng.integers(0, 20, 80)
    batches = rng.integers(1, 9, 20).tolist()
    order = single("f", np.concatenate([[0], np.cumsum(sizes)]), buckets, batches, 0, 4)
    rates = {b: Fraction(order.samples[b], batches[b]) for b in range(20) if order.samples[b]}
    total, counts = sum(rates.values()), [0] * 20
    for step in range(500):
        assert order.counts(step) == counts
        for b, rate in rates.items():
            share = rate / total
            assert abs(counts[b] - step * share) <= Fraction(1, 2) + Fraction(len(rates) - 2, 2) * share
        counts[order.batch(step).bucket] += 1


def test_positioned_quickly_in_a_large_dataset() -> None:
    """45,000 shards, 45 million samples, five buckets: a fresh order at a random far step in under 2 s."""
    sizes = np.full(45_000, 1_000)
    sizes[::7] = 900
    sizes[::2] += 64
    starts, buckets = np.concatenate([[0], np.cumsum(sizes)]), np.arange(45_000) % 5
    begin = time.process_time()
    order = single("large", starts, buckets, [512, 1024, 256, 512, 384], 0, 16)
    batch = order.batch(7_654_321)
    assert time.process_time() - begin < 2
    assert batch.passes[0] > 50 and len(np.unique(batch.rows)) == len(batch.rows)


def test_bad_arguments_are_named() -> None:
    starts, buckets = np.array([0, 4, 8]), np.array([0, 1])
    for batches, window, named in [([4], 2, "1 batch sizes"), ([4, 0], 2, r"\[4, 0\]"), ([4, 4], 0, "window is 0")]:
        with pytest.raises(DataError, match=named):
            single("f", starts, buckets, batches, 0, window)
    with pytest.raises(DataError, match="no samples"):
        single("f", np.array([0]), np.array([]), [4], 0, 2)
    with pytest.raises(ValueError, match="-1"):
        single("f", starts, buckets, [4, 4], 0, 2).batch(-1)


# Several sources. A has buckets 0 and 1, B 1 and 2, C only 1; a third of B's rows and a whole shard are left out.
A = DatasetRows("a", np.array([0, 7, 7, 16, 21, 33]), np.array([0, 1, 1, 0, 0]), None, Fraction(1, 2), [0, 1])
B_KEPT = (np.arange(30) % 3 != 1) & ~((np.arange(30) >= 11) & (np.arange(30) < 15))
B = DatasetRows("b", np.array([0, 11, 15, 24, 30]), np.array([0, 1, 0, 1]), B_KEPT, Fraction(3, 10), [2, 1])
C = DatasetRows("c", np.array([0, 3, 8]), np.array([0, 0]), None, Fraction(1, 5), [1])
MIXED = [7, 5, 4]


def mixed(sources: tuple[DatasetRows, ...] = (A, B, C), batches: list[int] = MIXED) -> Order:
    return Order(sources, batches, 5, 2)


def stream_rows(batches: list[GlobalBatch], source: int, bucket: int) -> tuple[list[int], list[int]]:
    """Rows and passes that one source has given in one bucket."""
    rows: list[int] = []
    passes: list[int] = []
    for batch in batches:
        if batch.bucket == bucket:
            rows += batch.rows[batch.datasets == source].tolist()
            passes += batch.passes[batch.datasets == source].tolist()
    return rows, passes


def own_rows(source: DatasetRows, own: int) -> set[int]:
    starts, kept = source.shard_start, source.kept
    return {
        row
        for shard, bucket in enumerate(source.shard_bucket)
        for row in range(starts[shard], starts[shard + 1])
        if bucket == own and (kept is None or kept[row])
    }


def test_every_sample_of_every_source_once_per_pass() -> None:
    order = mixed()
    batches = [order.batch(step) for step in range(300)]
    sources, seen = (A, B, C), 0
    for number, source in enumerate(sources):
        assert source.common is not None
        for own, bucket in enumerate(source.common):
            whole = own_rows(source, own)
            rows, passes = stream_rows(batches, number, bucket)
            assert passes == [i // len(whole) for i in range(len(rows))]
            assert len(rows) > 3 * len(whole)
            for start in range(0, len(rows) - len(whole) + 1, len(whole)):
                assert set(rows[start : start + len(whole)]) == whole
            seen += len(rows)
    assert seen == sum(len(batch.rows) for batch in batches) == order.first_sample(300)
    first = 0
    for batch in batches:
        assert batch.first_sample == first and len(batch.rows) == MIXED[batch.bucket]
        first += len(batch.rows)


def test_weights_are_exact() -> None:
    """The slots of a bucket are the naive merge; the shares of the datasets are the weights, at any step."""
    order = mixed()
    sizes = {"a": 33, "b": int(B_KEPT.sum()), "c": 8}
    rates = [s.weight * len(own_rows(s, own)) / sizes[s.fingerprint] for s, own in ((A, 1), (B, 1), (C, 0))]
    merge = sorted((Fraction(2 * i + 1) / rate, member) for member, rate in enumerate(rates) for i in range(3000))
    batches = [order.batch(step) for step in range(1000)]
    owners = [d for batch in batches if batch.bucket == 1 for d in batch.datasets.tolist()]
    assert len(owners) > 1000 and owners == [member for _, member in merge[: len(owners)]]
    drawn = [0, 0, 0]
    for step, batch in enumerate(batches):
        assert order.drawn(step) == drawn
        for d in batch.datasets.tolist():
            drawn[d] += 1
        # What is rounded: which slots of a bucket (under 1 sample a bucket) and which bucket comes (under a batch).
        off = [abs(count - weight * sum(drawn)) for count, weight in zip(drawn, (0.5, 0.3, 0.2), strict=True)]
        assert max(off) < max(MIXED) + 3
    far = 10**12 + 7
    total = order.first_sample(far)
    off = [
        abs(count - w * total) for count, w in zip(order.drawn(far), map(Fraction, ("0.5", "0.3", "0.2")), strict=True)
    ]
    assert sum(order.drawn(far)) == total and max(off) < max(MIXED) + 3


def test_a_period_is_exact_to_the_sample() -> None:
    order = Order(
        [DatasetRows(n, C.shard_start, C.shard_bucket, None, w, [0]) for n, w in (("c", 7), ("d", 3))], [20], 0, 2
    )  # type: ignore[arg-type]
    for step in range(0, 50):
        assert order.drawn(step) == [14 * step, 6 * step]
    odd = Order(
        [DatasetRows(n, C.shard_start, C.shard_bucket, None, w, [0]) for n, w in (("c", 7), ("d", 3))], [9], 0, 2
    )  # type: ignore[arg-type]
    assert odd.drawn(10) == [63, 27] and [abs(10 * odd.drawn(s)[0] - 63 * s) <= 5 for s in range(10)] == [True] * 10


def test_a_sources_own_order_stays_when_others_join_or_weights_change() -> None:
    alone = mixed((A,))
    other = mixed((B, DatasetRows("a", A.shard_start, A.shard_bucket, None, Fraction(9), [0, 1])), [3, 8, 6])
    for bucket in (0, 1):
        first = stream_rows([alone.batch(step) for step in range(100)], 0, bucket)[0]
        second = stream_rows([other.batch(step) for step in range(100)], 1, bucket)[0]
        shared = min(len(first), len(second))
        assert shared > 30 and first[:shared] == second[:shared]
    three = mixed()
    assert [x.source for x in three._streams[1]] == three.bucket_streams[1] == [0, 1, 2]
    assert np.array_equal(kept_per_shard(B.shard_start, B_KEPT), [7, 0, 6, 4])


def test_mixed_batches_are_a_pure_function_of_the_step() -> None:
    walked = mixed()
    sequence = [walked.batch(step) for step in range(80)]
    jumping = mixed()
    for step in np.random.Generator(np.random.Philox(4)).permutation(80).tolist():
        for batch in (jumping.batch(step), mixed().batch(step)):
            expected = sequence[step]
            assert (batch.step, batch.bucket, batch.first_sample) == (step, expected.bucket, expected.first_sample)
            for name in ("datasets", "rows", "passes"):
                assert np.array_equal(getattr(batch, name), getattr(expected, name))


def test_mixed_order_never_changes() -> None:
    """As test_order_never_changes, with several sources and left-out rows."""
    order, total = mixed(), hashlib.sha256()
    for step in range(100):
        batch = order.batch(step)
        total.update(np.array([batch.bucket, batch.first_sample], dtype="<i8").tobytes())
        for values in (batch.datasets, batch.rows, batch.passes):
            total.update(values.astype("<i8").tobytes())
    assert total.hexdigest() == "f35ce3e6779dd958b30f256c3668a94ea799736c6c3a36f19ba3ea4834148b4b"


@pytest.mark.parametrize(
    "rates", [[1], [1, 1], [3, 5, 7], [Fraction(1, 3), Fraction(7, 11), 2, 100], [10**9, 1, 10**9 + 1]]
)
def test_interleave_is_the_naive_merge(rates: list[Fraction | int]) -> None:
    found = Interleave(rates)
    naive = sorted((Fraction(2 * i + 1) / rate, m) for m, rate in enumerate(rates) for i in range(400))[:400]
    members = [m for _, m in naive]
    for turn in (0, 1, 2, 17, 99, 250):
        before, taken = found.take(turn, 100)
        assert before == found.counts(turn) == [members[:turn].count(m) for m in range(len(rates))]
        assert taken == members[turn : turn + 100]
    assert found.counts(found.total * 10**6) == [rate * 10**6 for rate in found.rates]


def test_impossible_sources_are_named() -> None:
    with pytest.raises(DataError, match="weight 0"):
        mixed((DatasetRows("a", A.shard_start, A.shard_bucket, None, Fraction(0), [0, 1]),))
    with pytest.raises(DataError, match="b has no samples.*thresholds"):
        mixed((A, DatasetRows("b", B.shard_start, B.shard_bucket, np.zeros(30, bool), Fraction(1), [2, 1])))
    with pytest.raises(DataError, match="no dataset"):
        mixed(())
