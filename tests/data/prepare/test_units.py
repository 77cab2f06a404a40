"""Units of work: a killed run goes on where it was, single units together give what one run gives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data.dataset.build import write_index
from data.dataset.index import DatasetIndex
from data.dataset.shards import ShardWriter
from data.errors import DataError
from data.prepare.claim import MARKER
from data.prepare.curation import PrepareConfig, prepare
from data.prepare.pipeline import Pipeline
from data.prepare.spool import FileResult
from data.prepare.unit import UNITS
from data.sources import SourceFile
from data.sources.cells import TableLayout
from data.sources.survey import Survey
from data.sources.table import SourceTable, make_table, prepare_table
from data.windows.table import read_columns
from tests.child import run_child

MakeMedia = Callable[..., Path]
FILES, COUNT = 9, 4


@pytest.fixture(scope="module")
def source(make_media: MakeMedia, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    for number in range(FILES):
        sound = 0.3 * np.sin(np.arange(24000) / (3 + number)) + np.random.default_rng(number).normal(0, 0.02, 24000)
        make_media(folder / f"{number}.mp4", times=[i / 24 for i in range(36)], sound=sound, rate=16000)
        (folder / f"{number}.txt").write_text(f"Tone {number}.")
    (folder / "copy.mp4").write_bytes((folder / "0.mp4").read_bytes())
    (folder / "garbage.mp4").write_bytes(b"no film" * 99)
    return folder


def config(source: Path, output: Path, **settings: object) -> PrepareConfig:
    values = {
        "frames": 17,
        "height": 32,
        "width": 48,
        "samples_per_shard": 3,
        "text_dim": 64,
        "workers": 1,
        "units": COUNT,
    }
    values |= {"scores": ["silence", "motion"], **settings}
    return PrepareConfig(source=str(source), output=str(output), **values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of an unbroken run."""
    output = tmp_path_factory.mktemp("out") / "set"
    prepare(config(source, output))
    return output


def dealt(source: Path, place: Path) -> dict[str, int]:
    """Unit of every file, by its name."""
    make_table(place / "table", Survey(str(source), TableLayout()), "")
    prepare_table(place / "table", COUNT, hash_all=False)
    with SourceTable(place / "table") as table:
        return {entry.name: unit for unit in range(COUNT) for entry in table.unit(unit)}


def assert_same(output: Path, whole: Path) -> None:
    """Shards, tables and lists, byte for byte; nothing left over."""
    assert DatasetIndex.open(output).fingerprint == DatasetIndex.open(whole).fingerprint
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert (output / "rejected.jsonl").read_bytes() == (whole / "rejected.jsonl").read_bytes()
    mine, theirs = read_columns(output / "scores.parquet"), read_columns(whole / "scores.parquet")
    assert all((mine[name] == theirs[name]).all() for name in theirs)
    summaries = [json.loads((path / "prepare.json").read_text())["summary"] for path in (output, whole)]
    for name in ("files", "kept", "rejected", "windows", "windows_seen", "seconds", "source_seconds", "buckets"):
        assert summaries[0][name] == summaries[1][name]
    assert not output.with_name(output.name + ".partial").exists()


