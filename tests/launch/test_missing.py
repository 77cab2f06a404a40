"""What a run reads and does not find: a mistake where somebody typed it, something that comes back at a restart."""

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from core import errors
from core.errors import RunError, describe, exit_status, missing
from core.run_dir import RunDir
from data.clip import Bucket
from data.dataset import index as index_module
from data.dataset.index import DatasetIndex
from data.dataset.selection import Rule, read_takedown
from data.errors import DataError, MissingData, ReadError
from launch.local import local
from launch.local.local import Ending, LocalConfig, run_local
from launch.local.ranks import Ended
from launch.slurm.inputs import missing_inputs
from launch.slurm.preflight import NO_BLAME, judge
from tests.shards import make_dataset
from train.faults.stop import STOP_SIGNALS

BUCKET = Bucket(frames=2, height=2, width=2, audio_steps=5, fps=24.0, has_video=True, has_audio=True)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data", [(BUCKET, 2), (BUCKET, 2)])


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.delenv("MOVA_ATTEMPT", raising=False)


ERRORS = [
    MissingData("dataset folder /d does not exist"), PermissionError(errno.EACCES, "Permission denied", "/d/x"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "/d/x"), NotADirectoryError(errno.ENOTDIR, "x", "/d"),
    IsADirectoryError(errno.EISDIR, "x", "/d"), FileExistsError(errno.EEXIST, "File exists", "/d"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("attempt", "status"), [(None, 1), ("", 1), ("0", 1), ("1", 75), ("12", 75)])
def test_what_is_missing_is_a_mistake_at_first_and_no_more_at_a_restart(
    error: Exception, attempt: str | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attempt is not None:
        monkeypatch.setenv("MOVA_ATTEMPT", attempt)
    assert exit_status(error) == status
    assert describe(error).startswith(f"node n7, restart {attempt}: ") == (status == 75)
    assert (missing("no weights").retry, exit_status(missing("no weights"))) == (status == 75, status)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_what_vanishes_while_a_run_trains_was_there(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the attempt that somebody typed: a mount that goes away after days is no mistake of the command."""
    monkeypatch.setattr(errors, "_trained", True)
    assert exit_status(error) == exit_status(missing("no weights")) == 75
    assert describe(error) == f"node n7, restart 0: {error} (it was there)"


@pytest.mark.parametrize("attempt", ["0", "3"])
def test_what_a_restart_does_not_cure_stays_so(attempt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOVA_ATTEMPT", attempt)
    assert exit_status(DataError("the dataset has changed")) == exit_status(RunError("another config")) == 1
    assert exit_status(ValueError("a bug")) == 1 and describe(DataError("x")) == "x"
    assert exit_status(ReadError("the line")) == exit_status(OSError(errno.EIO, "I/O error")) == 75


def test_a_dataset_that_is_not_there(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingData, match="nowhere does not exist"):
        DatasetIndex.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()  # what an unmounted folder looks like
    with pytest.raises(MissingData, match="has no index"):
        DatasetIndex.open(tmp_path / "empty")
    shard = dataset / "av-000001.tar"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(MissingData, match="av-000001.tar of dataset .* is missing"):
        DatasetIndex.open(dataset)
    shard.write_bytes(content + b"more")
    with pytest.raises(DataError, match="the index recorded") as changed:
        DatasetIndex.open(dataset)
    assert not isinstance(changed.value, MissingData)  # that does not come back by itself


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EACCES, errno.EHOSTDOWN])
def test_a_file_system_that_does_not_answer(dataset: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder, of the index, of a shard."""
    real = os.stat

    def broken(part: str):
        def stat(path, *args, **keys):
            if part in os.fspath(path):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return real(path, *args, **keys)

        return stat

    for part, words in (("dataset.json", "can't be opened"), ("av-000000.tar", "can't be looked at")):
        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", broken(part))
            with pytest.raises(MissingData, match=f"{words}.*{os.strerror(number)}.*mount"):
                DatasetIndex.open(dataset)

    def unreadable(path: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(index_module.Path, "read_bytes", unreadable)
    with pytest.raises(MissingData, match=f"can't be read.*{os.strerror(number)}"):
        DatasetIndex.open(dataset)


def test_files_beside_a_dataset(tmp_path: Path) -> None:
    for read in (Rule.read, read_takedown):
        with pytest.raises(MissingData, match="can't be read"):
            read(tmp_path / "nowhere")
    (tmp_path / "odd").write_bytes(b"\xff\xfe\x00")
    for read in (Rule.read, read_takedown):
        with pytest.raises(DataError, match="can't be read") as odd:
            read(tmp_path / "odd")
        assert not isinstance(odd.value, MissingData)


SMALL = [
    "model.video.dim=48", "model.video.num_heads=1", "model.video.num_layers=1", "model.video.ffn_dim=64",
    "model.audio.dim=48", "model.audio.num_heads=1", "model.audio.num_layers=1", "model.audio.ffn_dim=64",
    "model.video.text_dim=6", "model.audio.text_dim=6", "model.text_length=4", "data.batch_size=2",
    "monitor.wandb=disabled", "steps=1", "validation.samples=1",
]  # fmt: skip


def test_the_program_ends_with_it(dataset: Path, tmp_path: Path) -> None:
    """A start that somebody typed, then a restart in the same folder."""
    for attempt, gone, status in (("0", "data.path", 1), ("1", "data.valid_path", 75)):
        paths = {"data.path": str(dataset), "data.valid_path": str(dataset), gone: str(tmp_path / "gone")}
        done = subprocess.run(
            [sys.executable, "-m", "train", *SMALL, "run.id=x", f"run.root={tmp_path}", *map("=".join, paths.items())],
            env={**os.environ, "MOVA_ATTEMPT": attempt, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        said = json.loads((tmp_path / "x" / "status.json").read_text())
        assert (said["state"], said["exit_status"]) == ("failed", status)
        line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert line == f"error: {said['error']}" and f"{tmp_path / 'gone'} does not exist" in line
        assert line.startswith("error: node n7, restart 1: ") == (status == 75)


def test_the_launcher_says_which_attempt_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "x")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump({"steps": 9}))
    told = []

    def attempt(*_: object) -> tuple[Ending, int]:
        told.append(os.environ["MOVA_ATTEMPT"])
        assert os.environ["PYTHONSAFEPATH"] == "1" and os.environ["LAUNCHER_PID"] == str(os.getpid())
        run.write_status("failed", error="a rank is gone", exit_status=75)
        return Ending("rank 0 ended with exit status 75", early=False, asked=False), 75

    monkeypatch.setenv("MOVA_ATTEMPT", "5")  # of a job that this shell was once in
    monkeypatch.setattr(local, "_run_once", attempt)
    before = dict(os.environ)
    assert run_local(LocalConfig(processes=1, restarts=2, max_failed_restarts=9), run, tmp_path, []).failure
    assert told == ["0", "1", "2"]
    assert dict(os.environ) == before  # what workers inherit is not left to whatever this process starts next


def test_a_launch_leaves_its_process_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that goes on after a launch keeps its other children, the fork server of its worker processes for
    instance; what the run's workers left behind has ended."""
    run = RunDir(tmp_path / "x")
    run.checkpoints.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump({"steps": 9}))
    orphan = tmp_path / "orphan"
    left = f"import subprocess; print(subprocess.Popen(['sleep', '100']).pid, file=open({str(orphan)!r}, 'w'))"

    def attempt(*_: object) -> tuple[int, Ended]:
        subprocess.run([sys.executable, "-c", left], check=True)
        run.write_status("finished", step=9)
        return 0, Ended()

    monkeypatch.setattr(local, "_until_all_ended", attempt)
    handlers, reaper = [signal.getsignal(number) for number in STOP_SIGNALS], reaps_orphans()
    with subprocess.Popen(["sleep", "100"]) as other:
        try:
            assert run_local(LocalConfig(processes=1), run, tmp_path, []).failure is None
            assert other.poll() is None and not psutil.pid_exists(int(orphan.read_text()))
        finally:
            other.kill()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers and reaps_orphans() == reaper


def reaps_orphans() -> int:
    """PR_GET_CHILD_SUBREAPER of prctl(2) for this process."""
    found = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(37, ctypes.byref(found), 0, 0, 0)
    return found.value


def written(tmp_path: Path, data: dict, source: str | None = None) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    run.config.write_text(yaml.safe_dump({"steps": 9, "data": data, "init": {"source": source}}))
    return run


def test_a_node_looks_at_what_the_run_reads(dataset: Path, tmp_path: Path) -> None:
    valid = make_dataset(tmp_path / "valid", [(BUCKET, 2)])
    data = {"path": str(dataset), "valid_path": str(valid)}
    assert missing_inputs(written(tmp_path, data)) == []
    assert missing_inputs(written(tmp_path, {"path": "s3://bucket/never/asked"})) == []
    (dataset / "av-000000.tar").unlink()
    shutil.rmtree(valid)
    found = missing_inputs(written(tmp_path, data, source=str(tmp_path / "gone")))
    assert [word in line for line, word in zip(found, (f"{valid} does", "av-000000", "gone does"), strict=True)] == (
        [True] * 3
    ), found
    run = written(tmp_path, {"path": None, "datasets": [{"path": str(dataset), "takedown": str(tmp_path / "list")}]})
    assert any(f"{tmp_path / 'list'} can't be read" in line for line in missing_inputs(run))


def test_a_node_needs_no_data_that_is_behind_the_run(dataset: Path, tmp_path: Path) -> None:
    later = {"first_step": 10, "datasets": [{"path": str(dataset)}]}
    run = written(tmp_path, {"path": str(tmp_path / "gone"), "segments": [later]}, source=str(tmp_path / "gone"))
    assert len(missing_inputs(run)) == 2
    for step in (5, 10):
        folder = run.checkpoints / f"step-{step:08d}"
        folder.mkdir()
        (folder / "COMMITTED").touch()
        assert len(missing_inputs(run)) == (1 if step == 5 else 0)


@pytest.mark.parametrize(("attempt", "status"), [("0", 1), ("2", 75)])
def test_data_that_no_node_has(tmp_path: Path, attempt: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed wrong, or the file system is away."""
    monkeypatch.setenv("MOVA_ATTEMPT", attempt)
    run = written(tmp_path, {"path": "/gone"})
    folder = run.logs / "preflight-12-0"
    folder.mkdir(parents=True)
    for name in ("n1", "n2"):
        report = {"node": name, "problems": ["/gone does not exist"], "missing": ["/gone does not exist"]}
        (folder / f"{name}.json").write_text(json.dumps({**report, "together": "skipped"}))
    assert judge(run, "12", 0, ["n1", "n2"], "", 8) == NO_BLAME
    assert run.read_status()["exit_status"] == status and "/gone does not exist" in run.read_status()["error"]
    assert not (run.root / "excluded_nodes").exists()
