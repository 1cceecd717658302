"""The real operator as a process that tests can kill."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from api_client import eventually


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class OperatorProcess:
    """`finetune-operator` against one namespace of a server."""

    program = ("-m", "finetune_operator.main")
    """What Python runs."""

    def __init__(self, kubeconfig: Path, namespace: str, log: Path, **settings: str) -> None:
        self._log = log
        self.port = free_port()
        self._environment = os.environ | {
            "KUBECONFIG": str(kubeconfig),
            "FINETUNE_NAMESPACES": namespace,
            "FINETUNE_TRAINER_IMAGE": "scripted/trainer:test",
            "FINETUNE_HTTP_HOST": "127.0.0.1",
            "FINETUNE_HTTP_PORT": str(self.port),
            "FINETUNE_POLL_SECONDS": "0.2",
            "FINETUNE_PROGRESS_SECONDS": "0",
            "FINETUNE_RESYNC_SECONDS": "5",
            **settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *self.program],
                env=self._environment,
                stdout=output,
                stderr=output,
            )
        if wait:
            eventually(self.is_healthy, describe=self.log)

    def kill(self) -> None:
        """`kill -9`: nothing is said, nothing is tidied."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=30)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def ended(self) -> int | None:
        """The exit code; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
            body: bytes = response.read()
            return body.decode()

    def probe(self, path: str) -> tuple[int, str]:
        """Code and text of an answer that may be a refusal."""
        try:
            return 200, self.get(path)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def is_healthy(self, path: str = "/healthz") -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log()
        try:
            return self.get(path) == "ok\n"
        except OSError:
            return False

    def leads(self) -> bool:
        try:
            return "finetune_operator_is_leader 1.0" in self.get("/metrics")
        except OSError:
            return False

    def log(self) -> str:
        return self._log.read_text()[-4000:]
