"""`finetune local up` as a user runs it, and what a user does with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import psutil
import yaml

FINETUNE = [sys.executable, "-m", "finetune_operator.cli"]


def eventually(check: Callable[[], Any], what: str, seconds: float = 300) -> Any:
    """The check's first true value. The limit only ends a test that would never end."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)  # most checks start kubectl, and what is waited for needs the processor
    return value


class LocalUp:
    """The stack in processes of its own."""

    def __init__(self, state: Path, kubectl: str) -> None:
        self.state = state
        self._kubectl = kubectl
        self._output = (state.parent / f"{state.name}.log").open("wb")
        self._process = subprocess.Popen([*FINETUNE, "local", "up", "--state", str(state)], stdout=self._output)
        path = state / "stack.json"
        eventually(lambda: path.exists() or self._process.poll() is not None, "the stack starts")
        self.description: dict[str, str] = json.loads(path.read_text())
        self.s3 = boto3.client(
            "s3",
            endpoint_url=self.description["s3_endpoint"],
            aws_access_key_id=self.description["access_key"],
            aws_secret_access_key=self.description["secret_key"],
            region_name="us-east-1",
        )

    def close(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=60)
        self._output.close()

    # What a user types

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        command = [self._kubectl, "--kubeconfig", self.description["kubeconfig"], *arguments]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=300, check=False)
        assert not check or done.returncode == 0, f"{' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout + ("" if check else done.stderr)

    def start_kubectl(self, *arguments: str) -> subprocess.Popen[str]:
        command = [self._kubectl, "--kubeconfig", self.description["kubeconfig"], *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def finetune(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"KUBECONFIG": self.description["kubeconfig"]}
        command = [*FINETUNE, *arguments]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=300, env=environment, check=False
        )

    def apply(self, manifest: dict[str, Any]) -> str:
        return self.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(manifest))

    # What a user sees

    def job(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.kubectl("get", "ftj", name, "-o", "json"))
        return found

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.job(name).get("status", {})
        return found

    def until(
        self, name: str, check: Callable[[dict[str, Any]], Any], what: str, seconds: float = 400
    ) -> dict[str, Any]:
        """The status, as soon as it satisfies a check."""

        def look() -> dict[str, Any] | None:
            status = self.status(name)
            assert status.get("phase") != "Failed" or "Failed" in what, status.get("failure")
            return status if check(status) else None

        found: dict[str, Any] = eventually(look, f"{name}: {what}", seconds)
        return found

    def succeeded(self, name: str) -> dict[str, Any]:
        return self.until(name, lambda status: status.get("phase") == "Succeeded", "Succeeded")

    def failed(self, name: str) -> dict[str, Any]:
        return self.until(name, lambda status: status.get("phase") == "Failed", "Failed")

    def jobs(self, name: str) -> list[str]:
        """Names of the child Jobs, sorted."""
        selector = f"finetune.dev/job-name={name}"
        return sorted(self.kubectl("get", "jobs", "-l", selector, "-o", "name").replace("job.batch/", "").split())

    # The buckets

    def put(self, bucket: str, key: str, content: bytes) -> None:
        self.s3.put_object(Bucket=bucket, Key=key, Body=content)

    def put_folder(self, bucket: str, prefix: str, folder: Path) -> None:
        for path in folder.iterdir():
            self.s3.upload_file(str(path), bucket, f"{prefix}/{path.name}")

    def read(self, uri: str) -> bytes:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        content: bytes = self.s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        return content

    def keys(self, uri: str) -> list[str]:
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
        return [item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page.get("Contents", [])]

    def all_keys(self, bucket: str) -> set[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {item["Key"] for page in pages for item in page.get("Contents", [])}

    def pod(self, name: str, stage: str) -> str:
        """The name of a job's newest pod of a stage."""
        selector = f"finetune.dev/job-name={name},finetune.dev/stage={stage}"
        found = self.kubectl("get", "pods", "-l", selector, "--sort-by=.metadata.creationTimestamp", "-o", "name")
        return found.split()[-1].removeprefix("pod/")

    # The processes

    def processes(self, pattern: str, uid: str = "") -> list[psutil.Process]:
        """Processes of this stack whose command line holds a pattern; `uid` narrows to the pods of one job."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                command = " ".join(process.cmdline())
                document = process.environ().get("FINETUNE_DOCUMENT", "")
            except psutil.Error:
                continue
            if pattern in command and (not uid or (Path(document).is_file() and uid in Path(document).read_text())):
                found.append(process)
        return found

    def kill_operator(self) -> None:
        for process in self.processes("finetune_operator.main"):
            process.kill()
