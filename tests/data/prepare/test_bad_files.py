"""No file ends the work: whatever lies in a folder, each file has one verdict, the same for any number of workers."""

import contextlib
import errno
import gc
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from bench.data.bad_files import curate, verdicts
from bench.data.bad_media import DEADLY, DeadlyPipeline, contents, film, make_folder, names
from data.dataset.index import DatasetIndex
from data.dataset.shards import ShardWriter
from data.errors import DataError
from data.prepare.curation import PrepareConfig, prepare
from data.prepare.pipeline import Pipeline, PipelineConfig
from data.prepare.pool import Listener, Pool
from data.prepare.spool import EncodedWindow, FileResult, WindowResult, read_spool
from data.prepare.stages import Decode, Probe
from data.prepare.worker import run_file
from data.scores import ScoreConfig
from data.sources import SourceFile
from data.sources.verdict import kind_of, name_of, printable, reason_of
from data.windows.filter import FilterConfig
from data.windows.table import read_columns
from data.windows.window import Geometry

MakeMedia = Callable[..., Path]
SETTINGS = PipelineConfig([Geometry(17, 24, 32, 48)], scores=[], score=ScoreConfig(), filters=FilterConfig())
TIMEOUT = 6.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "raw"
    folder.mkdir()
    make_folder(folder)
    return folder


@pytest.fixture(scope="module", params=[1, 2])
def curated(request: pytest.FixtureRequest, folder: Path) -> tuple[Path, dict[str, Any]]:
    """(dataset, summary) of the folder with one and with two workers."""
    output = folder.parent / f"set-{request.param}"
    return output, curate(folder, output, request.param, TIMEOUT)


def media_files(folder: Path) -> list[str]:
    """Names below the folder of all plain files that are no caption."""
    found = []
    for place, _, files in os.walk(folder):
        paths = [Path(place) / name for name in files]
        found += [
            str(path.relative_to(folder))
            for path in paths
            if not path.is_symlink() and stat.S_ISREG(path.stat().st_mode) and path.suffix not in (".txt", ".json")
        ]
    return found


def test_every_file_has_one_verdict(folder: Path, curated: tuple[Path, dict[str, Any]]) -> None:
    output, summary = curated
    found = verdicts(output)
    assert len(found) == len(media_files(folder)) == summary["files"] > 150
    assert {name: reasons for name, reasons in found.items() if len(reasons) != 1} == {}
    assert all(reasons[0] and reasons[0] == printable(reasons[0]) for reasons in found.values())
    kept = {name for name, (reason,) in found.items() if reason.startswith("kept")}
    assert summary["kept"] == len(kept) and sum(summary["rejected"].values()) == len(found) - len(kept)
    assert {f"whole.{suffix}" for suffix in ("mkv", "avi", "webm")} <= kept and kept & {"whole.mp4", "copy.mp4"}
    assert set(summary["rejected_examples"]) == set(summary["rejected"])
    for kind, first in summary["rejected_examples"].items():
        assert first and all(kind_of(found[name][0]) == kind for name in first)
        assert len(first) == min(3, summary["rejected"][kind])


def test_a_file_that_ends_its_process_costs_only_itself(curated: tuple[Path, dict[str, Any]]) -> None:
    found = {name.removesuffix(".mp4"): reason for name, (reason,) in verdicts(curated[0]).items()}
    kills = "decoding it kills the process"
    assert found["kills-segfault"] == f"{kills} (signal 11, Segmentation fault)" == found["kills-bad-address"]
    assert found["kills-abort"] == f"{kills} (signal 6, Aborted)"
    assert found["kills-out-of-memory"] == f"{kills} (signal 9, Killed, perhaps out of memory)"
    assert found["kills-exit"] == f"{kills} (exit status 3)"
    assert found["loops"] == found["sleeps"] == f"it does not finish: one step took more than {TIMEOUT:.0f} s (timeout)"
    assert "MemoryError" in found["raises-memory"] and "MemoryError" in found["raises-av-memory"]
    assert found["raises-assertion"] == "nothing of it was kept: decode failed (AssertionError: shape)"
    assert found["raises-panic"].endswith("decode failed (_Panic: called `Option::unwrap()` on a `None` value)")
    assert found["raises-odd-letters"].endswith("(ValueError: caf\\xe9 \\u001b[31m\\u0000)")
    assert all("decode failed" in found[name] for name in DEADLY if name.startswith("raises-"))


