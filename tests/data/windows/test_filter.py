"""Filters: thresholds, alternatives, what is not measured; the paper's; other thresholds later."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from core.compose import compose
from data.dataset.index import DatasetIndex
from data.dataset.selection import Rule, Selection
from data.errors import DataError
from data.prepare.__main__ import PROGRAM
from data.prepare.curation import PrepareConfig, prepare
from data.refilter import RefilterConfig, refilter
from data.windows.filter import Filter, FilterConfig, rule_name
from data.windows.table import External, read_columns

MakeMedia = Callable[..., Path]
NAN = math.nan
NAMES = ("a", "b", "c", "d")


def rules(missing: str = "reject", **thresholds: Any) -> Filter:
    alternatives = thresholds.pop("alternatives", [])
    return Filter(FilterConfig(thresholds, alternatives, missing), NAMES)


def test_bounds_are_inclusive_and_in_float32() -> None:
    strict = rules(a=[0.2, 0.8], b=[None, 5])
    for a, b, kept in ((0.2, 5, True), (0.8, -9, True), (0.19999, 1, False), (0.80001, 1, False), (0.5, 5.001, False)):
        assert (strict.failures({"a": a, "b": b}) == []) == kept
    assert strict.failures({"a": 0.9, "b": 6}) == ["0.2 <= a <= 0.8", "b <= 5"]
    table = {"a": np.float32([0.2, 0.1]), "b": np.float32([5, 5])}
    assert strict.kept(table, 2).tolist() == [True, False]


def test_alternatives_need_one_whole_term() -> None:
    either = rules(alternatives=[[{"a": [0.2, None]}, {"b": [None, 0.5]}, {"c": [1, None], "d": [1, None]}]])
    assert rule_name(either.rules[0]) == "a >= 0.2 or b <= 0.5 or (c >= 1 and d >= 1)"
    for values, kept in (
        ((0.3, 9, 0, 0), 1),
        ((0, 0.1, 0, 0), 1),
        ((0, 9, 1, 0), 0),
        ((0, 9, 1, 1), 1),
        ((NAN, 9, 1, NAN), 0),
    ):
        assert (either.failures(dict(zip(NAMES, values, strict=True))) == []) == bool(kept)


def test_what_is_not_measured_follows_the_setting() -> None:
    for missing, kept in (("reject", False), ("keep", True)):
        assert (rules(missing, a=[1, None]).failures({"a": NAN}) == []) == kept
        assert (rules(missing, a=[1, None]).failures({}) == []) == kept
        either = rules(missing, alternatives=[[{"a": [1, None]}, {"b": [1, None]}]])
        assert (either.failures({"a": NAN, "b": NAN}) == []) == kept
        assert either.failures({"a": NAN, "b": 0}) and not either.failures({"a": NAN, "b": 2})


def test_a_rule_on_a_score_that_nothing_brings() -> None:
    config = FilterConfig({"a": [1, None], "dover": [1, None], "off": None}, [[{"x": [1, None]}, {"b": [1, None]}]])
    with pytest.raises(DataError, match=r"`dover >= 1` needs the score dover.*filters.thresholds.dover=null"):
        Filter(config, NAMES)
    config.absent = "skip"
    skipping = Filter(config, NAMES)
    assert skipping.skipped == ["dover", "x"] and [rule_name(rule) for rule in skipping.rules] == ["a >= 1", "b >= 1"]


@pytest.mark.parametrize("pair", [5, [1], [None, None], ["1", 2], [2, 1], [True, 2], [NAN, 2]])
def test_bounds_that_make_no_sense(pair: Any) -> None:
    with pytest.raises(DataError, match="threshold a"):
        rules(a=pair)
    with pytest.raises(DataError, match="must be reject or keep"):
        rules("maybe")


def composed(*overrides: str) -> PrepareConfig:
    config: Any = compose(PROGRAM.schema, ["source=s", "output=o", *overrides]).typed()
    return config


def test_the_papers_filters() -> None:
    good = {
        "silence_ratio": 0.1, "bandwidth": 4000, "audiobox_pq": 6, "audiobox_cu": 5, "audiobox_ce": 3,
        "dover_aesthetic": 0.9, "dover_technical": 0.2,
        "imagebind": 0.3, "desync": 0.1, "subtitles": 0, "lse_d": 8, "lse_c": 6,
    }  # fmt: skip
    failures: dict[str, Filter] = {}
    for phase in ("phase1", "phase2", "phase3"):
        failures[phase] = Filter(composed(f"data/filters={phase}").filters, good)
        assert failures[phase].failures(good) == []
    for change, expected in (
        ({"silence_ratio": 0.81}, "phase1 phase2 phase3"), ({"bandwidth": 999}, "phase1 phase2 phase3"),
        ({"audiobox_pq": 4.9}, "phase1 phase2 phase3"), ({"audiobox_cu": 4.4}, "phase1 phase2 phase3"),
        ({"audiobox_ce": 2.4}, "phase1 phase2 phase3"), ({"dover_aesthetic": 0.84}, "phase1 phase2 phase3"),
        ({"dover_technical": 0.04}, "phase1 phase2 phase3"), ({"imagebind": 0.1}, ""), ({"desync": 0.6}, ""),
        ({"imagebind": 0.1, "desync": 0.6}, "phase1 phase2 phase3"), ({"dover_technical": 0.13}, "phase3"),
        ({"dover_technical": 0.145, "subtitles": 1, "lse_d": 9.6}, "phase2 phase3"),
        ({"dover_technical": 0.145, "subtitles": 1}, ""), ({"subtitles": 1, "lse_c": 4.4}, ""),
    ):  # fmt: skip
        assert " ".join(phase for phase, rule in failures.items() if rule.failures(good | change)) == expected, change


def test_the_groups_compose() -> None:
    for name, longest in (("360p", 193), ("720p", 193), ("small", 49)):
        buckets = composed(f"data/buckets={name}", "data/window=mova").buckets
        assert max(bucket.frames for bucket in buckets) == longest
        for bucket in buckets:
            assert bucket.frames % 4 == 1 and bucket.height % 16 == bucket.width % 16 == 0
        areas = [bucket.height * bucket.width for bucket in buckets]
        assert max(areas) / min(areas) < 1.12
    assert composed().window.rule == "fixed" and composed("data/window=mova").window.rule == "mova"


@pytest.fixture(scope="module")
def dataset(make_media: MakeMedia, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files of different loudness and brightness, all stored, with scores of the manifest."""
    folder = tmp_path_factory.mktemp("raw")
    rows = []
    for number in range(6):
        sound = 10.0 ** (-number) * np.sin(2 * np.pi * 500 * np.arange(24000) / 16000)
        make_media(
            folder / f"{number}.mp4", times=[i / 24 for i in range(36)], sound=sound if number else None, rate=16000
        )
        rows.append(
            {"path": f"{number}.mp4", "dover": number / 10, **({"rare": 1.0} if number == 5 else {"rare": None})}
        )
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path_factory.mktemp("out") / "set"
    prepare(
        PrepareConfig(
            str(folder / "m.jsonl"),
            str(output),
            frames=17,
            height=32,
            width=48,
            text_dim=64,
            workers=1,
            holdout=0.4,
            scores=["silence", "bandwidth", "motion"],
            filters=FilterConfig({"silence_ratio": [None, 0.5]}, drop=False),
        )  # fmt: skip
    )
    return output


