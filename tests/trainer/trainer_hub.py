"""A model hub of a few files: as much of the Hugging Face hub's HTTP API as huggingface_hub needs to read.

Repositories: any name is missing unless it was added; one that is gated wants a token, and one that is forbidden
refuses it.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


@dataclass
class Repository:
    """Commits by hash, and branches by name; the newest commit is that of `main`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit to a branch; its hash."""
        content = repr((len(self.commits), sorted(files))).encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


def blob_id(data: bytes) -> str:
    """As git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        """`context`: speak TLS."""
        self._context = context
        self.repositories: dict[str, Repository] = {}
        """By "models/org/name" or "datasets/org/name"."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.broken = 0
        """Answer so many requests with 500."""

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if self._context:
            self._server.socket = self._context.wrap_socket(self._server.socket, server_side=True)
        scheme = "https" if self._context else "http"
        self.endpoint = f"{scheme}://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        url = urlsplit(request.path)
        path = unquote(url.path).strip("/")
        self.requests.append((request.command, path, {name.lower(): value for name, value in request.headers.items()}))
        if self.broken:
            self.broken -= 1
            return _send(request, 500, {"error": "broken"})
        if path.startswith("api/"):
            kind, organisation, name, *rest = path.removeprefix("api/").split("/")
            return self._api(request, f"{kind}/{organisation}/{name}", rest, parse_qs(body.decode()))
        kind = "datasets" if path.startswith("datasets/") else "models"
        organisation, name, action, revision, *rest = path.removeprefix("datasets/").split("/")
        assert action == "resolve", path
        return self._file(request, f"{kind}/{organisation}/{name}", revision, "/".join(rest))

    def _repository(self, request: BaseHTTPRequestHandler, name: str) -> Repository | None:
        """The repository, or None when the request was refused."""
        repository = self.repositories.get(name)
        if repository is None:
            _send(request, 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        if repository.gated:
            status = 403 if request.headers.get("Authorization") else 401
            _send(request, status, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return None
        return repository

    def _api(self, request: BaseHTTPRequestHandler, name: str, rest: list[str], form: dict[str, list[str]]) -> None:
        repository = self._repository(request, name)
        if repository is None:
            return None
        action, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        path = ""
        if action == "tree":
            revision, *parts = rest[1:]
            path = "/".join(parts)
        sha = repository.resolve(revision)
        if sha is None:
            return _send(request, 404, {"error": "Invalid rev"}, {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[sha]
        if action == "revision":
            siblings = [
                {"rfilename": key, "size": len(data), "blobId": blob_id(data)} for key, data in sorted(files.items())
            ]
            return _send(request, 200, {"id": name.partition("/")[2], "sha": sha, "siblings": siblings})
        if action == "paths-info":
            found = [_entry(key, files[key]) for key in form.get("paths", []) if key in files]
            return _send(request, 200, found)
        if action == "tree":
            return _send(request, 200, [_entry(key, data) for key, data in files.items() if key.startswith(path)])
        raise AssertionError(f"unexpected request {request.path}")

    def _file(self, request: BaseHTTPRequestHandler, name: str, revision: str, key: str) -> None:
        repository = self._repository(request, name)
        if repository is None:
            return None
        sha = repository.resolve(revision)
        if sha is None:
            return _send(request, 404, {"error": "Invalid rev"}, {"X-Error-Code": "RevisionNotFound"})
        data = repository.commits[sha].get(key)
        if data is None:
            return _send(request, 404, {"error": "no entry"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob_id(data)}"', "Accept-Ranges": "bytes"}
        status = 200
        if wanted := request.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) if last else len(data) - 1, len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            status, data = 206, data[start : end + 1]
        return _send(request, status, data, headers)


def _entry(key: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": key, "size": len(data), "oid": blob_id(data)}


def _send(request: BaseHTTPRequestHandler, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request.send_response(status)
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)
