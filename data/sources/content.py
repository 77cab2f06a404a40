"""Reads of a source file before it is decoded, on disk or at an address: its size, hashes, a copy.

Errors that may be temporary are retried (data.storage.remote); then they are the verdict of that file.
"""

import contextlib
import hashlib
import os
import re
import stat
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

from data.errors import DataError
from data.sources.verdict import name_of
from data.storage.remote import Store, save, store_of
from data.storage.retry import retried
from data.storage.web import RangesRefused, Web, hide

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
PART = 1 << 14  # bytes read at the start, in the middle and at the end of a file
CHUNK = 1 << 20


def is_address(name: str) -> bool:
    """Whether a file lies elsewhere: http, https, s3, or another scheme that data.storage.remote opens."""
    return bool(ADDRESS.match(name)) and not name.lower().startswith("file:")


def label_of(name: str) -> str:
    """The name by which records call a file: of an address without what may be a secret."""
    return name_of(hide(name) if is_address(name) else name)


def known_as(name: str) -> str:
    """The name by which records call a file that a manifest or another table names."""
    return label_of(name if is_address(name) else os.path.normpath(name))


def location_of(root: str, name: str) -> Path | str:
    """Where the file with a name below `root` lies: a path, or its address."""
    if is_address(name):
        return name
    if not is_address(root):
        return Path(root) / name
    quoted = urllib.parse.quote(name) if root.lower().startswith("http") else name
    return f"{root.rstrip('/')}/{quoted}"


def size_of(path: Path | str) -> int:
    """Bytes of a file. DataError when it can't be asked for, or when it is no plain file."""
    if isinstance(path, str):
        size = retried(lambda: _store(path).stat(path), hide(path), remote=True).size
        if size is None:
            raise DataError(f"can't be read ({hide(path)}: the server doesn't say how many bytes it has)")
        return size
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise DataError(f"can't be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError("can't be read (it is no plain file)")
    return found.st_size


def hash_file(path: Path | str, size: int) -> tuple[bytes | None, str]:
    """(None, SHA-256 of the content). DataError when it can't be read or doesn't have `size` bytes any more."""
    if isinstance(path, str):
        count, digest = retried(lambda: _hash(_store(path).stream(path)), hide(path), remote=True)
    else:
        try:
            with open(path, "rb") as file:
                count, digest = _hash(iter(lambda: file.read(CHUNK), b""))
        except OSError as error:
            raise DataError(f"can't be read ({error.strerror or error})") from error
    if count != size:
        raise DataError(f"has {count} bytes, it had {size} when the sources were listed; list them again")
    return None, digest


def hash_parts(path: Path | str, size: int) -> tuple[bytes | None, str]:
    """(hash of three parts of the content, SHA-256 of the content where they are all of it, else "").

    Files of equal size with other parts are others. DataError as hash_file.
    """
    if size <= 3 * PART:
        return None, hash_file(path, size)[1]
    digest = hashlib.sha256()
    try:
        for offset in (0, (size - PART) // 2, size - PART):
            digest.update(_part(path, offset, size))
    except RangesRefused:
        return None, hash_file(path, size)[1]
    except OSError as error:
        raise DataError(f"can't be read ({error.strerror or error})") from error
    return digest.digest()[:16], ""


@contextlib.contextmanager
def fetched(path: Path | str, size: int, copy: Path, alive: Callable[[], None]) -> Iterator[Path]:
    """The path of a file, for one that lies elsewhere that of a copy, which is deleted at the end.

    alive: called while bytes come. DataError when it can't be had, or has another size than when it was listed.
    """
    if isinstance(path, Path):
        yield path
        return

    try:
        fetch(path, size, copy, alive)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def fetch(address: str, size: int, copy: Path, alive: Callable[[], None] = lambda: None) -> None:
    """Copy a file of `size` bytes from an address. alive: called while bytes come. DataError when it can't be had."""

    def parts() -> Iterator[bytes]:
        for part in _store(address).stream(address):
            alive()
            yield part

    with open(copy, "wb") as file:
        retried(lambda: save(parts(), size, file.fileno()), hide(address), remote=True)


def _part(path: Path | str, offset: int, size: int) -> bytes:
    if isinstance(path, Path):
        with open(path, "rb") as file:
            return os.pread(file.fileno(), PART, offset)
    store = _store(path)
    if not isinstance(store, Web):
        raise RangesRefused("it gives whole files only")
    buffer = bytearray(PART)
    retried(lambda: store.read_range(path, offset, [memoryview(buffer)], size), hide(path), remote=True)
    return bytes(buffer)


def _hash(parts: Iterator[bytes]) -> tuple[int, str]:
    digest, count = hashlib.sha256(), 0
    for part in parts:
        digest.update(part)
        count += len(part)
    return count, digest.hexdigest()


def _store(address: str) -> Store:
    return store_of(address.partition(":")[0].lower())
