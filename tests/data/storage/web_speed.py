"""How fast ranges come over http from this machine itself: python -m tests.data.storage.web_speed [seconds a line]

Prints, for several sizes and numbers of threads, the rate, the processor time of a range on this side, the connections
that were opened, and the same of bare http.client with one connection a thread.
"""

import http.client
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data.storage.web import Web

FILE = 64 << 20


def main() -> None:
    """Measure and print."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 3.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(os.urandom(FILE))
        ours, theirs = get_context("fork").Pipe()
        server = get_context("fork").Process(target=_serve, args=(path, theirs), daemon=True)
        server.start()
        port = ours.recv()
        web = Web(60.0)
        print("| bytes a range | threads | MB/s | processor ms a range | new connections | http.client: MB/s | ms |")
        print("|---|---|---|---|---|---|---|")
        for size in (1 << 12, 1 << 16, 1 << 20, 5 << 20):
            for threads in (1, 4):
                ours.send("connections")
                before = ours.recv()
                rate, cost = _measure(lambda: _reader(web, f"http://127.0.0.1:{port}/file"), size, threads, seconds)
                ours.send("connections")
                new = ours.recv() - before
                bare, bare_cost = _measure(lambda: _bare(port), size, threads, seconds)
                print(
                    f"| {size} | {threads} | {rate * size / 1e6:.0f} | {cost * 1e3:.2f} | {new} "
                    f"| {bare * size / 1e6:.0f} | {bare_cost * 1e3:.2f} |"
                )
        server.terminate()


def _reader(web: Web, url: str) -> Callable[[int, memoryview], Any]:
    return lambda offset, buffer: web.read_range(url, offset, [buffer], FILE)


def _bare(port: int) -> Callable[[int, memoryview], Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def read(offset: int, buffer: memoryview) -> None:
        connection.request("GET", "/file", headers={"Range": f"bytes={offset}-{offset + len(buffer) - 1}"})
        response, count = connection.getresponse(), 0
        while count < len(buffer):
            count += response.readinto(buffer[count:])
        response.read()

    return read


def _measure(
    make: Callable[[], Callable[[int, memoryview], Any]], size: int, threads: int, seconds: float
) -> tuple[float, float]:
    """Reads a second of all threads, and the processor seconds of one."""

    def work(number: int) -> int:
        read, buffer, count = make(), memoryview(bytearray(size)), 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            read((number + count) * 7919 * 4096 % (FILE - size), buffer)
            count += 1
        return count

    begin = time.process_time()
    with ThreadPoolExecutor(threads) as pool:
        count = sum(pool.map(work, range(threads)))
    return count / seconds, (time.process_time() - begin) / count


def _serve(path: Path, pipe: Connection) -> None:
    connections = 0
    file = os.open(path, os.O_RDONLY)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            nonlocal connections
            connections += 1
            super().setup()

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            """A range."""
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert span is not None
            start, stop = int(span[1]), int(span[2]) + 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{FILE}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            while start < stop:
                start += os.sendfile(self.connection.fileno(), file, start, stop - start)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.server_address[1])
    while pipe.recv():
        pipe.send(connections)


if __name__ == "__main__":
    main()
