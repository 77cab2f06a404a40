"""Where the files of a dataset lie: a local folder, a web server, or behind a command that writes a file to stdout.

    /data/clips                                    a folder
    https://host/clips                             ranges where the server has them, else whole files into the cache
    pipe:aws s3 cp s3://bucket/clips/{name} -      run without a shell; {name} is replaced inside its argument
    gs://bucket/clips, sftp://host/clips, ...      what webdataset's gopen opens (gsutil, curl, ...), into the cache

A place raises OSError for what may pass (reset, stall, 500, a body cut short: the index tries again) and DataError for
what won't (404, no such program, a file of another size).
"""

import http.client
import os
import re
import select
import shlex
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from data.cache import Cache
from data.errors import DataError
from data.tensors import Source

OPEN_SHARDS = 64  # file descriptors kept open
CHUNK = 1 << 20
CACHE_BYTES = 200 << 30
SCHEME = re.compile(r"pipe:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)


class Place(Protocol):
    """Where files lie. `remote`: reading may fail for reasons that pass; root: as it was given."""

    remote: bool
    root: Path | str

    def source(self, name: str, size: int, digest: str) -> AbstractContextManager[Source]:
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


def find_place(root: str | Path, cache: Path | None, cache_bytes: int, timeout: float) -> Place:
    """The place of a dataset. `timeout`: seconds without a byte after which a remote read counts as failed."""
    if not is_remote(root):
        return Folder(Path(re.sub(r"^file:(//)?", "", str(root))))
    text = str(root)
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mova-data"
    store = Cache(folder, cache_bytes)
    if text.startswith("pipe:"):
        return Command(text, store, timeout)
    if text.lower().startswith(("http:", "https:")):
        return Web(text, store, timeout)
    return Opened(text, store, timeout)


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
    def source(self, name: str, size: int, digest: str) -> Iterator[Source]:
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
    """Whole files through the cache, by what `stream` gives."""

    remote = True

    def __init__(self, template: str, cache: Cache, timeout: float):
        self.root: Path | str = template
        self.template, self.cache, self.timeout = template, cache, timeout

    def __str__(self) -> str:
        return self.template.partition("?")[0]  # what follows may be a token

    def stream(self, name: str) -> Iterator[bytes]:
        """See Place."""
        raise NotImplementedError

    def source(self, name: str, size: int, digest: str) -> AbstractContextManager[Source]:
        """See Place."""
        return self._cached(name, size, digest)

    @contextmanager
    def _cached(self, name: str, size: int, digest: str) -> Iterator[Source]:
        with self.cache.file(cache_name(name, digest), size, lambda target: self._save(name, size, target)) as file:
            yield FileSource(file)

    def _save(self, name: str, size: int, target: int) -> None:
        count = 0
        for part in self.stream(name):
            count += len(part)
            if count > size:
                break
            view = memoryview(part)
            while view:
                view = view[os.write(target, view) :]
        if count != size:
            found = f"more than {size}" if count > size else str(count)
            raise OSError(f"{found} bytes came, the index recorded {size}")

    def forget(self, name: str, digest: str) -> None:
        """See Place."""
        self.cache.drop(cache_name(name, digest))

    def close(self) -> None:
        """Nothing is held open."""


def cache_name(name: str, digest: str) -> str:
    """Content decides: a shard that changed at its place is another file, one that lies at two places is one."""
    return f"{digest[:16]}-{name}"


class Web(Remote):
    """A folder of a web server; `{name}` in the URL, or its end, takes the file's name."""

    def __init__(self, template: str, cache: Cache, timeout: float):
        super().__init__(template, cache, timeout)
        self.ranges: bool | None = None  # not known before the first read

    def source(self, name: str, size: int, digest: str) -> AbstractContextManager[Source]:
        """See Place."""
        if self.ranges is None:
            with self._request(name, (0, 0)) as response:
                self.ranges = response.status == 206
        return nullcontext(_Ranges(self, name, size)) if self.ranges else self._cached(name, size, digest)

    def stream(self, name: str) -> Iterator[bytes]:
        """See Place."""
        with self._request(name, None) as response:
            expected, count = response.headers.get("Content-Length"), 0
            while part := _passing(lambda: response.read(CHUNK)):
                count += len(part)
                yield part
            if expected is not None and count != int(expected):
                raise ConnectionError(f"the body ended after {count} of {expected} bytes")

    def _request(self, name: str, span: tuple[int, int] | None) -> Any:
        quoted = urllib.parse.quote(name)
        url = self.template.replace("{name}", quoted)
        if url == self.template:
            url = f"{self.template.rstrip('/')}/{quoted}"
        headers = {"Range": f"bytes={span[0]}-{span[1]}"} if span else {}
        try:
            request = urllib.request.Request(url, headers={**headers, "Accept-Encoding": "identity"})
            return _passing(lambda: urllib.request.urlopen(request, timeout=self.timeout))
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 and error.code not in (408, 425, 429):
                message = f"{self}: the server answers {error.code} ({error.reason}) for {name}"
                raise DataError(f"{message}; check the address and your access") from error
            raise
        except ValueError as error:
            raise DataError(f"{self} is no address ({error})") from error


def _passing(call: Any) -> Any:
    """Broken protocol is a broken line: OSError."""
    try:
        return call()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{type(error).__name__}: {error}") from error


class _Ranges:
    whole = True

    def __init__(self, web: Web, name: str, size: int):
        self.web, self.name, self.size = web, name, size

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> int:
        """See Source."""
        wanted = min(sum(map(len, buffers)), self.size - offset)
        if wanted <= 0:
            return 0
        count = 0
        with self.web._request(self.name, (offset, offset + wanted - 1)) as response:
            if response.status != 206:
                raise ConnectionError(f"the server answers {response.status} where it gave ranges before")
            place = response.headers.get("Content-Range", "")
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", place.strip())
            if found is None or (int(found[1]), int(found[2])) != (offset, offset + wanted - 1):
                raise ConnectionError(f"asked for bytes {offset} to {offset + wanted - 1}, the server gives {place!r}")
            if found[3] not in ("*", str(self.size)):
                raise DataError(
                    f"{self.name} at {self.web} has {found[3]} bytes, the index recorded {self.size}; "
                    "restore it or prepare the dataset again"
                )
            for buffer in buffers:
                while len(buffer) and count < wanted:
                    got = _passing(lambda view=buffer: response.readinto(view))
                    if not got:
                        raise ConnectionError(f"the body ended after {count} of {wanted} bytes")
                    count, buffer = count + got, buffer[got:]
        return count


class Command(Remote):
    """`pipe:` and a command line that writes the file `{name}` to its standard output."""

    def __init__(self, template: str, cache: Cache, timeout: float):
        super().__init__(template, cache, timeout)
        try:
            self.words = shlex.split(template.removeprefix("pipe:"))
        except ValueError as error:
            raise DataError(f"{template} is no command line ({error})") from error
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


class Opened(Remote):
    """A URL of another scheme, through webdataset's gopen."""

    def stream(self, name: str) -> Iterator[bytes]:
        """See Place."""
        from webdataset.gopen import Pipe, gopen, gopen_schemes

        scheme = self.template.partition(":")[0]
        if scheme not in gopen_schemes:
            raise DataError(
                f"{self}: nothing opens {scheme}: addresses; give the command that does, such as "
                f'"pipe:aws s3 cp s3://bucket/dir/{{name}} -", or one of {", ".join(sorted(gopen_schemes))}'
            )
        try:
            pipe = gopen(f"{self.template.rstrip('/')}/{urllib.parse.quote(name)}", "rb")
        except (FileNotFoundError, ValueError, ImportError) as error:
            raise DataError(f"{self} can't be opened ({error})") from error
        assert isinstance(pipe, Pipe)
        yield from _output(pipe.proc, self.timeout)


def _output(process: subprocess.Popen, timeout: float) -> Iterator[bytes]:
    """What a process writes. OSError when nothing comes for `timeout` seconds or it ends with an error."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    try:
        while True:
            if not poll.poll(timeout * 1000):
                raise TimeoutError(f"nothing came for {timeout:g} s")
            part = os.read(descriptor, CHUNK)
            if not part:
                break
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
