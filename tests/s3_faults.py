"""A proxy on loopback before an S3 server that fails a share of the requests: 500, 503 SlowDown, no answer in time, half a body, a cut connection.

A cut or unanswered request may have done its work before: half of them reach the server first. Faults are drawn from a seed, and counted.
Beside that the whole store can be `gone` (every connection is cut) or `refusing` (403 to what writes), and requests are written down.
"""

from __future__ import annotations

import http.client
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import urlsplit

KINDS = ("500", "503", "silence", "half", "cut")
_ERRORS = {"500": (500, "InternalError"), "503": (503, "SlowDown"), "403": (403, "AccessDenied")}


class Request(NamedTuple):
    """What came: `method`, `path` with its query, and the headers that say who asks."""

    method: str
    path: str
    authorization: str
    token: str


class FaultyProxy:
    """Forwards to `endpoint`; `share` of the requests fail. `faults` counts what was done to whom, by kind."""

    def __init__(self, endpoint: str, share: float, seed: int, silence_seconds: float) -> None:
        self.upstream = urlsplit(endpoint).netloc
        self.share, self.silence_seconds = share, silence_seconds
        self.faults: Counter[str] = Counter()
        self.requests = 0
        self.gone = self.refusing = False
        self.seen: list[Request] = []
        self._random, self._lock = random.Random(seed), threading.Lock()

    def draw(self, request: Request) -> tuple[str | None, bool]:
        """The fault of the next request, if it has one, and whether the server sees the request."""
        with self._lock:
            self.requests += 1
            self.seen.append(request)
            if self.gone:
                return "cut", False
            if self.refusing and request.method != "GET" and request.method != "HEAD":
                return "403", False
            if self._random.random() >= self.share:
                return None, True
            kind = self._random.choice(KINDS)
            self.faults[kind] += 1
            return kind, kind == "half" or (kind in ("silence", "cut") and self._random.random() < 0.5)


def _handler(proxy: FaultyProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self._body()
            said = self.headers.get
            request = Request(
                self.command, self.path, said("Authorization", ""), said("X-Amz-Security-Token", "")
            )
            kind, forwarded = proxy.draw(request)
            answer = self._forward(body) if forwarded else None
            if kind is None or kind == "half":
                assert answer is not None
                self._answer(*answer, cut_body=kind == "half")
            elif kind in _ERRORS:
                status, code = _ERRORS[kind]
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
                self._answer(
                    status,
                    [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))],
                    text,
                    cut_body=False,
                )
            else:
                if kind == "silence":
                    threading.Event().wait(proxy.silence_seconds)
                self._drop()

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        def _body(self) -> bytes:
            if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            if self.headers.get("Expect", "").lower() == "100-continue":
                pass  # http.server has said so
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(proxy.upstream, timeout=60)
            headers = {
                k: v
                for k, v in self.headers.items()
                if k.lower() not in ("transfer-encoding", "expect", "connection")
            }
            headers["Content-Length"] = str(len(body))
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            data = response.read()
            kept = [
                (k, v)
                for k, v in response.getheaders()
                if k.lower() not in ("transfer-encoding", "connection", "content-length")
            ]
            length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            connection.close()
            return response.status, [*kept, *([("Content-Length", length)] if length else [])], data

        def _answer(
            self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut_body: bool
        ) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut_body else data)
            if cut_body:
                self._drop()

        def _drop(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def log_message(self, format: str, *given: Any) -> None:
            return

    return Handler


@contextmanager
def faulty(
    endpoint: str, *, share: float = 0.05, seed: int = 0, silence_seconds: float = 4.0
) -> Iterator[tuple[str, FaultyProxy]]:
    """The endpoint of a proxy before `endpoint`, and what it does."""
    proxy = FaultyProxy(endpoint, share, seed, silence_seconds)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(proxy))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", proxy
    finally:
        server.shutdown()
        server.server_close()
