"""Servers of files on this machine: S3, HTTP, and a proxy in front of one that drops, damages or delays answers."""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseServer
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import fsspec
import pytest

Fault = Callable[[str, str, int], str | None]
"""From the method, the path and how often both came before, the name of a fault; None to answer as the server does."""


@contextmanager
def s3_server(**environment: str) -> Iterator[str]:
    """An S3 server with a bucket `bucket`, and the environment variables of its clients; yields its URL."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    host, port = server.get_host_and_port()
    given = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (given | environment).items():
            patch.setenv(name, value)
        urlopen(
            Request(f"http://{host}:{port}/moto-api/reset", method="POST"), timeout=60
        ).close()  # of earlier tests
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield given["AWS_ENDPOINT_URL"]
        fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def http_server(folder: Path) -> Iterator[str]:
    """`python -m http.server` over a folder; yields its URL."""
    with _serving(partial(_Quiet, directory=str(folder))) as server:
        yield _url(server)


class FaultyProxy:
    """An HTTP proxy in front of a server.

    Attributes:
        fault: decides what happens to a request. `drop` closes the connection without an answer, `500` and `503` answer
            so, `truncated` closes it in the middle of the body, `short` sends half of the body as if it were whole,
            `slow` sends the body in pieces, `silent` sends nothing, `stuck` sends half of the body and then nothing.
        url: its URL.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.fault: Fault = lambda *_: None
        self.released = threading.Event()
        self.seen: Counter[tuple[str, str]] = Counter()
        self._guard = threading.Lock()
        self.url = ""

    def choose(self, method: str, path: str) -> str | None:
        with self._guard:
            before = self.seen[method, path]
            self.seen[method, path] += 1
        return self.fault(method, path, before)


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: FaultyProxy, *args: Any) -> None:
        self.proxy = proxy
        super().__init__(*args)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.choose(self.command, self.path.partition("?")[0])
        self.close_connection = fault is not None
        if fault == "drop":
            return
        if fault == "silent":
            self.proxy.released.wait()
            return
        if fault in ("500", "503"):
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        try:
            status, headers, content = self._forwarded(body)
        except ConnectionError:  # the server has ended, and a client still asks
            self.close_connection = True
            return
        length = len(content) // 2 if fault == "short" else len(content)
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        given = {name.lower(): value for name, value in headers}.get("content-length")
        self.send_header("Content-Length", given if self.command == "HEAD" and given else str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "slow":
            for start in range(0, len(content), 2**14):
                self.wfile.write(content[start : start + 2**14])
                self.proxy.released.wait(0.02)
            return
        self.wfile.write(content[: len(content) // 2 if fault in ("truncated", "stuck", "short") else None])
        if fault == "stuck":
            self.wfile.flush()
            self.proxy.released.wait()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any  # noqa: N815

    def _forwarded(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body or None, dict(self.headers))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """A `FaultyProxy` in front of the server at a URL; every silent request is ended with it."""
    proxy = FaultyProxy(upstream)
    with _serving(partial(_ProxyHandler, proxy)) as server:
        proxy.url = _url(server)
        yield proxy
        proxy.released.set()


@contextmanager
def _serving(handler: Callable[..., Any]) -> Iterator[BaseServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.05), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _url(server: BaseServer) -> str:
    host, port = server.server_address[:2]  # type: ignore[misc]
    return f"http://{host}:{port}"
