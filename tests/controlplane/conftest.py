"""Servers to test against: the embedded one, and a real one when FINETUNE_TEST_KUBECONFIG names it.

KUBECONFIG is never looked at: a test must not touch a cluster that somebody happens to be logged in to. Each test has
a namespace of its own.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from api_client import Client, eventually
from finetune_job import Job
from operator_process import OperatorProcess
from scripted import ScriptedKubelet

from finetune_api import crd
from finetune_operator.local.cluster import LocalCluster

REAL = os.environ.get("FINETUNE_TEST_KUBECONFIG")


@dataclass(frozen=True)
class TestServer:
    """An API server and how to reach it."""

    __test__ = False

    name: str
    kubeconfig: Path
    client: Client
    cluster: LocalCluster | None = None

    @property
    def is_embedded(self) -> bool:
        return self.cluster is not None


class Kubectl:
    """Stock kubectl against one server and namespace."""

    def __init__(self, program: str, kubeconfig: Path, namespace: str) -> None:
        self._command = [program, "--kubeconfig", str(kubeconfig), "--namespace", namespace]
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(kubeconfig.parent), "KUBE_EDITOR": ""}

    def run(self, *arguments: str, stdin: str | None = None, check: bool = True, **environment: str) -> str:
        """Run to the end; what it printed. With check=False failures print, too."""
        done = subprocess.run(
            [*self._command, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            env={**self._environment, **environment},
            check=False,
        )
        assert not check or done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout if check else f"{done.stdout}{done.stderr}"

    def fail(self, *arguments: str, stdin: str | None = None) -> str:
        """Run a command that must fail; what it printed."""
        done = subprocess.run(
            [*self._command, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            env=self._environment,
            check=False,
        )
        assert done.returncode != 0, f"kubectl {' '.join(arguments)} succeeded: {done.stdout}"
        return f"{done.stdout}{done.stderr}"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Run in the background."""
        return subprocess.Popen(
            [*self._command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment,
        )


def in_thread(make: Callable[[], LocalCluster]) -> Iterator[LocalCluster]:
    """Run a cluster in a thread with an event loop of its own, so that synchronous tests can use it."""
    started: list[LocalCluster | BaseException] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        try:
            async with make() as cluster:
                started.append(cluster)
                ready.set()
                await stop.wait()
        except BaseException as error:
            started.append(error)
            ready.set()
            raise

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    ready.wait(60)
    cluster = started[0]
    if isinstance(cluster, BaseException):
        raise cluster
    try:
        yield cluster
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()


@pytest.fixture(scope="session")
def embedded() -> Iterator[TestServer]:
    """An embedded cluster without a runner: pods do what the test writes into their status."""
    for cluster in in_thread(lambda: LocalCluster(runner=False)):
        yield TestServer("embedded", cluster.kubeconfig, Client(cluster.kubeconfig), cluster)


@pytest.fixture(scope="session")
def running() -> Iterator[TestServer]:
    """An embedded cluster that runs pods."""
    for cluster in in_thread(LocalCluster):
        yield TestServer("embedded", cluster.kubeconfig, Client(cluster.kubeconfig), cluster)


@pytest.fixture(scope="session")
def real() -> TestServer:
    """The server of FINETUNE_TEST_KUBECONFIG, with the CRD of this source tree."""
    assert REAL
    client = Client(Path(REAL))
    definition = crd.load()
    crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    path = f"{crds}/{definition['metadata']['name']}"
    if client.create(crds, definition).code == 409:
        assert client.patch(path, {"spec": definition["spec"]}).code == 200
    eventually(lambda: client.get("/apis/finetune.dev/v1alpha1/finetunejobs").code == 200)
    return TestServer("real", Path(REAL), client)


@pytest.fixture(params=["embedded", *(["real"] if REAL else [])])
def server(request: pytest.FixtureRequest) -> TestServer:
    """Each server that the same test must pass on."""
    found: TestServer = request.getfixturevalue("running" if request.param == "embedded" else "real")
    return found


@pytest.fixture(params=["embedded", *(["real"] if REAL else [])])
def scripted_server(request: pytest.FixtureRequest) -> TestServer:
    """Each server on which a test can play the kubelet: the Job controller runs, and nobody runs pods."""
    if request.param == "embedded":
        found: TestServer = request.getfixturevalue("embedded")
        return found
    found = request.getfixturevalue("real")
    if found.client.get("/api/v1/nodes").body["items"]:
        pytest.skip("the server of FINETUNE_TEST_KUBECONFIG has nodes, whose kubelets would speak for the pods")
    return found


def target_of(request: pytest.FixtureRequest) -> TestServer:
    """The server that a test uses."""
    fixtures = ("server", "scripted_server", "running", "embedded")
    found: TestServer = request.getfixturevalue(next(name for name in fixtures if name in request.fixturenames))
    return found


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own, on the server that it uses."""
    target = target_of(request)
    name = f"finetune-test-{secrets.token_hex(4)}"
    assert target.client.create("/api/v1/namespaces", {"metadata": {"name": name}}).code == 201
    accounts = f"/api/v1/namespaces/{name}/serviceaccounts/default"
    if not target.is_embedded:
        eventually(lambda: target.client.get(accounts).code == 200)
    yield name
    target.client.delete(f"/api/v1/namespaces/{name}")


@pytest.fixture(scope="session")
def kubectl_program() -> str:
    """FINETUNE_KUBECTL, else the one in .tools/bin, else the one in PATH."""
    tools = Path(__file__).parents[2] / ".tools" / "bin" / "kubectl"
    found = os.environ.get("FINETUNE_KUBECTL") or (str(tools) if tools.exists() else shutil.which("kubectl"))
    if not found:
        pytest.skip("no kubectl: set FINETUNE_KUBECTL, or put it into .tools/bin")
    return found


@pytest.fixture
def kubectl(request: pytest.FixtureRequest, kubectl_program: str, namespace: str) -> Kubectl:
    """Stock kubectl in the test's namespace."""
    target = target_of(request)
    return Kubectl(kubectl_program, target.kubeconfig, namespace)


@pytest.fixture
def job(scripted_server: TestServer, namespace: str) -> Job:
    return Job(scripted_server.client, namespace)


@pytest.fixture
def kubelet(scripted_server: TestServer, namespace: str) -> ScriptedKubelet:
    return ScriptedKubelet(scripted_server.client, namespace)


@pytest.fixture
def operator(scripted_server: TestServer, namespace: str, tmp_path: Path) -> Iterator[OperatorProcess]:
    process = OperatorProcess(scripted_server.kubeconfig, namespace, tmp_path / "operator.log")
    process.start()
    yield process
    process.close()
