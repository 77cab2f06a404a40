"""A web server of one folder that fails at random, as stores do: 500, reset, stall, a body cut short, drips."""

import contextlib
import random
import re
import socket
import struct
import threading
import urllib.parse
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
    it hangs in the middle of a body. `counts`: connections, requests, failures by kind, answers with 206, bytes sent.
    """

    def __init__(self, root: Path, failure: float = 0.0, ranges: bool = True, stall: float = 2.0, seed: int = 0):
        self.root, self.failure, self.ranges, self.stall = root, failure, ranges, stall
        self.kinds = FAILURES  # of failures, one of which is drawn
        self.counts: Counter[str] = Counter()
        self.gone: set[str] = set()  # names answered with 404
        self.garbled: dict[str, int] = {}  # name -> how often a byte of its body is wrong
        self.range_answer = ""  # how a request for a range is answered: "wrong" (other bytes), "416"; "": as asked
        self.drip: dict[str, float] = {}  # "head", "body", "late" (the second half) -> bytes a second
        self.drop = False  # every connection is closed after its answer, without a word of it before
        self.answers: list[tuple[int, dict[str, str]]] = []  # status and headers of the next answers, which are empty
        self.redirects: dict[str, str] = {}  # name -> address
        self.encoding = ""  # Content-Encoding that it claims
        self.seen: list[dict[str, str]] = []  # headers of the requests (lower case), the path as "path"
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"flaky": self}))
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
        self._server.close_connections()

    def fate(self) -> str | None:
        """How this request fails, if it does."""
        with self._lock:
            self.counts["requests"] += 1
            kind = self._random.choice(self.kinds) if self._random.random() < self.failure else None
            self.counts[kind or "good"] += 1
            return kind

    def wait(self, seconds: float | None = None) -> bool:
        """Hang. True when the server ends meanwhile."""
        return self._end.wait(self.stall if seconds is None else seconds)

    def count_connection(self) -> None:
        """A client has connected."""
        with self._lock:
            self.counts["connections"] += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """A server that has ended keeps no connection open."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet: clients hang up."""


class _Handler(BaseHTTPRequestHandler):
    flaky: FlakyServer
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # an answer is one packet
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.flaky.count_connection()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        """One file, or a range of it."""
        flaky = self.flaky
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path.lstrip("/"))
        flaky.seen.append({**{name.lower(): text for name, text in self.headers.items()}, "path": self.path})
        if flaky.answers:
            status, headers = flaky.answers.pop(0)
            self.send_response(status)
            for header, text in {"Content-Length": "0", **headers}.items():
                self.send_header(header, text)
            return self.end_headers()
        if name in flaky.redirects:
            self.send_response(302)
            self.send_header("Location", flaky.redirects[name])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        path = flaky.root / name
        if name in flaky.gone or not path.is_file():
            return self.send_error(404)
        fate = flaky.fate()
        if fate == "500":
            return self.send_error(500)
        if fate == "reset":
            linger = struct.pack("ii", 1, 0)  # close sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return self.connection.close()
        body = self._begin(name, path.read_bytes())
        if body is not None:
            self._send(body, fate)

    def _begin(self, name: str, body: bytes) -> bytes | None:
        """Send status and headers; the body that follows."""
        flaky = self.flaky
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if span and flaky.ranges and flaky.range_answer == "416":
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if span and flaky.ranges:
            start, stop = int(span[1]), min(int(span[2]) + 1, len(body))
            if flaky.range_answer == "wrong":
                start, stop = 0, stop - start
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
        if flaky.encoding:
            self.send_header("Content-Encoding", flaky.encoding)
        if "head" in flaky.drip:
            self.wfile.flush()
            if not self._drip(b"X-Long: " + b"x" * 5000 + b"\r\n", flaky.drip["head"]):
                return None
        self.end_headers()
        return body

    def _send(self, body: bytes, fate: str | None) -> None:
        flaky = self.flaky
        half = len(body) // 2
        try:
            if "body" in flaky.drip:
                self._drip(body, flaky.drip["body"])
            else:
                self.wfile.write(body[:half])
                self.wfile.flush()
                if fate == "stall":
                    flaky.wait()
                if fate == "cut":
                    self.close_connection = True
                elif "late" in flaky.drip:
                    self._drip(body[half:], flaky.drip["late"])
                else:
                    self.wfile.write(body[half:])
            self.wfile.flush()
        except OSError:
            self.close_connection = True  # the client gave up
        flaky.counts["bytes"] += len(body)
        if flaky.drop:
            self.close_connection = True

    def _drip(self, data: bytes, rate: float) -> bool:
        """Send so many bytes a second, twenty times a second or byte by byte. False when the other side has gone."""
        step = max(1, round(rate / 20))
        try:
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                self.wfile.flush()
                if self.flaky.wait(step / rate):
                    break
            else:
                return True
        except OSError:
            pass
        self.close_connection = True
        return False