def test_the_number_of_workers_changes_nothing(folder: Path, curated: tuple[Path, dict[str, Any]]) -> None:
    output, one = curated[0], folder.parent / "set-1"
    assert DatasetIndex.open(output).fingerprint == DatasetIndex.open(one).fingerprint
    assert (output / "rejected.jsonl").read_bytes() == (one / "rejected.jsonl").read_bytes()


def test_awkward_names_reach_every_record(folder: Path, curated: tuple[Path, dict[str, Any]]) -> None:
    output, _ = curated
    expected = {name_of(os.fsdecode(name)) for name in names()}
    assert len(expected) == len(names()) and "caf\\xe9.mp4" in expected and "caf\\\\xe9.mp4" in expected
    assert expected <= set(read_columns(output / "scores.parquet", ["source"])["source"])
    index = DatasetIndex.open(output)
    assert expected <= {index.read_meta(row)["source"] for row in range(len(index))}
    (output / "report.html").read_text(encoding="utf-8")
    assert not [path for path in folder.rglob("*") if path.name in ("x", "touch")]


class SlowPipeline(Pipeline):
    """Waits at each file, so that a test can do something in between."""

    def run(self, source: SourceFile, *more: Any) -> FileResult:
        """As Pipeline.run, later."""
        time.sleep(0.3)
        return super().run(source, *more)


