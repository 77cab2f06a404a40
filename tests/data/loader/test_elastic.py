"""Several datasets at any number of ranks and threads, over interruptions, changes of data, reported damage and within
groups that share their reading: always the same sequence."""

import json
import random
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from core.errors import NoRoomError, UserError
from data.batch import Batch
from data.clip import Bucket
from data.dataset.build import build_index
from data.dataset.index import DatasetIndex
from data.dataset.record import EMPTY_TEXT
from data.dataset.selection import Rule, Selection
from data.errors import DataError, MissingData, ReadError
from data.loader.mixture import BatchCost, Mixture, explicit_sizes, label
from data.loader.share import GroupShare
from data.loader.state import DataState, Segment
from data.loader.stream import Stream
from tests.distributed import run_cases
from tests.shards import make_dataset

BOTH = Bucket(frames=2, height=2, width=3, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
SOUND = Bucket(frames=2, height=2, width=3, audio_steps=7, fps=24.0, has_video=False, has_audio=True)
WIDE = Bucket(frames=2, height=2, width=5, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
SHARDS = {
    "one": [(BOTH, 9), (SOUND, 4), (BOTH, 7), (SOUND, 5)],
    "two": [(WIDE, 6), (BOTH, 11), (WIDE, 5), (BOTH, 2)],
    "three": [(SOUND, 8), (SOUND, 3)],
}
SIZES = {BOTH: 8, SOUND: 12, WIDE: 9}
LENGTH, SEED, WINDOW = 4, 3, 2
RANKS, WORKERS = (1, 2, 3, 4, 6, 8), (0, 1, 2, 3, 4)
Slot = tuple[int, str, int]  # sample number, key, a sum over the bits of its tensors


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("elastic")
    made = {name: make_dataset(place / name, SHARDS[name], seed=seed) for seed, name in enumerate(SHARDS, start=1)}
    for root in (made["two"], made["three"]):  # one text encoder, one empty prompt
        shutil.copy(made["one"] / EMPTY_TEXT, root / EMPTY_TEXT)
        build_index(root)
    return made


def open_mixture(roots: dict[str, Path], weights: tuple[float, ...] = (0.5, 0.3, 0.2)) -> Mixture:
    """All three; five samples of the second are taken down."""
    indices = {name: DatasetIndex.open(root) for name, root in roots.items()}
    gone = Rule.of({}, [indices["two"].key(row) for row in (0, 6, 7, 15, 23)])
    selections = [Selection(index, gone if name == "two" else None) for name, index in indices.items()]
    return Mixture(selections, weights)


@pytest.fixture(scope="module")
def mixture(roots: dict[str, Path]) -> Mixture:
    return open_mixture(roots)


def segment(mixture: Mixture, first_step: int = 0, first_sample: int = 0, seed: int = SEED) -> Segment:
    sizes = [SIZES[bucket] for bucket in mixture.buckets]
    return Segment(first_step, mixture.fingerprint, sizes, seed, WINDOW, first_sample, mixture.describe())


def new_state(mixture: Mixture) -> DataState:
    return DataState([segment(mixture)])


def copy(state: DataState) -> DataState:
    return DataState.from_json(json.loads(json.dumps(state.to_json())))


def make_stream(data: Any, state: DataState, rank: int = 0, world: int = 1, **options: Any) -> Stream[Batch]:
    settings: dict[str, Any] = {"micro_batch": 2, "text_length": LENGTH, "transform": lambda batch: batch, **options}
    return Stream(data, state, dp_rank=rank, dp_world=world, **settings)


def slots_of(batches: list[Batch]) -> list[Slot]:
    """The slots that count, with their contents."""
    slots = []
    for batch in batches:
        for i, key in enumerate(batch.keys):
            if batch.weight[i] > 0:
                bits = sum(int(t[i].view(torch.int16).long().sum()) for t in (batch.video, batch.audio, batch.text))
                slots.append((int(batch.sample_numbers[i]), key, bits))
    return slots


def run_steps(data: Any, state: DataState, world: int, steps: int, **options: Any) -> list[list[Slot]]:
    """The sorted slots of all ranks per step; `state` is advanced."""
    states = [state] + [copy(state) for _ in range(world - 1)]
    found: list[list[Slot]] = [[] for _ in range(steps)]
    for rank in range(world):
        with make_stream(data, states[rank], rank, world, **options) as stream:
            for slots in found:
                slots += slots_of(next(stream))
    for other in states[1:]:
        state.absorb(other.quarantine)
    return [sorted(slots) for slots in found]


@pytest.fixture(scope="module")
def expected(mixture: Mixture) -> list[list[Slot]]:
    return run_steps(mixture, new_state(mixture), 1, 150, workers=0)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world", RANKS)
def test_the_same_sequence_at_any_number_of_ranks_and_threads(
    mixture: Mixture, expected: list[list[Slot]], world: int, workers: int
) -> None:
    assert run_steps(mixture, new_state(mixture), world, 6, workers=workers) == expected[:6]


def test_the_sequence_is_the_orders_and_keeps_its_weights(mixture: Mixture, expected: list[list[Slot]]) -> None:
    order = mixture.order(segment(mixture).batch_sizes, SEED, WINDOW)
    keys: list[list[str]] = [[], [], []]
    number = 0
    for step, slots in enumerate(expected):
        batch = order.batch(step)
        wanted = []
        for source, row in zip(batch.datasets.tolist(), batch.rows.tolist(), strict=True):
            key = mixture.selections[source].index.key(row)
            keys[source].append(key)
            wanted.append((number, key))
            number += 1
        assert [slot[:2] for slot in slots] == wanted
    names = [selection.index.root.name for selection in mixture.selections]  # type: ignore[union-attr]
    shares = dict(zip(names, (len(part) / number for part in keys), strict=True))
    assert shares == pytest.approx({"one": 0.5, "two": 0.3, "three": 0.2}, abs=0.02)
    for selection, part in zip(mixture.selections, keys, strict=True):
        kept = {selection.index.key(row) for row in range(len(selection.index))}
        if selection.kept is not None:
            kept = {selection.index.key(int(row)) for row in np.flatnonzero(selection.kept)}
            assert len(kept) == len(selection.index) - 5
        assert set(part) == kept
        # After n passes' worth of samples, every sample has come n times, give or take one where a pass begins.
        counts = {part.count(key) for key in kept}
        assert max(counts) - min(counts) <= 2 and max(counts) >= 3


@pytest.mark.slow
def test_two_hundred_interruptions_at_random_layouts(mixture: Mixture, expected: list[list[Slot]]) -> None:
    rng = random.Random(11)
    state, seen, layouts = new_state(mixture), [], set()
    for _ in range(200):
        state = copy(state)
        world, workers = rng.choice(RANKS), rng.choice(WORKERS)
        layouts.add((world, workers))
        options = {"workers": workers, "micro_batch": rng.choice([1, 2, 4]), "prefetch": rng.choice([1, 2])}
        seen += run_steps(mixture, state, world, rng.choice([0, 0, 1, 1, 1]), **options)
    assert state.position == len(seen) > 90 and len(layouts) > 20
    assert seen == expected[: len(seen)]


def test_listing_order_and_places_change_nothing(roots: dict[str, Path], mixture: Mixture) -> None:
    turned = open_mixture(dict(reversed(roots.items())), (0.4, 0.6, 1.0))  # the same shares, listed from the end
    assert turned.fingerprint == mixture.fingerprint and turned.buckets == mixture.buckets
    assert turned.weights == mixture.weights and sum(mixture.weights) == 1 and Fraction(3, 10) in mixture.weights
    other = open_mixture(roots, (0.5, 0.3, 0.21))
    assert other.fingerprint != mixture.fingerprint
    alone = DatasetIndex.open(roots["one"])
    assert Mixture.of(alone).fingerprint == alone.fingerprint and Mixture.of(alone).buckets == alone.buckets
    by_size = Mixture([Selection(DatasetIndex.open(root)) for root in roots.values()])
    assert sorted(by_size.weights) == sorted(Fraction(n, 60) for n in (25, 24, 11))


def test_mixtures_that_make_no_sense_are_named(roots: dict[str, Path], tmp_path: Path) -> None:
    one, two = (DatasetIndex.open(roots[name]) for name in ("one", "two"))
    wide = DatasetIndex.open(make_dataset(tmp_path / "wide", [(BOTH, 3)], seed=5, dim=8))
    cases: list[tuple[list[Selection], list[float | None] | None, str]] = [
        ([Selection(one), Selection(one)], None, "one comes twice"),
        ([Selection(one), Selection(two)], [0.5, None], "two has no weight"),
        ([Selection(one), Selection(two)], [0.5, 0.0], "weight 0.0 of dataset.*two"),
        ([Selection(one), Selection(two)], [0.5], "1 weights for 2 datasets"),
        ([Selection(one, Rule.of({}, [one.key(row) for row in range(25)]))], None, "nothing of dataset.*one is kept"),
        ([Selection(one), Selection(wide)], None, "width"),
        ([], None, "no dataset"),
    ]
    for selections, weights, named in cases:
        with pytest.raises(DataError, match=named):
            Mixture(selections, weights)
    two.encoders = {**one.encoders, "video": "b"}
    one.encoders = {**one.encoders, "video": "a"}
    with pytest.raises(DataError, match="video encoder"):
        Mixture([Selection(one), Selection(two)])
    foreign = DatasetIndex.open(make_dataset(tmp_path / "foreign", [(BOTH, 3)], seed=6))
    with pytest.raises(DataError, match="empty prompt"):
        Mixture([Selection(DatasetIndex.open(roots["one"])), Selection(foreign)]).empty_text()
    with pytest.raises(DataError, match="one batch size per bucket"):
        open_mixture(roots).order([8], 0, 2)


# Changing data in mid-run.


def two_segments(mixture: Mixture, alone: Mixture, first_step: int = 7) -> list[Segment]:
    order = mixture.order(segment(mixture).batch_sizes, SEED, WINDOW)
    return [segment(mixture), segment(alone, first_step, order.first_sample(first_step), seed=9)]


def test_a_change_of_data_at_any_layout(roots: dict[str, Path], mixture: Mixture, expected: list[list[Slot]]) -> None:
    alone = Mixture.of(DatasetIndex.open(roots["two"]))
    planned = two_segments(mixture, alone)
    state = DataState(planned)
    steps = run_steps([mixture, alone], state, 1, 14, workers=3)
    assert steps[:7] == expected[:7]
    numbers = [slot[0] for slots in steps for slot in slots]
    assert numbers == list(range(len(numbers)))
    fresh = run_steps(alone, DataState([segment(alone, seed=9)]), 2, 7)
    assert [[s[1:] for s in slots] for slots in steps[7:]] == [[s[1:] for s in slots] for slots in fresh]
    for world, workers, first in ((3, 0, 5), (4, 2, 7), (8, 4, 9)):
        resumed = DataState(list(planned), position=first)
        data = [mixture, alone] if first < 7 else [alone]  # what is behind need not be there any more
        assert run_steps(data, resumed, world, 14 - first, workers=workers) == steps[first:]


def test_the_past_is_kept_and_the_future_is_free(roots: dict[str, Path], mixture: Mixture) -> None:
    alone = Mixture.of(DatasetIndex.open(roots["two"]))
    planned = two_segments(mixture, alone)
    state = new_state(mixture)
    state.follow(planned)  # nothing was done yet: anything goes
    assert state.segments == planned
    state.position = 7  # the new segment may begin with the very next step
    for later in ([], planned[1:], [segment(alone, 9, 1)], [segment(alone, 7, 1, seed=2)]):
        state.follow([planned[0], *later])
        assert state.segments == [planned[0], *later]
    state.segments, state.position = list(planned), 12
    state.follow(planned)
    gone = Segment(0, "", [], SEED, WINDOW, 0, [])  # its data is not there any more
    state.follow([gone, planned[1]])
    assert state.segments == planned
    third = segment(mixture, 12, 99)
    state.follow([gone, planned[1], third])
    assert state.segments == [*planned, third]
    DataState.from_json(json.loads(json.dumps(state.to_json()))).follow([gone, planned[1]])


def test_another_past_is_refused_and_the_difference_is_shown(roots: dict[str, Path], mixture: Mixture) -> None:
    indices = {name: DatasetIndex.open(root) for name, root in roots.items()}
    alone = Mixture.of(indices["two"])
    planned = two_segments(mixture, alone)
    loose = Mixture([Selection(index) for index in indices.values()], (0.5, 0.3, 0.2))
    heavier = open_mixture(roots, (0.6, 0.2, 0.2))
    fewer = Mixture([Selection(indices["one"]), Selection(indices["three"])], (0.5, 0.5))
    larger = Segment(**{**vars(segment(mixture)), "batch_sizes": [16, 12, 9]})
    stated = [{**Rule.of({"quality": [1, 2]}).describe()} for _ in range(3)]
    cases = [
        ([segment(loose), planned[1]], r"segment 0, source \d, takedown: 5 keys .* -> none"),
        ([segment(heavier), planned[1]], r"weight: 1/2 -> 3/5"),
        ([segment(fewer), planned[1]], r"recorded, and now missing"),
        ([larger, planned[1]], r"batch_sizes: .* -> \[16, 12, 9\]"),
        ([segment(mixture, seed=4), planned[1]], r"segment 0, seed: 3 -> 4"),
        ([planned[0]], r"segment 1, from step 7: recorded, and now missing"),
        ([planned[0], segment(alone, 8, seed=9)], r"segment 1, first_step: 7 -> 8"),
        ([*planned, segment(mixture, 11)], r"a segment from step 11, which lies before 12: new"),
        ([Segment(0, "", [], SEED, WINDOW, 0, stated), planned[1]], r"thresholds: {} -> {'quality': \[1.0, 2.0\]}"),
    ]
    for plan, named in cases:
        state = DataState(list(planned), position=12)
        with pytest.raises(DataError, match=named) as error:
            state.follow(plan)
        assert "past 12 steps can't be changed" in str(error.value) and "from step 12 on" in str(error.value)
        assert state.segments == planned
    with pytest.raises(DataError, match=f"(?s){loose.fingerprint}.*takedown: 5 keys .* -> none"):
        make_stream(loose, new_state(mixture))
    with pytest.raises(DataError, match="must start at 0 and ascend"):
        DataState(list(planned), position=12).follow([planned[0], segment(alone, 7), segment(alone, 7)])


# Damage that a step finds.


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_reported_sample_has_weight_zero_from_then_on(
    mixture: Mixture, expected: list[list[Slot]], workers: int
) -> None:
    """At once, though later steps were read ahead, at every layout, and after a restart; it keeps its slots."""
    key = expected[20][3][1]
    again = [step for step, slots in enumerate(expected) if key in [slot[1] for slot in slots]]
    assert again[0] < again[1] < 60
    first, stop = again[0], again[1] - 1  # reported just before it comes back, when it has been read already
    sequence: dict[int, list[list[Slot]]] = {}
    for world in (1, 3):
        state, steps = new_state(mixture), [[] for _ in range(again[1] + 2)]  # type: ignore[var-annotated]
        states = [state] + [copy(state) for _ in range(world - 1)]
        for rank in range(world):
            options = {"workers": workers, "prefetch": 4, "quarantine_budget": 0.01}
            with make_stream(mixture, states[rank], rank, world, **options) as stream:
                for step, slots in enumerate(steps):
                    if step == stop:
                        stream.report_damage(key, "its loss is NaN", first)
                    batches = next(stream)
                    slots += slots_of(batches)
                    for batch in batches if step > stop else []:
                        for place in [i for i, k in enumerate(batch.keys) if k == key]:
                            assert batch.weight[place] == 0
                            assert not any(t.any() for t in batch.slot(place).values())
                            assert batch.condition[place, :4, 0].all()
        sequence[world] = [sorted(slots) for slots in steps]
        for other in states:
            assert [(e["key"], e["step"], e["found"]) for e in other.quarantine] == [(key, first, "step")]
    assert sequence[1] == sequence[3]
    assert sequence[1] == [
        [slot for slot in slots if slot[1] != key or step < stop] for step, slots in enumerate(expected[: again[1] + 2])
    ]
    resumed = copy(DataState(state.segments, again[1], state.quarantine))
    assert run_steps(mixture, resumed, 4, 2, workers=workers) == sequence[1][again[1] :]


def test_reports_are_looked_up_and_count_for_the_budget(mixture: Mixture, expected: list[list[Slot]]) -> None:
    state = new_state(mixture)
    with make_stream(mixture, state) as stream:
        with pytest.raises(DataError, match="no step was handed out"):
            stream.report_damage(expected[0][0][1], "NaN")
        for _ in range(3):
            next(stream)
        index = next(s.index for s in mixture.selections if expected[1][2][1] in [s.index.key(r) for r in range(11)])
        stream.report_damage(expected[1][2][1], "NaN")
        assert [(e["key"], e["step"]) for e in state.quarantine] == [(expected[1][2][1], 1)]
        assert state.quarantine[0]["shard"] in [shard["name"] for shard in index.shards]
        stream.report_damage(expected[1][2][1], "NaN again")
        assert len(state.quarantine) == 1
        with pytest.raises(DataError, match="steps 0 to 2 do not hold it"):
            stream.report_damage("f" * 24, "NaN")
        with pytest.raises(DataError, match=r"2 of \d+ samples are damaged.*NaN in step two"):
            stream.report_damage(expected[2][0][1], "NaN in step two")
        with pytest.raises(DataError, match="2 of"):
            next(stream)
    assert state.position == 3


# Groups of ranks that share what one of them read.


FAILURES = {"failing": DataError, "passing": ReadError, "missing": MissingData, "full": NoRoomError}


def share_case(paths: list[str], record: dict[str, Any], reads: str, workers: int, late: int) -> Any:
    """One rank of a group of two: its slots, how often it read, how its stream ended."""
    group = dist.new_group([0, 1], backend="gloo")
    mixture = Mixture([Selection(DatasetIndex.open(path)) for path in paths], (0.6, 0.4))
    state = DataState.from_json(record)
    count, failed = [0], ""
    read = DatasetIndex.read_into

    def counted(self: DatasetIndex, *args: Any, **kwargs: Any) -> None:
        count[0] += 1
        if reads in FAILURES and count[0] > 30:
            raise FAILURES[reads]("the disk is gone")
        read(self, *args, **kwargs)

    DatasetIndex.read_into = counted  # type: ignore[method-assign]
    steps, options = [], {"workers": workers, "quarantine_budget": 0.5}
    stream = make_stream(mixture, state, share=GroupShare(group), **options)
    try:
        for step in range(8 + late * (dist.get_rank() == 0)):  # ranks may stop apart: nobody waits for ever
            batches = next(stream)
            whole = [[b.step, b.keys, b.weight.tolist(), b.total_weight, str(b.bucket)] for b in batches]
            steps.append((whole, slots_of(batches)))
            if step == 2:
                stream.report_damage(batches[0].keys[0], "NaN")
    except UserError as error:
        failed = f"{type(error).__name__}: {error}"
    stream.close()
    DatasetIndex.read_into = read  # type: ignore[method-assign]
    return steps, count[0], failed, state.to_json()


def test_groups_read_once_and_agree(roots: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "two"
    shutil.copytree(roots["two"], damaged)
    index = DatasetIndex.open(damaged)
    with open(damaged / index.shards[1]["name"], "r+b") as file:
        file.seek(int(index.columns["av_offset"][8]) + int(index.columns["av_size"][8]) - 5)
        file.write(b"\x01\x02\x03")
    paths = [str(roots["one"]), str(damaged)]
    mixture = Mixture([Selection(DatasetIndex.open(path)) for path in paths], (0.6, 0.4))
    state = new_state(mixture)
    alone = run_steps(mixture, copy(state), 1, 3)
    cases = [("fine", 0, 0), ("fine", 1, 1), ("fine", 3, 0), ("fine", 3, 1), *((each, 2, 0) for each in FAILURES)]
    results = run_cases(2, {str(case): (share_case, (paths, state.to_json(), *case)) for case in cases})
    for (kind, workers, late), (leader, other) in zip(cases, results.values(), strict=True):
        assert other[1] == 0 and leader[1] > 0  # only one rank of the group read
        assert leader[0][: len(other[0])] == other[0]
        if kind in FAILURES:  # on both ranks, or one of them would not be started again
            assert (
                leader[2] == other[2] == f"{FAILURES[kind].__name__}: the disk is gone"
                and len(leader[0]) == len(other[0]) > 0
            )
            continue
        assert (leader[2], other[2]) == ("", "") and len(other[0]) == 8
        assert [sorted(slots) for _, slots in other[0]][:3] == alone
        if not late:
            assert leader[3] == other[3]
            ahead = 2 + workers if workers else 0
            assert leader[1] <= (8 + ahead) * 12
        found = {entry["found"] for entry in other[3]["quarantine"]}
        assert "step" in found


# Batch sizes by cost.


def test_batches_of_equal_cost() -> None:
    cost = BatchCost(budget=6.8e6)
    clip = Bucket(frames=49, height=44, width=80, audio_steps=403, fps=24.0, has_video=True, has_audio=True)
    tokens = 49 * 22 * 40 + 403
    assert cost.sample(clip) == pytest.approx(tokens * (1 + tokens / 29184)) and cost.size(clip) == 62
    large = Bucket(frames=49, height=90, width=160, audio_steps=403, fps=24.0, has_video=True, has_audio=True)
    short = Bucket(frames=13, height=44, width=80, audio_steps=103, fps=24.0, has_video=False, has_audio=True)
    for bucket in (clip, large, short):
        size = cost.size(bucket)
        assert size * cost.sample(bucket) <= 6.8e6 < (size + 1) * cost.sample(bucket)
        assert BatchCost(6.8e6, multiple=8).size(bucket) == max(8, size // 8 * 8)
    # Four times the tokens cost more than four times as much, and this less with cheaper attention.
    assert (
        cost.sample(large) / cost.sample(clip) > 11 > BatchCost(1, 1e9).sample(large) / BatchCost(1, 1e9).sample(clip)
    )
    odd = Bucket(frames=1, height=3, width=5, audio_steps=2, fps=24.0, has_video=True, has_audio=True)
    assert BatchCost(1, 1e12).sample(odd) == pytest.approx(2 * 3 + 2)
    assert explicit_sizes([clip, short], {label(short): 3, "49x44x80x403": 5}) == [5, 3]
    with pytest.raises(DataError, match="no batch size for bucket 13x44x80x103; given are 49x44x80x403"):
        explicit_sizes([clip, short], {"49x44x80x403": 5})
    for wrong in ({"budget": 0.0}, {"budget": 1.0, "multiple": 0}, {"budget": 1.0, "attention_tokens": -1.0}):
        with pytest.raises(DataError, match=f"{list(wrong)[-1]} is"):
            BatchCost(**wrong)  # type: ignore[arg-type]
