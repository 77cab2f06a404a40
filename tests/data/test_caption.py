"""Captions for a finished dataset: the right words at every window, nothing else touched, wherever it is killed."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

import data.caption
from data.caption import CaptionConfig, caption
from data.clip import Bucket, EncodedClip
from data.codec.builtin import text
from data.dataset.build import build_index
from data.dataset.index import DatasetIndex
from data.dataset.shards import ShardWriter, write_empty_text
from data.errors import DataError
from data.loader.state import DataState, Segment
from data.loader.stream import Stream

SOUND = Bucket(frames=1, height=2, width=2, audio_steps=2, fps=24.0, has_video=False, has_audio=True)
DIM = 8
WINDOWS = {"train": [("a.mp4", 0), ("a.mp4", 2), ("a.mp4", 4), ("b/c.mp4", 0), ("b/c.mp4", 2), ("b/c.mp4", 4.5)],
           "valid": [("d.mp4", 0), ("d.mp4", 2)]}  # fmt: skip


def key(part: str, row: int) -> str:
    return f"{part[0]}{row:023d}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Windows of 2 s in two parts, two a shard."""
    for part, windows in WINDOWS.items():
        with ShardWriter(tmp_path / "dataset" / part, 2) as writer:
            for row, (source, start) in enumerate(windows):
                meta = {"source": source, "start": start, "seconds": 2.0, "encoders": {"text": text.fingerprint}}
                clip = EncodedClip(key(part, row), None, torch.full((2, 128), row, dtype=torch.bfloat16), None, meta)
                writer.write(clip, SOUND, f"own {row}", text.encode(f"own {row}", DIM))
        write_empty_text(tmp_path / "dataset" / part, text.encode("", DIM))
        build_index(tmp_path / "dataset" / part)
    return tmp_path / "dataset"


def words(root: Path, captioner: str) -> dict[str, Any]:
    """Captions by key, from the tars; each embedding is that of its caption, as the index reads it."""
    found = {}
    for part in WINDOWS:
        index = DatasetIndex.open(root / part)
        for shard in index.shards:
            with tarfile.open(root / part / shard["text"][captioner]) as tar:
                members = [m.name for m in tar.getmembers() if m.name.endswith(".json")]
                contents = {name[:-5]: json.load(tar.extractfile(name)) for name in members}  # type: ignore[arg-type]
            found |= {name: content["caption"] for name, content in contents.items()}
        for row in range(len(index)):
            words_or_none = found[index.key(row)]
            assert torch.equal(index.read_text(row, captioner), text.encode(words_or_none or "", DIM).bfloat16())
            assert index.is_absent(row, captioner) == (words_or_none is None)
    return found


def files(root: Path, but: str = "") -> dict[str, str]:
    """Hashes of all files of the dataset outside its indices, without the captioner's."""
    found = sorted(path for path in root.rglob("*") if path.is_file() and "index" not in path.parts)
    chosen = [path for path in found if not but or not path.name.startswith(f"text-{but}")]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in chosen}


ROWS = [{"id": key("train", row), "words": f"a cat, number {row}"} for row in (3, 0, 5)] + [
    {"id": key("valid", 1), "words": 'Müller "sings"\ntwice'}
]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", encoding: str = "utf-8") -> None:
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding=encoding)


