"""Captions by weight: which captioner a sample takes depends on its number alone, and changes nothing else."""

import hashlib
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.batch import Batch, pad_text
from data.clip import Bucket
from data.dataset.index import DatasetIndex
from data.dataset.selection import Selection
from data.errors import DataError
from data.loader.caption_mix import CaptionMix, exact_weights
from data.loader.mixture import Mixture
from data.loader.state import DataState, Segment
from data.loader.stream import Stream
from tests.shards import add_captions, make_dataset

BOTH = Bucket(frames=2, height=2, width=3, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
SOUND = Bucket(frames=2, height=2, width=3, audio_steps=7, fps=24.0, has_video=False, has_audio=True)
SHARDS = [(BOTH, 9), (SOUND, 4), (BOTH, 7), (BOTH, 10), (SOUND, 9), (BOTH, 3)]
LENGTH, SEED = 8, 3
MIX = {"qwen": "7/10", "short": "3/10"}
Slot = tuple[int, str, str]  # sample number, key, captioner


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three captioners; rows 5 and 20 have no caption by qwen, 20 and 30 none by short."""
    made = make_dataset(tmp_path_factory.mktemp("captioners") / "dataset", SHARDS)
    add_captions(made, "qwen", 11, without=(5, 20))
    add_captions(made, "short", 12, without=(20, 30))
    return made


@pytest.fixture(scope="module")
def index(root: Path) -> DatasetIndex:
    return DatasetIndex.open(root)


def new_state(index: DatasetIndex, captioners: dict[str, str]) -> DataState:
    return DataState([Segment(0, index.fingerprint, [8, 8], SEED, 2, captioners=captioners)])


def whose(index: DatasetIndex, row: int, text: torch.Tensor) -> str:
    """The captioner whose caption this is, "" for the empty prompt."""
    if torch.equal(text, pad_text(index.empty_text(), LENGTH)):
        return ""
    [name] = [one for one in index.captioners if torch.equal(text, pad_text(index.read_text(row, one), LENGTH))]
    return name


def run_steps(index: DatasetIndex, state: DataState, world: int, steps: int, **options: Any) -> list[list[Slot]]:
    """The sorted slots of all ranks per step; `state` is advanced, and those of all ranks agree."""
    rows = {index.key(row): row for row in range(len(index))}
    states = [state] + [DataState.from_json(json.loads(json.dumps(state.to_json()))) for _ in range(world - 1)]
    found: list[list[Slot]] = [[] for _ in range(steps)]
    for rank in range(world):
        settings: dict[str, Any] = {"micro_batch": 2, "text_length": LENGTH, "transform": lambda batch: batch} | options
        with Stream[Batch](index, states[rank], dp_rank=rank, dp_world=world, **settings) as stream:
            for slots in found:
                for batch in next(stream):
                    for i, key in enumerate(batch.keys):
                        if batch.weight[i] > 0:
                            slots.append((int(batch.sample_numbers[i]), key, whose(index, rows[key], batch.text[i])))
    assert all(other.to_json() == state.to_json() for other in states)
    return [sorted(slots) for slots in found]


@pytest.fixture(scope="module")
def expected(index: DatasetIndex) -> list[list[Slot]]:
    return run_steps(index, new_state(index, MIX), 1, 60, workers=0)


def uniform(sample: int) -> Fraction:
    """The number in [0, 1) that decides for a sample, from numpy's Philox alone."""
    key = int.from_bytes(hashlib.sha256(f"{SEED}/captioner".encode()).digest()[:16], "little")
    bits = np.random.Philox(key=key, counter=sample << 192).random_raw()
    return Fraction(int(bits), 2**64)


def test_each_sample_takes_the_captioner_that_its_number_draws(index: DatasetIndex, expected: list[list[Slot]]) -> None:
    """Below 7/10 it is qwen, else short; and the other one where that has no caption of the window."""
    rows, seen, empty = {index.key(row): row for row in range(len(index))}, {"qwen": 0, "short": 0}, 0
    for number, key, name in (slot for slots in expected for slot in slots):
        drawn = "qwen" if uniform(number) < Fraction(7, 10) else "short"
        seen[drawn] += 1
        wanted = {5: "short", 30: "qwen", 20: ""}.get(rows[key], drawn)
        assert name == wanted, (number, key)
        empty += wanted == ""
    assert abs(seen["qwen"] / 480 - 0.7) < 4 * (0.21 / 480) ** 0.5 and empty > 5
    state = new_state(index, MIX)
    run_steps(index, state, 2, 60)
    assert state.empty_captions == empty


def test_shares_over_many_samples(index: DatasetIndex) -> None:
    mix = CaptionMix([index], {"plain": 0.5, "qwen": 0.3, "short": 0.2}, SEED)
    row, drawn = 0, [mix.choose(0, 0, sample) for sample in range(20_000)]
    for name, share in (("plain", 0.5), ("qwen", 0.3), ("short", 0.2)):
        assert abs(drawn.count(name) / 20_000 - share) < 4 * (share * (1 - share) / 20_000) ** 0.5
    row = 5  # without qwen: its samples go to the others by their weights, all other samples stay as they are
    again = [mix.choose(0, row, sample) for sample in range(20_000)]
    assert all(before == after for before, after in zip(drawn, again, strict=True) if before != "qwen")
    moved = [after for before, after in zip(drawn, again, strict=True) if before == "qwen"]
    assert set(moved) == {"plain", "short"}
    assert abs(moved.count("plain") / len(moved) - 5 / 7) < 4 * (10 / 49 / len(moved)) ** 0.5
    other = CaptionMix([index], {"plain": 0.5, "qwen": 0.3, "short": 0.2}, SEED + 1)
    assert sum(other.choose(0, 0, n) == drawn[n] for n in range(2000)) < 1000  # another seed draws anew


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("workers", [0, 3])
def test_the_same_captions_at_any_layout(
    index: DatasetIndex, expected: list[list[Slot]], world: int, workers: int
) -> None:
    assert run_steps(index, new_state(index, MIX), world, 12, workers=workers, micro_batch=3) == expected[:12]


def test_the_same_captions_after_forty_interruptions(index: DatasetIndex, expected: list[list[Slot]]) -> None:
    rng = random.Random(5)
    state, seen = new_state(index, MIX), []
    for _ in range(40):
        state = DataState.from_json(json.loads(json.dumps(state.to_json())))
        options = {"workers": rng.choice([0, 1, 3]), "micro_batch": rng.choice([1, 2, 4])}
        seen += run_steps(index, state, rng.choice([1, 2, 3, 4]), rng.choice([0, 1, 2]), **options)
    assert len(seen) > 30 and seen == expected[: len(seen)]


def test_a_mix_changes_nothing_but_the_text(index: DatasetIndex) -> None:
    """Order, numbers and latents are those of the run without a mix, bit for bit."""
    runs = []
    for captioners in ({}, MIX, {"short": "1"}):
        with Stream[Batch](
            index, new_state(index, captioners), dp_rank=0, dp_world=1, micro_batch=8, text_length=LENGTH,
            transform=lambda batch: batch,
        ) as stream:  # fmt: skip
            runs.append([next(stream)[0] for _ in range(30)])
    for plain, mixed, alone in zip(*runs, strict=True):
        for other in (mixed, alone):
            assert plain.keys == other.keys and plain.sample_numbers.tolist() == other.sample_numbers.tolist()
            for name in ("video", "audio", "condition", "weight", "empty_text"):
                assert torch.equal(getattr(plain, name), getattr(other, name))
            assert not torch.equal(plain.text, other.text)


def test_datasets_that_lack_a_captioner_take_another_of_the_mix(index: DatasetIndex, tmp_path: Path) -> None:
    lacking = make_dataset(tmp_path / "lacking", [(BOTH, 5)], seed=4)
    add_captions(lacking, "short", 13)
    other = DatasetIndex.open(lacking)
    mix = CaptionMix([index, other], MIX, SEED)
    assert mix.names == [["qwen", "short"], ["short"]]
    assert {mix.choose(1, 2, sample) for sample in range(50)} == {"short"}
    assert {mix.choose(0, 2, sample) for sample in range(50)} == {"qwen", "short"}
    add_captions(lacking, "any", 14)
    three = CaptionMix([index, DatasetIndex.open(lacking)], {"any": 0.5, "plain": 0.3, "short": 0.2}, SEED)
    drawn = [three.choose(0, 2, sample) for sample in range(10_000)]  # half of the numbers fall into any's share
    assert set(drawn) == {"plain", "short"} and abs(drawn.count("plain") / 10_000 - 0.6) < 4 * (0.24 / 10_000) ** 0.5
    assert CaptionMix([index, other], {}, SEED).names == [index.captioners[:1], other.captioners[:1]]
    with pytest.raises(DataError, match=r"lacking has no captions of the mix \(qwen\), it has plain, short"):
        CaptionMix([index, other], {"qwen": 1}, SEED)
    with pytest.raises(DataError, match="'nobody' is in no dataset; there are plain, qwen, short"):
        CaptionMix([index, other], {"short": 1, "nobody": 2}, SEED)


def test_weights_are_exact() -> None:
    assert exact_weights({"b": 0.3, "a": 0.7}) == {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    assert list(exact_weights({"b": 3, "a": 7})) == ["a", "b"]
    assert exact_weights({"a": 0.1, "b": 0.2}) == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    for weight in (0, -1, float("nan"), float("inf"), "1/0", "much"):
        with pytest.raises(DataError, match=f"captioner short has weight {weight}"):
            exact_weights({"qwen": 1, "short": weight})


def test_captions_that_changed_by_themselves_are_refused(index: DatasetIndex, root: Path, tmp_path: Path) -> None:
    mixture = Mixture([Selection(index)])
    state = new_state(index, MIX)
    state.segments[0].texts = mixture.texts(mixture.captions(MIX, SEED))
    assert set(state.segments[0].texts[index.fingerprint]) == {"qwen", "short"}
    run_steps(index, state, 1, 1)
    state.segments[0].texts[index.fingerprint]["short"] = "0" * 64  # as it was recorded: now it is another one
    with pytest.raises(DataError, match=f"text of captioner short in {index.fingerprint[:12]}: 000"):
        run_steps(index, state, 1, 1)
