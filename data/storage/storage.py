"""The storage of a dataset's files: a local folder, a web server, a bucket, or a command that writes to stdout.

    /data/clips                                    a folder
    https://host/clips                             by ranges; whole files into the cache where the server has none
    https://host/get?file={name}&token=...         {name} is replaced; what follows ? is never printed
    s3://bucket/clips                              the same, signed with the credentials that AWS tools find
    (data.storage.s3) gs://bucket/clips, sftp://host/clips, ...      what fsspec opens: whole files into the cache
    pipe:aws s3 cp s3://bucket/clips/{name} -      run without a shell: whole files into the cache

A storage raises OSError for what may pass (reset, stall, 500, a body cut short: the index tries again), DataError for
what won't (404, no such program, a file of another size). What counts as a stall: data.storage.web. Single files and
lists of them (sources, manifests): open_remote_file, read_remote and list_remote of data.storage.remote.
"""

import os
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from data.errors import DataError
from data.storage.cache import Cache
from data.storage.remote import Store, save, store_of
from data.storage.source import ByteSource
from data.storage.web import CHUNK, RangesRefused, StallDetector, Web, hide

OPEN_SHARDS = 64  # file descriptors kept open
CACHE_BYTES = 200 << 30
SCHEME = re.compile(r"pipe:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class Storage(Protocol):
    """Where files lie. `remote`: reading may fail for reasons that pass; root: as it was given."""

    remote: bool
    root: Path | str

    def source(self, name: str, size: int, digest: str) -> AbstractContextManager[ByteSource]:
        """Open the file `name`, recorded with `size` bytes and SHA-256 `digest`."""

    def stream(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, in parts."""

    def forget(self, name: str, digest: str) -> None:
        """The bytes that came were wrong: the next read must come from the origin."""

    def close(self) -> None:
        """Close what is held open; reading again opens it again."""

    def __str__(self) -> str: ...


def is_remote(root: str | Path) -> bool:
    """Whether a dataset's root is a URL or a command rather than a folder."""
    return isinstance(root, str) and bool(SCHEME.match(root)) and not root.lower().startswith("file:")


def find_storage(root: str | Path, cache: Path | None, cache_bytes: int, timeout: float) -> Storage:
    """The storage of a dataset. `timeout`: seconds after which a remote read that gets no bytes, or too few, has failed
    (see data.storage.web)."""
    if not is_remote(root):
        return Folder(Path(re.sub(r"^file:(//)?", "", str(root))))
    text = str(root)
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mova-data"
    store = Cache(folder, cache_bytes)
    if text.startswith("pipe:"):
        return PipeStorage(text, store, timeout)
    files = store_of(text.partition(":")[0].lower(), timeout)
    return Ranged(text, store, files) if isinstance(files, Web) else Remote(text, store, files)


class FileSource:
    """A local file."""

    whole = False

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """See Source."""
        if len(buffers) == 1 and len(buffers[0]) <= 4096:  # headers and metas
            data = os.pread(self.descriptor, len(buffers[0]), offset)
            buffers[0][: len(data)] = data
            return len(data)
        count, left = 0, [buffer for buffer in buffers if len(buffer)]
        while left:
            got = os.preadv(self.descriptor, left, offset + count)
            if got == 0:
                break
            count += got
            while left and got >= len(left[0]):
                got -= len(left.pop(0))
            if got:
                left[0] = left[0][got:]
        return count


class Folder:
    """A folder of this machine. Its most recently used files stay open."""

    remote = False

    def __init__(self, root: Path):
        self.root: Path | str = root
        self._open: OrderedDict[str, list[int]] = OrderedDict()  # name -> [descriptor, readers]
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return str(self.root)

    @contextmanager
    def source(self, name: str, size: int, digest: str) -> Iterator[ByteSource]:
        """See Place."""
        with self._lock:
            entry = self._open.pop(name, None) or [os.open(Path(self.root) / name, os.O_RDONLY), 0]
            self._open[name] = entry
            entry[1] += 1
            idle = [other for other, (_, readers) in self._open.items() if readers == 0]
            for other in idle[: max(0, len(self._open) - OPEN_SHARDS)]:
                os.close(self._open.pop(other)[0])
        try:
            yield FileSource(entry[0])
        except OSError:
            with self._lock:
                if self._open.get(name) is entry:
                    del self._open[name]  # a stale handle never recovers: the next attempt opens the file anew
            raise
        finally:
            with self._lock:
                entry[1] -= 1
                if entry[1] == 0 and self._open.get(name) is not entry:
                    os.close(entry[0])

    def stream(self, name: str) -> Iterator[bytes]:
        """See Place."""
        with open(Path(self.root) / name, "rb") as file:
            while part := file.read(CHUNK):
                yield part

    def forget(self, name: str, digest: str) -> None:
        """Nothing is cached but the kernel's pages."""

    def close(self) -> None:
        """See Place."""
        with self._lock:
            for name, (descriptor, readers) in list(self._open.items()):
                del self._open[name]
                if readers == 0:
                    os.close(descriptor)


class Remote:
    """Whole files through the cache. `{name}` in the address, or its end, takes the file's name."""

    remote = True

    def __init__(self, template: str, cache: Cache, store: Store | None = None):
        self.root: Path | str = template
        self.template, self.cache, self.store = template, cache, store

    def __str__(self) -> str:
        return hide(self.template)

    def address(self, name: str) -> str:
        """Where the file lies."""
        scheme = self.template.partition(":")[0].lower()
        written = urllib.parse.quote(name) if scheme in ("http", "https") else name
        url = self.template.replace("{name}", written)
        return f"{self.template.rstrip('/')}/{written}" if url == self.template else url

    def stream(self, name: str) -> Iterator[bytes]:
        """See Place."""
        assert self.store is not None
        return self.store.stream(self.address(name))

    def source(self, name: str, size: int, digest: str) -> AbstractContextManager[ByteSource]:
        """See Place."""
        return self._cached(name, size, digest)

    @contextmanager
    def _cached(self, name: str, size: int, digest: str) -> Iterator[ByteSource]:
        with self.cache.file(
            cache_name(name, digest), size, lambda target: save(self.stream(name), size, target)
        ) as file:
            yield FileSource(file)

    def forget(self, name: str, digest: str) -> None:
        """See Place."""
        self.cache.drop(cache_name(name, digest))

    def close(self) -> None:
        """See Place."""
        if self.store is not None:
            self.store.close()


def cache_name(name: str, digest: str) -> str:
    """Content decides: a shard that changed is another file, one that has two addresses is one."""
    return f"{digest[:16]}-{name}"


class Ranged(Remote):
    """A web server or a bucket: parts of files by ranges; whole files through the cache where it gives none."""

    def __init__(self, template: str, cache: Cache, store: Web):
        super().__init__(template, cache, store)
        self.web = store
        self.ranges: bool | None = None  # not known before the first read

    def source(self, name: str, size: int, digest: str) -> AbstractContextManager[ByteSource]:
        """See Place."""
        if self.ranges is None:
            self.ranges = self.web.has_ranges(self.address(name))
        return nullcontext(_Ranges(self, name, size, digest)) if self.ranges else self._cached(name, size, digest)


class _Ranges:
    whole = True

    def __init__(self, storage: Ranged, name: str, size: int, digest: str):
        self.storage, self.name, self.size, self.digest = storage, name, size, digest

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """See Source."""
        storage = self.storage
        if storage.ranges:
            try:
                return storage.web.read_range(storage.address(self.name), offset, buffers, self.size)
            except RangesRefused as refusal:
                if storage.ranges:
                    print(f"{storage}: {refusal}; whole files are fetched from now on", file=sys.stderr)
                storage.ranges = False
        with storage.source(self.name, self.size, self.digest) as source:
            return source.read_into(offset, buffers)


class PipeStorage(Remote):
    """`pipe:` and a command line that writes the file `{name}` to its standard output."""

    def __init__(self, template: str, cache: Cache, timeout: float):
        super().__init__(template, cache)
        self.timeout = timeout
        try:
            self.words = shlex.split(template.removeprefix("pipe:"))
        except ValueError as error:
            raise DataError(f"{template} is not a command line ({error})") from error
        if not any("{name}" in word for word in self.words[1:]):
            raise DataError(
                f"{template} has no {{name}}: write where the file's name goes, as in pipe:cat dir/{{name}}"
            )

    def stream(self, name: str) -> Iterator[bytes]:
        """See Place."""
        words = [word.replace("{name}", name) for word in self.words]
        with tempfile.TemporaryFile() as complaints:
            try:
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, start_new_session=True
                )
            except (FileNotFoundError, PermissionError) as error:
                raise DataError(f"{self}: {words[0]} can't be run ({error.strerror}); install it") from error
            try:
                yield from _output(process, self.timeout)
            except OSError as error:
                complaints.seek(0)
                said = complaints.read(2000).decode(errors="replace").strip()
                raise OSError(f"{error}{': ' if said else ''}{said}") from error


def _output(process: subprocess.Popen[bytes], timeout: float) -> Iterator[bytes]:
    """What a process writes. OSError when nothing (or too little) comes for `timeout` seconds, or it fails."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    pace = StallDetector(timeout)
    try:
        while True:
            begin = time.monotonic()
            if not poll.poll(timeout * 1000):
                raise TimeoutError(f"nothing came for {timeout:g} s")
            part = os.read(descriptor, CHUNK)
            if not part:
                break
            pace.add(len(part), time.monotonic() - begin)
            yield part
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"the command does not end within {timeout:g} s") from error
        if code != 0:
            raise OSError(f"the command ended with {code}")
    finally:
        if process.poll() is None:
            try:  # its children too, where it leads a group of its own
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                process.kill()
            process.wait()
        process.stdout.close()
