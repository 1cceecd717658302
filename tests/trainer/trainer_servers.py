"""S3 servers in processes of their own, and a proxy in front of them that breaks connections on demand."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

REPOSITORY = Path(__file__).parents[2]
S3RVER_FOLDER = REPOSITORY / ".tools" / "s3rver"


class Server:
    """A program that prints where it listens. It is ended at the end of the block."""

    key_id = "AKIDTESTTESTTEST"
    secret = "test-secret-value-0123456789"
    name = ""
    scheme = "http"

    def __init__(self, command: list[str], pattern: str, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        assert self._process.stdout is not None
        seen = []
        for line in self._process.stdout:
            seen.append(line)
            if match := re.search(pattern, line):
                self.endpoint = f"{self.scheme}://127.0.0.1:{match[1]}"
                break
        else:
            raise RuntimeError(f"{command[0]} did not start: {''.join(seen)}")
        # A full pipe would stop the server.
        self._reader = threading.Thread(target=self._process.stdout.read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait(30)
        self._reader.join(30)
        assert self._process.stdout
        self._process.stdout.close()


class MotoServer(Server):
    name = "moto"

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        super().__init__(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            r"Running on http://127\.0\.0\.1:(\d+)",
            environment,
        )


class SecureMotoServer(Server):
    """Behind TLS, with the certificate and key in a file."""

    name = "moto"
    scheme = "https"

    def __init__(self, certificate: Path) -> None:
        super().__init__(
            [
                sys.executable,
                "-m",
                "moto.server",
                "-H",
                "127.0.0.1",
                "-p",
                "0",
                "-c",
                str(certificate),
                "-k",
                str(certificate),
            ],
            r"Running on https://127\.0\.0\.1:(\d+)",
        )


class S3rver(Server):
    """The npm package s3rver: checks signatures, keeps objects as files."""

    key_id = secret = "S3RVER"
    name = "s3rver"

    def __init__(self, folder: Path) -> None:
        script = (
            "const S3rver = require('s3rver');"
            "new S3rver({port: 0, address: '127.0.0.1', silent: true, directory: process.argv[1]}).run()"
            ".then(({port}) => console.log('listening on ' + port));"
        )
        node = shutil.which("node")
        assert node
        super().__init__(
            # It makes tokens with a cipher that OpenSSL 3 calls old.
            [node, "--openssl-legacy-provider", "-e", script, str(folder)],
            r"listening on (\d+)",
            {"NODE_PATH": str(S3RVER_FOLDER / "node_modules"), "NODE_NO_WARNINGS": "1"},
        )


def s3rver_problem() -> str | None:
    """Why s3rver cannot run here."""
    if shutil.which("node") is None:
        return "s3rver needs node on PATH"
    if not (S3RVER_FOLDER / "node_modules" / "s3rver").is_dir():
        return "s3rver is not installed: npm install --prefix .tools/s3rver s3rver"
    return None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    """Without the query."""
    query: str
    headers: dict[str, str]


@dataclass
class Fault:
    """What goes wrong with matching requests, the first `times` times. Exactly one action is set."""

    matches: Callable[[Request], bool]
    times: int = 1_000_000
    cut_response_after: int | None = None
    """Bytes of the answer, its head included, that still arrive."""
    cut_request_after: int | None = None
    """Bytes of the request's body that still arrive."""
    answer: tuple[int, bytes] | None = None
    """Answered by the proxy: status and body."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of that answer."""
    hang: bool = False
    """No answer ever comes."""
    first: Callable[[], None] | None = None
    """Something that happens before the request is passed on."""


@dataclass
class Proxy:
    """Passes requests to a server, one on each connection, and breaks those that a fault names."""

    target: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Proxy:
        # Holds the port while nobody listens on it.
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._holder.bind(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._holder.getsockname()[1]}"
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._clients: set[socket.socket] = set()
        self.come_back()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self.go_away()
        self._holder.close()

    def go_away(self) -> None:
        """Connections break off, and new ones are refused, until it comes back."""
        with self._lock:
            for end in (self._socket, *self._clients):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def come_back(self) -> None:
        self._socket = socket.create_server(self._holder.getsockname(), backlog=64, reuse_port=True)
        threading.Thread(target=self._accept, args=(self._socket,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            with self._lock:
                self._clients.add(client)
            try:
                self._pass(client)
            except OSError:
                return
            finally:
                with self._lock:
                    self._clients.remove(client)

    def _pass(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = client.recv(65536)
            if not data:
                return
            head += data
        head, _, body = head.partition(b"\r\n\r\n")
        request = _parse(head)
        with self._lock:
            self.requests.append(request)
            fault = next((fault for fault in self.faults if fault.times > 0 and fault.matches(request)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.first is not None:
            fault.first()
        if fault is not None and fault.hang:
            self._closing.wait()
            return
        if fault is not None and fault.answer is not None:
            status, content = fault.answer
            length = int(request.headers.get("content-length", 0))
            if request.headers.get("expect") == "100-continue":
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            while len(body) < length and (data := client.recv(65536)):
                body += data
            headers = {"Content-Type": "application/xml", "Connection": "close", "Content-Length": str(len(content))}
            lines = [f"{name}: {value}\r\n" for name, value in {**headers, **fault.headers}.items()]
            client.sendall(f"HTTP/1.1 {status} Said by the proxy\r\n{''.join(lines)}\r\n".encode() + content)
            return
        with socket.create_connection(("127.0.0.1", urlsplit(self.target).port or 80)) as server:
            server.sendall(_one_request(head) + b"\r\n\r\n")
            limit = fault.cut_request_after if fault else None
            upward = threading.Thread(target=_copy, args=(client, server, body, limit), daemon=True)
            upward.start()
            _copy(server, client, b"", fault.cut_response_after if fault else None)


def _parse(head: bytes) -> Request:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    url = urlsplit(target)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Request(method, unquote(url.path), url.query, headers)


def _one_request(head: bytes) -> bytes:
    """The same head, asking the server to close the connection after its answer."""
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
    return b"\r\n".join([*lines, b"Connection: close"])


def _copy(source: socket.socket, target: socket.socket, pending: bytes, limit: int | None) -> None:
    sent = 0
    try:
        while True:
            if pending:
                part = pending if limit is None else pending[: limit - sent]
                target.sendall(part)
                sent += len(part)
                if limit is not None and sent >= limit:
                    break
            pending = source.recv(65536)
            if not pending:
                return
    except OSError:
        return
    # Both ends see the connection break off.
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
