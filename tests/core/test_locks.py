"""Locks: one answer of the kernel means that somebody else holds one; a file system without locks holds nothing."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from core import locks
from core.locks import byte_locked_now, lock_now, lock_when_free
from data.storage.cache import Cache

REPOSITORY = Path(__file__).parents[2]
NONE_HERE = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF]  # EBADF: of NFS, for a folder


def of_byte(file: IO[Any]) -> bool:
    with byte_locked_now(file, 3) as mine:
        return mine


def waiting(file: IO[Any]) -> bool:
    lock_when_free(file)
    return True


def of_descriptor(file: IO[Any]) -> bool:
    return lock_now(file.fileno())


def answer(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locks, "_told", set())
    for name in ("flock", "lockf"):
        monkeypatch.setattr(fcntl, name, flock)


@pytest.mark.parametrize("code", NONE_HERE)
@pytest.mark.parametrize("way", [lock_now, of_descriptor, waiting, of_byte])
def test_a_file_system_without_locks_holds_nothing_and_is_told_once(
    way: Callable, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer(monkeypatch, code)
    for name in ("one", "two"):
        with open(tmp_path / name, "w") as file:
            assert way(file) is True
    assert caplog.text.count("without locks") == 1 and str(tmp_path / "one") in caplog.text


@pytest.mark.parametrize("way", [lock_now, of_descriptor, waiting, of_byte])
def test_what_does_not_answer_is_an_error(way: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, errno.ESTALE)
    with open(tmp_path / "one", "w") as file, pytest.raises(OSError, match="Stale"):
        way(file)


def test_what_another_process_holds_is_held(tmp_path: Path) -> None:
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'r+'); fcntl.flock(file, fcntl.LOCK_EX); "
        "fcntl.lockf(file, fcntl.LOCK_EX, 1, 3); print('held', flush=True); sys.stdin.read()"
    )
    (tmp_path / "one").touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "one"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdin is not None and holder.stdout.readline() == b"held\n"
    with open(tmp_path / "one", "r+") as file:
        assert not lock_now(file) and not lock_now(file, shared=True) and not of_byte(file)
        with byte_locked_now(file, 4) as other:
            assert other
        holder.stdin.close()
        holder.wait()
        assert lock_now(file) and of_byte(file)


def test_there_is_no_other_place_that_locks() -> None:
    """Each would have to tell a holder from a file system without locks."""
    packages = ("core", "data", "launch", "model", "tools", "train", "bench")
    files = [path for package in packages for path in (REPOSITORY / package).rglob("*.py")]
    assert [path.name for path in files if "import fcntl" in path.read_text()] == ["locks.py"]


def test_processes_that_share_a_cache_without_locks_read_the_right_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one downloads a file, another one begins with the same, and has it later; a third one makes room."""
    answer(monkeypatch, errno.ENOLCK)
    begun, ended = threading.Event(), threading.Event()

    def read(name: str, first: Callable[[], object] = int, then: Callable[[], object] = int) -> None:
        def download(target: int) -> None:
            first()
            os.write(target, name.encode() * 500)
            then()
            os.write(target, name.encode() * 500)

        with Cache(tmp_path, 2500).file(name, 1000, download) as descriptor:
            assert os.pread(descriptor, 2000, 0) == name.encode() * 1000

    def others() -> None:
        second.start()
        assert begun.wait(20)
        read("b")  # there is room for two of the three: what is downloaded is deleted, and still read

    second = threading.Thread(target=read, args=("a", lambda: (begun.set(), ended.wait(20))))
    try:
        read("a", then=others)
    finally:
        ended.set()
        second.join()
    assert os.path.getsize(tmp_path / "files" / "b") == 1000
