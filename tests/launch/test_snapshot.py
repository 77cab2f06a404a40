"""The copy of the code that a run runs."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import RunError
from core.secrets import without_secrets
from launch import snapshot
from tests.child import run_child

REPOSITORY = Path(__file__).parents[2]


def test_the_same_code_is_copied_once_and_other_code_gets_another_folder(tmp_path: Path) -> None:
    now = snapshot.look()
    first = now.write(tmp_path)
    assert first == tmp_path / "code" == now.write(tmp_path)
    assert (first / "train" / "loop.py").read_text() == (now.source / "train" / "loop.py").read_text()
    assert (first / "conf" / "train.yaml").exists() and (first / "launch" / "slurm" / "submit.sh.template").exists()
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
    assert (copy / "train" / "loop.py").exists() and (copy / "launch" / "slurm" / "submit.sh.template").exists()
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
    command = [sys.executable, "-c", code, str(copy)]
    run_child(command, cwd=REPOSITORY, env=environment)


def test_data_among_the_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "MOST_BYTES", 1000)
    with pytest.raises(RunError, match="move data out of the packages"):
        snapshot.look()


def test_nested_code_is_copied_and_secrets_are_not(tmp_path: Path) -> None:
    """A repository within, a linked folder, a file in another encoding, keys beside the code, umask 077."""
    source = tmp_path / "checkout"
    for package in snapshot.PACKAGES:
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main"]
    latin = source / "model" / "latin.py"
    latin.write_bytes(b"# caf\xe9\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=source, check=True)
    latin.write_bytes(b"# caf\xe9s\n")
    nested = source / "model" / "nested"
    nested.mkdir()
    (nested / "kernel.py").write_text("NESTED = 1\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "nested"]):
        subprocess.run([*git, *command], cwd=nested, check=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "linked.py").write_text("LINKED = 1\n")
    (source / "data" / "outside").symlink_to(tmp_path / "outside")
    (source / "train" / ".env").write_text("WANDB_API_KEY=secret\n")
    (source / "train" / "id.pem").write_text("secret\n")
    code = (
        "import os; os.umask(0o077); from pathlib import Path; from launch import snapshot; "
        "print(snapshot.look().write(Path('run')))"
    )
    run = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    copy = tmp_path / done.stdout.strip()
    assert (copy / "model" / "nested" / "kernel.py").exists() and (copy / "data" / "outside" / "linked.py").exists()
    assert not (copy / "model" / "nested" / ".git").exists()
    assert not (copy / "train" / ".env").exists() and not (copy / "train" / "id.pem").exists()
    assert b"+# caf\xe9s" in (tmp_path / "run" / "code.diff").read_bytes()
    assert all(path.stat().st_mode & 0o077 == 0 for path in copy.rglob("*") if not path.is_symlink())
    (source / "data" / "gone").symlink_to(tmp_path / "nowhere")
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "is a link to" in done.stderr and "data/gone" in done.stderr


@pytest.mark.parametrize(
    "value, stored",
    [
        ("https://host/clips?X-Amz-Signature=abc", "https://host/clips"),
        ("https://me:secret@host/clips/{name}?token=abc", "https://host/clips/{name}"),
        ("pipe:curl https://me:secret@host/{name}?t=1 -o -", "pipe:curl https://host/{name} -o -"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("https://me:p@ss@host/clips#access_token=abc", "https://host/clips"),
        ("s3://KEY:SECRET@bucket/prefix", "s3://bucket/prefix"),
        ("pipe:curl -u me:secret https://host/{name}", "pipe:curl -u *** https://host/{name}"),
        (
            "pipe:curl -H 'Authorization: Bearer abc' https://h/x",
            "pipe:curl -H 'Authorization: Bearer ***' https://h/x",
        ),
        ("pipe:curl -H 'X-Auth-Token: abc' https://h/x", "pipe:curl -H 'X-Auth-Token: ***' https://h/x"),
        ("AWS_SECRET_ACCESS_KEY=ab/c+d aws s3 cp {path}", "AWS_SECRET_ACCESS_KEY=*** aws s3 cp {path}"),
        ("--user=me:secret", "--user=***"),
        ("aws --secret-key abc cp", "aws --secret-key *** cp"),
        ('checkpoint.upload=[curl,-u,me:secret,"{path}"]', 'checkpoint.upload=[curl,-u,***,"{path}"]'),
        ('upload=["curl", "-u", "me:secret", "{path}"]', 'upload=["curl", "-u", "***", "{path}"]'),
        (["curl", "-u", "me:secret", "--data", "@{path}"], ["curl", "-u", "***", "--data", "@{path}"]),
        (["s5cmd", "--token", "abc", "cp"], ["s5cmd", "--token", "***", "cp"]),
        ("--token-mix 4 --keys=[a,b] -untitled x", "--token-mix 4 --keys=[a,b] -untitled x"),
        ("43,120 tokens=many, token: one", "43,120 tokens=many, token: one"),
        ("runs/a?b", "runs/a?b"),
    ],
)
def test_what_is_stored_of_an_address_holds_no_secret(value: object, stored: object) -> None:
    assert without_secrets({"data": {"datasets": [{"path": value, "weight": 1.0}]}}) == {
        "data": {"datasets": [{"path": stored, "weight": 1.0}]}
    }
