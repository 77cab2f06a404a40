"""Uploads have a bounded end; what they did not do is written down, spared and done later."""

import json
import os
import time
from pathlib import Path

import psutil
import pytest
import yaml

from core.run_dir import RunDir
from launch import upload as program
from train.checkpoint import saver
from train.checkpoint.checkpoint import MARKER
from train.checkpoint.uploads import CheckpointEvent, Uploads, waiting_uploads


def commit(run: RunDir, *steps: int) -> list[Path]:
    paths = []
    for step in steps:
        path = run.checkpoints / f"step-{step:08d}"
        path.mkdir(parents=True)
        (path / "data").write_text(str(step))
        (path / MARKER).write_text(json.dumps({"step": step, "files": {}}))
        paths.append(path)
    return paths


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.of(str(tmp_path), "try1")


def copying(run: RunDir) -> list[str]:
    store = run.root.parent / "store"
    store.mkdir(exist_ok=True)
    return ["cp", "-r", "{path}", f"{store}/"]


def test_an_upload_that_never_ends_is_ended_and_waits_for_the_next_attempt(run: RunDir) -> None:
    first, second = commit(run, 1, 2)
    events: list[CheckpointEvent] = []
    # A command with a child of its own: both must be gone.
    long = f"9{os.getpid()}"  # of this test alone
    uploads = Uploads(run.checkpoints, ["sh", "-c", f"sleep {long} & sleep {long} # {{path}}"], events.append)
    uploads.add(first)
    uploads.add(second)
    time.sleep(0.3)
    begin = time.monotonic()
    uploads.close(0.5)
    assert time.monotonic() - begin < 5
    assert [event.kind for event in events] == ["uploads wait"] and "mova upload" in events[0].text
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", long]]
    assert waiting_uploads(run.checkpoints) == [first, second]

    again = Uploads(run.checkpoints, copying(run), events.append)  # the next attempt
    assert again.waiting() <= {first, second}
    again.close(30)
    assert [event.kind for event in events[1:]] == ["uploaded", "uploaded"]
    assert waiting_uploads(run.checkpoints) == []
    assert (run.root.parent / "store" / second.name / "data").read_text() == "2"


def test_what_waits_is_not_rotated_away(run: RunDir) -> None:
    first, second, third = commit(run, 1, 2, 3)
    saver._prune(run.checkpoints, 1, {first}, None)
    assert first.exists() and not second.exists() and third.exists()


def test_the_program_uploads_what_waits(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = commit(run, 1, 2)
    run.config.write_text(yaml.safe_dump({"checkpoint": {"upload": ["false", "{path}"]}}))
    (run.root / "uploads.json").write_text(json.dumps({"waiting": [first.name, second.name, "step-00000009"]}))
    assert program.PROGRAM.run([str(run.root)]) == 1
    assert "exit status 1" in capsys.readouterr().err and len(waiting_uploads(run.checkpoints)) == 2
    run.config.write_text(yaml.safe_dump({"checkpoint": {"upload": copying(run)}}))
    with run.lock():
        assert program.PROGRAM.run([str(run.root)]) == 1
        assert "uploads its checkpoints itself" in capsys.readouterr().err
    assert program.PROGRAM.run([str(run.root)]) == 0
    assert waiting_uploads(run.checkpoints) == [] and (run.root.parent / "store" / first.name).is_dir()
    assert program.PROGRAM.run([str(run.root / "nothing")]) == 1
    run.config.write_text(yaml.safe_dump({"checkpoint": {"upload": ["sh", "-c", "TOKEN=*** put {path}"]}}))
    capsys.readouterr()
    assert program.PROGRAM.run([str(run.root)]) == 1 and "holds a secret" in capsys.readouterr().err
