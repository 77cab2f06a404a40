"""The table of sources: units of one size, copies found, nothing hashed twice, one process at a time makes it."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data.sources.table
from data.dataset.index import DatasetIndex
from data.errors import DataError
from data.prepare.claim import SOURCES_LOCK
from data.prepare.curation import PrepareConfig, prepare
from data.sources.cells import TableLayout
from data.sources.content import PART, hash_file, hash_parts
from data.sources.survey import Survey
from data.sources.table import SourceTable, make_table, prepare_table
from tests.data.storage.flaky_server import FlakyServer

MakeMedia = Callable[..., Path]


def sparse(folder: Path, sizes: list[int]) -> Path:
    """Files of these sizes, each with other bytes at its start; they take no disk."""
    folder.mkdir()
    for number, size in enumerate(sizes):
        with open(folder / f"{number}.mp4", "wb") as file:
            file.write(number.to_bytes(4, "big"))
            file.truncate(size)
    return folder


def units_of(source: Path, place: Path, units: int) -> list[list[tuple[str, int, str]]]:
    make_table(place, Survey(str(source), TableLayout()), "")
    prepare_table(place, units, hash_all=False)
    with SourceTable(place) as table:
        found = [[(one.name, one.size, one.reason) for one in table.unit(number)] for number in range(units)]
        sums = [(len(unit), sum(size for _, size, reason in unit if not reason)) for unit in found]
        assert sums == table.sizes() and table.files == sum(files for files, _ in sums)
    return found


WILD = [int(size) for size in np.random.default_rng(0).lognormal(11, 2, 800)]


@pytest.mark.parametrize("sizes", [[50_000] * 400, [50_000] * 399, WILD], ids=["equal", "odd", "wild"])
def test_units_have_nearly_as_many_files_and_bytes(tmp_path: Path, sizes: list[int]) -> None:
    units = units_of(sparse(tmp_path / "raw", sizes), tmp_path / "table", 16)
    counts, loads = [len(unit) for unit in units], [sum(size for _, size, _ in unit) for unit in units]
    assert not any(reason for unit in units for _, _, reason in unit) and sum(counts) == len(sizes)
    if sizes is WILD:  # nothing splits a file that is larger than a unit
        assert max(loads) <= max(1.02 * sum(sizes) / 16, 1.03 * max(sizes)) and max(counts) <= 1.1 * len(sizes) / 16
    else:
        assert max(counts) - min(counts) <= 1
    assert units == units_of(tmp_path / "raw", tmp_path / "again", 16)


def test_one_huge_file_has_few_beside_it(tmp_path: Path) -> None:
    units = units_of(sparse(tmp_path / "raw", [10**9] + [1000 + number for number in range(79)]), tmp_path / "table", 8)
    assert sorted(len(unit) for unit in units) == [1, 11, 11, 11, 11, 11, 12, 12]


def test_copies_are_found_and_only_those_that_may_be_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, size = tmp_path / "raw", 10 * PART
    raw.mkdir()
    content = bytearray(os.urandom(size))
    for name in ("a", "copy-1", "copy-2"):
        (raw / f"{name}.mp4").write_bytes(content)
    content[5 * PART - 1] ^= 1  # in the middle part
    (raw / "middle.mp4").write_bytes(content)
    content[2 * PART] ^= 1  # in no part that is looked at first
    (raw / "unseen.mp4").write_bytes(content)
    content[5 * PART - 1] ^= 2
    (raw / "alone.mp4").write_bytes(content)  # the middle part tells it from all others
    (raw / "longer.mp4").write_bytes(content + b"x")
    (raw / "small-1.mp4").write_bytes(b"small")
    (raw / "small-2.mp4").write_bytes(b"small")
    (raw / "small-3.mp4").write_bytes(b"other")
    parts, wholes = [], []
    monkeypatch.setattr(
        data.sources.table, "hash_parts", lambda path, n: (parts.append(path.name), hash_parts(path, n))[1]
    )
    monkeypatch.setattr(
        data.sources.table, "hash_file", lambda path, n: (wholes.append(path.name), hash_file(path, n))[1]
    )
    reasons = {name: reason for unit in units_of(raw, tmp_path / "table", 3) for name, _, reason in unit}
    assert len(parts) == 9 and "longer.mp4" not in parts
    assert sorted(wholes) == ["a.mp4", "copy-1.mp4", "copy-2.mp4", "middle.mp4", "unseen.mp4"]
    kept = [name for name, reason in reasons.items() if not reason]
    assert len(kept) == 7 and {"alone.mp4", "middle.mp4", "unseen.mp4", "longer.mp4", "small-3.mp4"} <= set(kept)
    (first,) = {"a.mp4", "copy-1.mp4", "copy-2.mp4"} & set(kept)
    assert sorted(reasons.values())[-3:-1] == [f"has the same content as {first}"] * 2


def test_what_was_hashed_before_a_kill_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, place = sparse(tmp_path / "raw", [5 * PART] * 50), tmp_path / "table"
    (raw / "copy.mp4").write_bytes((raw / "7.mp4").read_bytes())
    monkeypatch.setattr(data.sources.table, "BATCH", 10)
    make_table(place, Survey(str(raw), TableLayout()), "")
    seen: list[str] = []

    def dying(path: Path, size: int) -> Any:
        seen.append(path.name)
        if len(seen) == 25:
            raise KeyboardInterrupt
        return hash_parts(path, size)

    monkeypatch.setattr(data.sources.table, "hash_parts", dying)
    with pytest.raises(KeyboardInterrupt):
        prepare_table(place, 4, hash_all=False)
    first, seen[:] = len(seen), []
    monkeypatch.setattr(
        data.sources.table, "hash_parts", lambda path, n: (seen.append(path.name), hash_parts(path, n))[1]
    )
    prepare_table(place, 4, hash_all=False)
    assert 25 <= first <= 30 and len(seen) == 31  # of 51 the two batches that were stored are not read again
    with SourceTable(place) as table:
        reasons = [one.reason for unit in range(4) for one in table.unit(unit) if one.reason]
        assert reasons in (["has the same content as copy.mp4"], ["has the same content as 7.mp4"])
    monkeypatch.setattr(data.sources.table, "hash_parts", None)
    prepare_table(place, 4, hash_all=False)
    prepare_table(place, 5, hash_all=True)  # other units, and all hashes, without the parts again
    with SourceTable(place) as table:
        assert sum(len(table.hashes(unit)) for unit in range(5)) == 50


@pytest.fixture(scope="module")
def films(make_media: MakeMedia, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six files of 3 s, of nearly one size, and a manifest of their segments."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(6):
        sound = 0.3 * np.sin(np.arange(48000) / (3 + number))
        make_media(folder / f"{number}.mp4", times=[i / 24 for i in range(72)], sound=sound, rate=16000)
    return folder


def config(source: Path, output: Path, **settings: Any) -> PrepareConfig:
    values = {"frames": 17, "height": 32, "width": 48, "text_dim": 64, "workers": 1, **settings}
    return PrepareConfig(str(source), str(output), **values)


def test_jobs_that_begin_together_make_one_table(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    settings = ["frames=17", "height=32", "width=48", "text_dim=64", "workers=1"]
    command = [sys.executable, "-m", "data.prepare", f"source={films}", f"output={tmp_path / 'set'}", *settings]
    here = Path(__file__).parents[3]
    jobs = [
        subprocess.Popen([*command, f"unit={number}/2"], cwd=here, stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    printed = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], printed
    assert sum("files listed" in text for text in printed) == 1
    prepare(config(films, tmp_path / "one", units=2))
    assert DatasetIndex.open(tmp_path / "set").fingerprint == DatasetIndex.open(tmp_path / "one").fingerprint


def test_a_job_waits_for_the_one_that_lists(films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fcntl

    prepare(config(films, tmp_path / "set", unit="0/2"))
    with open(tmp_path / "set.partial" / SOURCES_LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = threading.Thread(target=prepare, args=(config(films, tmp_path / "set", unit="1/2"),))
        job.start()
        job.join(0.5)
        assert job.is_alive() and "waiting for it" in capsys.readouterr().out
    job.join()
    assert (tmp_path / "set").is_dir()
    prepare(config(films, tmp_path / "other", unit="0/2"))
    with pytest.raises(DataError, match="was begun with source"):
        prepare(config(films / "0.mp4", tmp_path / "other", unit="1/2"))


def test_a_restart_that_sees_less_does_not_begin_anew(
    films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "raw"
    for number in range(4):
        (source / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        (source / f"{number % 2}" / f"{number}.mp4").write_bytes((films / f"{number}.mp4").read_bytes())
    prepare(config(source, tmp_path / "set", units=2, unit="0/2"))
    done = sorted((tmp_path / "set.partial" / "units").glob("*.json"))
    true = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "1":
            raise OSError(5, "Input/output error")
        return true(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        with pytest.raises(DataError, match="1 can't be read, but could be when .* was begun"):
            prepare(config(source, tmp_path / "set", units=2))
    assert sorted((tmp_path / "set.partial" / "units").glob("*.json")) == done
    (source / "0" / "new.mp4").write_bytes((films / "5.mp4").read_bytes())
    record = prepare(config(source, tmp_path / "set", units=2))
    assert "starting over" in capsys.readouterr().out and record["summary"]["files"] == 5


def test_windows_lie_in_their_segment_and_have_its_words(films: Path, tmp_path: Path) -> None:
    rows = [
        '0.mp4,0,3,whole', '0.mp4,1,2.5,middle', '0.mp4,1.0,2.6,the same window', '0.mp4,2.5,3,too short',
        '0.mp4,9,10,beyond', '1.mp4,0.5,1.3,"[\'a cat\', \'a dog\']"', '2.mp4,1,1,empty',
    ]  # fmt: skip
    (films / "m.csv").write_text("path,start,end,caption\n" + "\n".join(rows))
    record = prepare(config(films / "m.csv", tmp_path / "set", workers=2))
    index = DatasetIndex.open(tmp_path / "set")
    seconds, found = 17 / 24, {}
    for row in range(len(index)):
        meta = index.read_meta(row)
        found[meta["source"], round(meta["start"], 3)] = (index.read_text(row, "builtin"), meta.get("captions"))
    starts = [0, 1, 17 / 24, 1 + 17 / 24, 34 / 24, 51 / 24]
    assert set(found) == {*(("0.mp4", round(start, 3)) for start in starts), ("1.mp4", 0.5)}
    from data.codec.builtin import text

    for key, words in ((("0.mp4", 0), "whole"), (("0.mp4", 1), "middle"), (("1.mp4", 0.5), "a cat")):
        assert (found[key][0] == text.encode(words, 64).bfloat16()).all(), key
    assert found["1.mp4", 0.5][1] == ["a cat", "a dog"] and found["0.mp4", 1][1] is None
    assert all(start + seconds <= 3 + 0.5 / 24 for _, start in found)
    lines = (tmp_path / "set" / "rejected.jsonl").read_text()
    assert lines.count("the same window as of an earlier row") == 2
    for reason in (
        "the segment is shorter than a window",
        "begins at 9 s, the file ends at 2.9",
        "not after its start",
    ):
        assert lines.count(reason) == 1, lines
    assert (record["summary"]["files"], record["summary"]["kept"]) == (3, 2) and record["summary"]["segments"] == 7


def test_sources_and_manifests_on_a_web_server(films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["0.mp4,0,2,zero", "copy.mp4,0,2,again", "1.mp4,0,1,one", "gone.mp4,0,1,gone", "{url}/sub/a%20b.mp4,0,1,b"]
    (tmp_path / "web" / "sub").mkdir(parents=True)
    for name, film in (("0", 0), ("copy", 0), ("1", 1), ("sub/a b", 2)):
        (tmp_path / "web" / f"{name}.mp4").write_bytes((films / f"{film}.mp4").read_bytes())
    with FlakyServer(tmp_path / "web") as server:
        text = "path,start,end,caption\n" + "\n".join(rows).replace("{url}", server.url)
        (tmp_path / "web" / "m.csv").write_text(text)
        record = prepare(config(f"{server.url}/m.csv?token=secret", tmp_path / "set"))  # type: ignore[arg-type]
        server.gone.add("1.mp4")
        single = prepare(config(f"{server.url}/0.mp4?token=secret", tmp_path / "single"))  # type: ignore[arg-type]
    (tmp_path / "local.csv").write_text(
        "path,start,end\n" + "\n".join(f"{films}/{n}.mp4,0,{2 - (n > 0)}" for n in range(3))
    )
    prepare(config(tmp_path / "local.csv", tmp_path / "local"))
    far, near = DatasetIndex.open(tmp_path / "set"), DatasetIndex.open(tmp_path / "local")
    assert {far.key(row) for row in range(len(far))} == {near.key(row) for row in range(len(near))}
    assert record["summary"]["files"] == 5 and record["summary"]["kept"] == 3 and single["summary"]["windows"] == 4
    lines = (tmp_path / "set" / "rejected.jsonl").read_text()
    assert "has the same content as" in lines and "404" in lines and lines.count("\n") == 2
    files = [path for name in ("set", "single") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(files) > 10 and not any(b"secret" in path.read_bytes() for path in files)
    assert not list((tmp_path).rglob("*.source"))