def kept_keys(dataset: Path) -> set[str]:
    """What the selections beside the indices keep, as training reads them."""
    keys = set()
    for part in ("train", "valid"):
        index = DatasetIndex.open(dataset / part)
        selection = Selection(index, Rule.read(dataset / part / "selection.yaml"))
        every = np.arange(len(index)) if selection.kept is None else np.flatnonzero(selection.kept)
        keys |= {index.key(int(row)) for row in every}
    return keys


def test_all_scores_are_kept(dataset: Path) -> None:
    table = read_columns(dataset / "scores.parquet")
    assert len(table["key"]) == 12 and set(table["part"]) == {"train", "valid"} and table["stored"].all()
    assert np.allclose(table["dover"], [int(name[0]) / 10 for name in table["source"]])
    silent = np.isnan(table["silence_ratio"])
    assert {name[0] for name in table["source"][silent]} == {"0"} and not np.isnan(table["motion"]).any()
    assert set(table["unmeasured"][silent]) == {"silence, bandwidth: no sound"} == {*table["unmeasured"]} - {""}
    for part in ("train", "valid"):
        index = DatasetIndex.open(dataset / part)
        for row in range(len(index)):
            (place,) = np.flatnonzero(table["key"] == index.key(row))
            scores = index.read_meta(row)["scores"]
            for name in ("dover", "silence_ratio", "bandwidth", "motion", "rare"):
                value = float(table[name][place])
                assert (math.isnan(value) and name not in scores) or value == pytest.approx(scores[name], rel=1e-6)


