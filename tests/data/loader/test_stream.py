"""The stream: the same samples per step at any number of ranks and after any restart; damage keeps its slot."""

import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import data.storage.retry
from data.batch import Batch
from data.clip import Bucket
from data.dataset.index import DatasetIndex
from data.errors import DataError
from data.loader.state import DataState, Segment
from data.loader.stream import Stream
from tests.shards import make_dataset

BOTH = Bucket(frames=2, height=2, width=3, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
SOUND = Bucket(frames=2, height=2, width=3, audio_steps=7, fps=24.0, has_video=False, has_audio=True)
SHARDS = [(BOTH, 9), (SOUND, 4), (BOTH, 7), (BOTH, 10), (SOUND, 9), (BOTH, 3)]
DIM, LENGTH = 6, 4


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return DatasetIndex.open(make_dataset(tmp_path_factory.mktemp("stream") / "dataset", SHARDS))


def new_state(index: DatasetIndex, batch: int = 8) -> DataState:
    return DataState.start(index.fingerprint, [batch] * len(index.buckets), seed=3, window=2)


def same(batch: Batch) -> Batch:
    return batch


def make_stream(index: DatasetIndex, state: DataState, rank: int = 0, world: int = 1, **options: Any) -> Stream[Batch]:
    settings: dict[str, Any] = {"micro_batch": 2, "text_length": LENGTH, "transform": same, **options}
    return Stream(index, state, dp_rank=rank, dp_world=world, **settings)


Slot = tuple[int, str, float, int]  # sample number, key, weight, sum over the bits of its tensors


def slots_of(batch: Batch) -> list[Slot]:
    """Per slot, with the contents, so that a key on another sample's tensors is seen."""
    tensors = (batch.video, batch.audio, batch.condition, batch.text)
    sums = [sum(int(t[i].view(torch.int16).long().sum()) for t in tensors) for i in range(len(batch.keys))]
    return list(zip(batch.sample_numbers.tolist(), batch.keys, batch.weight.tolist(), sums, strict=True))


def run_steps(index: DatasetIndex, state: DataState, world: int, steps: int, **options: Any) -> list[list[Slot]]:
    """Slots of all ranks per step; all ranks' states are advanced, the first one is `state` itself."""
    states = [state] + [DataState.from_json(json.loads(json.dumps(state.to_json()))) for _ in range(world - 1)]
    result: list[list[Slot]] = [[] for _ in range(steps)]
    for rank in range(world):
        with make_stream(index, states[rank], rank, world, **options) as stream:
            for slots in result:
                for batch in next(stream):
                    slots += slots_of(batch)
    for other in states[1:]:
        assert other.position == state.position
        state.absorb(other.quarantine)
    return result


def real(slots: list[Slot]) -> list[Slot]:
    return sorted(slot for slot in slots if slot[2] > 0)


@pytest.fixture(scope="module")
def expected(index: DatasetIndex) -> list[list[Slot]]:
    return [real(slots) for slots in run_steps(index, new_state(index), 1, 60)]


def test_batches_are_the_orders_rows_with_the_stored_tensors(index: DatasetIndex) -> None:
    state = new_state(index)
    rows = {index.key(row): row for row in range(len(index))}
    kinds, number = set(), 0
    with make_stream(index, state, micro_batch=4) as stream:
        for step in range(8):
            assert state.position == step
            batches = next(stream)
            assert state.position == step + 1 and stream.data_wait >= 0
            assert [n for batch in batches for n in batch.sample_numbers.tolist()] == list(range(number, number + 8))
            number += 8
            for batch in batches:
                assert batch.step == step and batch.total_weight == 8.0
                kinds.add(batch.bucket)
                empty = index.empty_text()
                assert torch.equal(batch.empty_text[:3], empty) and not batch.empty_text[3:].any()
                assert batch.condition.shape == (4, 20, 2, 2, 3) and batch.audio.shape[1] == 128
                assert (batch.condition[:, :4, 0] == 1).all() and (batch.condition[:, :4, 1:] == 0).all()
                assert batch.video_weight.tolist() == [float(batch.bucket.has_video)] * 4
                assert batch.audio_weight.tolist() == [1.0] * 4
                for slot, key in enumerate(batch.keys):
                    clip, text = index.read_clip(rows[key]), index.read_text(rows[key], "plain")
                    assert clip.audio is not None and torch.equal(batch.audio[slot], clip.audio.T)
                    if batch.bucket.has_video:
                        assert clip.video is not None and torch.equal(batch.video[slot], clip.video)
                        assert clip.condition is not None and torch.equal(batch.condition[slot, 4:], clip.condition)
                    else:
                        assert not batch.video.any() and not batch.condition[:, 4:].any()
                    kept = min(len(text), LENGTH)
                    assert torch.equal(batch.text[slot, :kept], text[:kept]) and not batch.text[slot, kept:].any()
    assert kinds == {BOTH, SOUND}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_same_global_batches_at_any_number_of_ranks(
    index: DatasetIndex, expected: list[list[Slot]], world: int, micro_batch: int
) -> None:
    steps = run_steps(index, new_state(index), world, 12, micro_batch=micro_batch)
    for step, slots in enumerate(steps):
        assert real(slots) == expected[step] and len(expected[step]) == 8
        assert len(slots) == -(-8 // (world * micro_batch)) * world * micro_batch
        # Left-over slots repeat the last sample, so that they have honest tensors and no number of their own.
        last = max(slots)
        assert {(n, key, bits) for n, key, weight, bits in slots if weight == 0} <= {(last[0], last[1], last[3])}


def test_ranks_have_equally_many_micro_batches_and_the_same_total(index: DatasetIndex) -> None:
    for rank in range(5):
        with make_stream(index, new_state(index), rank, 5, micro_batch=1) as stream:
            batches = next(stream)
            assert len(batches) == 2 and all(batch.total_weight == 8.0 for batch in batches)


def test_fifty_interruptions_at_random_layouts_give_the_unbroken_sequence(
    index: DatasetIndex, expected: list[list[Slot]]
) -> None:
    rng = random.Random(7)
    state, seen = new_state(index), []
    for _ in range(50):
        state = DataState.from_json(json.loads(json.dumps(state.to_json())))
        options = {"micro_batch": rng.choice([1, 2, 4]), "prefetch": rng.choice([1, 3])}
        seen += run_steps(index, state, rng.choice([1, 2, 3, 4, 5, 8]), rng.choice([0, 1, 1, 2]), **options)
    assert state.position == len(seen) > 40
    assert [real(slots) for slots in seen] == expected[: len(seen)]


def test_reading_ahead_does_not_advance_the_state(index: DatasetIndex) -> None:
    state, transformed = new_state(index), []
    with make_stream(index, state, prefetch=3, transform=lambda batch: transformed.append(batch.step)) as stream:
        deadline = time.monotonic() + 10
        while len(set(transformed)) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert set(transformed) == {0, 1, 2, 3}  # three that lie ready and one in hand: memory is bounded
        assert state.position == 0
        next(stream)
        assert state.position == 1


def damage(root: Path, rows: list[int]) -> DatasetIndex:
    """Flip bytes inside these samples' tensors, as a bad disk would: the size of the tar stays."""
    found = DatasetIndex.open(root)
    for row in rows:
        path = root / found.shards[found.shard_of(row)]["name"]
        with open(path, "r+b") as file:
            file.seek(int(found.columns["av_offset"][row]) + int(found.columns["av_size"][row]) - 5)
            flipped = bytes(255 - byte for byte in file.read(3))
            file.seek(-3, io.SEEK_CUR)
            file.write(flipped)
    return DatasetIndex.open(root)


@pytest.mark.parametrize("world", [1, 3])
def test_damaged_sample_keeps_its_slot_and_enters_quarantine(
    index: DatasetIndex, expected: list[list[Slot]], tmp_path: Path, world: int
) -> None:
    number, key, _, _ = expected[3][5]
    row = [index.key(row) for row in range(len(index))].index(key)
    shutil.copytree(index.root, tmp_path / "dataset")
    bad = damage(tmp_path / "dataset", [row])
    state = new_state(bad)
    run_steps(bad, state, world, 3)
    assert state.quarantine == []  # it was read ahead, but not consumed
    [slots] = run_steps(bad, state, world, 1)
    assert real(slots) == [slot for slot in expected[3] if slot[1] != key]
    assert (number, key, 0.0) in {slot[:3] for slot in slots}
    [entry] = state.quarantine
    assert (entry["key"], entry["step"]) == (key, 3)
    assert entry["shard"] == bad.shards[bad.shard_of(row)]["name"] and "checksum" in entry["reason"]
    assert DataState.from_json(json.loads(json.dumps(state.to_json()))) == state
    with make_stream(bad, new_state(bad)) as stream:
        batch = [b for _ in range(4) for b in next(stream) if key in b.keys][0]
    slot = batch.keys.index(key)
    assert batch.weight[slot] == 0 and batch.total_weight == 8.0
    assert not batch.video[slot].any() and not batch.audio[slot].any() and not batch.text[slot].any()


def test_nan_is_damage(tmp_path: Path) -> None:
    found = DatasetIndex.open(make_dataset(tmp_path / "nan", [(BOTH, 8)], nan=6))
    state = new_state(found)
    [slots] = run_steps(found, state, 2, 1)
    assert [key for _, key, weight, _ in slots if weight == 0] == [found.key(6)]
    assert [(e["key"], e["step"]) for e in state.quarantine] == [(found.key(6), 0)]
    assert "NaN" in state.quarantine[0]["reason"]


def test_more_damage_than_the_budget_stops_the_run(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "bad", [(BOTH, 40)])
    probe = DatasetIndex.open(root)
    steps = run_steps(probe, new_state(probe), 1, 5)
    keys = [probe.key(row) for row in range(40)]
    bad = damage(root, [keys.index(steps[0][2][1]), keys.index(steps[2][4][1])])
    state = new_state(bad)
    with make_stream(
        bad, state, quarantine_budget=0.05
    ) as stream:  # 2 of 24 samples are above 5 %, 1 is always allowed
        next(stream)
        next(stream)
        for _ in range(2):
            with pytest.raises(DataError, match="2 of 24 samples are damaged at step 2") as error:
                next(stream)
        assert steps[2][4][1] in str(error.value) and "quarantine_budget" in str(error.value)
    assert state.position == 2
    state = new_state(bad)
    run_steps(bad, state, 1, 5, quarantine_budget=0.09)
    assert len(state.quarantine) == 2


def failing_pread(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> list[int]:
    """os.pread raises an input/output error for the calls that `fails` names."""
    calls, read = [0], os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        calls[0] += 1
        if fails(calls[0]):
            raise OSError(errno.EIO, "Input/output error")
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(data.storage.retry, "LOCAL_WAITS", (0.0, 0.0, 0.0))
    return calls


def test_transient_errors_are_retried_and_change_nothing(
    index: DatasetIndex, expected: list[list[Slot]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing_pread(monkeypatch, lambda call: call % 5 in (1, 2, 3))
    state = new_state(index)
    assert [real(slots) for slots in run_steps(index, state, 2, 6)] == expected[:6]
    assert calls[0] > 100 and state.quarantine == []


def test_lasting_read_errors_stop_the_run_and_lose_nothing(
    index: DatasetIndex, expected: list[list[Slot]], monkeypatch: pytest.MonkeyPatch
) -> None:
    state, seen = new_state(index), []
    with monkeypatch.context() as patch:
        failing_pread(patch, lambda call: call > 70)
        with make_stream(index, state) as stream, pytest.raises(DataError, match="Input/output error"):
            while True:
                seen.append([slot for batch in next(stream) for slot in slots_of(batch)])
    assert 0 < state.position == len(seen) < 10 and state.quarantine == []
    seen += run_steps(index, state, 4, 5)
    assert [real(slots) for slots in seen] == expected[: len(seen)]


def test_another_dataset_is_refused_with_both_fingerprints(index: DatasetIndex, tmp_path: Path) -> None:
    other = DatasetIndex.open(make_dataset(tmp_path / "other", SHARDS, seed=1))
    with pytest.raises(DataError) as error:
        make_stream(other, new_state(index))
    assert other.fingerprint in str(error.value) and index.fingerprint in str(error.value)


def test_segments_change_the_order_from_their_step_on(index: DatasetIndex, expected: list[list[Slot]]) -> None:
    """The numbers go on, the order starts anew; also when the stream is opened inside the later segment."""
    state = new_state(index)
    later = Segment(3, index.fingerprint, [4, 6], seed=9, window=1, first_sample=24)
    state.segments.append(later)
    steps = run_steps(index, state, 1, 8)
    assert [real(slots) for slots in steps[:3]] == expected[:3]
    assert [slot[0] for slots in steps for slot in slots] == list(range(len([s for slots in steps for s in slots])))
    alone = DataState.start(index.fingerprint, [4, 6], seed=9, window=1)
    assert [[s[1] for s in slots] for slots in steps[3:]] == [[s[1] for s in x] for x in run_steps(index, alone, 1, 5)]
    resumed = DataState(state.segments, position=5)
    assert run_steps(index, resumed, 1, 3) == steps[5:]
    state = new_state(index)
    state.segments.append(Segment(2, "elsewhere", [4, 6], seed=9, window=1, first_sample=16))
    with make_stream(index, state) as stream:
        next(stream)
        next(stream)
        with pytest.raises(DataError, match="elsewhere since step 2"):
            next(stream)


def test_an_error_in_the_thread_reaches_the_caller_and_close_ends_it(index: DatasetIndex) -> None:
    def transform(batch: Batch) -> int:
        if batch.step == 2:
            raise ZeroDivisionError("in the transform")
        return batch.step

    state = new_state(index)
    stream = Stream(index, state, dp_rank=0, dp_world=1, micro_batch=8, text_length=LENGTH, transform=transform)
    assert [next(stream), next(stream)] == [[0], [1]]
    for _ in range(2):  # again, and not a wait for ever
        with pytest.raises(ZeroDivisionError, match="in the transform"):
            next(stream)
    assert state.position == 2
    open_stream = make_stream(index, new_state(index))
    next(open_stream)
    assert set(open_stream._threads) & set(threading.enumerate())
    begin = time.monotonic()
    open_stream.close()
    open_stream.close()
    assert time.monotonic() - begin < 2 and not set(open_stream._threads) & set(threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        next(open_stream)


def test_a_program_that_forgets_to_close_ends_cleanly(index: DatasetIndex) -> None:
    """A thread that comes back from torch while the interpreter ends would (sometimes) abort the process."""
    program = f"""
import atexit, os
from data.index import DatasetIndex
from data.loader.state import DataState
from data.loader.stream import Stream
from tests.shards import make_dataset
atexit.register(lambda: os._exit(3) if stream._threads[0].is_alive() else None)  # runs after those registered later
index = DatasetIndex.open({str(index.root)!r})
state = DataState.start(index.fingerprint, [8, 8], 0, 2)
stream = Stream(index, state, dp_rank=0, dp_world=1, micro_batch=1, text_length=4, transform=str)
next(stream)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_bad_arguments_are_named(index: DatasetIndex) -> None:
    state = new_state(index)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rank": 2, "world": 2}, "data rank 2 of 2"),
        ({"world": 9}, "9 data-parallel ranks"),
        ({"micro_batch": 0}, "micro_batch is 0"),
    ]
    for options, named in cases:
        with pytest.raises(DataError, match=named):
            make_stream(index, state, **options)
    one = DataState.start(index.fingerprint, [8], seed=0, window=2)
    with pytest.raises(DataError, match="one batch size per bucket"):
        make_stream(index, one)
    with pytest.raises(DataError, match="must start at 0"):
        DataState([Segment(1, "f", [1], 0, 1)])
    with pytest.raises(DataError, match="cannot be read.*position"):
        DataState.from_json(
            {"segments": [{"first_step": 0, "fingerprint": "f", "batch_sizes": [1], "seed": 0, "window": 1}]}
        )
