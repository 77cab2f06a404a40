"""A bounded folder of whole files fetched from elsewhere, shared by any number of processes of one machine.

A file gets its name only when it is complete (written aside, synced, renamed). Who reads a file or writes one holds a
lock on it (flock, given back by the kernel when a process dies), so the least recently used files that make room are
never those in use, and what a killed process left unfinished is cleared like any other file.
"""

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import NoRoomError, lacks_room
from core.locks import lock_now, lock_when_free
from data.errors import DataError, ReadError

ROOM_WAIT = 600.0  # seconds that files in use may keep a new one from fitting


class Cache:
    """At most `limit` bytes of files under `folder` (indexes of datasets lie beside them and don't count)."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.files, self.locks = folder / "files", folder / "locks"
        try:
            self.files.mkdir(parents=True, exist_ok=True)
            self.locks.mkdir(exist_ok=True)
        except OSError as error:
            raise DataError(f"cache folder {folder} can't be made ({error.strerror}); choose another one") from error

    @contextmanager
    def file(self, name: str, size: int, download: Callable[[int], None]) -> Iterator[int]:
        """Descriptor of the file `name` of `size` bytes, kept while in use. `download` writes it when it is not here.

        Of several processes that want it, one downloads and the others wait. DataError when it can't fit, NoRoomError
        when the disk is full.
        """
        descriptor = self._open(name)
        if descriptor is None:
            descriptor = self._fetch(name, size, download)
        try:
            yield descriptor
        finally:
            os.close(descriptor)  # and with it the lock

    def folder_of(self, name: str, write: Callable[[Path], None]) -> Path:
        """A folder that stays, beside the files; `write` fills it when it is not here. One process does it for all."""
        final, part = self.folder / name, self.folder / f"{name}.part"
        with self.lock(f"{name}.lock"):
            if not final.is_dir():
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                write(part)
                os.rename(part, final)
        return final

    def drop(self, name: str) -> None:
        """Forget a file, so that the next reader fetches it again; who reads it now still does."""
        (self.files / name).unlink(missing_ok=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """One process and thread at a time."""
        descriptor = os.open(self.locks / name, os.O_RDWR | os.O_CREAT)
        try:
            lock_when_free(descriptor)
            yield
        finally:
            os.close(descriptor)

    def _open(self, name: str) -> int | None:
        path = self.files / name
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        lock_when_free(descriptor, shared=True)
        try:
            if os.stat(path).st_ino == os.fstat(descriptor).st_ino:  # not removed before the lock was ours
                os.utime(path)  # used last: now
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)
        return None

    def _fetch(self, name: str, size: int, download: Callable[[int], None]) -> int:
        with self.lock(name):
            if (descriptor := self._open(name)) is not None:
                return descriptor
            # A name of its own: on a file system without locks another process may download the same file.
            part = self.files / f"{name}.{secrets.token_hex(6)}.part"
            with self.lock("room"):
                descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                lock_when_free(descriptor)
                try:
                    self._make_room(name, size, part)
                    os.truncate(descriptor, size)  # counts from now on
                except BaseException:
                    self._give_up(part, descriptor)
                    raise
            try:
                self._write(name, part, descriptor, download)
                # Not found: deleted by a process that could not see that it is in use; the open file can still be read.
                with self.lock("names"), contextlib.suppress(FileNotFoundError):
                    os.rename(part, self.files / name)
            except BaseException:
                self._give_up(part, descriptor)
                raise
            lock_when_free(descriptor, shared=True)
            return descriptor

    def _write(self, name: str, part: Path, descriptor: int, download: Callable[[int], None]) -> None:
        """Download into an open file. A disk that is full before the bound is reached takes the place of the bound;
        NoRoomError where nothing is left to delete."""
        while True:
            try:
                download(descriptor)
                os.fsync(descriptor)
                return
            except (OSError, ReadError) as error:
                if not lacks_room(error):
                    raise
                with self.lock("names"):
                    freed = any(_remove_unused(path) for path in self._files() if path != part)
                if not freed:
                    raise NoRoomError(
                        f"the cache {self.folder} has no room for {name} ({error}), and nothing to delete that is not "
                        "in use: make room on its disk, or choose another cache folder"
                    ) from error

    def _files(self) -> dict[Path, os.stat_result]:
        """All files, that which was used longest ago first. Whoever calls it holds the lock on names."""
        stats = {}
        for path in self.files.iterdir():
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                stats[path] = path.stat()
        return dict(sorted(stats.items(), key=lambda file: (file[1].st_mtime_ns, file[0])))

    @staticmethod
    def _give_up(part: Path, descriptor: int) -> None:
        part.unlink(missing_ok=True)
        os.close(descriptor)

    def _make_room(self, name: str, size: int, part: Path) -> None:
        if size > self.limit:
            raise DataError(
                f"{name} has {size} bytes, the cache {self.folder} may hold {self.limit}: raise cache_bytes to one "
                "window of shards at least, or make smaller shards"
            )
        end = time.monotonic() + ROOM_WAIT
        while not self._has_room(size, part):
            if time.monotonic() > end:
                raise DataError(
                    f"the cache {self.folder} of {self.limit} bytes is full of files in use for {ROOM_WAIT:.0f} s; "
                    f"raise cache_bytes so that {name} ({size} bytes) fits"
                )
            time.sleep(0.02)

    def _has_room(self, size: int, part: Path) -> bool:
        """Whether `size` bytes fit beside what is here, after deleting what is not in use."""
        with self.lock("names"):  # a file that is renamed while they are listed would be missed, or taken for deleted
            others = self._files()
            others.pop(part, None)
            used = sum(stat.st_size for stat in others.values())
            for path, stat in others.items():
                if used + size <= self.limit:
                    break
                used -= stat.st_size if _remove_unused(path) else 0
            return used + size <= self.limit


def _remove_unused(path: Path) -> bool:
    """Delete a file unless somebody holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR)  # NFS locks for one process alone only what is open for writing
    except FileNotFoundError:
        return True
    try:
        if not lock_now(descriptor):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)
