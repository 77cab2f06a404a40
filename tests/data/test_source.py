"""Sources: manifests of every kind, with captions and scores from elsewhere."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.errors import DataError
from data.source import Source, list_sources, listing_hash

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


def write(folder: Path, kind: str, rows: list[dict[str, object]]) -> Path:
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
    sources = {source.name: source for source in list_sources(str(write(folder, kind, ROWS)))}
    assert set(sources) == {"a.mp4", "sub/b.mp4", "gone.mp4"}
    assert sources["a.mp4"].caption == "A ball." and sources["sub/b.mp4"].caption is None  # the file beside it counts
    assert sources["a.mp4"].scores == {"dover": pytest.approx(0.9)} and sources["sub/b.mp4"].scores == {}
    assert sources["a.mp4"].path.read_bytes() == b"aaa" and sources["sub/b.mp4"].size == 2
    assert "can't be read" in sources["gone.mp4"].reason and not sources["a.mp4"].reason
    assert "lang" in capsys.readouterr().out  # a column of words is said to be no score, though one of them is a number


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"path": "a.mp4", "x": 1}, {"path": "", "x": 1}], "row 2 has no path"),
        ([{"file": "a.mp4", "x": 1}], "needs a column path"),
        ([{"path": "a.mp4", "x": 1}, {"path": "a.mp4", "x": 2}], "names a.mp4 twice"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(folder: Path, rows: list[dict[str, object]], message: str) -> None:
    for kind in ("csv", "jsonl", "parquet"):
        with pytest.raises(DataError, match=message):
            list_sources(str(write(folder, kind, rows)))


def test_a_manifest_that_is_none(folder: Path) -> None:
    for kind, content in (("parquet", "nothing"), ("jsonl", "{"), ("csv", "path,caption\n")):
        (folder / f"m.{kind}").write_text(content)
        with pytest.raises(DataError, match="can't be read|has no rows"):
            list_sources(str(folder / f"m.{kind}"))


def test_the_listing_knows_every_change(folder: Path) -> None:
    def made(**values: object) -> list[Source]:
        return [Source(**{"path": folder / "a.mp4", "name": "a.mp4", "size": 3, **values})]  # type: ignore[arg-type]

    listings = [
        made(),
        made(size=4),
        made(name="b"),
        made(caption="c"),
        made(scores={"x": 1.0}),
        made(scores={"x": 2.0}),
    ]
    assert len({listing_hash(listing) for listing in listings}) == len(listings)
    before = listing_hash(made())
    (folder / "a.txt").write_text("now there is one")
    assert listing_hash(made()) != before
