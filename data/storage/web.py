"""Reading over http and https: whole files, ranges, sizes, with connections that are kept open and limits on waiting.

A server has failed when it sends no byte for `timeout` seconds, or fewer than FLOOR bytes a second over `timeout`
seconds of waiting. So a server that drips is given up within three times `timeout`, wherever in its answer it begins
to. An answer that is complete within `timeout` seconds never fails, however small; neither does one whose reader is
slow, since only the time spent waiting for bytes counts. Finding a host's address and connecting to it takes `timeout`
at most.
"""

import http.client
import io
import os
import re
import socket
import ssl
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, InvalidHeader, MaxRetryError, NewConnectionError, ProtocolError, ResponseError
from urllib3.exceptions import TimeoutError as HTTPTimeoutError

from data.errors import DataError

FLOOR = 10_000  # bytes a second; fewer over `timeout` seconds are a stall
CHUNK = 1 << 20
CONNECTIONS = 64  # of one server, kept open
REDIRECTS = 10
RETRY_AFTER = 30.0  # seconds: the longest wait that a server may ask for
BUSY_ATTEMPTS = 3  # requests after which a server that asks for patience has failed
STALE_ATTEMPTS = 3  # connections that may turn out to be closed, each tried again at once
TRANSIENT = (408, 425, 429)  # beside all from 500 on

T = TypeVar("T")


class RangesRefused(Exception):
    """The server gives other bytes than the range that it was asked for."""


@dataclass(frozen=True)
class Stat:
    """What a server says of a file. size: bytes, None when it doesn't say; tag: changes with the content, or ""."""

    size: int | None
    tag: str


class Stalled(TimeoutError):
    """Bytes come, but too slowly."""


