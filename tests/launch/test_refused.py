"""What is refused changes nothing; who only looks is in nobody's way; what is new in an upgrade locks no run out."""

import errno
import fcntl
import json
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

import launch.__main__ as program
from core import locks
from core.errors import RunError
from core.run_dir import RunDir
from launch.attempts import Attempts
from launch.slurm import slurm
from launch.status import standing
from tests.launch import test_launch
from tests.launch.test_launch import arguments
from train.checkpoint.resume import config_differences
from train.config import default_values

folder = test_launch.folder  # a fixture


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def begun(folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> RunDir:
    """A run that was launched once; its workers are not real."""
    monkeypatch.setattr(program, "run_local", lambda *_: SimpleNamespace(failure=None, early=False, asked=False))
    name = f"run-{abs(hash(request.node.name)) % 10**8}"
    assert program.PROGRAM.run(arguments(folder, name, "cluster.processes=2")) == 0
    run = RunDir(folder / name)
    (run.root / "attempts.jsonl").write_text('{"event": "submitted"}\n{"event": "begin", "step": 0}\n')
    return run


@pytest.mark.parametrize("lock", ["lock", "launch.lock"])
def test_a_second_launch_of_a_living_run_changes_nothing(
    folder: Path,
    begun: RunDir,
    lock: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = begun.lock(lock)
    before = contents(begun.root)
    assert program.PROGRAM.run(arguments(folder, begun.root.name, "cluster.processes=2", "steps=10")) == 1
    assert "is already being trained" in capsys.readouterr().err
    assert contents(begun.root) == before
    file.close()
    assert program.PROGRAM.run(arguments(folder, begun.root.name, "cluster.processes=2", "steps=10")) == 0
    assert "steps: 10\n" in begun.config.read_text()


def refusing_slurm(place: Path) -> None:
    """Commands of a cluster whose queue is empty and which refuses every job."""
    place.mkdir()
    for name, script in (("sbatch", "echo 'Invalid partition' >&2; exit 1"), ("squeue", "exit 0")):
        (place / name).write_text(f"#!/bin/sh\n{script}\n")
        (place / name).chmod(0o755)


def test_a_refused_sbatch_leaves_the_id_free_and_an_existing_run_as_it_was(
    folder: Path,
    begun: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refusing_slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert program.PROGRAM.run(arguments(folder, "fresh", "cluster=slurm", "cluster.partition=nowhere")) == 1
    assert "sbatch refused the job: Invalid partition" in capsys.readouterr().err
    assert not (folder / "fresh").exists()
    begun.stop_file.write_text("")
    before = contents(begun.root)
    assert program.PROGRAM.run(arguments(folder, begun.root.name, "cluster=slurm", "steps=10")) == 1
    assert contents(begun.root) == before


@pytest.mark.parametrize("queue", ["has it", "has none", "has an older one", "is silent"])
def test_an_answer_that_got_lost_is_no_refusal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], queue: str
) -> None:
    """SLURM's controller was busy: the job may be in its queue, and its folder must be there."""
    name = "lost-" + queue.replace(" ", "-")
    script = (folder / name / "submit.sh").absolute()
    row = f'echo "77|$(date -d {"-1hour" if "older" in queue else "+0sec"} +%FT%T)|{script}"'
    answer = {"has none": "true", "is silent": "exit 1"}.get(queue, row)
    refusing_slurm(tmp_path / "bin")
    said = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\necho '{said}' >&2; exit 1\n")
    (tmp_path / "bin" / "squeue").write_text(f'#!/bin/bash\ncase "$*" in *--name={name}*) {answer} ;; esac\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "ASK_AGAIN", (0.01,))
    status = program.PROGRAM.run(arguments(folder, name, "cluster=slurm"))
    out, err = capsys.readouterr()
    assert script.exists() and (folder / name / "config.yaml").exists()
    if queue == "has it":
        assert status == 0 and "job 77" in out and Attempts(RunDir(folder / name)).jobs() == ["77"]
    else:
        assert status == 1 and "whether it accepted the job is unknown" in err


def test_a_job_that_waits_for_room_is_found_though_the_full_disk_has_no_record_of_it(
    folder: Path, begun: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Attempts(begun).queued("4")
    refusing_slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for other, found in ((begun.root.with_name("other"), False), (begun.root, True)):
        line = f"5|PENDING|BeginTime|waits for room: {other.absolute()}"
        (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\necho '{line}'\n")
        assert program.PROGRAM.run(arguments(folder, begun.root.name, "cluster=slurm")) == 1
        assert ("has job 5 in the queue (PENDING)" in capsys.readouterr().err) is found
        assert (standing(begun).state == "queued") is found


def test_two_submissions_at_once_are_one_job(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing_slurm(tmp_path / "bin")
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 5\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with RunDir(folder / "twice").lock("launch.lock"):
        assert program.PROGRAM.run(arguments(folder, "twice", "cluster=slurm")) == 1
        assert not (folder / "twice" / "config.yaml").exists()
    assert "already" in capsys.readouterr().err
    assert program.PROGRAM.run(arguments(folder, "twice", "cluster=slurm")) == 0


@pytest.mark.parametrize("what", ["root is a file", "root is read-only", "Ctrl-C"])
def test_a_launch_that_cannot_write_says_so_in_one_line(
    folder: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").touch()
    root = {"root is a file": folder / "file", "root is read-only": Path("/proc/nowhere")}.get(what, folder / "fine")

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    if what == "Ctrl-C":
        monkeypatch.setattr(program.snapshot.Snapshot, "write", press)
    given = [each for each in arguments(folder, "x", "cluster.processes=1") if not each.startswith("run.root=")]
    assert program.PROGRAM.run([*given, f"run.root={root}"]) == (130 if what == "Ctrl-C" else 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert ("stopped before" if what == "Ctrl-C" else "; nothing runs") in line


def test_asking_who_holds_a_run_is_in_no_starters_way(tmp_path: Path) -> None:
    run, ended = RunDir.of(str(tmp_path), "x"), threading.Event()
    run.lock().close()
    askers = [threading.Thread(target=lambda: [run.holder() for _ in iter(ended.is_set, True)]) for _ in range(4)]
    for asker in askers:
        asker.start()
    try:
        for _ in range(200):
            run.lock().close()  # no RunError
    finally:
        ended.set()
        for asker in askers:
            asker.join()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_holds_nothing(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    run = RunDir.of(str(tmp_path), f"x{code}")
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(locks, "_told", set())
        patch.setattr(fcntl, "flock", unsupported)
        with run.lock():
            assert run.holder() is None
    assert "without locks" in caplog.text
    with run.lock():
        assert run.holder() == f"process {os.getpid()} on {os.uname().nodename}"


def test_a_lock_that_does_not_answer_is_an_error_and_no_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    run = RunDir.of(str(tmp_path), "x")
    run.lock().close()
    monkeypatch.setattr(fcntl, "flock", stale)
    with pytest.raises(OSError, match="Stale"):
        run.lock()
    assert run.holder() is None


def test_a_key_that_an_upgrade_added_is_no_difference_at_its_default() -> None:
    now = json.loads(json.dumps(default_values()))
    earlier = json.loads(json.dumps(now))
    for part, key in (("objective", "paired_prob"), ("optim", "clip"), ("model", "prediction")):
        del earlier[part][key]
    del earlier["model"]["bridge"]["clock_bias"]
    assert config_differences(earlier, now, default_values()) == []
    now["model"]["bridge"]["clock_bias"] = 2.0
    assert config_differences(earlier, now, default_values()) == ["model.bridge.clock_bias: None -> 2.0"]
    del now["objective"]["clean_video_prob"]  # a key that is gone
    assert "objective.clean_video_prob: 0.0 -> None" in config_differences(earlier, now, default_values())


def test_a_run_of_before_such_an_upgrade_goes_on(folder: Path, begun: RunDir) -> None:
    text = begun.config.read_text()
    assert "  noise_floor: 0.0\n" in text
    begun.config.write_text(text.replace("  noise_floor: 0.0\n", ""))
    given = arguments(folder, begun.root.name, "cluster.processes=2")
    assert program.PROGRAM.run([*given, "objective.noise_floor=0.1"]) == 1
    assert program.PROGRAM.run(given) == 0


def test_only_runs_that_exist_are_refused(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path), "x")
    assert run.holder() is None and run.known_commit() is None
    with pytest.raises(RunError, match="letters, digits"):
        RunDir.of(str(tmp_path), "../x")
