"""From the data part of a config to segments: what is opened, what is compared, what a changed config may change."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import RunError, UserError
from data.batch import Batch
from data.clip import Bucket
from data.dataset.build import build_index
from data.dataset.index import DatasetIndex
from data.dataset.record import EMPTY_TEXT
from data.errors import DataError
from data.loader.state import DataState
from data.loader.stream import Stream
from launch.compose import compose_launch
from tests.shards import add_captions, make_dataset
from train.checkpoint.resume import config_differences
from train.config import compose_train
from train.data_config import DataConfig, DatasetConfig, SegmentConfig
from train.dataloader import describe_data, open_data, plan, start_state

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
    state = start(DataConfig(path=roots["a"], batch_size=4, shuffle_shards=3))
    index = DatasetIndex.open(roots["a"])
    expected = DataState.start(index.fingerprint, [4, 4], seed=5, window=3)
    assert [{**vars(s), "sources": [], "texts": {}} for s in state.segments] == [vars(s) for s in expected.segments]
    old = DataState.start(index.fingerprint, [4, 4], seed=5, window=3)  # a checkpoint from before there were sources
    old.position = 9
    [segment] = resume(DataConfig(path=roots["a"], batch_size=4, shuffle_shards=3), old).segments
    assert {**vars(segment), "texts": {}} == vars(expected.segments[0]) and "plain" in segment.texts[index.fingerprint]
    with pytest.raises(DataError, match=r"batch_sizes: \[4, 4\] -> \[8, 8\]"):
        resume(DataConfig(path=roots["a"], batch_size=8, shuffle_shards=3), old)
    with pytest.raises(DataError, match="fingerprint"):
        resume(DataConfig(path=roots["b"], batch_size=4, shuffle_shards=3), old)


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
    assert "from step 0 data that is no longer there" in describe_data(open_data(config, DIM))
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
        ({"path": "x", "segments": [SegmentConfig(step, [DatasetConfig("y")]) for step in (5, 5)]}, "must increase"),
        ({"path": "x", "segments": [SegmentConfig(0, [DatasetConfig("y")])]}, "must increase"),
        ({"path": "x", "segments": [SegmentConfig(5)]}, "step 5 has neither datasets"),
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


# Whose captions are read.


@pytest.fixture
def captioned(roots: dict[str, str]) -> dict[str, str]:
    """`a` has captions by qwen and short too, `b` by short."""
    for name, captioner in (("a", "qwen"), ("a", "short"), ("b", "short")):
        add_captions(Path(roots[name]), captioner, seed=len(captioner))
    return roots


def mixed(captioned: dict[str, str], **values: Any) -> DataConfig:
    values = {"path": captioned["a"], "batch_size": 4, "captioners": {"qwen": 0.7, "short": 0.3}} | values
    return DataConfig(**values)


def test_a_mix_is_recorded_with_the_texts_that_it_reads(captioned: dict[str, str]) -> None:
    config = mixed(captioned)
    [segment] = start(config).segments
    index = DatasetIndex.open(captioned["a"])
    assert segment.captioners == {"qwen": "7/10", "short": "3/10"}
    assert segment.texts == {index.fingerprint: {name: index.text_fingerprints[name] for name in ("qwen", "short")}}
    assert "captions by qwen (70.0%) + short (30.0%)" in describe_data(open_data(config, DIM))
    [plain] = start(mixed(captioned, captioners={})).segments
    assert plain.captioners == {} and list(plain.texts[index.fingerprint]) == index.captioners[:1]
    both = [DatasetConfig(captioned["a"]), DatasetConfig(captioned["b"])]
    [segment] = start(mixed(captioned, path=None, datasets=both)).segments
    assert sorted(sorted(texts) for texts in segment.texts.values()) == [["qwen", "short"], ["short"]]
    refused: dict[str, dict[str, float]] = {
        "'nobody' is in no dataset; there are plain, qwen, short": {"nobody": 1},
        "has no captions of the mix": {"qwen": 1},
        "qwen has weight 0": {"qwen": 0},
    }
    for named, captioners in refused.items():
        with pytest.raises(DataError, match=named):
            open_data(mixed(captioned, path=None, datasets=both, captioners=captioners), DIM)


def test_another_mix_is_a_new_segment(captioned: dict[str, str]) -> None:
    """Refused for what has begun; asked for as a segment, the samples go on as if nothing had changed."""
    config = mixed(captioned)
    assert resume(mixed(captioned, captioners={"short": 3, "qwen": 7}), start(config, 9)).position == 9  # the same mix
    for captioners in ({"qwen": 0.5, "short": 0.5}, {"qwen": 1}, {}):
        with pytest.raises(DataError, match=r"captioners: qwen 7/10, short 3/10 -> .*\n.*data.segments.* step 9 on"):
            resume(mixed(captioned, captioners=captioners), start(config, 9))
    later = mixed(captioned, segments=[SegmentConfig(9, captioners={"short": 1}), SegmentConfig(15, captioners={})])
    for position in (3, 9):
        state = resume(later, start(config, position))
        assert [s.captioners for s in state.segments] == [{"qwen": "7/10", "short": "3/10"}, {"short": "1"}, {}]
        assert [s.order_step for s in state.segments] == [0, 9, 15]
    with pytest.raises(DataError, match="a segment from step 9, which lies before 10: new"):
        resume(later, start(config, 10))
    with pytest.raises(DataError, match="captioners: short 1 -> qwen 1"):
        resume(mixed(captioned, segments=[SegmentConfig(9, captioners={"qwen": 1})]), start(later, 12))
    keys = {}
    for name, one in (("whole", config), ("later", later)):
        state = start(one)
        mixtures = [part.mixture for part in open_data(one, DIM) if part.mixture is not None]
        keys[name] = []
        with Stream[Batch](
            mixtures, state, dp_rank=0, dp_world=1, micro_batch=4, text_length=8, transform=lambda batch: batch
        ) as stream:
            for _ in range(20):
                [batch] = next(stream)
                keys[name].append((batch.keys, batch.sample_numbers.tolist(), batch.text.double().sum().item()))
    assert [step[:2] for step in keys["whole"]] == [step[:2] for step in keys["later"]]
    changed = [step for step in range(20) if keys["whole"][step] != keys["later"][step]]
    assert changed and min(changed) >= 9
    other = mixed(captioned, segments=[SegmentConfig(9, [DatasetConfig(captioned["a"])], {"short": 1})])
    assert start(other).segments[1].order_step == 0  # datasets that are named begin anew


def test_captions_that_changed_under_their_name_are_refused(captioned: dict[str, str]) -> None:
    config = mixed(captioned)
    state, before = start(config, 9), start(config, 9)
    index = DatasetIndex.open(captioned["a"])
    old = index.text_fingerprints["short"]
    state.segments[0].texts[index.fingerprint]["short"] = "0" * 64
    with pytest.raises(DataError, match=f"text of captioner short in {index.fingerprint[:12]}: 0000.* -> {old}"):
        resume(config, state)
    # As a segment from here on the new text is taken: nothing is read of the old one any more.
    state = resume(mixed(captioned, segments=[SegmentConfig(9, captioners={"short": 1})]), state)
    assert state.segments[1].texts == {index.fingerprint: {"short": old}}
    assert resume(config, before).segments[0].texts[index.fingerprint]["short"] == old


def test_runs_from_before_there_were_mixes_go_on(captioned: dict[str, str]) -> None:
    """Their checkpoints hold no captioners; their config says `captioner`: null, or one name."""
    for captioner, captioners in ((None, {}), ("qwen", {"qwen": 1.0})):
        config = mixed(captioned, captioners=captioners)
        saved = json.loads(json.dumps(start(config, 9).to_json()))
        del saved["empty_captions"]
        for segment in saved["segments"]:
            for name in ("captioners", "texts", "order_step"):
                del segment[name]
        state = resume(config, DataState.from_json(saved, captioner))
        assert state.segments == start(config, 9).segments and state.empty_captions == 0  # texts: from now on
        with pytest.raises(DataError, match="captioners: "):
            resume(mixed(captioned, captioners={"short": 1}), DataState.from_json(saved, captioner))
        earlier = {"data": {"captioner": captioner, "shuffle_shards": 16}}
        assert config_differences(earlier, {"data": {"captioners": captioners, "shuffle_shards": 16}}, {}) == []
    for override in ("data.captioner=qwen", "+data.captioner=qwen", "data.captioner=null"):
        with pytest.raises(UserError, match=r"this key was removed; use data.captioners=\{NAME: 1.0\}"):
            compose_train(["run.id=x", "data.path=x", override])
    compose_train(["run.id=x", "data.captioners={qwen: 1}", "data.path=x"])


def test_captioners_are_given_on_the_command_line(captioned: dict[str, str]) -> None:
    given = ["run.id=x", f"data.path={captioned['a']}", "data.captioners={qwen2.5-vl: 0.7, short: 0.3}",
             "data.segments=[{first_step: 5, captioners: {short: 1}}]", "data.batch_sizes={2x2x3x5: 4}"]  # fmt: skip
    config, resolved = compose_train(given)
    assert config.data.captioners == {"qwen2.5-vl": 0.7, "short": 0.3} == resolved["data"]["captioners"]
    assert config.data.segments == [SegmentConfig(5, [], {"short": 1.0})] and config.data.batch_sizes == {"2x2x3x5": 4}
    with pytest.raises(UserError, match="data.captioner=x: this key was removed"):
        compose_launch(["run.id=x", "data.captioner=x"])
