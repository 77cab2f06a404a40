"""The loader: the micro-batches of one rank, step by step, read ahead by one background thread.

The global batches come from `data.order` and know nothing of ranks; ranks only share the reading. Slot s of a batch
goes to rank s % dp_world, so any number of ranks up to the batch gives the same samples, numbers and weights per step.

    with Stream(index, state, dp_rank=0, dp_world=2, micro_batch=1, text_length=512, transform=prepare) as stream:
        micro_batches = next(stream)        # state.position is now the following step
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Generic, TypeVar

from data.batch import Batch, Sample, assemble
from data.errors import DamagedSample, DataError
from data.index import DatasetIndex
from data.order import Order
from data.state import DataState, Quarantined, Segment

T = TypeVar("T")


@dataclass(frozen=True)
class _Ready(Generic[T]):
    step: int
    micro_batches: list[T]
    damaged: list[Quarantined]
    seen: int  # samples of the run up to and with this step, over all ranks


class Stream(Generic[T]):
    """Iterator over steps from `state.position` on; each item is the list of this rank's transformed micro-batches.

    Every rank gets the same number of micro-batches, ceil(G / (dp_world * micro_batch)), of micro_batch samples each;
    slots that are left over repeat the batch's last sample with weight 0. Ranks that work on the same samples (sequence
    parallel) share a dp_rank.

    Args:
        index: the dataset.
        state: advanced by `__next__` (not by reading ahead), so that it can be saved between any two steps.
        text_length: captions are padded and cut to it.
        captioner: whose captions (default: the dataset's first).
        transform: from Batch to what the step needs; runs in the background thread.
        prefetch: steps that lie ready at most.
        quarantine_budget: fraction of damaged samples above which the run stops. A rank counts what it found and what
            `state.absorb` brought from others.

    Raises DataError when the dataset is not the one of the state or the numbers don't fit it, and from `__next__` when
    reading fails for good or too many samples are damaged; the state then still stands at the step that failed.
    """

    def __init__(
        self,
        index: DatasetIndex,
        state: DataState,
        *,
        dp_rank: int,
        dp_world: int,
        micro_batch: int,
        text_length: int,
        transform: Callable[[Batch], T],
        captioner: str | None = None,
        prefetch: int = 2,
        quarantine_budget: float = 0.001,
    ) -> None:
        if not 0 <= dp_rank < dp_world:
            raise DataError(f"data rank {dp_rank} of {dp_world}: ranks count from 0 to {dp_world - 1}")
        for name, value in (("micro_batch", micro_batch), ("text_length", text_length), ("prefetch", prefetch)):
            if value < 1:
                raise DataError(f"{name} is {value}: give 1 or more")
        captioners = index.captioners
        if not captioners or (captioner is not None and captioner not in captioners):
            raise DataError(f"dataset {index.root} has no captions by {captioner!r}; choose one of {captioners}")
        self.state = state
        self.data_wait = 0.0  # seconds that the last __next__ waited
        self._index = index
        self._dp_rank, self._dp_world, self._micro_batch = dp_rank, dp_world, micro_batch
        self._text_length = text_length
        self._captioner = captioners[0] if captioner is None else captioner
        self._transform = transform
        self._budget = quarantine_budget
        self._first_step = state.position
        self._segments = DataState(list(state.segments))  # the thread's own: it never looks at what __next__ changes
        self._order = self._make_order(self._segments.segment(self._first_step))
        self._empty_text = index.empty_text()
        self._queue: queue.Queue[_Ready[T] | BaseException] = queue.Queue(prefetch)
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="data stream", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside torch while the interpreter ends aborts the process

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> list[T]:
        """The micro-batches of step `state.position`, which is advanced; damaged samples enter `state.quarantine`."""
        begin = time.perf_counter()
        ready = self._get()
        self.data_wait = time.perf_counter() - begin
        if ready.damaged:
            self.state.absorb(ready.damaged)
            self._check_budget(ready)
        self.state.position = ready.step + 1
        return ready.micro_batches

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the background thread (after the step that it is reading). The state stays valid."""
        atexit.unregister(self.close)
        self._stop.set()
        self._thread.join()
        if self._failure is None:
            self._failure = RuntimeError("the stream is closed")

    def _get(self) -> _Ready[T]:
        while self._failure is None:
            try:
                item = self._queue.get(timeout=1)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    self._failure = RuntimeError("the data thread ended silently; resume from the last checkpoint")
                continue
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def _check_budget(self, ready: _Ready[T]) -> None:
        damaged, allowed = self.state.quarantine, max(1.0, self._budget * ready.seen)
        if len(damaged) <= allowed:
            return
        last = "; ".join(f"{entry['key']} in {entry['shard']} ({entry['reason']})" for entry in damaged[-3:])
        self._failure = DataError(
            f"{len(damaged)} of {ready.seen} samples are damaged at step {ready.step}, allowed are {self._budget:.3%} "
            f"(1 at least). The last: {last}. Restore these shards of {self._index.root} from their source or "
            "prepare them again, then resume; or raise quarantine_budget"
        )
        raise self._failure

    # The background thread.

    def _work(self) -> None:
        try:
            step = self._first_step
            while not self._stop.is_set():
                self._put(self._read(step))
                step += 1
        except BaseException as error:  # whatever ends this thread must end the run, not let it wait for ever
            self._put(error)

    def _put(self, item: _Ready[T] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _make_order(self, segment: Segment) -> Order:
        self._segments.check(self._index.fingerprint, segment.first_step)
        buckets = self._index.buckets
        if len(segment.batch_sizes) != len(buckets):
            raise DataError(
                f"batch sizes are {segment.batch_sizes}, the dataset {self._index.root} has {len(buckets)} buckets "
                f"({'; '.join(map(str, buckets))}): give one batch size per bucket"
            )
        order = Order(
            segment.fingerprint,
            self._index.shard_start,
            self._index.shard_bucket,
            segment.batch_sizes,
            segment.seed,
            segment.window,
        )
        smallest = min(size for size, samples in zip(order.batch_sizes, order.samples, strict=True) if samples)
        if self._dp_world > smallest:
            raise DataError(
                f"{self._dp_world} data-parallel ranks share a global batch of {smallest}: some would never have a "
                "sample. Use fewer ranks (or more sequence parallelism)"
            )
        return order

    def _read(self, step: int) -> _Ready[T]:
        segment = self._segments.segment(step)
        if step == segment.first_step and step != self._first_step:
            self._order = self._make_order(segment)
        batch = self._order.batch(step - segment.first_step)
        size, first = len(batch.rows), segment.first_sample + batch.first_sample
        bucket = self._index.buckets[batch.bucket]
        micro_batches = -(-size // (self._dp_world * self._micro_batch))
        cache: dict[int, Sample] = {}  # a left-over slot repeats a slot that this rank may have read
        damaged: list[Quarantined] = []
        results = []
        for micro in range(micro_batches):
            samples = []
            for position in range(micro * self._micro_batch, (micro + 1) * self._micro_batch):
                slot = position * self._dp_world + self._dp_rank
                real = min(slot, size - 1)
                if real not in cache:
                    found = damaged if slot < size else []  # the rank that owns the slot reports its damage
                    cache = {real: self._sample(int(batch.rows[real]), first + real, step, found)}
                samples.append(cache[real] if slot < size else replace(cache[real], weight=0.0))
            micro_batch = assemble(step, bucket, samples, self._empty_text, self._text_length, float(size))
            results.append(self._transform(micro_batch))
        return _Ready(step, results, damaged, first + size)

    def _sample(self, row: int, number: int, step: int, found: list[Quarantined]) -> Sample:
        key = self._index.key(row)
        try:
            clip = self._index.read_clip(row)
            text = self._index.read_text(row, self._captioner)
        except DamagedSample as damage:
            found.append(Quarantined(key=damage.key, shard=damage.shard, reason=damage.reason, step=step))
            return Sample(key, number, 0.0, None, None)
        return Sample(key, number, 1.0, clip, text)
