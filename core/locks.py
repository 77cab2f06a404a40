"""Locks between processes: the kernel releases them when a process dies, however it dies.

Only one error means that another process holds a lock. A file system without locks (NFS without its lock service, some
object-store mounts) returns another one: then the caller continues unprotected, with a warning.
"""

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from typing import IO, Any

# NFS makes flock a lock of the file's bytes, for which an exclusive one must be open for writing (a folder never is):
# EBADF.
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)

logger = logging.getLogger(__name__)
_told: set[int] = set()  # file systems


def lock_now(file: IO[Any] | int, shared: bool = False) -> bool:
    """Lock an open file (or descriptor) until it is closed, without waiting. False if another process holds it.

    True, with a warning the first time, if the file system has no locks. OSError if it does not answer.
    """
    return _lock(file, lambda: fcntl.flock(file, _kind(shared) | fcntl.LOCK_NB))


def lock_when_free(file: IO[Any] | int, shared: bool = False) -> None:
    """Like `lock_now`, but wait until no other process holds the lock."""
    _lock(file, lambda: fcntl.flock(file, _kind(shared)))


@contextlib.contextmanager
def byte_locked_now(file: IO[Any], position: int) -> Iterator[bool]:
    """Lock one byte of a file that is open for writing, for the block. False when another process holds it; else as
    `lock_now`. Threads of one process do not lock each other out."""
    try:
        mine = _lock(file, lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, position))
    except PermissionError:  # what POSIX also allows as the answer for bytes that are held
        mine = False
    try:
        yield mine
    finally:
        if mine:
            _lock(file, lambda: fcntl.lockf(file, fcntl.LOCK_UN, 1, position))


def _kind(shared: bool) -> int:
    return fcntl.LOCK_SH if shared else fcntl.LOCK_EX


def _lock(file: IO[Any] | int, lock: Callable[[], None]) -> bool:
    try:
        lock()
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        status = os.fstat(file if isinstance(file, int) else file.fileno())
        if status.st_dev not in _told:
            _told.add(status.st_dev)
            logger.warning(
                "%s is on a file system without locks (%s): make sure that no other process uses it",
                _name(file), error.strerror,
            )  # fmt: skip
    return True


def _name(file: IO[Any] | int) -> str:
    if not isinstance(file, int):
        return str(file.name)
    try:
        return os.readlink(f"/proc/self/fd/{file}")
    except OSError:
        return "a file"