class FullPipeline(Pipeline):
    """A library's scratch disk is full."""

    def run(self, source: SourceFile, *more: Any) -> FileResult:
        """As Pipeline.run, with a decoder that fails."""

        def decode(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/scratch")

        self.decode = decode  # type: ignore[assignment]
        return super().run(source, *more)


class BrokenPipeline(Pipeline):
    """Can't be made."""

    def __init__(self, config: PipelineConfig):
        os._exit(7)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[SourceFile]:
    """Some good films, hashed."""
    place = tmp_path_factory.mktemp("good")
    found = []
    for number in range(6):
        path = place / f"{number}.mp4"
        path.write_bytes(film(seed=number, frames=24))
        found.append(SourceFile(path, path.name, path.stat().st_size, sha256=f"{number:064d}"))
    return found


def gives(pool: Pool, sources: list[SourceFile], waiting: Path) -> list[tuple[str, str, list[str]]]:
    """(name, reason, keys) of each source."""
    waiting.mkdir(exist_ok=True)
    return [
        (source.name, result.rejected, [window.row["key"] for window in windows])
        for source, result, windows in pool.run(sources, waiting, Listener())
    ]


def test_the_fork_server_dies(sources: list[SourceFile], tmp_path: Path) -> None:
    with Pool(SETTINGS, 2) as pool:
        expected = gives(pool, sources, tmp_path / "a")
    assert all(not reason and len(keys) == 1 for _, reason, keys in expected)
    with Pool(SETTINGS, 2, make=SlowPipeline) as pool:
        (tmp_path / "b").mkdir()
        found = []
        for source, result, windows in pool.run(sources, tmp_path / "b", Listener()):
            found.append((source.name, result.rejected, [window.row["key"] for window in windows]))
            if len(found) == 1:
                os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
    assert found == expected
    assert list((tmp_path / "b").iterdir()) == []


def test_a_full_disk_ends_the_work_and_is_no_verdict(
    sources: list[SourceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "2-0").symlink_to("/dev/full")  # where the third file's windows go
    with Pool(SETTINGS, 2) as pool, pytest.raises(DataError, match="No space left.*free space, then run the same"):
        gives(pool, sources, tmp_path / "a")
    with Pool(SETTINGS, 1, make=FullPipeline) as pool, pytest.raises(DataError, match="disk is full.*scratch"):
        gives(pool, sources, tmp_path / "b")
    settings = PrepareConfig(str(sources[0].path.parent), str(tmp_path / "set"), frames=17, height=32, width=48)
    settings.workers, settings.text_dim = 2, 64

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(settings)
    assert prepare(settings)["summary"]["kept"] == 6  # nothing was held against a file


def test_workers_that_can_not_start_are_an_error(sources: list[SourceFile], tmp_path: Path) -> None:
    with (
        Pool(SETTINGS, 2, make=BrokenPipeline) as pool,
        pytest.raises(DataError, match="no worker process can be started.*exit status 7"),
    ):
        gives(pool, sources, tmp_path / "a")


def test_a_file_that_changes_or_goes(
    sources: list[SourceFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline(SETTINGS)

    def verdict(deed: Callable[[Path], object], stage: type) -> str:
        path = tmp_path / "film.mp4"
        path.write_bytes(sources[0].path.read_bytes())
        source = SourceFile(path, path.name, path.stat().st_size, sha256="0" * 64)
        true_call = stage.__call__
        with monkeypatch.context() as patch:
            patch.setattr(stage, "__call__", lambda self, *given: (deed(path), true_call(self, *given))[1])
            return run_file(pipeline, source, tmp_path / "spool", lambda done, windows: None).rejected

    assert verdict(lambda path: None, Decode) == ""
    assert "bytes when it was listed and has 5000 now" in verdict(lambda path: os.truncate(path, 5000), Decode)
    assert "changed while it was read" in verdict(lambda path: os.utime(path, ns=(1, 1)), Decode)
    assert "FileNotFoundError" in verdict(Path.unlink, Decode)
    assert verdict(Path.unlink, Probe) == "it is not a file"
    grown = SourceFile(sources[0].path, "0.mp4", sources[0].size - 1, sha256="0" * 64)
    reason = run_file(pipeline, grown, tmp_path / "spool", lambda done, windows: None).rejected
    assert reason.startswith(f"it had {sources[0].size - 1} bytes when it was listed")


def test_one_window_is_held_at_a_time(make_media: MakeMedia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_media(tmp_path / "long.mp4", times=[i / 24 for i in range(17 * 9 + 2)])
    most = 0
    true_encode = EncodedWindow.__init__

    def counting(self: EncodedWindow, *values: Any) -> None:
        nonlocal most
        true_encode(self, *values)
        most = max(most, sum(isinstance(one, EncodedWindow) for one in gc.get_objects()))

    monkeypatch.setattr(EncodedWindow, "__init__", counting)
    gc.collect()
    source = SourceFile(path, path.name, path.stat().st_size, sha256="0" * 64)
    result = run_file(Pipeline(SETTINGS), source, tmp_path / "spool", lambda done, windows: None)
    assert result.windows == 9 and most <= 2
    most, read = 0, list[str]()
    for window in read_spool(tmp_path / "spool"):
        assert window.sample is not None
        read.append(window.row["key"])
    assert len(set(read)) == 9 and most <= 2


def test_a_spool_gives_back_what_it_was_given(tmp_path: Path) -> None:
    from data.prepare.spool import Spool, Thumbnail

    bucket = SETTINGS.buckets[0].bucket(True, False)
    row = {
        "stored": True,
        "scores": {"x": 0.1 + 0.2, "y": float("inf")},
        "source": "a\\u000a\N{CLAPPER BOARD}",
        "start": -1e-9,
    }
    windows = [
        WindowResult(row, 3, EncodedWindow(b"\n{}\x00" * 9, b"", bucket), Thumbnail(b"\xff\xd8", [0.5])),
        WindowResult(row | {"stored": False}, 4),
        WindowResult(row, 5, EncodedWindow(b"", b"\n", bucket)),
        WindowResult(row, 6, None, Thumbnail(b"", [])),
    ]
    with Spool(tmp_path / "spool") as spool:
        for window in windows:
            spool.add(window)
    assert list(read_spool(tmp_path / "spool")) == windows


def test_a_claim_of_years_is_no_film(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: list[SourceFile]
) -> None:
    monkeypatch.setattr("data.prepare.pipeline.MOST_WINDOWS", 1)
    long = SourceFile(tmp_path / "long.mp4", "long.mp4", sha256="0" * 64)
    long.path.write_bytes(film(frames=60))
    result = run_file(Pipeline(SETTINGS), long, tmp_path / "spool", lambda done, windows: None)
    assert "its timestamps are wrong" in result.rejected and result.windows == 0


@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_stop_leaves_no_worker_behind(make_media: MakeMedia, tmp_path: Path, stop: str) -> None:
    (tmp_path / "raw").mkdir()
    make_media(tmp_path / "raw" / "long.mp4", times=[i / 24 for i in range(17 * 20)])
    make_media(tmp_path / "raw" / "long.mkv", times=[i / 24 for i in range(17 * 21)])
    command = [sys.executable, "-m", "data.prepare", f"source={tmp_path}/raw", f"output={tmp_path}/set", "workers=2"]
    command += ["frames=17", "height=704", "width=1280", "units=1", "scores=[motion]"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    waiting, end = tmp_path / "set.partial" / "units" / "00000.waiting", time.monotonic() + 120
    while not (waiting.is_dir() and len(list(waiting.iterdir())) == 2) and time.monotonic() < end:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.05)
    members = processes_of(run.pid)
    assert len(members) >= 4  # itself, the fork server, two workers
    if stop == "SIGINT":
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    else:
        run.send_signal(getattr(signal, stop))
    errors = run.communicate(timeout=60)[1]
    assert run.returncode == {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}[stop] and "Traceback" not in errors
    end = time.monotonic() + 20
    while processes_of(run.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert processes_of(run.pid) == []
    assert not (tmp_path / "set").exists()


def processes_of(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_reasons_are_one_printable_line_that_is_the_same_in_every_run() -> None:
    path = Path("/films/caf\udce9\n.mp4")
    assert reason_of(DataError(f"{path} is truncated"), path) == "it is truncated"
    assert reason_of(FileNotFoundError(2, "No such file", str(path)), path, "probe").endswith("No such file: it)")
    assert reason_of(ValueError("first\nsecond"), path, "decode") == "decode failed (ValueError: first)"
    assert reason_of(ValueError(), path) == "a stage failed (ValueError)"
    assert reason_of(ValueError("[mov @ 0x55d0c1a2b3c4] bad"), path, "probe").endswith("[mov @ 0x...] bad)")
    assert reason_of(DataError(f"{path}: no frame in {path.name!r}"), path) == "no frame in it"
    log = f"it can't be decoded (ArgumentError: it returned 22; last error log: [mov] of (another) {path})"
    assert reason_of(DataError(log), path) == "it can't be decoded (ArgumentError: it returned 22)"
    assert reason_of(ValueError("bad; last error log: [mov]"), path) == "a stage failed (ValueError: bad)"
    assert reason_of(OSError("[03:35:02] bad"), path, "decode") == "decode failed (OSError: bad)"
    assert len(reason_of(ValueError("x" * 10**6), path)) == 300

    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    assert reason_of(Silent(), path, "encode") == "encode failed (Silent)"
    awkward = ["a\nb", "a\\nb", "a\\u000ab", "a\udc0ab", "a\udce9b", "a\\xe9b", "a\x85b", "a\udc85b", "a\u2028b", "aéb"]
    assert len({name_of(name) for name in awkward}) == len(awkward)
    assert all(name_of(name).isprintable() and name_of(name).encode() for name in awkward)
    assert (
        kind_of("it declares 1.5 s, -2 frames (signal 11, Errno 5)") == "it declares N s, N frames (signal 11, Errno 5)"
    )
    assert kind_of("has the same content as 7/x.mp4") == kind_of("has the same content as y.mkv")


def test_there_are_kinds_enough(tmp_path: Path) -> None:
    made = contents(tmp_path)
    assert len({name.split(".")[0].rstrip("0123456789-") for name in made}) > 60
    assert [name for name, content in made.items() if list(made.values()).count(content) > 1] == []
    assert isinstance(DeadlyPipeline(SETTINGS), Pipeline) and json.dumps(sorted(DEADLY))
