"""Small file systems that really fill up, turn read-only and vanish: a tmpfs in a mount namespace of its own.

Nothing of them is seen on the machine but through the process that holds the namespace, and they go when it ends. No
root is needed where the kernel lets users make namespaces.
"""

import contextlib
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PLACE = "/mnt"


class Disk:
    """`path`: of the file system, for any process of this user."""

    def __init__(self, holder: int) -> None:
        self._holder = holder
        self.path = Path(f"/proc/{holder}/root{PLACE}")

    def fill(self, leave: int = 0) -> None:
        """Take all its space but `leave` bytes, by one file."""
        with open(self.path / "filler", "ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass
            if leave:
                file.truncate(max(0, file.tell() - leave))

    def use_up_files(self) -> None:
        """Make files until no more can be made; for a file system of few ("20m,nr_inodes=300")."""
        (self.path / "files").mkdir()
        with contextlib.suppress(OSError):
            for number in itertools.count():
                (self.path / "files" / str(number)).touch()

    def free(self) -> None:
        """Give the space back."""
        (self.path / "filler").unlink()
        shutil.rmtree(self.path / "files", ignore_errors=True)

    def run(self, *command: str) -> None:
        """A command where the file system is seen at PLACE: mount, umount."""
        enter = ["nsenter", f"--target={self._holder}", "--user", "--mount", "--preserve-credentials"]
        subprocess.run([*enter, *command], check=True, capture_output=True)


@contextmanager
def disk(size: str) -> Iterator[Disk]:
    """A file system of that size ("20m", and further options of a tmpfs). Skips the test where none can be made."""
    script = f"mount -t tmpfs -o size={size} none {PLACE} && echo ready && exec sleep infinity"
    try:
        holder = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        pytest.skip("no file system can be mounted here: unshare (util-linux) is missing")
    try:
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            pytest.skip("no file system can be mounted here: neither root nor user namespaces are allowed")
        yield Disk(holder.pid)
    finally:
        holder.kill()
        holder.wait()
