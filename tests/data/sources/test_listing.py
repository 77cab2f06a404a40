"""What is tried of a folder, and that nothing beside it is passed over in silence."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.prepare.curation import PrepareConfig, prepare
from data.sources.cells import TableLayout
from data.sources.listing import SUFFIXES, Beside, find_files
from data.sources.survey import Survey

MakeMedia = Callable[..., Path]


def names(source: Path | str) -> tuple[list[str], dict[str, tuple[int, list[str]]]]:
    """Files that are tried, and what was found beside them."""
    beside = Beside()
    return sorted(name for _, name in find_files(str(source), beside)), beside.kinds


def touch(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"x")


def test_every_container_is_tried_and_the_rest_is_named(tmp_path: Path) -> None:
    wanted = [f"{place}/{number}{suffix}" for number, suffix in enumerate(SUFFIXES) for place in ("a", "a/b")]
    assert {".ts", ".mts", ".mpg", ".flv", ".wmv", ".ogv", ".gif", ".wav", ".m4a", ".mp4"} <= set(SUFFIXES)
    touch(tmp_path, *wanted, "a/UPPER.MP4", "a/0.txt", "a/1.json", "lonely.txt", "lonely.json", "README", ".hidden.mp4")
    touch(tmp_path, *(f"{number}.pdf" for number in range(5)), ".cache/x.mp4", "c/x.mp4", "c/x.wav", "c/y.wav")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere.mp4")
    found, beside = names(tmp_path)
    assert found == sorted([*wanted, "a/UPPER.MP4", "c/x.mp4", "c/y.wav"])
    assert beside == {
        "file with the ending .txt": (1, ["lonely.txt"]),
        "file with the ending .json": (1, ["lonely.json"]),
        "file with the ending .pdf": (5, ["0.pdf", "1.pdf", "2.pdf"]),
        "file without an ending": (1, ["README"]),
        "hidden file": (1, [".hidden.mp4"]),
        "hidden folder": (1, [".cache"]),
        "special file (pipe, socket or device)": (1, ["pipe.mp4"]),
        "link that leads nowhere": (1, ["gone.mp4"]),
        "sound of a video of the same name": (1, ["c/x.wav"]),
    }


def test_symlinked_folders_are_read_once(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    touch(root, "a/1.mp4", "b/2.mp4")
    touch(out, "3.mp4", "sub/4.mp4")
    touch(tmp_path, "secret.mp4")
    (root / "0-first").symlink_to(out)  # sorts before the others
    (root / "again").symlink_to(out)
    (root / "inner").symlink_to(root / "a")
    (root / "a" / "cycle").symlink_to(root)
    (root / "b" / "above").symlink_to(tmp_path)
    (out / "sub" / "back").symlink_to(out)
    (root / "self").symlink_to("self")
    found, beside = names(root)
    assert found == ["0-first/3.mp4", "0-first/sub/4.mp4", "a/1.mp4", "b/2.mp4"]
    assert beside["link to a folder above the source"] == (1, ["b/above"])
    count, first = beside["link to a folder that is read already"]
    assert (
        count == 4
        and first == ["0-first/sub/back", "a/cycle", "again"]
        and any("self" in n for _, n in beside.values())
    )
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert names(linked)[0] == found


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.mp4", "locked/2.mp4")
    true = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return true(path)

    monkeypatch.setattr(os, "scandir", scandir)
    survey = Survey(str(tmp_path), TableLayout())
    assert [entry.name for entry in survey] == [b"a/1.mp4"] and survey.unread == ["locked"]
    assert survey.summary()["beside"] == {"unreadable folder (Permission denied)": {"count": 1, "first": ["locked"]}}
    with pytest.raises(DataError, match="can't be read .Permission denied"):
        names(tmp_path / "locked")
    (tmp_path / "a" / "1.mp4").unlink()
    with pytest.raises(DataError, match="holds no video files .*and locked could not be read"):
        Survey(str(tmp_path), TableLayout())


def test_what_is_named_is_tried_whatever_its_ending(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.dat", "c/d.dat", "c/e.mp4", "c/f/g.mp4", ".h.mp4", "i[1].mp4", "c/.k/l.mp4")
    assert names(tmp_path / "b.dat")[0] == ["b.dat"] and names(tmp_path / ".h.mp4")[0] == [".h.mp4"]
    assert names(tmp_path / "i[1].mp4")[0] == ["i[1].mp4"]  # a name first, a pattern second
    for pattern, wanted in (
        ("*.dat", ["b.dat"]), ("*", ["a.mp4", "i[1].mp4"]), ("c/*", ["c/e.mp4"]), ("*/*.mp4", ["c/e.mp4"]),
        ("**/*.mp4", ["a.mp4", "c/e.mp4", "c/f/g.mp4", "i[1].mp4"]), ("**/*.dat", ["b.dat", "c/d.dat"]),
        ("**", ["a.mp4", "c/e.mp4", "c/f/g.mp4", "i[1].mp4"]), ("c/**/g.mp?", ["c/f/g.mp4"]), ("[ab].*", ["a.mp4"]),
    ):  # fmt: skip
        expected = [name.removeprefix("c/") if pattern.startswith("c/") else name for name in wanted]
        assert names(f"{tmp_path}/{pattern}")[0] == expected, pattern
    with pytest.raises(DataError, match="the folder .*/none does not exist"):
        names(f"{tmp_path}/none/*.mp4")


def test_names_of_every_kind(tmp_path: Path) -> None:
    odd = [
        b"caf\xe9.mp4",
        b"new\nline.mp4",
        b"n" * 251 + b".mp4",
        b"tab\t.mp4",
        "猫.mp4".encode(),
        b"-rf.mp4",
        b"a b'\".mp4",
    ]
    for name in odd:
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(b"x")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"a cafe")
    entries = {entry.name: entry for entry in Survey(str(tmp_path), TableLayout())}
    assert set(entries) == set(odd) and not any(entry.unread or entry.row.reason for entry in entries.values())
    assert entries[odd[0]].row.captions == ["a cafe"]


def test_what_was_noticed_stands_in_the_record_and_the_report(
    make_media: MakeMedia, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    sound = 0.3 * np.sin(np.arange(16000) / 5)
    for name in ("a", "b", "c", os.fsdecode(b"caf\xe9")):
        frames = [np.full((48, 64, 3), 40 * len(name) + ord(name[0]) % 7, np.uint8)] * 24
        made = make_media(
            tmp_path / "new.mp4", times=[i / 24 for i in range(24)], sound=sound, rate=16000, pictures=frames
        )
        made.rename(raw / f"{name}.mp4")
    (raw / "a.json").write_text('{"caption": ["a cat", "a dog"]}')
    (raw / "b.json").write_text('{"text": "unused"}')
    (raw / "c.txt").write_bytes("café".encode("latin-1"))
    (raw / "notes <1>.pdf").write_bytes(b"x")
    config = PrepareConfig(str(raw), str(tmp_path / "set"), frames=17, height=32, width=48, text_dim=64, workers=1)
    summary = prepare(config)["summary"]
    printed, page = capsys.readouterr().out, (tmp_path / "set" / "report.html").read_text()
    assert (summary["files"], summary["kept"]) == (4, 3)
    assert summary["without_caption"] == {"count": 2, "first": ["b.mp4", "caf\\xe9.mp4"]}
    assert summary["several_captions"] == {"count": 1, "first": ["a.mp4"]}
    assert summary["beside"]["file with the ending .pdf"] == {"count": 1, "first": ["notes <1>.pdf"]}
    assert "1 not tried: file with the ending .pdf: notes <1>.pdf" in printed
    assert "2 without caption: b.mp4, caf\\xe9.mp4" in printed
    assert "notes &lt;1&gt;.pdf" in page and 'segments without caption</td><td class="n">2' in page
    (line,) = [json.loads(line) for line in (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()]
    assert line["source"] == "c.mp4" and "UTF-8, the encoding that was tried" in line["reason"]
