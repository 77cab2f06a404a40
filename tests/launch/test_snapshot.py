"""The copy of the code that a run runs."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import snapshot
from train.errors import RunError

REPOSITORY = Path(__file__).parents[2]


def test_the_same_code_is_copied_once_and_other_code_gets_another_folder(tmp_path: Path) -> None:
    now = snapshot.look()
    first = now.write(tmp_path)
    assert first == tmp_path / "code" == now.write(tmp_path)
    assert (first / "train" / "loop.py").read_text() == (now.source / "train" / "loop.py").read_text()
    assert (first / "conf" / "train.yaml").exists() and (first / "launch" / "submit.sh.template").exists()
    assert not (first / "tests").exists()
    later = dataclasses.replace(now, digest="other")
    assert later.folder(tmp_path) == tmp_path / "code-2" == later.write(tmp_path)
    assert now.folder(tmp_path) == first
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".diff") == [
        "code", "code-2", "code-2.json", "code.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "code-2.json").read_text())["digest"] == "other"


def test_looking_writes_nothing(tmp_path: Path) -> None:
    assert snapshot.look().folder(tmp_path / "run") == tmp_path / "run" / "code"
    assert not (tmp_path / "run").exists()


def test_without_git_all_code_of_the_packages_is_copied(tmp_path: Path) -> None:
    """As from an installed package: no checkout, no commit."""
    source = tmp_path / "site-packages"
    for package in snapshot.PACKAGES:
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "elsewhere").mkdir()
    code = "from pathlib import Path; from launch import snapshot; print(snapshot.look().write(Path('run')))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(source)},
    )  # fmt: skip
    copy = tmp_path / done.stdout.strip()
    about = json.loads((tmp_path / "run" / "code.json").read_text())
    assert about["commit"] == "" and about["source"] == str(source) and not (tmp_path / "run" / "code.diff").exists()
    assert (copy / "train" / "loop.py").exists() and (copy / "launch" / "submit.sh.template").exists()
    assert not (copy / "elsewhere").exists() and not list(copy.rglob("*.pyc"))


def test_a_process_that_runs_other_code_is_refused(tmp_path: Path) -> None:
    snapshot.check_runs_from(str(REPOSITORY))
    with pytest.raises(RunError, match="instead of the run's own copy"):
        snapshot.check_runs_from(str(tmp_path))


def test_the_copy_wins_over_the_checkout_and_what_is_installed(tmp_path: Path) -> None:
    """In the checkout's own folder, with its packages installed in editable form or not."""
    copy = snapshot.look().write(tmp_path)
    code = "import sys; from launch.snapshot import check_runs_from; check_runs_from(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": f"{copy}:{REPOSITORY}", "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code, str(copy)], cwd=REPOSITORY, env=environment, check=True)


def test_data_among_the_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MOST_BYTES", 1000)
    with pytest.raises(RunError, match="move data out of the packages"):
        snapshot.look()
