"""A launch that comes to nothing before anything runs leaves the id free, and an existing run as it was."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

import launch.__main__ as program
from core.durable import write_atomically
from core.errors import RunError
from core.run_dir import RunDir
from launch.slurm import slurm
from launch.snapshot import Snapshot
from launch.undo import Before
from tests.disks import disk
from tests.launch import test_launch
from tests.launch.test_launch import arguments
from tests.launch.test_refused import contents
from train.checkpoint.resume import check_run
from train.config import default_values

folder = test_launch.folder  # a fixture

SBATCH = """#!/bin/bash
cut -d' ' -f5 /proc/$$/stat >{place}/group
touch {place}/asked
for _ in {{1..100}}; do [ -s {place}/answer ] && break; sleep 0.1; done
cat {place}/answer; exit 0
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of a SLURM whose sbatch answers when the file `answer` is there; `queue` is what squeue lists."""
    place = tmp_path / "slurm"
    place.mkdir()
    scripts = {
        "sbatch": SBATCH.format(place=place),
        "squeue": f"#!/bin/sh\ncat {place}/queue 2>/dev/null; exit 0\n",
        "scancel": f'#!/bin/sh\necho "$@" >>{place}/cancelled\n',
    }
    for name, script in scripts.items():
        (place / name).write_text(script)
        (place / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def press_while_sbatch_is_asked(cluster: Path, queue: str, times: int = 1) -> threading.Thread:
    """Ctrl-C as soon as sbatch runs; its answer comes after that, and then the queue is as given."""

    def press() -> None:
        while not (cluster / "asked").exists():
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        (cluster / "queue").write_text(queue)
        (cluster / "answer").write_text("5\n")

    thread = threading.Thread(target=press)
    thread.start()
    return thread


@pytest.mark.parametrize("there", [False, True])
def test_ctrl_c_while_sbatch_is_asked_takes_the_job_back(
    folder: Path, cluster: Path, there: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(folder / f"pressed-{there}")
    if there:
        run.checkpoints.mkdir(parents=True)
        (run.root / "attempts.jsonl").write_text('{"event": "submitted"}\n{"event": "queued", "jobs": ["4"]}\n')
        run.stop_file.touch()
    before = contents(run.root)
    thread = press_while_sbatch_is_asked(cluster, "")
    assert program.PROGRAM.run(arguments(folder, run.root.name, "cluster=slurm")) == 130
    thread.join()
    assert "stopped before anything ran" in capsys.readouterr().err
    assert (cluster / "cancelled").read_text() == "--state=PENDING 5\n"
    group = int((cluster / "group").read_text())
    assert group != os.getpgrp(), "a terminal's Ctrl-C ends sbatch, which leaves open whether SLURM has the job"
    if there:
        code = {"code.json", "code.diff"}
        after = {name: text for name, text in contents(run.root).items() if not name.startswith("code/")}
        assert {name: after[name] for name in after if name not in code | {"launch.lock"}} == before
    else:
        assert not run.root.exists()


@pytest.mark.parametrize("answer", ["", "welcome to the cluster"])
def test_an_sbatch_that_names_no_job_cancels_none(
    folder: Path, cluster: Path, answer: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`scancel --state=PENDING ""` may take all of the user's jobs. What was submitted is looked for in the queue,
    where another run's job is none of it."""
    monkeypatch.setattr(slurm, "ASK_AGAIN", (0.01,))
    (cluster / "sbatch").write_text(f"#!/bin/sh\necho '{answer}'\n")
    (cluster / "queue").write_text("77|2026-01-31T12:00:00|/another/script.sh\n")
    assert program.PROGRAM.run(arguments(folder, "nameless", "cluster=slurm")) != 0
    said = capsys.readouterr().err
    assert f"sbatch answered {answer!r}" in said and "squeue --me --name=nameless" in said
    assert not (cluster / "cancelled").exists() and (folder / "nameless" / "submit.sh").exists()


