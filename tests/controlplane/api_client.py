"""A small synchronous client for tests: what a raw request is answered with, and what a watch sends."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import yaml

MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"


@dataclass
class Answer:
    """One response."""

    code: int
    body: Any
    headers: http.client.HTTPMessage

    @property
    def message(self) -> str:
        return str(self.body["message"])

    @property
    def causes(self) -> set[tuple[str, str, str]]:
        """Reason, field and message of each cause of a refusal."""
        return {(item["reason"], item["field"], item["message"]) for item in self.body["details"]["causes"]}


@dataclass
class Watched:
    """Events of a watch that is read in the background."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def until(self, done: Callable[[list[dict[str, Any]]], bool], seconds: float = 60) -> list[dict[str, Any]]:
        """All events, as soon as they satisfy a condition."""
        eventually(lambda: done(self.events), seconds, lambda: f"watched: {[summary(e) for e in self.events]}")
        return list(self.events)


class Client:
    """Talks to the server of a kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        url = urlsplit(cluster["server"])
        self.host, self.port = url.hostname or "", url.port or 443
        self.token: str | None = user.get("token")
        self.tls = ssl.create_default_context(cadata=_text(cluster, "certificate-authority"))
        if "client-certificate" in user or "client-certificate-data" in user:
            with tempfile.NamedTemporaryFile("w") as file:
                file.write(_text(user, "client-certificate") + "\n" + _text(user, "client-key"))
                file.flush()
                self.tls.load_cert_chain(file.name)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        content_type: str = "application/json",
        accept: str = "application/json",
        headers: dict[str, str] | None = None,
        **query: Any,
    ) -> Answer:
        """Send one request; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPSConnection(self.host, self.port, context=self.tls, timeout=30)
        try:
            connection.request(
                method,
                _with_query(path, query),
                body if body is None or isinstance(body, bytes) else json.dumps(body),
                {**self._headers(accept), "Content-Type": content_type, **(headers or {})},
            )
            response = connection.getresponse()
            data = response.read()
            is_json = response.headers.get_content_type() == "application/json" and data != b""
            return Answer(response.status, json.loads(data) if is_json else data.decode(), response.headers)
        finally:
            connection.close()

    def get(self, path: str, **more: Any) -> Answer:
        return self.request("GET", path, **more)

    def create(self, path: str, body: Any, **more: Any) -> Answer:
        return self.request("POST", path, body, **more)

    def patch(self, path: str, body: Any, content_type: str = MERGE, **more: Any) -> Answer:
        return self.request("PATCH", path, body, content_type=content_type, **more)

    def delete(self, path: str, body: Any = None, **more: Any) -> Answer:
        return self.request("DELETE", path, body, **more)

    @contextmanager
    def watch(self, path: str, accept: str = "application/json", **query: Any) -> Iterator[Watched]:
        """Read a watch in the background for as long as the block runs."""
        connection = http.client.HTTPSConnection(self.host, self.port, context=self.tls, timeout=90)
        connection.request("GET", _with_query(path, {"watch": "true", **query}), headers=self._headers(accept))
        # A watch answers with its first event, so the answer is waited for in the background, too.
        watched = Watched()
        sock = connection.sock
        thread = threading.Thread(target=_read, args=(connection, watched), daemon=True)
        thread.start()
        try:
            yield watched
        finally:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            connection.close()

    def _headers(self, accept: str) -> dict[str, str]:
        return {"Accept": accept, **({"Authorization": f"Bearer {self.token}"} if self.token else {})}


def _read(connection: http.client.HTTPSConnection, watched: Watched) -> None:
    try:
        response = connection.getresponse()
        left = b""
        while data := response.read1(1 << 20):
            *lines, left = (left + data).split(b"\n")
            watched.events.extend(json.loads(line) for line in lines)
    except (OSError, ValueError, AttributeError, http.client.HTTPException):
        return


def _with_query(path: str, query: dict[str, Any]) -> str:
    return f"{path}?{urlencode(query, quote_via=quote)}" if query else path


def _text(holder: dict[str, str], key: str) -> str:
    if f"{key}-data" in holder:
        return base64.b64decode(holder[f"{key}-data"]).decode()
    return Path(holder[key]).read_text()


def eventually(check: Callable[[], Any], seconds: float = 30, describe: Callable[[], str] = lambda: "") -> Any:
    """Poll until a check returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while True:
        result = check()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s. {describe()}")
        time.sleep(0.02)


def summary(event: dict[str, Any]) -> str:
    obj = event["object"]
    return f"{event['type']} {obj.get('metadata', {}).get('name')} {obj.get('status')}"