class StallDetector:
    """Sees when bytes come too slowly: it is told of every wait for them."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._waited, self._count, self._begun = 0.0, 0, False

    def add(self, count: int, waited: float) -> None:
        """`count` bytes came after `waited` seconds. Stalled below the floor."""
        if not self._begun:  # the first byte may take `timeout`, which is the caller's to see
            self._begun = True
            return
        self._waited += waited
        self._count += count
        if self._waited >= self.timeout:
            if self._count < FLOOR * self._waited:
                raise Stalled(f"only {self._count} bytes came in {self._waited:.3g} s, fewer than {FLOOR} a second")
            self._waited, self._count = 0.0, 0


class Web:
    """Files of web servers. Any number of threads, and of processes after a fork, may use one.

    Methods raise OSError for what may pass (no connection, reset, stall, 500, a body cut short) and DataError for what
    won't (404, an address that is none).
    """

    certificates: str | None = None  # file of those that are trusted instead of the system's

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._proxies: dict[tuple[str, str], str] = {}  # by scheme and host, "" for none
        self._pools: dict[str, urllib3.PoolManager] = {}  # by proxy
        self._pid = os.getpid()
        self._inherited: list[Any] = []

    def address(self, url: str) -> str:
        """The http address at which `url` is found now."""
        return url

    def moved(self, response: urllib3.BaseHTTPResponse) -> bool:
        """Whether an answer that is no success says where `address` has to look from now on."""
        return False

    def stat(self, url: str) -> Stat:
        """Size and tag of a file."""
        with self.request(url, (0, 0)) as response:
            tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            if response.status == 200:
                length = response.headers.get("Content-Length", "")
                return Stat(int(length) if length.isdigit() else None, tag)
            response.read(1)  # the connection is free again when all is read
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            return Stat(int(total) if total.isdigit() else None, tag)

    def has_ranges(self, url: str) -> bool:
        """Whether the server gives parts of a file."""
        with self.request(url, (0, 0)) as response:
            return response.status == 206 and len(response.read(2)) == 1

    def stream(self, url: str) -> Iterator[bytes]:
        """A whole file, in parts."""
        with self.request(url) as response:
            if response.status != 200:
                raise OSError(f"the server answers {response.status} though no range was asked for")
            while part := response.read(CHUNK):
                yield part

    def read_range(self, url: str, offset: int, buffers: Sequence[memoryview], size: int) -> int:
        """Fill the buffers from `offset` on, at most to the end of the file of `size` bytes; returns the count.

        RangesRefused when the server answers with anything else, DataError when the file has another size.
        """
        wanted = min(sum(map(len, buffers)), size - offset)
        if wanted <= 0:
            return 0
        count = 0
        with self.request(url, (offset, offset + wanted - 1)) as response:
            content_range = response.headers.get("Content-Range", "")
            found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", content_range.strip())
            if found and found[3] not in ("*", str(size)):
                raise DataError(
                    f"{hide(url)} has {found[3]} bytes, the index recorded {size}; "
                    "restore it or prepare the dataset again"
                )
            if response.status != 206:
                raise RangesRefused(f"the server answers {response.status} to a range")
            if found is None or found[1] is None or (int(found[1]), int(found[2])) != (offset, offset + wanted - 1):
                raise RangesRefused(
                    f"asked for bytes {offset} to {offset + wanted - 1}, the server gives {content_range!r}"
                )
            for buffer in buffers:
                view = buffer[: wanted - count]
                while len(view):
                    got = response.readinto(view[:CHUNK])
                    if not got:
                        raise ConnectionError(f"the body ended after {count} of {wanted} bytes")
                    count, view = count + got, view[got:]
        return count

    @contextmanager
    def request(self, url: str, span: tuple[int, int] | None = None) -> Iterator[urllib3.BaseHTTPResponse]:
        """A response with its body still to be read: 200, 206, or 416. span: first and last byte that are wanted."""
        with _as_os_errors(self.timeout, url):
            response = self._answer(url, span)
            try:
                yield response
            finally:
                if not response.closed:  # not read to its end: what would follow is not the next answer
                    response.close()
                response.release_conn()

    def files_below(self, url: str) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every file below a folder: web servers have no common way to list them."""
        raise DataError(f"{hide(url)}: a web server doesn't list its files; give a manifest of addresses")

    def close(self) -> None:
        """Close all connections; a further request opens new ones."""
        self._renew()
        for pool in list(self._pools.values()):
            pool.clear()

    def _answer(self, url: str, span: tuple[int, int] | None) -> urllib3.BaseHTTPResponse:
        busy = stale = 0
        while True:
            try:
                response = self._send(url, span)
            except ProtocolError:
                stale += 1  # a connection that the server had closed meanwhile
                if stale == STALE_ATTEMPTS:
                    raise
                continue
            if response.status in (200, 206, 416):
                if response.headers.get("Content-Encoding", "identity").lower() not in ("identity", "aws-chunked"):
                    response.close()
                    raise DataError(f"{hide(url)}: the server compresses it; let it send the file as it is")
                return response
            said = _excerpt(response)
            if self.moved(response):
                continue
            if response.status < 500 and response.status not in TRANSIENT:
                raise DataError(
                    f"{hide(url)}: the server answers {response.status} ({said}); check the address and your access"
                )
            busy += 1
            seconds = _patience(response)
            if seconds is None or busy == BUSY_ATTEMPTS:
                raise OSError(f"the server answers {response.status} ({said})")
            time.sleep(seconds)

    def _send(self, url: str, span: tuple[int, int] | None) -> urllib3.BaseHTTPResponse:
        address = self.address(url)
        parts = urllib.parse.urlsplit(address)
        headers = {"Accept-Encoding": "identity"}
        if span:
            headers["Range"] = f"bytes={span[0]}-{span[1]}"
        if "@" in parts.netloc:
            user, _, host = parts.netloc.rpartition("@")
            headers |= urllib3.make_headers(basic_auth=urllib.parse.unquote(user))
            address = parts._replace(netloc=host).geturl()
        retries = urllib3.Retry(
            None, connect=False, read=False, redirect=REDIRECTS, status=0, other=0, respect_retry_after_header=False
        )
        return self._pool(parts).request(
            "GET",
            address,
            headers=headers,
            preload_content=False,
            decode_content=False,
            retries=retries,
            timeout=urllib3.Timeout(connect=self.timeout, read=self.timeout),
        )

    def _pool(self, parts: urllib.parse.SplitResult) -> urllib3.PoolManager:
        self._renew()
        host = parts.netloc.rpartition("@")[2]
        if (parts.scheme, host) not in self._proxies:  # looked up once: it costs as much as a small read
            proxies = urllib.request.getproxies()
            proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
            self._proxies[parts.scheme, host] = "" if proxy and urllib.request.proxy_bypass(host) else proxy
        proxy = self._proxies[parts.scheme, host]
        if proxy not in self._pools:
            self._pools[proxy] = _open_pool(proxy, self.certificates)
        return self._pools[proxy]

    def _renew(self) -> None:
        """After a fork, the open connections and the locks are the parent's."""
        if self._pid != os.getpid():
            self._inherited.append(self._pools)  # not freed, which would close them
            self._pools, self._pid = {}, os.getpid()


def hide(url: str) -> str:
    """An address without what may be a secret: its query, and a password."""
    return re.sub(r"(?<=//)[^/@]*@", "", re.split(r"[?#]", url, maxsplit=1)[0])