WRITERS: dict[str, Callable[[Path], None]] = {
    "plain.csv": lambda path: write_csv(path, ROWS),
    "mark.csv": lambda path: write_csv(path, ROWS, encoding="utf-8-sig"),
    "tabs.tsv": lambda path: write_csv(path, ROWS, "\t", "utf-8-sig"),
    "semicolons.csv": lambda path: write_csv(path, ROWS, ";"),
    "lines.jsonl": lambda path: write_jsonl(path, ROWS),
    "mark.jsonl": lambda path: write_jsonl(path, ROWS, "utf-8-sig"),
    "columns.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_captions_by_key_from_every_kind_of_table(root: Path, tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    before, prints = files(root), {part: DatasetIndex.open(root / part).fingerprint for part in WINDOWS}
    columns = {"key": "id", "caption": "words"}
    record = caption(CaptionConfig(str(root), str(tmp_path / name), "qwen", columns))
    wanted = {key(part, row): None for part, windows in WINDOWS.items() for row in range(len(windows))}
    assert words(root, "qwen") == {**wanted, **{row["id"]: row["words"] for row in ROWS}}
    summary = record["summary"]
    assert (summary["windows"], summary["without"]["count"], summary["rows"]) == (8, 4, 4)
    assert summary["without"]["examples"] == [key("train", row) for row in (1, 2, 4)]
    # Nothing that was there has changed, and the dataset is the same one, with its own captions first.
    after = files(root, but="qwen")
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == {"caption-qwen.json", "train/captioners.json", "valid/captioners.json"}
    for part, fingerprint in prints.items():
        index = DatasetIndex.open(root / part)
        assert index.fingerprint == fingerprint and index.captioners == ["builtin", "qwen"]
        assert index.verify() == [] and index.text_fingerprints["qwen"] != index.text_fingerprints["builtin"]
    rebuilt = build_index(root / "train")  # the index follows from the tars, as it was
    assert rebuilt.fingerprint == prints["train"] and rebuilt.captioners == ["builtin", "qwen"]
    assert [rebuilt.is_absent(row, "qwen") for row in range(6)] == [False, True, True, False, True, False]


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    write_jsonl(path, rows)
    return path


def test_captions_by_source_apply_where_the_middle_lies(root: Path, tmp_path: Path) -> None:
    """The middles are 1, 3, 5 s (of the last window of b/c.mp4: 5.5): the start belongs to a row, the end doesn't."""
    rows = [
        {"source": "a.mp4", "start": 3, "end": 5, "caption": "the middle"},
        {"source": "a.mp4", "start": 5, "end": 5.01, "caption": "the end"},
        {"source": "a.mp4", "start": 2.99, "end": 3, "caption": "between windows"},
        {"source": "b/c.mp4", "end": 3, "caption": "before three"},
        {"source": "b/c.mp4", "caption": "all of it"},
        {"source": "b/c.mp4", "start": "5.4", "end": None, "caption": "late"},
        {"source": "d.mp4", "start": "", "end": float("nan"), "caption": "both"},
        {"source": "elsewhere.mp4", "caption": "nobody's"},
        {"source": "a.mp4", "start": 0, "end": 1, "caption": " "},
        {"source": "d.mp4", "start": 2, "end": 1, "caption": "backwards"},
        {"source": "d.mp4", "start": "one", "end": 1, "caption": "when?"},
        {"source": 7, "caption": "what?"},
    ]
    record = caption(CaptionConfig(str(root), str(table(tmp_path / "rows.jsonl", rows)), "by.source"))
    expected = [None, "the middle", "the end", "before three", "all of it", "all of it", "both", "both"]
    assert list(words(root, "by.source").values()) == expected
    summary = record["summary"]
    found = {name: (summary[name]["count"], summary[name]["examples"]) for name in ("unmatched", "duplicate", "empty")}
    assert found == {
        "unmatched": (2, ["row 3 (a.mp4)", "row 8 (elsewhere.mp4)"]),
        "duplicate": (2, ["row 5 (b/c.mp4)", "row 6 (b/c.mp4)"]),  # the first row of a window counts
        "empty": (1, ["row 9 (a.mp4)"]),
    }
    assert summary["unusable"]["count"] == 3 and "row 10 (it ends at 1 s, not after its start at 2 s)" in str(summary)
    assert summary["without"] == {"count": 1, "examples": [key("train", 0)]} and summary["by"] == "source"


def test_rows_for_one_window_twice_and_for_none(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [key("train", 1), "f" * 24, key("train", 1), *(f"{n:024d}" for n in range(5)), key("train", 2)]
    rows = [{"key": name, "caption": f"row {row}"} for row, name in enumerate(names, start=1)]
    rows[0]["caption"] = ""  # no caption at all: the next row of that window counts
    summary = caption(CaptionConfig(str(root), str(table(tmp_path / "rows.jsonl", rows)), "qwen"))["summary"]
    found = words(root, "qwen")
    assert (found[key("train", 1)], found[key("train", 2)]) == ("row 3", "row 9")
    assert summary["unmatched"]["count"] == 6 and summary["duplicate"]["count"] == 0 and summary["empty"]["count"] == 1
    assert summary["unmatched"]["examples"] == [f"row {r} ({names[r - 1]})" for r in (2, 4, 5)]
    said = capsys.readouterr().out
    assert "2 of 8 windows have one" in said and "6 rows whose key no window has: row 2 (ffff" in said
    assert "1 rows without a caption: row 1" in said and "6 windows without a caption" in said


OURS = {
    "positions.csv": b"7,a.mp4,0:00:03,a cat\n8,./b/../b/c.mp4,0,a dog\n",
    "times.csv": b"source;start;seconds;caption\na.mp4;00:00:02.500;2;a cat\nb/c.mp4;0;9;a dog\nd.mp4;;;nan\n",
    "list.csv": b'source,start,end,caption\na.mp4,3,5,"[""a cat""]"\nb/c.mp4,,,"[\'a dog\', \'\']"\nd.mp4,,,[]\n',
    "mark.jsonl": b'\xef\xbb\xbf{"source": "a.mp4", "start": 3, "end": 5, "caption": "\\ufeffa cat"}\n'
    b'\xef\xbb\xbf{"source": "b/c.mp4", "caption": "a dog"}',
}


@pytest.mark.parametrize("name", OURS)
def test_tables_are_read_as_manifests_are(root: Path, tmp_path: Path, name: str) -> None:
    """Without header, times of every kind, lists in cells, marks in cells, names written otherwise."""
    (tmp_path / name).write_bytes(OURS[name])
    columns = {"source": 1, "start": 2, "caption": 3} if name == "positions.csv" else {}
    caption(CaptionConfig(str(root), str(tmp_path / name), "qwen", columns))
    last = "a cat" if name == "positions.csv" else None  # it has no end
    assert list(words(root, "qwen").values()) == [None, "a cat", last, "a dog", "a dog", "a dog", None, None]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"key,caption,caption\nx,a,b\n", "two columns caption"),
        (b"key,source,caption\n,a.mp4,a cat\n", "its key is '', no text"),  # not the caption of all of a.mp4
        (b"source,caption\n/raw/a.mp4,a cat\n", r"by source, /raw/a.mp4.*the dataset has a.mp4 from 0 to 2 s.*Nothing"),
        (b"key,caption\nf0f0,a cat\n", "by key, f0f0.*the dataset has t0000"),
        (b'key,caption\nf0f0,"[""a cat"", ""a dog""]"\n', "a list of captions in row 1"),
        ("key,caption\nx,a cat\n".encode("utf-16-le"), "line 1: it holds NUL"),
    ],
)
def test_tables_that_would_write_wrong_captions(root: Path, tmp_path: Path, content: bytes, named: str) -> None:
    before = files(root)
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(DataError, match=named):
        caption(CaptionConfig(str(root), str(tmp_path / "t.csv"), "qwen"))
    assert {path for path in files(root) if ".partial" not in path} == set(before)
    record = caption(CaptionConfig(str(root), str(simple(tmp_path / "rows.jsonl")), "qwen"))  # the name is free
    assert record["summary"]["without"]["count"] == 0


