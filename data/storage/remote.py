"""Single remote files: sources, manifests, anything with an address.

    with open_remote_file("s3://bucket/clips/a.mp4", cache) as path: ...   # a local copy, kept while in use
    data = read_remote("https://host/manifest.csv")
    for name, size in list_remote("s3://bucket/clips"): ...

http and https go through data.storage.web, s3 through data.storage.s3, any other scheme (gs, az, hf, sftp, ...) through
fsspec.
"""

import functools
import hashlib
import os
import re
import urllib.parse
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec

from data.errors import DataError
from data.storage.cache import Cache
from data.storage.retry import retried
from data.storage.web import CHUNK, FLOOR, Stat, Web, hide, within

TIMEOUT = 60.0
TAGS = ("etag", "ETag", "md5", "mtime", "updated", "created")  # what file systems of fsspec say of a file's content

T = TypeVar("T")


class Store(Protocol):
    """What gives the files at addresses of one kind. OSError for what may pass, DataError for what won't."""

    def stat(self, url: str) -> Stat:
        """Size and tag of a file."""

    def stream(self, url: str) -> Iterator[bytes]:
        """A whole file, in parts."""

    def files_below(self, url: str) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every file below a folder."""

    def close(self) -> None:
        """Close what is held open; a further call opens it again."""


class FileSystem:
    """Files of a scheme that fsspec opens. A part of FLOOR bytes for each second of `timeout` comes within it."""

    def __init__(self, timeout: float):
        self.timeout = timeout

    def stat(self, url: str) -> Stat:
        """See Store."""
        system, path = self._find(url)
        with _as_our_errors(url):
            found = within(self.timeout, lambda: system.info(path))
        known = {
            name: str(found[name]) for name in ("etag", "ETag", "md5", "mtime", "updated", "created") if name in found
        }
        return Stat(found.get("size"), _digest(known) if known else "")

    def stream(self, url: str) -> Iterator[bytes]:
        """See Store."""
        system, path = self._find(url)
        part = max(1 << 12, min(CHUNK, round(FLOOR * self.timeout)))
        with _as_our_errors(url):
            file = within(self.timeout, lambda: system.open(path, "rb"), late=lambda late: late.close())
            try:
                while data := within(self.timeout, lambda: file.read(part)):
                    yield data
            finally:
                file.close()

    def files_below(self, url: str) -> Iterator[tuple[str, int]]:
        """See Store."""
        system, path = self._find(url)
        with _as_our_errors(url):
            found = within(10 * self.timeout, lambda: system.find(path, detail=True))
        folder = path.rstrip("/") + "/"
        yield from sorted((name.removeprefix(folder), entry.get("size") or 0) for name, entry in found.items())

    def close(self) -> None:
        """Nothing is held open."""

    def _find(self, url: str) -> tuple[Any, str]:
        try:
            with _as_our_errors(url):
                result: tuple[Any, str] = within(self.timeout, lambda: fsspec.url_to_fs(url))
                return result
        except ImportError as error:
            package = getattr(error.__cause__, "name", None) or "the package that it names"
            raise DataError(f"{hide(url)}: {error}: pip install {package}") from error


@contextmanager
def _as_our_errors(url: str) -> Iterator[None]:
    """Each file system has its own errors: those that are not known to be permanent may pass."""
    try:
        yield
    except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(
            f"{hide(url)} can't be read ({type(error).__name__}); check the address and your access"
        ) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise DataError(f"{hide(url)} can't be read ({type(error).__name__}: {error}); check the address") from error
    except (OSError, ImportError, DataError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=64)
def store_of(scheme: str, timeout: float = TIMEOUT) -> Store:
    """What reads addresses of a scheme. One a process and timeout, so that connections are shared."""
    if scheme in ("http", "https"):
        return Web(timeout)
    if scheme == "s3":
        from data.storage.s3 import S3  # boto3 costs 0.1 s of processor time to import, in every process of a run

        return S3(timeout)
    return FileSystem(timeout)


def read_remote(url: str, timeout: float = TIMEOUT) -> bytes:
    """A whole file in memory. ReadError after the last attempt, DataError for what won't pass."""
    return retried(lambda: b"".join(_store(url, timeout).stream(url)), hide(url), remote=True)


def list_remote(url: str, timeout: float = TIMEOUT) -> list[tuple[str, int]]:
    """(name below the folder `url`, bytes) of every file, in a fixed order. Errors as read_remote."""
    return retried(lambda: list(_store(url, timeout).files_below(url)), hide(url), remote=True)


@contextmanager
def open_remote_file(url: str, cache: Cache, timeout: float = TIMEOUT) -> Iterator[Path]:
    """A local copy of a file in the bounded cache, with the suffix of its address, to be read within the block.

    A file that is in the cache already, with the size and tag that the server gives now, is not fetched again. Errors
    as read_remote; DataError too when it doesn't fit into the cache, or the server doesn't say how large it is.
    """
    store = _store(url, timeout)
    stat = retried(lambda: store.stat(url), hide(url), remote=True)
    size = stat.size
    if size is None:
        raise DataError(f"{hide(url)}: the server doesn't say how many bytes it has; put it where it does")
    suffix = re.search(r"\.[A-Za-z0-9]{1,15}$", urllib.parse.urlsplit(url).path)
    name = _digest(url, size, stat.tag or uuid.uuid4().hex) + (suffix[0] if suffix else "")

    def download(target: int) -> None:
        retried(lambda: save(store.stream(url), size, target), hide(url), remote=True)

    try:
        with cache.file(name, size, download):
            yield cache.files / name
    finally:
        if not stat.tag:  # nothing would tell it from a later file at that address
            cache.drop(name)


def save(parts: Iterator[bytes], size: int, target: int) -> None:
    """Write the parts to the start of an open file. OSError when they are not `size` bytes."""
    os.lseek(target, 0, os.SEEK_SET)
    count = 0
    for part in parts:
        count += len(part)
        if count > size:
            break
        view = memoryview(part)
        while view:
            view = view[os.write(target, view) :]
    if count != size:
        found = f"more than {size}" if count > size else str(count)
        raise OSError(f"{found} bytes came, {size} are recorded")


def _store(url: str, timeout: float) -> Store:
    return store_of(url.partition(":")[0].lower(), timeout)


def _digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:32]