def test_units_cover_all_files_and_copies_are_found(source: Path, whole: Path, tmp_path: Path) -> None:
    units = dealt(source, tmp_path)
    assert len(units) == FILES + 2 and set(units.values()) == set(range(COUNT))
    numbers = {int(path.name[3:9]) // 1000 for path in whole.glob("av-*.tar")}
    assert numbers <= set(units.values()) and len(numbers) > 1
    index = DatasetIndex.open(whole)
    assert len(index) == 2 * FILES == len({index.key(row) for row in range(len(index))})
    assert "same content" in (whole / "rejected.jsonl").read_text()


def test_single_units_give_the_same_dataset(source: Path, whole: Path, tmp_path: Path) -> None:
    for number in (2, 0, 3, 0, 1):
        assert not (tmp_path / "set").exists()
        prepare(config(source, tmp_path / "set", units=0, unit=f"{number}/{COUNT}"))
    assert_same(tmp_path / "set", whole)
    prepare(config(source, tmp_path / "set", units=0, unit=f"1/{COUNT}"))  # nothing is done twice


def test_units_run_beside_each_other_and_then_the_rest(source: Path, whole: Path, tmp_path: Path) -> None:
    prepare(config(source, tmp_path / "set", units=0, unit=f"1/{COUNT}"))
    prepare(config(source, tmp_path / "set"))  # does what is missing
    assert_same(tmp_path / "set", whole)


class Killed(BaseException):
    """As a kill: nobody handles it."""


@pytest.mark.usefixtures("work_here")
@pytest.mark.parametrize("files", [0, 1, 3, 5, 8])
def test_a_stopped_run_goes_on(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    true_run, seen = Pipeline.run, []

    def counting(self: Pipeline, entry: SourceFile, *more: Any) -> FileResult:
        if len(seen) == files and files >= 0:
            raise Killed
        seen.append(entry.name)
        return true_run(self, entry, *more)

    monkeypatch.setattr(Pipeline, "run", counting)
    with pytest.raises(Killed):
        prepare(config(source, tmp_path / "set"))
    done = {json.loads(path.read_text())["unit"] for path in (tmp_path / "set.partial" / UNITS).glob("*.json")}
    finished = {name for name, unit in dealt(source, tmp_path).items() if unit in done}
    first, seen[:] = list(seen), []
    monkeypatch.setattr(
        Pipeline, "run", lambda self, entry, *more: (seen.append(entry.name), true_run(self, entry, *more))[1]
    )
    prepare(config(source, tmp_path / "set"))
    refused = {"0.mp4", "copy.mp4"} - set(first) - set(seen)  # of two copies one is not opened
    finished -= refused
    assert finished <= set(first) and not finished & set(seen)  # what was finished isn't done again
    assert len(refused) == 1 and len(seen) == FILES + 1 - len(finished)
    assert_same(tmp_path / "set", whole)


def test_a_killed_process_goes_on(source: Path, whole: Path, tmp_path: Path) -> None:
    output, partial = tmp_path / "set", tmp_path / "set.partial"
    settings = "frames=17 height=32 width=48 samples_per_shard=3 text_dim=64 workers=1 units=4 scores=[silence,motion]"
    command = [sys.executable, "-m", "data.prepare", f"source={source}", f"output={output}", *settings.split()]
    run = subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list((partial / UNITS).glob("*.json")) and run.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    prepare(config(source, output))
    assert_same(output, whole)


@pytest.mark.usefixtures("work_here")
def test_what_a_kill_left_in_the_shards_is_removed(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardWriter, "__exit__", lambda *_: None)  # as a kill: unfinished shards stay
    true_run, seen = Pipeline.run, []

    def dying(self: Pipeline, entry: SourceFile, *more: Any) -> FileResult:
        seen.append(entry.name)
        if len(seen) == 5:
            raise Killed
        return true_run(self, entry, *more)

    monkeypatch.setattr(Pipeline, "run", dying)
    with pytest.raises(Killed):
        prepare(config(source, tmp_path / "set", units=2, samples_per_shard=5))
    monkeypatch.undo()
    partial = tmp_path / "set.partial"
    assert list(partial.glob(".*.partial"))
    assert not list((partial / UNITS).glob("*.json"))
    (partial / "av-000077.tar").write_bytes(b"of a run with other code")
    record = prepare(config(source, tmp_path / "set", units=2, samples_per_shard=5))
    assert record["summary"]["windows"] == 2 * FILES and not list((tmp_path / "set").glob(".*"))
    assert DatasetIndex.open(tmp_path / "set").verify() == []
    assert {path.name for path in (tmp_path / "set").glob("av-*77.tar")} == set()


@pytest.mark.usefixtures("work_here")
def test_stopped_while_it_is_put_together(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data.prepare.finish

    def die(*_: object) -> None:
        raise Killed

    deadly = SimpleNamespace(**{**vars(os), "rename": die})
    for name, dying in (("merge", die), ("write_report", die), ("assemble", die), ("os", deadly), ("tidy", die)):
        output = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(data.prepare.finish, name, dying)
            with pytest.raises(Killed):
                prepare(config(source, output))
        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, "run", die)  # no file is needed again
            prepare(config(source, output))
        assert_same(output, whole)
        assert not (output / MARKER).exists()


def test_the_index_is_that_of_the_tars_though_none_was_read(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte what `mova index` builds from the shards alone."""
    with monkeypatch.context() as patch:
        patch.setattr("data.dataset.build.read_rows", lambda *_: pytest.fail("a shard was read to finish"))
        prepare(config(source, tmp_path / "set", units=3, holdout=0.3))
    for folder in (whole, tmp_path / "set" / "train", tmp_path / "set" / "valid"):
        there = {path.name: path.read_bytes() for path in (folder / "index").iterdir()}
        shutil.copytree(folder, tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy" / "index")
        if folder == whole:
            command = [sys.executable, "-m", "data.index", f"dir={tmp_path / 'copy'}"]
            run_child(command, cwd=Path(__file__).parents[3])
        else:
            write_index(tmp_path / "copy")
        assert {path.name: path.read_bytes() for path in (tmp_path / "copy" / "index").iterdir()} == there
        assert len(there) > 15 and DatasetIndex.open(folder).scores
        shutil.rmtree(tmp_path / "copy")


def test_rows_that_are_gone_or_damaged_are_no_smaller_dataset(source: Path, tmp_path: Path) -> None:
    output, folder = tmp_path / "set", tmp_path / "set.partial" / UNITS
    for number in range(COUNT - 1):
        prepare(config(source, output, units=0, unit=f"{number}/{COUNT}"))
    path = sorted(folder.glob("*.av.npz"))[0]
    good = path.read_bytes()
    path.write_bytes(good[:-300] + bytes(300))
    with pytest.raises(DataError, match=f"{path.name} is unreadable"):
        prepare(config(source, output, units=0, unit=f"{COUNT - 1}/{COUNT}"))
    for text in folder.glob(path.name.replace(".av.", ".text-*.")):
        text.rename(text.with_suffix(".gone"))
    path.unlink()
    with pytest.raises(DataError, match="samples, its units wrote"):
        prepare(config(source, output))
    assert not output.exists()


def test_other_settings_begin_anew_unless_others_are_at_it(source: Path, tmp_path: Path) -> None:
    prepare(config(source, tmp_path / "set", unit="0/4", units=0))
    with pytest.raises(DataError, match="begun with other settings.*frames: 17, now 21"):
        prepare(config(source, tmp_path / "set", unit="1/4", units=0, frames=21))
    (tmp_path / "set.partial" / "av-777777.tar").write_bytes(b"of a unit that there will not be")
    prepare(config(source, tmp_path / "set", frames=21))
    assert not (tmp_path / "set" / "av-777777.tar").exists()
    assert DatasetIndex.open(tmp_path / "set").buckets[0].frames == 6


def test_two_processes_at_one_unit(source: Path, tmp_path: Path) -> None:
    import fcntl

    prepare(config(source, tmp_path / "set", unit="0/4", units=0))
    with open(tmp_path / "set.partial" / UNITS / "00001.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another data.prepare is at unit 1"):
            prepare(config(source, tmp_path / "set", unit="1/4", units=0))
        with open(tmp_path / "set.partial" / MARKER, "a") as marker:
            fcntl.flock(marker, fcntl.LOCK_SH)  # a unit is being done elsewhere
            with pytest.raises(DataError, match="another data.prepare is writing"):
                prepare(config(source, tmp_path / "set"))


@pytest.mark.parametrize("unit", ["4/4", "1", "a/b", "-1/4", "1/0"])
def test_a_unit_that_is_none(source: Path, tmp_path: Path, unit: str) -> None:
    with pytest.raises(DataError, match="must be i/n"):
        prepare(config(source, tmp_path / "set", unit=unit, units=0))
    with pytest.raises(DataError, match="contradict"):
        prepare(config(source, tmp_path / "set", unit="1/3"))


def test_holdout_in_units_takes_whole_files(source: Path, tmp_path: Path) -> None:
    for number in range(3):
        prepare(config(source, tmp_path / "units", unit=f"{number}/3", units=0, holdout=0.3))
    prepare(config(source, tmp_path / "set", units=3, holdout=0.3))
    for part in ("train", "valid"):
        mine, theirs = DatasetIndex.open(tmp_path / "units" / part), DatasetIndex.open(tmp_path / "set" / part)
        assert mine.fingerprint == theirs.fingerprint and len(mine) > 0
    resumed = prepare(config(source, tmp_path / "set", units=3, holdout=0.3))
    assert resumed["summary"]["windows"] == 2 * FILES