def simple(path: Path, what: str = "word") -> Path:
    rows = [{"key": key(p, row), "caption": f"{what} {row}"} for p, w in WINDOWS.items() for row in range(len(w))]
    return table(path, rows)


def test_the_same_again_does_nothing_and_another_table_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CaptionConfig(str(root), str(simple(tmp_path / "rows.jsonl")), "qwen")
    record, there = caption(config), files(root)
    times = {path: os.stat(root / path).st_mtime_ns for path in there}
    assert caption(config) == record and "nothing to do" in capsys.readouterr().out
    assert files(root) == there and times == {path: os.stat(root / path).st_mtime_ns for path in there}
    other = simple(tmp_path / "rows.jsonl", "other word")
    with pytest.raises(DataError, match=r"other captions by 'qwen' \(table: .*captioner=qwen-2"):
        caption(config)
    caption(CaptionConfig(str(root), str(other), "qwen-2"))
    assert words(root, "qwen-2")[key("train", 1)] == "other word 1" and words(root, "qwen")[key("train", 1)] == "word 1"
    assert DatasetIndex.open(root / "train").captioners == ["builtin", "qwen", "qwen-2"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"captioner": "builtin"}, "already has captions by 'builtin'"),
        ({"captioner": "a/b"}, "use letters"),
        ({"captioner": "-x"}, "use letters"),
        ({"captioner": ""}, "use letters"),
        ({"captioner": "a b"}, "use letters"),
        ({"table": "nowhere.csv"}, "nowhere.csv is not a file"),
        ({"dataset": "nowhere"}, "nowhere does not exist"),
        ({"columns": {"words": "x"}}, "columns.words is not a known column"),
        ({"columns": {"caption": "x"}}, r"has columns key, caption; it needs a column x"),
        ({"columns": {"key": "x"}}, "needs a column x"),
        ({"unit": "3/3"}, "unit=3/3 must be"),
    ],
)
def test_settings_that_make_no_sense_are_named(root: Path, tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    before = files(root)
    settings = {"dataset": str(root), "table": str(simple(tmp_path / "rows.jsonl")), "captioner": "qwen"} | changes
    with pytest.raises(DataError, match=named):
        caption(CaptionConfig(**settings))
    assert {path for path in files(root) if ".partial" not in path} == set(before)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        (
            "a.csv",
            "key,caption\nx,Grün\n".encode("latin-1"),
            "a.csv, line 2: it is not UTF-8",
        ),
        ("b.jsonl", '{"key": "x", "caption": "y"}\n'.encode("utf-16"), "b.jsonl, line 1: it is not UTF-8.*UTF-16"),
        ("c.csv", b"key,caption\nx,a cat, a dog\n", r"none that is usable: row 1 \(it has 3 cells, the first row 2"),
        ("d.jsonl", b'{"key": "x", "caption": ["a cat", "a dog"]}', "list of captions in row 1.*its own column"),
        ("e.jsonl", b'{"key": "x", "caption": ""}\n[1]', r"row 2 \(it is no json object"),
        ("f.jsonl", b'{"key": ' + b"[" * 100_000, r"row 1 \(it nests too deep"),
        ("g.parquet", b"PAR1 not at all", "g.parquet can't be read"),
        ("h.csv", b"", "h.csv has 0 rows"),
        ("i.csv", b"key,caption\n", "0 rows"),
        ("j.xlsx", b"x", "j.xlsx is none of .csv"),
        ("k.jsonl", b'{"key": "x", "caption": ""}\n{"key": 7, "caption": "y"}', "1 without a caption.*its key is 7"),
        ("l.jsonl", b'{"key": "\\ud800", "caption": "y"}', "half a character"),
    ],
)
def test_tables_that_make_no_sense_are_named(root: Path, tmp_path: Path, name: str, content: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=named):
        caption(CaptionConfig(str(root), str(tmp_path / name), "qwen"))
    assert DatasetIndex.open(root / "train").captioners == ["builtin"]