def test_thresholds_without_dropping_make_a_selection(dataset: Path) -> None:
    table = read_columns(dataset / "scores.parquet")
    expected = set(table["key"][table["silence_ratio"] <= 0.5])
    assert kept_keys(dataset) == expected and 0 < len(expected) < 12


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        (FilterConfig({"dover": [0.2, 0.4]}), {"2", "3", "4"}),
        (FilterConfig({"silence_ratio": [None, 1]}), {"1", "2", "3", "4", "5"}),
        (FilterConfig({"silence_ratio": [None, 1]}, missing="keep"), {"0", "1", "2", "3", "4", "5"}),
        (FilterConfig({}, [[{"dover": [0.5, None]}, {"silence_ratio": [None, 0.1]}]]), {"1", "2", "5"}),
        (FilterConfig({"rare": [0, None]}), {"5"}),
        (FilterConfig({"rare": [0, None], "dover": [0, 0.4]}, missing="keep"), {"0", "1", "2", "3", "4"}),
        (FilterConfig(), {"0", "1", "2", "3", "4", "5"}),
    ],
)  # fmt: skip
def test_refilter_and_training_agree(dataset: Path, filters: FilterConfig, kept: set[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*.tar")}
    counts = refilter(RefilterConfig(str(dataset), filters=filters))
    table = read_columns(dataset / "scores.parquet")
    names = {str(name)[0] for key, name in zip(table["key"], table["source"], strict=True) if key in kept_keys(dataset)}
    assert names == kept and counts["kept"] == 2 * len(kept) and counts["lost"] == 0
    assert before == {path: path.stat().st_mtime_ns for path in dataset.rglob("*.tar")}


def test_scores_from_elsewhere_are_joined(dataset: Path, tmp_path: Path) -> None:
    table = read_columns(dataset / "scores.parquet")
    keys = table["key"].tolist()
    path = tmp_path / "elsewhere.parquet"
    rows = [{"key": key, "desync": number / 12, "note": "x"} for number, key in enumerate(keys[:-1])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows + [{"key": "f" * 24, "desync": 0.0, "note": "y"}]), path)
    refilter(RefilterConfig(str(dataset), str(path), FilterConfig({"desync": [None, 0.4]})))
    assert kept_keys(dataset) == set(keys[:5])  # the last one has no row: not measured
    by_file = tmp_path / "files.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"source": "3.mp4", "desync": 1.0}]), by_file)
    refilter(RefilterConfig(str(dataset), str(by_file), FilterConfig({"desync": [1, None]})))
    assert kept_keys(dataset) == {key for key, name in zip(keys, table["source"], strict=True) if name == "3.mp4"}
    for content, message in (
        ([{"key": "a" * 24, "desync": 1.0}], "no key of .* occurs"), ([{"key": keys[0], "dover": 1.0}], "dover is in"),
        ([{"key": "a", "x": 1.0}, {"key": "a", "x": 2.0}], "more than once"),
        ([{"name": "a", "x": 1.0}], "needs `key`"),
        ([{"key": "a", "x": "word"}], "no column of numbers"),
    ):  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        with pytest.raises(DataError, match=message):
            refilter(RefilterConfig(str(dataset), str(path)))


def test_external_rows_are_found(tmp_path: Path) -> None:
    rows = [{"key": f"{number:024x}", "x": float(number), "y": number % 2 == 0} for number in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), tmp_path / "t.parquet")
    table = External(tmp_path / "t.parquet")
    assert table.lookup(f"{31:024x}") == {"x": 31.0, "y": 0.0}
    assert math.isnan(table.lookup("nothing")["x"]) and math.isnan(table.lookup("f" * 30)["x"])


def test_dropped_windows_are_counted_as_lost(make_media: MakeMedia, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for number, level in enumerate((0.3, 0.0)):
        sound = level * np.sin(np.arange(24000) / 5)
        make_media(tmp_path / "raw" / f"{number}.mp4", times=[i / 24 for i in range(36)], sound=sound, rate=16000)
    config = PrepareConfig(
        str(tmp_path / "raw"), str(tmp_path / "set"), frames=17, height=32, width=48, text_dim=64, workers=1,
        scores=["silence"], filters=FilterConfig({"silence_ratio": [None, 0.5]}),
    )  # fmt: skip
    record = prepare(config)
    assert (record["summary"]["windows"], record["summary"]["windows_rejected"], record["summary"]["kept"]) == (2, 2, 1)
    lines = [json.loads(line) for line in (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines} == {"1.mp4"} and all(
        "silence_ratio <= 0.5" in line["reason"] for line in lines
    )
    counts = refilter(RefilterConfig(str(tmp_path / "set")))
    assert (counts["windows"], counts["kept"], counts["lost"]) == (4, 2, 2)
