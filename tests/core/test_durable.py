"""Files that get their name when they are whole: many writers, full disks, killed writers."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from core import durable
from core.durable import write_atomically
from data.windows.table import RowWriter
from tests.disks import disk

WRITER = """
import os, sys, time
from pathlib import Path
from core.durable import write_atomically
def write(path):
    path.write_text("half")
    print("half", flush=True)
    time.sleep(60)
write_atomically(Path(sys.argv[1]), write)
"""


def test_many_writers_of_one_file_leave_the_whole_content_of_one_of_them(tmp_path: Path) -> None:
    path, contents = tmp_path / "status.json", [str(number) * 100_000 for number in range(8)]
    barrier, errors = threading.Barrier(8), []

    def write(content: str) -> None:
        barrier.wait()
        try:
            for _ in range(10):
                write_atomically(path, lambda unfinished: unfinished.write_text(content))
                assert path.read_text() in contents
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and path.read_text() in contents
    assert os.listdir(tmp_path) == ["status.json"]


def test_the_first_error_is_the_one_that_is_heard_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail(unfinished: Path, cleanup_fails: bool) -> None:
        unfinished.write_text("half")
        if cleanup_fails:
            unfinished.unlink()
            unfinished.mkdir()  # which no unlink removes
        raise OSError(errno.ENOSPC, "the first")

    for cleanup_fails in (False, True):
        with pytest.raises(OSError, match="the first"):
            write_atomically(path, lambda unfinished, fails=cleanup_fails: fail(unfinished, fails))
        assert path.read_text() == "old"
        if not cleanup_fails:
            assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_costs_the_new_content_only_and_leaves_no_file() -> None:
    with disk("1m") as small:
        path = small.path / "x"
        write_atomically(path, lambda unfinished: unfinished.write_text("old"))
        small.fill()
        with pytest.raises(OSError) as caught:
            write_atomically(path, lambda unfinished: unfinished.write_text("new" * 10_000))
        assert caught.value.errno == errno.ENOSPC
        assert path.read_text() == "old" and sorted(os.listdir(small.path)) == ["filler", "x"]
        with pytest.raises(OSError) as caught, RowWriter(small.path / "rows", ["score"]):
            pass
        assert caught.value.errno == errno.ENOSPC and sorted(os.listdir(small.path)) == ["filler", "x"]
        small.free()
        write_atomically(path, lambda unfinished: unfinished.write_text("new"))
        assert path.read_text() == "new"


def test_what_a_killed_writer_left_goes_a_day_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(durable.__file__).parents[1]) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "half\n"
        writer.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    for days, files in ((0, [left.name, "x"]), (2, ["x"])):
        os.utime(left, (time.time() - 86400 * days,) * 2)
        monkeypatch.setattr(durable, "_swept", set())
        write_atomically(path, lambda unfinished: unfinished.write_text("whole"))
        assert sorted(os.listdir(tmp_path)) == files and path.read_text() == "whole"