def test_another_text_codec_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CaptionConfig(str(root), str(simple(tmp_path / "rows.jsonl")), "qwen")
    with monkeypatch.context() as patch:
        patch.setattr(text, "fingerprint", "umt5-xxl")
        with pytest.raises(DataError, match="has text of hash-text-1, the codec here is umt5-xxl"):
            caption(config)
    with monkeypatch.context() as patch:  # one that claims to be the same
        patch.setattr(text, "EMPTY", "otherwise")
        with pytest.raises(DataError, match="another encoding of the empty prompt"):
            caption(config)
    assert not list(root.glob("caption-*"))


def in_child(config: CaptionConfig, prepare: Callable[[], None]) -> int:
    """Run in a forked process; returns its exit status."""
    child = os.fork()
    if child == 0:
        status = 9
        try:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            prepare()
            caption(config)
            status = 0
        except DataError:
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killer(call: int) -> Callable[[], None]:
    """Ends the process at the call-th change of the disk, with nothing cleaned up."""

    def install() -> None:
        count = [0]
        for name in ("rename", "replace", "fsync", "link", "unlink", "mkdir", "rmdir"):
            function = getattr(os, name)

            def counted(*args: Any, _function: Any = function, **options: Any) -> Any:
                count[0] += 1
                if count[0] == call:
                    os._exit(7)
                return _function(*args, **options)

            setattr(os, name, counted)

    return install


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_and_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    """At every moment the dataset opens, verifies, and has the captioner whole or not at all."""
    config = CaptionConfig(str(root), str(simple(tmp_path / "rows.jsonl")), "qwen")
    shutil.copytree(root, tmp_path / "unbroken")
    caption(CaptionConfig(str(tmp_path / "unbroken"), config.table, "qwen"))
    status, kills, states = 7, 0, set()
    while status != 0:
        status = in_child(config, killer(1 + 3 * kills))
        assert status in (0, 7) and kills < 400
        kills += status == 7
        states.add(len(list(root.rglob("text-qwen-*"))))
        for part in WINDOWS:
            index = DatasetIndex.open(root / part)
            assert index.verify() == [] and index.captioners in (["builtin"], ["builtin", "qwen"])
            index.read_text(0, index.captioners[-1])
    assert kills > 15 and len(states) > 3 and files(root) == files(tmp_path / "unbroken")
    assert words(root, "qwen") == words(tmp_path / "unbroken", "qwen")


