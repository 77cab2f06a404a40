"""Units of work: a killed run goes on where it was, single units together give what one run gives."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.errors import DataError
from data.index import DatasetIndex
from data.pipeline import Pipeline, Result
from data.prepare import MARKER, PrepareConfig, prepare
from data.shards import ShardWriter
from data.source import Source, list_sources
from data.table import read_columns
from data.unit import UNITS, unit_of

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


def test_units_cover_all_files_and_copies_meet(source: Path, whole: Path) -> None:
    units = {entry.name: unit_of(entry, COUNT) for entry in list_sources(str(source))}
    assert units["0.mp4"] == units["copy.mp4"] and len(set(units.values())) > 2
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


@pytest.mark.parametrize("files", [0, 1, 3, 5, 8])
def test_a_stopped_run_goes_on(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    true_run, seen = Pipeline.run, []

    def counting(self: Pipeline, entry: Source) -> Result:
        if len(seen) == files and files >= 0:
            raise Killed
        seen.append(entry.name)
        return true_run(self, entry)

    monkeypatch.setattr(Pipeline, "run", counting)
    with pytest.raises(Killed):
        prepare(config(source, tmp_path / "set"))
    done = {json.loads(path.read_text())["unit"] for path in (tmp_path / "set.partial" / UNITS).glob("*.json")}
    finished = {entry.name for entry in list_sources(str(source)) if unit_of(entry, COUNT) in done}
    first, seen[:] = list(seen), []
    monkeypatch.setattr(Pipeline, "run", lambda self, entry: (seen.append(entry.name), true_run(self, entry))[1])
    prepare(config(source, tmp_path / "set"))
    assert finished <= set(first) and not finished & set(seen)  # what was finished isn't done again
    assert len(seen) == FILES + 2 - len(finished)
    assert_same(tmp_path / "set", whole)


def test_a_killed_process_goes_on(source: Path, whole: Path, tmp_path: Path) -> None:
    output, partial = tmp_path / "set", tmp_path / "set.partial"
    settings = "frames=17 height=32 width=48 samples_per_shard=3 text_dim=64 workers=1 units=4 scores=[silence,motion]"
    command = [sys.executable, "-m", "data.prepare", f"source={source}", f"output={output}", *settings.split()]
    run = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list((partial / UNITS).glob("*.json")) and run.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    prepare(config(source, output))
    assert_same(output, whole)


def test_what_a_kill_left_in_the_shards_is_removed(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardWriter, "__exit__", lambda *_: None)  # as a kill: unfinished shards stay
    true_run, seen = Pipeline.run, []

    def dying(self: Pipeline, entry: Source) -> Result:
        seen.append(entry.name)
        if len(seen) == FILES + 1:
            raise Killed
        return true_run(self, entry)

    monkeypatch.setattr(Pipeline, "run", dying)
    with pytest.raises(Killed):
        prepare(config(source, tmp_path / "set", units=2))
    monkeypatch.undo()
    partial = tmp_path / "set.partial"
    assert list(partial.glob(".*.partial"))
    (unit,) = {number for number in range(2) if not (partial / UNITS / f"{number:05d}.json").exists()}
    (partial / f"av-{1000 * unit + 77:06d}.tar").write_bytes(b"of a run with other code")
    record = prepare(config(source, tmp_path / "set", units=2))
    assert record["summary"]["windows"] == 2 * FILES and not list((tmp_path / "set").glob(".*"))
    assert DatasetIndex.open(tmp_path / "set").verify() == []
    assert {path.name for path in (tmp_path / "set").glob("av-*77.tar")} == set()


def test_stopped_while_it_is_put_together(
    source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import data.prepare

    def die(*_: object) -> None:
        raise Killed

    deadly = SimpleNamespace(**{**vars(os), "rename": die})
    for name, dying in (("merge", die), ("write_report", die), ("build_index", die), ("os", deadly), ("_tidy", die)):
        output = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(data.prepare, name, dying)
            with pytest.raises(Killed):
                prepare(config(source, output))
        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, "run", die)  # no file is needed again
            prepare(config(source, output))
        assert_same(output, whole)
        assert not (output / MARKER).exists()


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
