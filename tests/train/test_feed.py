"""From the data part of a config to segments: what is opened, what is compared, what a changed config may change."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.clip import Bucket
from data.errors import DataError
from data.index import EMPTY_TEXT, DatasetIndex, build_index
from data.state import DataState
from tests.shards import make_dataset
from train.errors import RunError
from train.feed import (
    DataConfig,
    DatasetConfig,
    SegmentConfig,
    describe_data,
    open_data,
    plan,
    start_state,
)

BOTH = Bucket(frames=2, height=2, width=3, audio_steps=5, fps=24.0, has_video=True, has_audio=True)
WIDE = Bucket(frames=2, height=2, width=5, audio_steps=9, fps=24.0, has_video=True, has_audio=True)
DIM = 6


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, str]:
    made = {"a": [(BOTH, 9), (WIDE, 6)], "b": [(BOTH, 7)], "c": [(WIDE, 8)]}
    for seed, (name, shards) in enumerate(made.items(), start=1):
        make_dataset(tmp_path / name, shards, seed=seed)
        if name != "a":
            shutil.copy(tmp_path / "a" / EMPTY_TEXT, tmp_path / name / EMPTY_TEXT)
            build_index(tmp_path / name)
    return {name: str(tmp_path / name) for name in made}


def start(config: DataConfig, position: int = 0) -> DataState:
    """The state of a run with this config that has come to a step."""
    parts = open_data(config, DIM)
    state = start_state(parts, config, seed=5)
    state.follow(plan(parts, state, config, seed=5))
    state.position = position
    return DataState.from_json(state.to_json())


def resume(config: DataConfig, state: DataState) -> DataState:
    state.follow(plan(open_data(config, DIM), state, config, seed=5))
    return state


def test_one_dataset_is_what_it_was(roots: dict[str, str]) -> None:
    state = start(DataConfig(path=roots["a"], batch_size=4, window=3))
    index = DatasetIndex.open(roots["a"])
    expected = DataState.start(index.fingerprint, [4, 4], seed=5, window=3)
    assert [{**vars(s), "sources": []} for s in state.segments] == [vars(s) for s in expected.segments]
    old = DataState.start(index.fingerprint, [4, 4], seed=5, window=3)  # a checkpoint from before there were sources
    old.position = 9
    assert resume(DataConfig(path=roots["a"], batch_size=4, window=3), old).segments == expected.segments
    with pytest.raises(DataError, match=r"batch_sizes: \[4, 4\] -> \[8, 8\]"):
        resume(DataConfig(path=roots["a"], batch_size=8, window=3), old)
    with pytest.raises(DataError, match="fingerprint"):
        resume(DataConfig(path=roots["b"], batch_size=4, window=3), old)


def test_thresholds_takedowns_and_selection_files_reach_the_mixture(roots: dict[str, str], tmp_path: Path) -> None:
    index = DatasetIndex.open(roots["a"])
    (tmp_path / "gone.txt").write_text(index.key(3) + "\n")
    (tmp_path / "selection.yaml").write_text(f"takedown: ['{index.key(4)}', '{index.key(9)}']\n")
    first = DatasetConfig(
        roots["a"], 0.25, takedown=str(tmp_path / "gone.txt"), selection=str(tmp_path / "selection.yaml")
    )
    parts = open_data(DataConfig(path=None, datasets=[first, DatasetConfig(roots["b"], 0.75)]), DIM)
    mixture = parts[0].mixture
    assert mixture is not None
    kept = {str(s.index.root): s.kept for s in mixture.selections}
    assert np.flatnonzero(~kept[roots["a"]]).tolist() == [3, 4, 9] and kept[roots["b"]] is None  # type: ignore[operator]
    shares = {str(s.index.root): str(w) for s, w in zip(mixture.selections, mixture.weights, strict=True)}
    assert shares == {roots["a"]: "1/4", roots["b"]: "3/4"}
    assert "(25.0%)" in describe_data(parts) and roots["b"] in describe_data(parts)
    with pytest.raises(DataError, match="no such score.*none"):
        open_data(DataConfig(path=None, datasets=[DatasetConfig(roots["a"], thresholds={"dnsmos": [1, None]})]), DIM)


def test_batch_sizes_by_bucket_and_by_cost(roots: dict[str, str]) -> None:
    sizes = {"2x2x3x5": 6, "2x2x5x9": 3}
    assert start(DataConfig(path=roots["a"], batch_sizes=sizes)).segments[0].batch_sizes == [6, 3]
    by_cost = DataConfig(path=roots["a"], batch_cost=100, attention_tokens=1e9)  # 9 and 15 tokens a clip
    assert start(by_cost).segments[0].batch_sizes == [11, 6]
    with pytest.raises(DataError, match="no batch size for bucket 2x2x5x9"):
        start(DataConfig(path=roots["a"], batch_sizes={"2x2x3x5": 6}))


def test_a_segment_is_added_in_mid_run(roots: dict[str, str]) -> None:
    before = DataConfig(path=roots["a"], batch_sizes={"2x2x3x5": 4, "2x2x5x9": 3})
    segments = [SegmentConfig(10, [DatasetConfig(roots["b"])]), SegmentConfig(14, [DatasetConfig(roots["c"])])]
    after = DataConfig(path=roots["a"], batch_sizes={"2x2x3x5": 4, "2x2x5x9": 3}, segments=segments)
    whole = start(after)
    order = open_data(before, DIM)[0].mixture.order([4, 3], 5, 16)  # type: ignore[union-attr]
    seen = order.first_sample(10)
    assert [s.first_sample for s in whole.segments] == [0, seen, seen + 4 * 4]
    for position in (1, 9, 10):  # asked for ahead, or with the very next step
        assert resume(after, start(before, position)).segments == whole.segments
    with pytest.raises(DataError, match="a segment from step 10, which lies before 11: new"):
        resume(after, start(before, 11))
    state = start(after, 12)
    with pytest.raises(DataError, match="segment 1, from step 10: recorded, and now missing"):
        resume(before, state)
    changed = DataConfig(path=roots["a"], batch_sizes=before.batch_sizes, segments=segments[:1])
    assert len(resume(changed, start(after, 12)).segments) == 2  # what was still to come may be dropped


def test_data_of_ended_segments_may_be_gone(roots: dict[str, str]) -> None:
    segments = [SegmentConfig(10, [DatasetConfig(roots["b"])]), SegmentConfig(14, [DatasetConfig(roots["c"])])]
    config = DataConfig(path=roots["a"], batch_size=4, segments=segments)
    state, early = start(config, 12), start(config, 10)
    recorded = list(state.segments)
    shutil.rmtree(roots["a"])
    assert resume(config, state).segments == recorded
    assert "from step 0 what is not there any more" in describe_data(open_data(config, DIM))
    with pytest.raises(DataError, match=f"{roots['a']} does not exist"):  # step 10 is numbered after its samples
        resume(config, early)
    other = DataConfig(
        path=None, datasets=[DatasetConfig(roots["a"], thresholds={"x": [1, None]})], batch_size=4, segments=segments
    )
    with pytest.raises(DataError, match=r"thresholds: {} -> {'x': \[1.0, None\]}"):
        resume(other, state)
    weighted = DataConfig(path=None, datasets=[DatasetConfig(roots["a"], 0.5)], batch_size=4, segments=segments)
    with pytest.raises(DataError, match="shares: by size -> by weight"):
        resume(weighted, state)
    shutil.rmtree(roots["c"])
    with pytest.raises(
        DataError, match=f"{roots['c']} does not exist"
    ):  # and what is to come must be there from the start
        open_data(config, DIM)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"path": None}, "give one of them"),
        ({"path": "x", "datasets": [DatasetConfig("y")]}, "both given.*data.path=null"),
        ({"path": "x", "batch_cost": 5.0, "batch_sizes": {"a": 1}}, "choose one"),
        ({"path": "x", "segments": [SegmentConfig(step, [DatasetConfig("y")]) for step in (5, 5)]}, "rise"),
        ({"path": "x", "segments": [SegmentConfig(0, [DatasetConfig("y")])]}, "rise"),
        ({"path": "x", "segments": [SegmentConfig(5)]}, "step 5 has no datasets"),
    ],
)  # fmt: skip
def test_configs_that_make_no_sense_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DataConfig(**values)


def test_width_of_text_is_checked_in_every_dataset(roots: dict[str, str], tmp_path: Path) -> None:
    wide = make_dataset(tmp_path / "wide", [(BOTH, 3)], seed=9, dim=8)
    config = DataConfig(path=None, datasets=[DatasetConfig(roots["a"]), DatasetConfig(str(wide))])
    with pytest.raises(RunError, match="wide has text embeddings of width 8"):
        open_data(config, DIM)
