"""Selections: exactly the rows that a rule keeps, with a fingerprint of their own; rules from files; bad ones named."""

from pathlib import Path

import numpy as np
import pytest

import data.dataset.selection
from data.clip import Bucket
from data.dataset.index import DatasetIndex
from data.dataset.selection import Rule, Selection, read_takedown
from data.errors import DataError
from tests.shards import make_dataset

BOTH = Bucket(frames=2, height=2, width=3, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
SCORES = np.array([0.1, 0.2, 0.3, np.nan, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("selection") / "dataset", [(BOTH, 4), (BOTH, 6)])


@pytest.fixture
def index(root: Path, tmp_path: Path) -> DatasetIndex:
    """With two scores; one lies in a mapped file, as those of a real index do."""
    found = DatasetIndex.open(root)
    np.save(tmp_path / "score.npy", SCORES)
    found.columns = {
        **found.columns,
        "score-quality": np.load(tmp_path / "score.npy", mmap_mode="r").view(np.ndarray),
        "score-speech": SCORES[::-1].copy(),
    }
    return found


def rows(selection: Selection) -> list[int]:
    return list(range(10)) if selection.kept is None else np.flatnonzero(selection.kept).tolist()


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_thresholds_include_their_ends_and_unmeasured_scores_fail(
    index: DatasetIndex, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.dataset.selection, "CHUNK", chunk)
    assert rows(Selection(index, Rule.of({"quality": [0.3, 0.8]}))) == [2, 4, 5, 6, 7]
    assert rows(Selection(index, Rule.of({"quality": [0.7, None]}))) == [6, 7, 8, 9]
    assert rows(Selection(index, Rule.of({"quality": [None, 0.2]}))) == [0, 1]
    assert rows(Selection(index, Rule.of({"quality": [None, None]}))) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    both = Selection(index, Rule.of({"quality": [0.2, 0.9], "speech": [0.3, None]}))
    assert rows(both) == [1, 2, 4, 5, 7] and both.samples == 5  # 6 has no measure of speech


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_what_is_taken_down_is_never_kept(index: DatasetIndex, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.dataset.selection, "CHUNK", chunk)
    gone = [index.key(2), index.key(9), "f" * 24, "no key of such a length in any dataset"]
    selection = Selection(index, Rule.of({}, gone))
    assert rows(selection) == [0, 1, 3, 4, 5, 6, 7, 8]
    assert rows(Selection(index, Rule.of({"quality": [0.3, None]}, gone))) == [4, 5, 6, 7, 8]


def test_a_sieve_that_lets_everything_pass_changes_nothing(
    index: DatasetIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.dataset.selection, "_sieve", lambda keys: np.zeros(len(keys), np.int64))
    assert rows(Selection(index, Rule.of({}, [index.key(7)]))) == [0, 1, 2, 3, 4, 5, 6, 8, 9]


def test_fingerprints_tell_apart_what_differs_and_nothing_else(index: DatasetIndex, tmp_path: Path) -> None:
    assert Selection(index).fingerprint == Selection(index, Rule()).fingerprint == index.fingerprint
    rules = [
        Rule.of({"quality": [0.3, 0.8]}),
        Rule.of({"quality": [0.3, 0.79]}),
        Rule.of({"quality": [0.3, None]}),
        Rule.of({"quality": [None, 0.3]}),
        Rule.of({"speech": [0.3, 0.8]}),
        Rule.of({"quality": [0.3, 0.8]}, [index.key(4)]),
        Rule.of({"quality": [0.3, 0.8]}, [index.key(5)]),
        Rule.of({}, [index.key(5)]),
        Rule.of({}, ["f" * 24]),
        Rule.of({}, ["e" * 24]),
    ]
    prints = [Selection(index, rule).fingerprint for rule in rules]
    assert len({*prints, index.fingerprint}) == len(rules) + 1
    turned = Rule.of({"speech": (0.1, 1), "quality": (0.3, 0.8)}, ["b", "a"])
    again = Rule.of({"quality": [0.3, 0.8], "speech": [0.1, 1.0]}, ["a", "b"])
    assert Selection(index, turned).fingerprint == Selection(index, again).fingerprint
    # Scores that were written anew are other data, though thresholds and shards are the same.
    index.columns["score-quality"] = np.where(np.arange(10) == 4, np.float32(0), SCORES)
    assert Selection(index, rules[0]).fingerprint != prints[0]
    assert Selection(index, rules[0]).describe()["thresholds"] == {"quality": [0.3, 0.8]}


def test_rules_from_files(index: DatasetIndex, tmp_path: Path) -> None:
    path = tmp_path / "selection.yaml"
    path.write_text(f"thresholds: {{quality: [0.3, null], speech: [null, 0.9]}}\ntakedown: ['{index.key(4)}']\n")
    rule = Rule.read(path)
    assert rule == Rule.of({"quality": [0.3, None], "speech": [None, 0.9]}, [index.key(4)])
    (tmp_path / "takedown.txt").write_text(
        f"# asked for on Monday\n{index.key(5)}  # by its author\n\n{index.key(6)}\n"
    )
    keys = read_takedown(tmp_path / "takedown.txt")
    assert keys == [index.key(5), index.key(6)]
    narrowed = rule.narrowed({"quality": [0.5, None]}, keys)
    assert narrowed == Rule.of({"quality": [0.5, None], "speech": [None, 0.9]}, [index.key(n) for n in (4, 5, 6)])
    path.write_text("{}\n")
    assert Rule.read(path) == Rule()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("thresholds: {quality: [1]}", "quality.*pair"),
        ("thresholds: {quality: 0.5}", "quality.*pair"),
        ("thresholds: {quality: [a, b]}", "quality.*pair"),
        ("thresholds: {quality: [.nan, 1]}", "quality.*NaN"),
        ("thresholds: {quality: [2, 1]}", "nothing lies between 2.0 and 1.0"),
        ("takedown: [123]", "takedown key 123"),
        ("takedown: abc", "takedown is a list"),
        ("treshold: {}", "nothing else"),
        ("- a", "nothing else"),
        ("a: [", "can't be read"),
    ],
)
def test_bad_rules_are_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "selection.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=named) as error:
        Rule.read(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_scores_are_named(index: DatasetIndex, tmp_path: Path) -> None:
    for read in (Rule.read, read_takedown):
        with pytest.raises(DataError, match=r"nowhere.*can't be read"):
            read(tmp_path / "nowhere")
    with pytest.raises(DataError, match="sharpness.*it has quality, speech"):
        Selection(index, Rule.of({"sharpness": [0, 1]}))


def test_mapped_columns_are_read_and_not_kept_in_memory(index: DatasetIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    read, counts = np.fromfile, []
    monkeypatch.setattr(np, "fromfile", lambda *args, **kw: counts.append(kw["count"]) or read(*args, **kw))
    assert index.columns["key"].base is not None and not isinstance(index.columns["key"], np.memmap)
    Selection(index, Rule.of({"quality": [0.3, None]}, [index.key(2)]))
    assert counts == [10, 10]  # the score and the keys