def within(seconds: float, call: Callable[[], T], late: Callable[[T], Any] | None = None) -> T:
    """What `call` returns, or TimeoutError after `seconds`: for calls into libraries that know no limit.

    The thread that makes it can't be stopped; what it returns too late is given to `late`.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    if not wait([future], seconds).done:
        if late is not None:
            future.add_done_callback(lambda done: None if done.exception() else late(done.result()))
        raise TimeoutError(f"nothing came for {seconds:g} s")
    return future.result()


class _Watched(io.RawIOBase):
    """What a socket gives, while it gives enough."""

    def __init__(self, raw: io.RawIOBase, timeout: float | None):
        self.raw = raw
        self.pace = StallDetector(timeout) if timeout else None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        begin = time.monotonic()
        count = self.raw.readinto(buffer)
        if count and self.pace is not None:
            self.pace.add(count, time.monotonic() - begin)
        return count

    def fileno(self) -> int:
        return self.raw.fileno()

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any):
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Watched(self.fp.detach(), sock.gettimeout()))


class _Limited(HTTPConnection):
    """A connection that is made within its timeout, the look-up of the host included."""

    response_class = _Response

    def _new_conn(self) -> socket.socket:
        seconds = self.timeout if isinstance(self.timeout, (int, float)) else None
        if seconds is None:
            return super()._new_conn()
        try:
            return within(seconds, super()._new_conn, late=lambda late: late.close())
        except TimeoutError as error:
            raise NewConnectionError(self, f"no connection to {self.host} within {seconds:g} s") from error


class _LimitedTLS(_Limited, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Limited


class _PoolTLS(urllib3.HTTPSConnectionPool):
    ConnectionCls = _LimitedTLS


def _open_pool(proxy: str, certificates: str | None) -> urllib3.PoolManager:
    options: dict[str, Any] = {"maxsize": CONNECTIONS, "socket_options": _socket_options()}
    if certificates:
        options["ca_certs"] = certificates
    if not proxy:
        pool = urllib3.PoolManager(**options)
    else:
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if parts.scheme not in ("http", "https"):
            raise DataError(f"the proxy {hide(parts.geturl())} is not an http or https proxy; set another one")
        user, _, host = parts.netloc.rpartition("@")
        headers = urllib3.make_headers(proxy_basic_auth=urllib.parse.unquote(user)) if user else None
        pool = urllib3.ProxyManager(parts._replace(netloc=host).geturl(), proxy_headers=headers, **options)
    pool.pool_classes_by_scheme = {"http": _Pool, "https": _PoolTLS}
    return pool


def _socket_options() -> list[tuple[int, int, int]]:
    """Sent at once; and the kernel asks an idle peer whether it is there, so that a lost one is not used again."""
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


@contextmanager
def _as_os_errors(timeout: float, url: str) -> Iterator[None]:
    """urllib3's errors as OSError or DataError, without the address's query, which its messages show."""
    try:
        yield
    except (HTTPError, ValueError) as error:
        cause = error.reason if isinstance(error, MaxRetryError) and error.reason else error
        raise _translate(cause, timeout, url) from cause


def _translate(error: Exception, timeout: float, url: str) -> Exception:
    if isinstance(error, ResponseError):
        return DataError(f"{hide(url)}: more than {REDIRECTS} redirects; check the address")
    if isinstance(error, ValueError):
        return DataError(f"{hide(url)} is not an address ({type(error).__name__}); expected http://host/path")
    if isinstance(error, HTTPTimeoutError) and not isinstance(error, NewConnectionError):
        stalled = isinstance(error.__cause__, Stalled)
        return TimeoutError(str(error.__cause__) if stalled else f"nothing came for {timeout:g} s")
    chain = (error.__cause__, *error.args)
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in chain):
        return DataError(f"{hide(url)}: its certificate can't be verified ({error}); set SSL_CERT_FILE to its issuer's")
    return ConnectionError(f"{type(error).__name__}: {error}")


def _patience(response: urllib3.BaseHTTPResponse) -> float | None:
    """Seconds that a busy server asks to be left alone, within bounds; None when it doesn't ask."""
    try:
        seconds = urllib3.Retry().get_retry_after(response) if response.status in (429, 503) else None
    except InvalidHeader:
        return None
    return None if seconds is None else min(max(seconds, 0.0), RETRY_AFTER)


def _excerpt(response: urllib3.BaseHTTPResponse) -> str:
    """The reason that a server gives, and the code of S3's errors."""
    length = response.headers.get("Content-Length", "")
    try:
        body = response.read(int(length)) if length.isdigit() and int(length) <= 1 << 16 else b""
    except HTTPError:
        body = b""
    if not response.closed:
        response.close()
    response.release_conn()
    code = re.search(rb"<Code>(\w+)</Code>", body)
    return code[1].decode() if code else str(response.reason or http.client.responses.get(response.status, "unknown"))
