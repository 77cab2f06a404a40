"""A web server of one folder that fails at random, as stores do: 500, reset, stall, a body cut short."""

import random
import re
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

FAILURES = ("500", "reset", "stall", "cut")
GARBLED_BYTE = 4000  # lies in the tensors of a small shard's first sample, and of any sample


class FlakyServer:
    """Serves `root` at `url` until the block ends.

    failure: share of the requests that fail, each way equally often; ranges: whether it knows them; stall: seconds that
    it hangs in the middle of a body. `counts`: requests, failures by kind, answers with 206, bytes sent.
    """

    def __init__(self, root: Path, failure: float = 0.0, ranges: bool = True, stall: float = 2.0, seed: int = 0):
        self.root, self.failure, self.ranges, self.stall = root, failure, ranges, stall
        self.counts: Counter[str] = Counter()
        self.gone: set[str] = set()  # names answered with 404
        self.garbled: dict[str, int] = {}  # name -> how often a byte of its body is wrong
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"flaky": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FlakyServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._server.shutdown()
        self._server.server_close()

    def fate(self) -> str | None:
        """How this request fails, if it does."""
        with self._lock:
            self.counts["requests"] += 1
            kind = self._random.choice(FAILURES) if self._random.random() < self.failure else None
            self.counts[kind or "good"] += 1
            return kind

    def wait(self) -> None:
        """Hang."""
        self._end.wait(self.stall)


class _Handler(BaseHTTPRequestHandler):
    flaky: FlakyServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        """One file, or a range of it."""
        flaky, name = self.flaky, self.path.lstrip("/")
        path = flaky.root / name
        if name in flaky.gone or not path.is_file():
            return self.send_error(404)
        fate = flaky.fate()
        if fate == "500":
            return self.send_error(500)
        if fate == "reset":
            linger = struct.pack("ii", 1, 0)  # close sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return self.connection.close()
        body = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span and flaky.ranges:
            start, stop = int(span[1]), min(int(span[2]) + 1, len(body))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
            flaky.counts["206"] += 1
            body = body[start:stop]
        else:
            self.send_response(200)
            flaky.counts["whole"] += 1
        if flaky.garbled.get(name, 0) > 0 and len(body) > GARBLED_BYTE:
            flaky.garbled[name] -= 1
            body = body[:GARBLED_BYTE] + bytes([body[GARBLED_BYTE] ^ 255]) + body[GARBLED_BYTE + 1 :]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = len(body) // 2
        try:
            self.wfile.write(body[:half])
            if fate == "stall":
                flaky.wait()
            if fate != "cut":
                self.wfile.write(body[half:])
            self.wfile.flush()
        except OSError:
            pass  # the client gave up
        flaky.counts["bytes"] += len(body)
