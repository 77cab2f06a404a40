"""The loader: the micro-batches of one rank, step by step, read ahead by background threads.

The global batches come from `data.loader.order` and know nothing of ranks or threads; these only share the reading.
Slot s of a batch goes to rank s % dp_world, so any number of ranks up to the batch gives the same samples, numbers and
weights per step.

    with Stream(index, state, dp_rank=0, dp_world=2, micro_batch=1, text_length=512, transform=prepare) as stream:
        micro_batches = next(stream)        # state.position is now the following step
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import Tensor

from core.errors import NoRoomError, UserError, lacks_room
from data.batch import Batch, pad_text, unfilled
from data.dataset.index import DatasetIndex
from data.errors import DamagedSample, DataError, MissingData, ReadError
from data.loader.caption_mix import CaptionMix
from data.loader.mixture import Mixture
from data.loader.order import GlobalBatch, Order
from data.loader.share import Share
from data.loader.state import DataState, Quarantined, Segment

T = TypeVar("T")

REPORTED = "step"  # Quarantined["found"] of a sample that a step found damaged: it is not used again
KINDS: dict[str, type[UserError]] = {kind.__name__: kind for kind in (ReadError, MissingData, DataError, NoRoomError)}
LOOK_BACK = 64  # steps in which a reported sample is looked for


@dataclass(frozen=True)
class _Read:
    """One step's micro-batches of this rank, before the transform."""

    step: int
    batches: list[Batch]
    damaged: list[Quarantined]
    seen: int  # samples of the run up to and with this step, over all ranks
    empty: int  # samples of this step without a caption, over all ranks
    excluded: frozenset[str]  # the reported samples that were known when it was read


@dataclass(frozen=True)
class _Ready(Generic[T]):
    read: _Read
    micro_batches: list[T]


@dataclass(frozen=True)
class _Data:
    """What a segment's steps are read from."""

    segment: Segment
    mixture: Mixture
    order: Order
    captions: CaptionMix
    empty_text: Tensor

    def batch(self, step: int) -> tuple[GlobalBatch, int]:
        """The samples of a step of the run, and the global number of the first of them."""
        began = self.segment.first_step - self.segment.order_step
        batch = self.order.batch(step - began)
        before = self.order.first_sample(self.segment.order_step)
        return batch, self.segment.first_sample + batch.first_sample - before


