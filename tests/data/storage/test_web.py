"""Reading over http: what is slow, gone, busy or lying, connections that are kept, secrets that are not shown."""

import multiprocessing
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import data.storage.web
from data.errors import DataError
from data.storage.web import FLOOR, Web, hide, within
from tests.data.storage.flaky_server import FlakyServer

SIZE = 300_000
CONTENT = bytes(i * i % 251 for i in range(SIZE))


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    (tmp_path / "small").write_bytes(b"small")
    return tmp_path


def read(web: Web, url: str, offset: int = 1000, count: int = 200_000) -> bytes:
    """A range, into buffers of unequal size."""
    target = bytearray(count)
    view = memoryview(target)
    got = web.read_range(url, offset, [view[:7], view[7:7], view[7:1000], view[1000:]], SIZE)
    return bytes(target[:got])


def whole(web: Web, url: str) -> bytes:
    return b"".join(web.stream(url))


def test_ranges_and_whole_files_are_the_bytes_of_the_file(folder: Path) -> None:
    web = Web(5)
    with FlakyServer(folder) as server:
        url = f"{server.url}/file"
        assert whole(web, url) == CONTENT
        assert read(web, url) == CONTENT[1000:201_000]
        assert read(web, url, SIZE - 10, 100) == CONTENT[-10:] and read(web, url, SIZE, 10) == b""
        assert web.stat(url).size == SIZE and web.has_ranges(url)
        server.ranges = False
        assert web.stat(url).size == SIZE and not web.has_ranges(url)
        with pytest.raises(DataError, match="has 300000 bytes, the index recorded 5"):
            server.ranges = True
            web.read_range(url, 0, [memoryview(bytearray(5))], 5)
        assert all(seen["accept-encoding"] == "identity" for seen in server.seen)


def test_threads_keep_their_connections(folder: Path) -> None:
    """400 reads of 8 threads open as many connections as there are threads, not 400."""
    web = Web(5)
    with FlakyServer(folder) as server, ThreadPoolExecutor(8) as pool:
        url = f"{server.url}/file"
        got = list(pool.map(lambda i: read(web, url, 500 * i, 2000) == CONTENT[500 * i : 500 * i + 2000], range(400)))
        assert all(got) and server.counts["206"] == 400
        assert server.counts["connections"] <= 8


def test_a_connection_that_the_server_closed_meanwhile_is_opened_anew_at_once(folder: Path) -> None:
    """The server hangs up after each answer and says nothing of it; no read fails."""
    web = Web(5)
    with FlakyServer(folder) as server, ThreadPoolExecutor(4) as pool:
        server.drop = True
        url = f"{server.url}/file"
        assert all(pool.map(lambda i: read(web, url, i, 3000) == CONTENT[i : i + 3000], range(100)))
        assert server.counts["connections"] == 100
        server.drop = False
        server.failure, server.kinds = 1.0, ("reset",)  # what never works is not tried for ever
        begin = server.counts["requests"]
        with pytest.raises(ConnectionError):
            read(Web(5), url)
        assert server.counts["requests"] - begin == data.storage.web.STALE_ATTEMPTS


def _child(web: Web, url: str, results: Any) -> None:
    results.put(all(read(web, url, i, 5000) == CONTENT[i : i + 5000] for i in range(30)))


def test_connections_are_not_shared_over_a_fork(folder: Path) -> None:
    """Three children and their parent read at the same time through a pool that was warm before the fork."""
    context = multiprocessing.get_context("fork")
    results, web = context.Queue(), Web(5)
    with FlakyServer(folder) as server:
        url = f"{server.url}/file"
        assert whole(web, url) == CONTENT
        children = [context.Process(target=_child, args=(web, url, results)) for _ in range(3)]
        for child in children:
            child.start()
        assert all(read(web, url, i, 5000) == CONTENT[i : i + 5000] for i in range(30))
        assert [results.get(timeout=30) for _ in children] == [True] * 3
        for child in children:
            child.join()
        assert server.counts["connections"] == 4