def test_a_wrapper_of_sbatch_may_print_more(folder: Path, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'checking your budget: ok'\necho '51;main'\n")
    assert program.PROGRAM.run(arguments(folder, "wrapped", "cluster=slurm")) == 0
    assert "51" in (folder / "wrapped" / "attempts.jsonl").read_text()


@pytest.mark.parametrize("times", [1, 2])
def test_a_job_that_has_begun_or_may_have_keeps_its_folder(
    folder: Path, cluster: Path, times: int, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"begun-{times}"
    thread = press_while_sbatch_is_asked(cluster, "5|RUNNING|None|\n", times)
    assert program.PROGRAM.run(arguments(folder, name, "cluster=slurm")) == 1
    thread.join()
    said = capsys.readouterr().err
    assert ("scancel 5 ends it" if times == 1 else f"squeue --me --name={name}") in said
    assert (folder / name / "submit.sh").exists() and (folder / name / "config.yaml").exists()


@pytest.mark.parametrize("where", ["cluster=slurm", "cluster.processes=1"])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_fails_before_that_leaves_nothing(
    folder: Path, cluster: Path, where: str, failure: type | OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(Snapshot, "write", fail)
    assert program.PROGRAM.run(arguments(folder, "failed", where)) == (130 if failure is KeyboardInterrupt else 1)
    assert not (folder / "failed").exists()
    run = RunDir(folder / "existing")
    run.root.mkdir(exist_ok=True)
    run.config.write_text("steps: 7\n")
    program.PROGRAM.run(arguments(folder, "existing", where))
    assert run.config.read_text() == "steps: 7\n"


def test_a_full_disk_at_submission_leaves_the_id_free(
    folder: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The copy of the code does not fit; when there is room the same command is taken."""
    for where in ("cluster=slurm", "cluster.processes=1"):
        with disk("600k") as small:
            given = [each for each in arguments(folder, "full", where) if not each.startswith("run.root=")]
            assert program.PROGRAM.run([*given, f"run.root={small.path}"]) == 1
            (line,) = capsys.readouterr().err.splitlines()
            assert "No space left on device; nothing runs" in line and list(small.path.iterdir()) == []
    with disk("20m") as roomy:
        (cluster / "answer").write_text("5\n")
        given = [each for each in arguments(folder, "full", "cluster=slurm") if not each.startswith("run.root=")]
        assert program.PROGRAM.run([*given, f"run.root={roomy.path}"]) == 0


def test_what_a_full_disk_does_not_take_back_is_left_whole(tmp_path: Path) -> None:
    with disk("1m") as small:
        run = RunDir(small.path / "one")
        run.root.mkdir()
        run.config.write_text("steps: 7\n")
        before = Before(run, False, [run.config, run.stop_file])
        write_atomically(run.config, "steps: 8\n")
        run.stop_file.touch()
        small.fill()
        with open(small.path / "rest", "ab", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"x")
        before.restore()
        assert run.config.read_text() in ("steps: 7\n", "steps: 8\n") and not run.stop_file.exists()


def test_a_config_alone_takes_no_id(tmp_path: Path) -> None:
    """What a launch left that was killed; a status, metrics, a beginning or a checkpoint make it a run."""
    other = default_values() | {"seed": default_values()["seed"] + 1}
    run = RunDir(tmp_path / "one")
    for name in ("", "status.json", "metrics.jsonl", "events.jsonl", "attempts.jsonl", "checkpoints/step-00000001/x"):
        run.checkpoints.mkdir(parents=True)
        run.config.write_text("seed: 0\n")
        (run.root / "attempts.jsonl").write_text('{"event": "submitted"}\n')
        if not name:
            check_run(run, other, default_values())
        else:
            (run.root / name).parent.mkdir(exist_ok=True)
            (run.root / name).write_text('{"event": "begin", "step": 0}\n')
            with pytest.raises(RunError, match="exists with another config"):
                check_run(run, other, default_values())
        shutil.rmtree(run.root)


def test_the_config_of_a_launch_holds_no_secret_of_its_command(folder: Path, cluster: Path) -> None:
    """But the script does, as nobody but the user may read it: the job needs it."""
    (cluster / "answer").write_text("5\n")
    upload = 'checkpoint.upload=[curl,-u,"me:SESAME","https://me:SESAME@host/{path}?token=SESAME"]'
    assert program.PROGRAM.run(arguments(folder, "secret", "cluster=slurm", upload)) == 0
    run = folder / "secret"
    found = {path.name for path in run.rglob("*") if path.is_file() and b"SESAME" in path.read_bytes()}
    assert found == {"submit.sh"} and "https://host/{path}" in (run / "config.yaml").read_text()