def test_units_in_any_order_give_what_one_run_gives(root: Path, tmp_path: Path) -> None:
    rows = str(simple(tmp_path / "rows.jsonl"))
    for unit in ("2/3", "0/3"):
        assert caption(CaptionConfig(str(root), rows, "qwen", unit=unit)) == {}
        assert DatasetIndex.open(root / "train").captioners == ["builtin"]
    assert caption(CaptionConfig(str(root), rows, "qwen", unit="0/3")) == {}  # again: it is done
    record = caption(CaptionConfig(str(root), rows, "qwen", unit="1/3"))
    assert record["summary"]["windows"] == 8 and not list(root.glob("*.partial"))
    whole = caption(CaptionConfig(str(root), rows, "whole"))
    assert whole["summary"] == record["summary"] and words(root, "qwen") == words(root, "whole")
    for part in WINDOWS:
        index = DatasetIndex.open(root / part)
        assert index.text_fingerprints["qwen"] == index.text_fingerprints["whole"]


def test_two_at_a_time_are_kept_apart(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CaptionConfig(str(root), str(simple(tmp_path / "rows.jsonl")), "qwen")
    part = CaptionConfig(config.dataset, config.table, "qwen", unit="0/2")
    others, statuses = [config, part], []
    write = data.caption._write_shard

    def second_comes(*args: Any) -> None:
        if not statuses:
            statuses.extend(in_child(other, lambda: None) for other in others)
        write(*args)

    monkeypatch.setattr(data.caption, "_write_shard", second_comes)
    caption(config)
    assert statuses == [3, 3] and len(words(root, "qwen")) == 8
    statuses.clear()
    units = [CaptionConfig(config.dataset, config.table, "units", unit=unit) for unit in ("0/2", "1/2")]
    others = [units[0], CaptionConfig(config.dataset, config.table, "units")]
    assert caption(units[0]) == {} and statuses == [3, 3]  # the same unit is refused, another one is not
    assert caption(units[1])["summary"]["windows"] == 8


def test_a_running_training_does_not_notice(root: Path, tmp_path: Path) -> None:
    index = DatasetIndex.open(root / "train")

    def stream(index: DatasetIndex) -> Stream[Any]:
        state = DataState([Segment(0, index.fingerprint, [2], 0, 2)])
        options = {"micro_batch": 2, "text_length": 4, "workers": 0}
        return Stream(index, state, dp_rank=0, dp_world=1, transform=lambda batch: batch, **options)

    expected = [next(s)[0].text for s in [stream(index)] for _ in range(9)]
    running = stream(index)
    found = [next(running)[0].text for _ in range(3)]
    caption(CaptionConfig(str(root), str(simple(tmp_path / "rows.jsonl")), "qwen"))
    found += [next(running)[0].text for _ in range(3)]
    reopened = stream(DatasetIndex.open(root / "train"))
    found += [next(reopened)[0].text for _ in range(9)][6:]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_names_with_the_same_hash_are_told_apart(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.sources.caption_table._hash", lambda name: len(name))  # all keys share one hash
    monkeypatch.setattr("data.sources.caption_table.BATCH", 3)
    caption(CaptionConfig(str(root), str(simple(tmp_path / "rows.jsonl")), "qwen"))
    assert words(root, "qwen") == {
        key(part, row): f"word {row}" for part, windows in WINDOWS.items() for row in range(len(windows))
    }


def test_a_dataset_that_is_itself_a_part(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = caption(CaptionConfig(str(root / "train"), str(simple(tmp_path / "rows.jsonl")), "qwen"))
    assert record["summary"]["windows"] == 6 and record["summary"]["unmatched"]["count"] == 2
    assert DatasetIndex.open(root / "valid").captioners == ["builtin"]
    assert "2 rows whose key no window has" in capsys.readouterr().out


def test_the_program(root: Path, tmp_path: Path) -> None:
    """As a user calls it: columns are named without a plus."""
    WRITERS["plain.csv"](tmp_path / "rows.csv")
    given = [f"dataset={root}", f"table={tmp_path / 'rows.csv'}"]
    program = [sys.executable, "-m", "data.caption", *given]
    done = subprocess.run(
        [*program, "captioner=qwen2.5-vl", "columns={key: id, caption: words}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and "4 of 8 windows have one" in done.stdout
    assert "data.captioners={qwen2.5-vl: 1.0}" in done.stdout and len(words(root, "qwen2.5-vl")) == 8