@pytest.mark.parametrize("where", ["head", "body", "late"])
@pytest.mark.parametrize("way", [whole, read])
def test_a_server_that_drips_is_given_up_in_time(folder: Path, where: str, way: Any) -> None:
    """No wait for a byte is longer than 50 ms, yet the read ends; at this rate it would take a minute and more."""
    with FlakyServer(folder) as server:
        server.drip[where] = 60.0 if where == "head" else 1000.0
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match="bytes came in .* fewer than 10000 a second"):
            way(Web(0.8), f"{server.url}/file")
        assert 0.8 <= time.monotonic() - begin < 3 * 0.8 + 3  # of a busy machine


def test_slow_is_not_stalled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the floor for as long as it takes; small and complete in time; a slow reader of a fast server."""
    with FlakyServer(folder) as server:
        web, url = Web(1.0), f"{server.url}/file"
        server.drip["body"] = 10 * FLOOR
        assert read(web, url, 0, 230_000) == CONTENT[:230_000]  # over twice the timeout
        server.drip["body"] = 20.0
        assert whole(web, f"{server.url}/small") == b"small"  # 5 bytes in 0.25 s
        server.drip.clear()
        monkeypatch.setattr(data.storage.web, "CHUNK", 50_000)
        parts = []
        for part in Web(0.5).stream(url):
            time.sleep(0.3)
            parts.append(part)
        assert b"".join(parts) == CONTENT and len(parts) == 6


def test_a_host_that_is_looked_up_or_connected_to_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: time.sleep(3))
    begin = time.monotonic()
    with pytest.raises(OSError, match="no connection to host.invalid within 0.3 s"):
        whole(Web(0.3), "http://host.invalid/file")
    assert time.monotonic() - begin < 2.5
    monkeypatch.undo()
    with socket.socket() as listener:  # accepts nothing, and its queue is full
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        begin = time.monotonic()
        with pytest.raises(OSError):
            whole(Web(0.3), f"http://127.0.0.1:{listener.getsockname()[1]}/file")
        assert time.monotonic() - begin < 4
        for filler in fillers:
            filler.close()
    with pytest.raises(OSError):  # nobody listens there
        whole(Web(0.3), f"http://127.0.0.1:{listener_port()}/file")


def listener_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_what_comes_too_late_is_not_lost() -> None:
    late: list[int] = []
    release = threading.Event()
    with pytest.raises(TimeoutError):
        within(0.05, lambda: (release.wait(5), 7)[1], late.append)
    release.set()
    end = time.monotonic() + 5
    while not late and time.monotonic() < end:
        time.sleep(0.01)
    assert late == [7]
    with pytest.raises(KeyError):
        within(1, lambda: {}["x"])


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_given_the_time_that_it_asks_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with FlakyServer(folder) as server:
        web, url = Web(5), f"{server.url}/file"
        server.answers = [(status, {"Retry-After": "1"})]
        begin = time.monotonic()
        assert whole(web, url) == CONTENT
        assert 1.0 <= time.monotonic() - begin < 20
        monkeypatch.setattr(data.storage.web, "RETRY_AFTER", 0.1)
        server.answers = [(status, {"Retry-After": "86400"})]
        begin = time.monotonic()
        assert whole(web, url) == CONTENT and time.monotonic() - begin < 20  # a day is too long
        server.answers = [(status, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})]
        assert whole(web, url) == CONTENT
        server.answers = [(status, {"Retry-After": "nonsense"})]
        with pytest.raises(OSError, match=str(status)):
            whole(web, url)
        for answers in ([(status, {"Retry-After": "0"})] * data.storage.web.BUSY_ATTEMPTS, [(status, {})]):
            server.answers = list(answers)
            with pytest.raises(OSError, match=str(status)):
                whole(web, url)
            assert not server.answers


@pytest.mark.parametrize("answer", ["wrong", "416", "whole"])
def test_other_bytes_than_the_range_are_never_taken_for_it(folder: Path, answer: str) -> None:
    with FlakyServer(folder) as server:
        server.range_answer, server.ranges = answer, answer != "whole"
        with pytest.raises(data.storage.web.RangesRefused):
            read(Web(5), f"{server.url}/file")
        server.range_answer, server.ranges = "", True
        assert read(Web(5), f"{server.url}/file") == CONTENT[1000:201_000]


def test_redirects_are_followed_but_not_for_ever(folder: Path) -> None:
    with FlakyServer(folder) as origin, FlakyServer(folder) as server:
        server.redirects = {"there": f"{origin.url}/file", "here": "/file", "loop": "/loop", "nowhere": "gopher://x/"}
        for name in ("there", "here"):
            assert read(Web(5), f"{server.url}/{name}") == CONTENT[1000:201_000]
        assert origin.counts["206"] == 1
        with pytest.raises(DataError, match="redirects"):
            whole(Web(5), f"{server.url}/loop?token=secret")
        with pytest.raises(DataError, match="not an address"):
            whole(Web(5), f"{server.url}/nowhere")


def test_proxies_of_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FlakyServer(folder) as proxy, FlakyServer(folder) as server:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//user:word@"))
        assert whole(Web(5), "http://host.invalid/file") == CONTENT
        assert proxy.seen[0]["path"] == "http://host.invalid/file"
        assert proxy.seen[0]["proxy-authorization"].startswith("Basic ")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert whole(Web(5), f"{server.url}/file") == CONTENT and len(proxy.seen) == 1
        monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
        with pytest.raises(DataError, match="not an http or https proxy"):
            whole(Web(5), "http://host.invalid/file")


def test_what_a_server_compresses_is_refused(folder: Path) -> None:
    with FlakyServer(folder) as server:
        server.encoding = "gzip"
        for way in (whole, read):
            with pytest.raises(DataError, match="compresses"):
                way(Web(5), f"{server.url}/file")


def test_secrets_are_not_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a password nor a token, whatever fails; the password is sent as a header."""
    assert hide("https://me:pass@host/a?token=b#c") == "https://host/a"
    monkeypatch.setattr(data.storage.web, "RETRY_AFTER", 0.0)
    messages = []

    def fail(url: str, timeout: float = 5) -> None:
        with pytest.raises((OSError, DataError)) as caught:
            whole(Web(timeout), url)
        error: BaseException | None = caught.value
        while error is not None:
            messages.append(str(error))
            error = error.__cause__

    with FlakyServer(folder) as server:
        base = server.url.replace("//", "//user:word@")
        assert whole(Web(5), f"{base}/file?token=secret") == CONTENT
        assert (
            server.seen[0]["authorization"] == "Basic dXNlcjp3b3Jk" and server.seen[0]["path"] == "/file?token=secret"
        )
        fail(f"{base}/absent?token=secret")
        server.redirects = {"loop": "/loop?token=secret"}
        fail(f"{base}/loop?token=secret")
        server.answers = [(503, {})]
        fail(f"{base}/file?token=secret")
        server.drip["body"] = 10
        fail(f"{base}/file?token=secret", 0.2)
        server.drip.clear()
        server.failure = 1.0
        for _ in range(8):
            fail(f"{base}/file?token=secret", 0.2)
    fail(f"{base}/file?token=secret")
    fail("http://[::1/file?token=secret")
    fail("http://user:word@:port/file?token=secret")
    assert len(messages) > 12
    assert not any("secret" in message or "word" in message for message in messages), messages


def test_a_certificate_that_is_not_trusted_is_an_error_of_the_setup(tmp_path: Path, folder: Path) -> None:
    ssl = pytest.importorskip("ssl")
    import subprocess

    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)],
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl can't make a certificate here")
    with FlakyServer(folder) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
        url = server.url.replace("http://127.0.0.1", "https://localhost") + "/file"
        with pytest.raises(DataError, match="certificate can't be verified"):
            whole(Web(5), url)
        web = Web(5)
        web.certificates = str(certificate)
        assert read(web, url) == CONTENT[1000:201_000] and whole(web, url) == CONTENT
        assert server.counts["connections"] <= 3
        server.drip["late"] = 1000.0
        slow = Web(0.8)
        slow.certificates = str(certificate)
        with pytest.raises(TimeoutError, match="bytes came"):
            whole(slow, url)
    assert os.path.exists(certificate)
