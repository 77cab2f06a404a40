"""Manifests of every kind, with captions, segments and scores from elsewhere; captions as they were written."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data.errors import DataError
from data.sources import SourceFile, SourceSegment
from data.sources.captions import captions_beside, captions_of
from data.sources.cells import TableLayout
from data.sources.manifest import NO_SCORES
from data.sources.survey import Survey
from data.sources.table import SourceTable, make_table, prepare_table
from data.sources.times import seconds_of
from data.windows.table import FIXED

ROWS = [
    {"path": "a.mp4", "caption": "A ball.", "dover": 0.9, "lang": "en"},
    {"path": "sub/b.mp4", "caption": None, "dover": None, "lang": "de"},
    {"path": "gone.mp4", "caption": "x", "dover": 0.1, "lang": "12"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"aaa")
    (tmp_path / "sub" / "b.mp4").write_bytes(b"bb")
    return tmp_path


def listed(source: Path, columns: dict[str, Any] | None = None, delimiter: str = "") -> dict[str, SourceFile]:
    """All sources by name, as one unit gets them."""
    place = source.parent / ".table"
    make_table(place, Survey(str(source), TableLayout(columns or {}, delimiter)), "")
    prepare_table(place, 1, hash_all=False)
    with SourceTable(place) as table:
        return {entry.name: entry for entry in table.unit(0)}


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"manifest.{kind}"
    if kind == "csv":
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_manifest_brings_captions_and_scores(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    sources = listed(write(folder, kind, ROWS))
    assert set(sources) == {"a.mp4", "sub/b.mp4", "gone.mp4"}
    (ball,), (other,) = sources["a.mp4"].segments, sources["sub/b.mp4"].segments
    assert ball.captions == ["A ball."] and other.captions == []
    assert ball.scores == {"dover": pytest.approx(0.9)} and other.scores == {}
    assert sources["a.mp4"].path.read_bytes() == b"aaa" and sources["sub/b.mp4"].size == 2
    assert "can't be read" in sources["gone.mp4"].reason and not sources["a.mp4"].reason
    assert "lang" in capsys.readouterr().out  # a column of words is said to be no score, though one of them is a number


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"path": "", "x": 1}], "no row can be used; the first one: it has no path"),
        ([{"file": "a.mp4", "x": 1}], "needs a column path"),
        ([{"path": "a.mp4", "x": 1}, {"path": "./a.mp4", "x": 2}], r"names a.mp4 twice .*rows 1 and 2"),
        ([{"path": "a.mp4", "start": 3, "end": 2}], "no row can be used; the first one: row 1: it ends at 2 s"),
        ([{"path": "a.mp4", "start": 1, "end": 2}, {"path": "a.mp4", "start": "0:01", "end": "2.0"}], "a.mp4 twice"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(folder: Path, rows: list[dict[str, Any]], message: str) -> None:
    kinds = ("csv", "jsonl") if isinstance(rows[-1].get("start"), str) else ("csv", "jsonl", "parquet")
    for kind in kinds:
        with pytest.raises(DataError, match=message):
            listed(write(folder, kind, rows))


def test_a_manifest_that_is_none(folder: Path) -> None:
    for kind, content in (("parquet", b"nothing"), ("jsonl", b"{"), ("csv", b"path,caption\n"), ("csv", b"")):
        (folder / f"m.{kind}").write_bytes(content)
        with pytest.raises(DataError, match="can't be read|no row can be used|has no rows") as error:
            listed(folder / f"m.{kind}")
        assert "\n" not in str(error.value)


def test_rows_that_are_bad_cost_themselves_only(folder: Path) -> None:
    rows = [
        {"path": "a.mp4", "start": 0, "end": 2, "caption": "good"},
        {"path": "a.mp4", "start": 5, "end": 5, "caption": "empty"},
        {"path": "a.mp4", "start": -1, "end": 5},
        {"path": "a.mp4", "start": "soon", "end": 5},
        {"path": "a.mp4", "start": 1, "end": 5, "seconds": 9},
        {"path": "sub/b.mp4", "caption": 7},
        {"path": "sub/b.mp4", "start": 1, "caption": {"text": "x"}},
        {"path": None, "caption": "nothing"},
        {"path": ["a.mp4"]},
        {"path": "nul\0.mp4"},
        {"path": "half\ud800.mp4"},
    ]
    path = folder / "rows.jsonl"
    path.write_text("\n".join([*map(json.dumps, rows), "[1]", "{", "[" * 100_000]))
    sources = listed(path)
    reasons = {name: [one.reason or entry.reason for one in entry.segments] for name, entry in sources.items()}
    words = ["", "not after its start", "before the file", "is not a time", "contradict each other"]
    assert len(reasons["a.mp4"]) == 5 and all(word in reason for word, reason in zip(words, reasons["a.mp4"]))
    assert sources["a.mp4"].segments[0] == SourceSegment((0, 2), ["good"])
    assert all("is not words" in reason for reason in reasons["sub/b.mp4"]) and len(reasons["sub/b.mp4"]) == 2
    assert reasons["row 8 of rows.jsonl"] == reasons["row 9 of rows.jsonl"] == ["it has no path"]
    assert "null" in reasons["nul\\u0000.mp4"][0] and len(sources) == 9
    assert "no json object" in reasons["row 12 of rows.jsonl"][0] and "no json (" in reasons["row 13 of rows.jsonl"][0]
    assert "nests too deep" in reasons["row 14 of rows.jsonl"][0]


TABLES = {  # the same rows in many clothes
    "m.csv": "path, caption , start, seconds\na.mp4, A ball., 1, 2.5\na.mp4,\"B, too\",0:01:02.500,1\n",
    "semi.csv": "path;caption;start;end\na.mp4;A ball.;1;3,5\n".replace("3,5", "3.5") + "a.mp4;B, too;62.5;63.5\n",
    "m.tsv": "path\tcaption\tstart\tend\na.mp4\tA ball.\t1\t3.5\na.mp4\tB, too\t62.5\t0:1:3.5\n",
    "bom.csv": "\ufeffpath,caption,start,end\r\na.mp4,A ball.,1,3.5\r\na.mp4,\"B, too\",1:02.5,1:03.5\r\n",
    "bom.jsonl": "\ufeff" + '{"path": "a.mp4", "caption": "A ball.", "start": 1, "end": 3.5}\n'
    '{"path": "a.mp4", "caption": "B, too", "start": 62.5, "seconds": 1}\n',
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_segments_of_a_file_in_tables_of_every_kind(folder: Path, name: str) -> None:
    (folder / name).write_bytes(TABLES[name].encode())
    (entry,) = listed(folder / name).values()
    assert entry.segments == [SourceSegment((1, 3.5), ["A ball."]), SourceSegment((62.5, 63.5), ["B, too"])]


def test_columns_have_the_names_or_positions_that_are_given(folder: Path) -> None:
    wanted = [SourceSegment((1, 3), ["A ball."])]
    (folder / "named.csv").write_text("begin|stop|video|text|caption\n1|3|a.mp4|A ball.|\n")
    columns: dict[str, Any] = {"path": "video", "caption": "text", "start": "begin", "end": "stop"}
    assert listed(folder / "named.csv", columns)["a.mp4"].segments == wanted
    for delimiter in (",", ";", "\t"):
        (folder / "bare.csv").write_text(delimiter.join(["a.mp4", "1", "A ball.", "3"]) + "\n")
        assert listed(folder / "bare.csv", {"path": 0, "start": 1, "caption": 2, "end": 3})["a.mp4"].segments == wanted
    (folder / "odd.csv").write_text("path:caption\na.mp4:A, ball.\n")
    assert listed(folder / "odd.csv", {}, ":")["a.mp4"].segments == [SourceSegment(None, ["A, ball."])]
    for wrong, message in (
        ({"file": "path"}, "columns.file is not a known column"),
        ({"path": 0, "caption": "x"}, "mixes names and positions"),
        ({"caption": 1}, "need the one of the path"),
        ({"path": "video"}, "needs a column video"),
        ({"path": 0, "caption": 7}, "needs a column 7"),
    ):
        with pytest.raises(DataError, match=message):
            listed(folder / "bare.csv", wrong)


def test_a_column_that_is_named_must_be_there(folder: Path) -> None:
    """Else all its captions or segments would be lost without a word."""
    for kind in ("csv", "jsonl", "parquet"):
        path = write(folder, kind, [{"path": "a.mp4", "caption": "a cat"}, {"path": "sub/b.mp4", "caption": "a dog"}])
        with pytest.raises(DataError, match=r"needs a column text, since columns\.caption=text"):
            listed(path, {"caption": "text"})


def test_cells_of_parquet_that_are_text_or_times_in_another_type(folder: Path) -> None:
    columns = {
        "\ufeffpath": pyarrow.array([b"a.mp4", b"\xef\xbb\xbfsub/b.mp4", b"\xff"]),
        "caption": pyarrow.array([b"a cat", b"\xef\xbb\xbfa dog", b"x"]),
        "start": pyarrow.array([1500, 0, 0], pyarrow.duration("ms")),
        "end": pyarrow.array([3000, 1000, 1000], pyarrow.time32("ms")),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "m.parquet")
    sources = listed(folder / "m.parquet")
    assert sources["a.mp4"].segments == [SourceSegment((1.5, 3), ["a cat"])]
    assert sources["sub/b.mp4"].segments == [SourceSegment((0, 1), ["a dog"])]
    assert "it is not UTF-8" in sources["row 3 of m.parquet"].segments[0].reason
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a.mp4"]), pyarrow.array(["sub/b.mp4"])], names=["path", "path"])
    pyarrow.parquet.write_table(twice, folder / "m.parquet")
    with pytest.raises(DataError, match="two columns path"):
        listed(folder / "m.parquet")


def test_empty_cells_lines_and_marks_as_programs_write_them(folder: Path) -> None:
    (folder / "a.txt").unlink(missing_ok=True)
    (folder / "m.csv").write_text('\n\npath,start,end,caption\n\na.mp4,nan,NaN,nan\nsub/b.mp4,null,2,"\ufeffa dog"\n')
    sources = listed(folder / "m.csv")
    assert sources["a.mp4"].segments[0].span is None and "nan" not in sources["a.mp4"].segments[0].captions
    assert sources["sub/b.mp4"].segments == [SourceSegment((0, 2), ["a dog"])]
    (folder / "m.jsonl").write_text('{"path": "a.mp4", "caption": "a cat"}\n"a.mp4"\n')
    assert listed(folder / "m.jsonl")["row 2 of m.jsonl"].segments[0].reason == "it is no json object"
    (folder / "m.csv").write_bytes("path,caption\na.mp4,a cat\n".encode("utf-16-le"))
    with pytest.raises(DataError, match="line 1: it holds NUL characters"):
        listed(folder / "m.csv")


def test_cells_too_many_are_said(folder: Path) -> None:
    (folder / "m.csv").write_text("path,caption\na.mp4,a cat, sitting\nsub/b.mp4,a dog\n")
    sources = listed(folder / "m.csv")
    assert "has 3 cells, the first row 2" in sources["row 1 of m.csv"].segments[0].reason
    assert sources["sub/b.mp4"].segments == [SourceSegment(None, ["a dog"])]


def test_lists_of_segments_as_panda_70m_has_them(folder: Path) -> None:
    spans = [["0:00:02.002", "0:00:04.004"], ["0:01:00.5", "0:01:02"]]
    wanted = [
        SourceSegment((2.002, 4.004), ["a cat"], {"score": 0.4}),
        SourceSegment((60.5, 62), ["it's a dog"], {"score": 0.5}),
    ]
    columns = {"path": "videoID", "segments": "timestamp"}
    rows = [{"videoID": "a.mp4", "timestamp": spans, "caption": ["a cat", "it's a dog"], "score": [0.4, 0.5]}]
    for kind in ("jsonl", "parquet"):
        assert listed(write(folder, kind, rows), columns)["a.mp4"].segments == wanted
    text = f'videoID,timestamp,caption,score\na.mp4,"{spans}","[\'a cat\', ""it\'s a dog""]","[0.4, 0.5]"\n'
    (folder / "m.csv").write_text(text)
    assert listed(folder / "m.csv", columns)["a.mp4"].segments == wanted
    (folder / "m.csv").write_text(text.replace("[0.4, 0.5]", "1") + 'sub/b.mp4,"[[1, 2], [2, 3]]",x,1\n')
    assert "2 segments and 1 captions" in listed(folder / "m.csv", columns)["sub/b.mp4"].segments[0].reason
    (folder / "m.csv").write_text('path,timestamp\na.mp4,"[1.5, 2.5]"\n')
    assert listed(folder / "m.csv", {"segments": "timestamp"})["a.mp4"].segments == [SourceSegment((1.5, 2.5))]


def test_times() -> None:
    assert [seconds_of(value) for value in ("1:02:03.5", "02:03", "7.25", 3, "", None, math.nan)] == [
        3723.5, 123, 7.25, 3, None, None, None,
    ]  # fmt: skip
    for wrong in ("1:2:3:4", "x", [1], True, math.inf, "nan"):
        with pytest.raises(DataError, match="is not a time"):
            seconds_of(wrong)


def test_our_own_tables_are_no_scores_when_they_come_back() -> None:
    assert set(FIXED) <= set(NO_SCORES)


def test_a_score_that_no_index_could_name_is_not_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "m.csv").write_text(",path,view count,good-1\n0,a.mp4,7,8\n")
    assert listed(folder / "m.csv")["a.mp4"].segments[0].scores == {"good-1": 8}
    assert "view count are not used as scores" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1", "cp1252", "shift-jis"])
def test_other_encodings_are_refused_by_name(folder: Path, encoding: str) -> None:
    words = "猫" if encoding == "shift-jis" else "café"
    for suffix, text in ((".txt", words), (".json", json.dumps({"caption": words}, ensure_ascii=False))):
        (folder / "a").with_suffix(suffix).write_bytes(text.encode(encoding))
        sources = listed(folder / "a.mp4") | listed(folder / "sub" / "b.mp4")
        (reason,) = [one.reason for one in sources["a.mp4"].segments]
        assert f"a{suffix}" in reason and "not UTF-8, the encoding that was tried" in reason and "\n" not in reason
        assert ("begins as UTF" in reason) == encoding.startswith("utf") and not sources["b.mp4"].segments[0].reason
        (folder / "a").with_suffix(suffix).unlink()
    for kind, text in (
        ("csv", f"path,caption\na.mp4,{words}\n"),
        ("jsonl", f'{{"path": "a.mp4", "caption": "{words}"}}'),
    ):
        (folder / f"m.{kind}").write_bytes(text.encode(encoding))
        with pytest.raises(DataError, match=rf"m.{kind}, line \d: it is not UTF-8, the encoding that was tried"):
            listed(folder / f"m.{kind}")


CAPTIONS = {
    "a cat": ["a cat"], " a cat\n": ["a cat"], "": [], None: [], math.nan: [], "['a cat', \"b\"]": ["a cat", "b"],
    '["a cat", "b"]': ["a cat", "b"], "[music]": ["[music]"], "[]": [], "[1, 2]": ["[1, 2]"],
}  # fmt: skip


def test_captions_are_words_or_lists_of_words() -> None:
    for value, wanted in CAPTIONS.items():
        assert captions_of(value) == wanted, value
    assert captions_of(["a cat", None, "", "a dog"]) == ["a cat", "a dog"] and captions_of([]) == []
    for wrong in (7, True, 1.5, {"text": "a cat"}, [["a cat"]], ["a cat", 3], "\ud800", "a\0b", "[['a', 'b']]"):
        with pytest.raises(DataError, match="is not words|surrogates|NUL"):
            captions_of(wrong)


def test_captions_beside_a_file(tmp_path: Path) -> None:
    clip, text, record = tmp_path / "clip.mp4", tmp_path / "clip.txt", tmp_path / "clip.json"
    assert captions_beside(clip) == []
    for content, wanted in (
        (b'\xef\xbb\xbf{"caption": "a cat"}', ["a cat"]), (b'{"caption": ["a cat", "a dog"]}', ["a cat", "a dog"]),
        (b'{"text": "a cat"}', []), (b'{"caption": null}', []), (b"[1]", []),
    ):  # fmt: skip
        record.write_bytes(content)
        assert captions_beside(clip) == wanted
    for content, why in ((b"[" * 100_000, "nests too deep"), (b"{", "clip.json"), (b'{"caption": 3}', "is not words")):
        record.write_bytes(content)
        with pytest.raises(DataError, match=why):
            captions_beside(clip)
    text.write_bytes(b"\xef\xbb\xbf[a cat]\n")  # it comes before the json
    assert captions_beside(clip) == ["[a cat]"]
    text.write_bytes(b"x" * (1 << 20) + b"x")
    with pytest.raises(DataError, match="it is no caption"):
        captions_beside(clip)
    assert captions_beside(tmp_path / ("n" * 251 + ".mp4")) == []  # its .json would have a name of 256 bytes


def test_the_listing_knows_every_change(folder: Path) -> None:
    def digest(content: str) -> str:
        (folder / "m.csv").write_text(content)
        survey = Survey(str(folder / "m.csv"), TableLayout())
        list(survey)
        return survey.digest

    tables = ["path\na.mp4\n", "path\nsub/b.mp4\n", "path\na.mp4\nsub/b.mp4\n", "path,caption\na.mp4,c\n",
              "path,x\na.mp4,1\n", "path,x\na.mp4,2\n", "path,start\na.mp4,1\n", "path,start\na.mp4,2\n"]  # fmt: skip
    digests = [digest(content) for content in tables]
    assert len(set(digests)) == len(tables) and digest("path\nsub/b.mp4\na.mp4\n") == digests[2]
    (folder / "a.txt").write_text("now there is one")
    assert digest(tables[0]) != digests[0]
    (folder / "a.txt").unlink()
    assert digest(tables[0]) == digests[0]
    (folder / "a.mp4").write_bytes(b"aaaa")
    assert digest(tables[0]) != digests[0]