class Stream(Generic[T]):
    """Iterator over steps from `state.position` on; each item is the list of this rank's transformed micro-batches.

    Every rank gets the same number of micro-batches, ceil(G / (dp_world * micro_batch)), of micro_batch samples each;
    slots that are left over repeat the batch's last sample with weight 0. Ranks that work on the same samples (sequence
    parallel) share a dp_rank.

    Args:
        data: a whole dataset, or the mixtures that the state's segments need from its position on.
        state: advanced by `__next__` (not by reading ahead), so that it can be saved between any two steps.
        text_length: captions are padded and cut to it.
        transform: from Batch to what the step needs; runs in the background threads.
        prefetch: steps that lie ready at most. `workers` more may be in the making: memory is bounded by both.
        workers: background threads that read and transform, each a step at a time; 0: `__next__` does it itself. No
            number changes what comes out.
        quarantine_budget: fraction of damaged samples above which the run stops. A rank counts what it found and what
            `state.absorb` brought from others.
        share: only its leader reads, the other ranks of the group receive (default: every rank reads for itself). All
            ranks of the group must close their streams.

    Raises DataError when the data is not the one of the state or the numbers don't fit it, and from `__next__` when
    reading fails for good or too many samples are damaged; the state then still stands at the step that failed.
    """

    def __init__(
        self,
        data: DatasetIndex | Mixture | Sequence[Mixture],
        state: DataState,
        *,
        dp_rank: int,
        dp_world: int,
        micro_batch: int,
        text_length: int,
        transform: Callable[[Batch], T],
        prefetch: int = 2,
        workers: int = 1,
        quarantine_budget: float = 0.001,
        share: Share | None = None,
    ) -> None:
        if not 0 <= dp_rank < dp_world:
            raise DataError(f"data rank {dp_rank} of {dp_world}: ranks count from 0 to {dp_world - 1}")
        for name, value in (("micro_batch", micro_batch), ("text_length", text_length), ("prefetch", prefetch)):
            if value < 1:
                raise DataError(f"{name} is {value}: give 1 or more")
        if workers < 0:
            raise DataError(f"workers is {workers}: give a number of threads, or 0 to read in the training thread")
        self.state = state
        self.data_wait = 0.0  # seconds that the last __next__ waited
        self._mixtures = _mixtures(data)
        self._dp_rank, self._dp_world, self._micro_batch = dp_rank, dp_world, micro_batch
        self._text_length = text_length
        self._transform = transform
        self._budget = quarantine_budget
        self._share = share
        # The threads' own: they never look at what __next__ changes.
        self._segments = DataState(list(state.segments), state.position)
        self._opened: dict[int, _Data] = {}
        self._opening = threading.Lock()
        self._known = -1  # entries of the quarantine that `_excluded` is made from
        self._excluded: frozenset[str] = frozenset()
        self._exclude()
        self._data(state.position)
        self._failure: BaseException | None = None
        self._turn = threading.Condition()  # guards what follows
        self._ready: dict[int, _Ready[T] | BaseException] = {}
        self._wanted = self._next = self._sent = state.position  # the next step to hand out, to read, to pass on
        self._ahead = prefetch + workers
        self._stopped = self._ended = False
        if share is not None and not share.leader:
            workers = min(workers, 1)  # what is received comes in order
        self._threads = [
            threading.Thread(target=self._work, name=f"data stream {number}", daemon=True) for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # a thread inside torch while the interpreter ends aborts the process

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> list[T]:
        """The micro-batches of step `state.position`, which is advanced; damaged samples enter `state.quarantine`."""
        begin = time.perf_counter()
        self._exclude()
        ready = self._without_reported(self._get())
        self.data_wait = time.perf_counter() - begin
        damaged = [entry for entry in ready.read.damaged if entry["key"] not in self._excluded]
        if damaged:
            self.state.absorb(damaged)
            self._check_budget(ready.read.seen, ready.read.step)
        self.state.position = ready.read.step + 1
        self.state.empty_captions += ready.read.empty
        return ready.micro_batches

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def report_damage(self, key: str, reason: str, step: int | None = None) -> None:
        """A step found this sample damaged (NaN in its loss, say): it has weight 0 from the next `__next__` on.

        Call it on every rank with the same arguments at the same position; then what follows does not depend on the
        layout. step: the step that the sample was in (default: it is looked for in the last steps handed out). It
        counts for the budget. DataError when no such sample was handed out, or the budget is spent.
        """
        last = self.state.position - 1
        steps = [step] if step is not None else list(range(last, max(-1, last - LOOK_BACK), -1))
        for number in steps:
            data = self._data(number)
            batch, _ = data.batch(number)
            for source, row in zip(batch.datasets.tolist(), batch.rows.tolist(), strict=True):
                index = data.mixture.selections[source].index
                if index.key(row) == key:
                    shard = index.shards[index.shard_of(row)]["name"]
                    entry = Quarantined(key=key, shard=shard, reason=reason, step=number, found=REPORTED)
                    self.state.absorb([entry])
                    final, first = self._data(last).batch(last)
                    self._check_budget(first + len(final.rows), last)
                    return
        where = f"steps {steps[-1]} to {steps[0]} do not hold it" if steps else "no step was handed out"
        raise DataError(f"sample {key} was reported as damaged ({reason}), but {where}")

    def close(self) -> None:
        """End the background threads (after the steps that they are reading). The state stays valid."""
        atexit.unregister(self.close)
        with self._turn:
            self._stopped = True
            self._turn.notify_all()
        for thread in self._threads:
            thread.join()
        if self._failure is None:
            self._failure = RuntimeError("the stream is closed")
        if self._share is not None and not self._ended:
            self._ended = True
            try:
                if self._share.leader:
                    self._share.send({"end": True}, [])
                else:
                    while "end" not in self._share.receive()[0]:  # or the leader would wait in a send for ever
                        pass
            except Exception:  # the group is gone: nobody waits
                return

    def _get(self) -> _Ready[T]:
        if self._failure is not None:
            raise self._failure
        step = self.state.position
        item: _Ready[T] | BaseException | None = None
        if not self._threads:
            try:
                item = self._make(step)
            except Exception as error:
                item = error
        while item is None:
            with self._turn:
                self._turn.wait_for(lambda: step in self._ready, timeout=1)
                item = self._ready.pop(step, None)
                if item is None and not any(thread.is_alive() for thread in self._threads):
                    item = RuntimeError("the data threads ended without an error; resume from the last checkpoint")
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        with self._turn:
            self._wanted = step + 1
            self._turn.notify_all()
        return item

    def _exclude(self) -> None:
        """Take over reported samples, also those that `state.absorb` brought."""
        if self._known != len(self.state.quarantine):
            self._known = len(self.state.quarantine)
            self._excluded = frozenset(e["key"] for e in self.state.quarantine if e["found"] == REPORTED)

    def _without_reported(self, ready: _Ready[T]) -> _Ready[T]:
        """As if what was reported while this step was read ahead had been known."""
        late = self._excluded - ready.read.excluded
        if not late or not any(key in late for batch in ready.read.batches for key in batch.keys):
            return ready
        batches = [
            batch.blanked([slot for slot, key in enumerate(batch.keys) if key in late]) for batch in ready.read.batches
        ]
        return _Ready(replace(ready.read, batches=batches), [self._transform(batch) for batch in batches])

    def _check_budget(self, seen: int, step: int) -> None:
        damaged, allowed = self.state.quarantine, max(1.0, self._budget * seen)
        if len(damaged) <= allowed:
            return
        last = "; ".join(f"{entry['key']} in {entry['shard']} ({entry['reason']})" for entry in damaged[-3:])
        roots = ", ".join(str(selection.index.root) for selection in self._data(step).mixture.selections)
        self._failure = DataError(
            f"{len(damaged)} of {seen} samples are damaged at step {step}, allowed are {self._budget:.3%} "
            f"(1 at least). The last: {last}. Restore these shards of {roots} from their source or "
            "prepare them again, then resume; or raise quarantine_budget"
        )
        raise self._failure

    # What follows also runs in the background threads.

    def _work(self) -> None:
        while (step := self._take()) is not None:
            try:
                item: _Ready[T] | BaseException = self._make(step)
            except BaseException as error:  # whatever ends this thread must end the run, not let it wait for ever
                item = error
            with self._turn:
                self._ready[step] = item
                self._turn.notify_all()
            if isinstance(item, BaseException):
                return

    def _take(self) -> int | None:
        """The next step to make, or None when no more are needed."""
        with self._turn:
            self._turn.wait_for(lambda: self._stopped or self._next < self._wanted + self._ahead)
            if self._stopped or any(isinstance(item, BaseException) for item in self._ready.values()):
                return None
            self._next += 1
            return self._next - 1

    def _make(self, step: int) -> _Ready[T]:
        if self._share is not None and not self._share.leader:
            read = self._receive(step)
        else:
            try:
                read = self._read(step)
            except Exception as error:
                self._pass_on(step, {"error": str(error), "kind": _kind(error)}, [])
                raise
            note = {"damaged": read.damaged, "seen": read.seen, "empty": read.empty, "excluded": sorted(read.excluded)}
            self._pass_on(step, note, read.batches)
        return _Ready(read, [self._transform(batch) for batch in read.batches])

    def _pass_on(self, step: int, note: dict[str, Any], batches: list[Batch]) -> None:
        """Send to the group, in the order of the steps."""
        if self._share is None:
            return
        with self._turn:
            self._turn.wait_for(lambda: self._stopped or self._sent == step)
            if self._sent != step:
                return
        self._share.send({"step": step, **note}, batches)
        with self._turn:
            self._sent += 1
            self._turn.notify_all()

    def _receive(self, step: int) -> _Read:
        assert self._share is not None
        note, batches = self._share.receive()
        if "end" in note:
            self._ended = True
            raise DataError(f"the rank that reads for this group ended before step {step}; its own message tells why")
        if note["step"] != step:
            raise DataError(f"step {note['step']} was received for step {step}: the group's ranks are out of step")
        if "error" in note:
            raise KINDS[note["kind"]](note["error"])
        return _Read(step, batches, note["damaged"], note["seen"], note["empty"], frozenset(note["excluded"]))

    def _data(self, step: int) -> _Data:
        segment = self._segments.segment(step)
        with self._opening:
            if segment.first_step not in self._opened:
                self._opened[segment.first_step] = self._open(segment)
            return self._opened[segment.first_step]

    def _open(self, segment: Segment) -> _Data:
        mixture = next((m for m in self._mixtures if m.fingerprint == segment.fingerprint), None)
        if mixture is None:
            nearest = self._mixtures[-1]
            self._segments.check(nearest.fingerprint, segment.first_step, nearest.describe())
            raise AssertionError("unreachable")
        captions = mixture.captions(segment.captioners, segment.seed)
        self._segments.check_texts(mixture.texts(captions), segment.first_step)
        empty_text = pad_text(mixture.empty_text(), self._text_length)  # once, not for every batch
        order = mixture.order(segment.batch_sizes, segment.seed, segment.window)
        smallest = min(size for size, samples in zip(order.batch_sizes, order.samples, strict=True) if samples)
        if self._dp_world > smallest:
            raise DataError(
                f"{self._dp_world} data-parallel ranks share a global batch of {smallest}: some would never have a "
                "sample. Use fewer ranks (or more sequence parallelism)"
            )
        return _Data(segment, mixture, order, captions, empty_text)

    def _read(self, step: int) -> _Read:
        data, excluded = self._data(step), self._excluded
        batch, first = data.batch(step)
        size, empty = len(batch.rows), data.captions.count_empty(batch.datasets, batch.rows)
        bucket = data.mixture.buckets[batch.bucket]
        last: tuple[int, Batch, int] | None = None  # slot read last, and where: left-over slots repeat it
        damaged: list[Quarantined] = []
        batches = []
        for micro in range(-(-size // (self._dp_world * self._micro_batch))):
            filled = unfilled(step, bucket, self._micro_batch, data.empty_text, self._text_length, float(size))
            for position in range(self._micro_batch):
                slot = (micro * self._micro_batch + position) * self._dp_world + self._dp_rank
                real = min(slot, size - 1)
                if last is not None and last[0] == real:
                    _repeat(last[1], last[2], filled, position)
                else:
                    source, row = int(batch.datasets[real]), int(batch.rows[real])
                    filled.sample_numbers[position] = first + real
                    entry = self._fill(data, source, row, filled, position, excluded)
                    if entry is not None and slot < size:  # the rank that owns the slot reports its damage
                        damaged.append(entry)
                if slot >= size:
                    filled.weight[position] = 0
                last = (real, filled, position)
            batches.append(filled)
        return _Read(step, batches, damaged, first + size, empty, excluded)

    def _fill(
        self, data: _Data, source: int, row: int, batch: Batch, position: int, excluded: frozenset[str]
    ) -> Quarantined | None:
        """Read a sample into one place of a batch; zeros and weight 0 where it is damaged. Returns the new damage."""
        index, targets = data.mixture.selections[source].index, batch.slot(position)
        batch.keys[position] = key = index.key(row)
        damage: Quarantined | None = None
        if key not in excluded:
            try:
                captioner = data.captions.choose(source, row, int(batch.sample_numbers[position]))
                index.read_into(row, captioner, **targets)
                return None
            except DamagedSample as error:
                damage = Quarantined(
                    key=error.key, shard=error.shard, reason=error.reason, step=batch.step, found="read"
                )
        batch.weight[position] = 0
        for tensor in targets.values():
            tensor.zero_()
        return damage


def _kind(error: Exception) -> str:
    """As which of KINDS an error of the reading rank is raised by the others: whether another attempt may succeed."""
    if lacks_room(error):
        return NoRoomError.__name__
    return next((name for name, kind in KINDS.items() if isinstance(error, kind)), DataError.__name__)


def _repeat(source: Batch, slot: int, batch: Batch, position: int) -> None:
    batch.keys[position], batch.sample_numbers[position] = source.keys[slot], source.sample_numbers[slot]
    batch.weight[position] = source.weight[slot]
    for name, tensor in source.slot(slot).items():
        batch.slot(position)[name].copy_(tensor)


def _mixtures(data: DatasetIndex | Mixture | Sequence[Mixture]) -> list[Mixture]:
    if isinstance(data, DatasetIndex):
        return [Mixture.of(data)]
    return [data] if isinstance(data, Mixture) else list(data)
