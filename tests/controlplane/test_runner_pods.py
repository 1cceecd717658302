"""Pods as local processes: what they see, how they end, and that nothing of them is left."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_client import Client, eventually
from builders import job_body
from conftest import TestServer, in_thread
from objects import pod_spec

from finetune_api.names import Stage
from finetune_operator import children
from finetune_operator.cli.validation import schema
from finetune_operator.config import Settings
from finetune_operator.local import pod_worker
from finetune_operator.local.cluster import LocalCluster
from finetune_operator.local.pod_files import expanded, translated
from finetune_operator.local.processes import group_members
from finetune_operator.local.scheduler import Hardware
from finetune_operator.resource import FineTuneJob

UNTIL_STOPPED = "while true; do sleep 0.1; done"


class Pods:
    """Pods of one namespace."""

    def __init__(self, client: Client, namespace: str) -> None:
        self.client = client
        self.namespace = namespace
        self.path = f"/api/v1/namespaces/{namespace}/pods"

    def create(self, name: str, script: str, **more: Any) -> dict[str, Any]:
        labels = more.pop("labels", {})
        body = {"metadata": {"name": name, "labels": labels}, "spec": pod_spec(script, **more)}
        answer = self.client.create(self.path, body)
        assert answer.code == 201, answer.body
        created: dict[str, Any] = answer.body
        return created

    def get(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"{self.path}/{name}").body
        return found

    def log(self, name: str, **query: Any) -> str:
        return str(self.client.get(f"{self.path}/{name}/log", **query).body)

    def when(self, name: str, phase: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            found = self.get(name)
            return found if found.get("status", {}).get("phase") == phase else None

        result: dict[str, Any] = eventually(reached, 30, lambda: json.dumps(self.get(name)))
        return result

    def says(self, name: str, text: str) -> str:
        return str(eventually(lambda: text in (found := self.log(name)) and found, 30, lambda: self.log(name)))

    def object(self, kind: str, name: str, **content: Any) -> None:
        path = f"/api/v1/namespaces/{self.namespace}/{kind}"
        assert self.client.create(path, {"metadata": {"name": name}, **content}).code == 201

    def gone(self, name: str) -> None:
        eventually(lambda: self.client.get(f"{self.path}/{name}").code == 404)


@pytest.fixture
def pods(running: TestServer, namespace: str) -> Pods:
    return Pods(running.client, namespace)


def exit_of(pod: dict[str, Any]) -> tuple[int, str]:
    terminated = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    return terminated["exitCode"], terminated["reason"]


def processes_with(word: str) -> list[int]:
    """Living processes whose command line has a word."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if word.encode() in (entry / "cmdline").read_bytes() and state != "Z":
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_environment(pods: Pods) -> None:
    pods.object("secrets", "s3", stringData={"AWS_SECRET_ACCESS_KEY": "open sesame", "OTHER": "x"})
    pods.object("configmaps", "settings", data={"MODE": "fast"})
    variables = [
        {"name": "PLAIN", "value": "1"},
        {"name": "SUM", "value": "$(PLAIN)+$(NOTHING) $$(PLAIN)"},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "AWS_SECRET_ACCESS_KEY"}}},
        {"name": "MODE", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "MODE"}}},
        {"name": "NONE", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "k", "optional": True}}},
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "TEAM", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['example.com/team']"}}},
    ]
    sources = [{"secretRef": {"name": "s3"}, "prefix": "S3_"}, {"configMapRef": {"name": "none", "optional": True}}]
    script = "import json, os; print(json.dumps(dict(os.environ)))"
    container = {"command": ["python", "-c", script], "env": variables, "envFrom": sources}
    pods.create("p", "", container=container, labels={"example.com/team": "blue"})
    found = json.loads((pods.when("p", "Succeeded"), pods.log("p"))[1])
    status = pods.get("p")["status"]
    expected = {
        "PLAIN": "1",
        "SUM": "1+$(NOTHING) $(PLAIN)",
        "KEY": "open sesame",
        "MODE": "fast",
        "POD_NAME": "p",
        "POD_IP": status["podIP"],
        "NODE": "local",
        "TEAM": "blue",
        "S3_OTHER": "x",
        "HOSTNAME": "p",
        "CUDA_VISIBLE_DEVICES": "",
    }
    assert {name: found.get(name) for name in expected} == expected
    assert "NONE" not in found
    # The program comes from the environment that runs this, and nothing else of ours is handed on.
    assert found["PATH"].startswith(str(Path(sys.executable).parent))
    assert found["HOME"] != os.environ.get("HOME")
    assert not {"PYTEST_CURRENT_TEST", "KUBECONFIG", "AWS_ACCESS_KEY_ID"} & found.keys()


def test_volumes_and_their_paths(pods: Pods) -> None:
    pods.object("configmaps", "document", data={"job.json": '{"a": 1}', "other": "x"})
    pods.object("secrets", "ca", stringData={"ca.crt": "certificate"})
    volumes = [
        {"name": "document", "configMap": {"name": "document", "items": [{"key": "job.json", "path": "in/job.json"}]}},
        {"name": "ca", "secret": {"secretName": "ca"}},
        {"name": "work", "emptyDir": {}},
        {
            "name": "all",
            "projected": {
                "sources": [
                    {"configMap": {"name": "document"}},
                    {"secret": {"name": "ca"}},
                    {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
                ]
            },
        },
    ]
    mounts = [
        {"name": "document", "mountPath": "/etc/finetune"},
        {"name": "ca", "mountPath": "/etc/finetune/ca.crt", "subPath": "ca.crt"},
        {"name": "work", "mountPath": "/work/"},
        {"name": "all", "mountPath": "/all"},
    ]
    script = 'cat "$DOCUMENT" "$CA" $0/other $0/ca.crt $0/name; echo; pwd > "$1"; cat "$1"; echo "$2"'
    container = {
        "command": ["sh", "-c", script],
        "args": ["/all", "/work/where", "see /work/where, /workshop"],
        "env": [
            {"name": "DOCUMENT", "value": "/etc/finetune/in/job.json"},
            {"name": "CA", "value": "/etc/finetune/ca.crt"},
        ],
        "volumeMounts": mounts,
        "workingDir": "/work",
    }
    created = pods.create("p", "", container=container, volumes=volumes)
    pods.when("p", "Succeeded")
    first, second, third = pods.log("p").splitlines()
    assert first == '{"a": 1}certificatexcertificatep'
    assert second.endswith(f"{created['metadata']['uid']}/volumes/work")
    # Only a path at the beginning is translated, and only a whole one.
    assert third == "see /work/where, /workshop"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/work", "/real/w"),
        ("/work/", "/real/w/"),
        ("/work/a/b", "/real/w/a/b"),
        ("/workshop", "/workshop"),
        ("/work/cache/x", "/real/c/x"),
        ("file:///work", "file:///work"),
        ("", ""),
    ],
)
def test_paths_are_translated_at_their_beginning(text: str, expected: str) -> None:
    mounts = [("/work", Path("/real/w")), ("/work/cache/", Path("/real/c"))]
    assert translated(text, mounts) == expected


def test_references_are_expanded() -> None:
    assert expanded("$(A)-$(B)-$$(A)-$C", {"A": "1"}) == "1-$(B)-$(A)-$C"


def test_a_pod_with_a_name_is_where_others_are_told(pods: Pods) -> None:
    """There is no DNS: a value that is the name of a pod of the same Service is that pod's address."""
    names = {"PEER": "first.gang", "OTHER": "first.others", "URL": "http://first.gang", "SHORT": "gang"}
    variables = [{"name": name, "value": value} for name, value in names.items()]
    show = f"import os; print(*[os.environ[name] for name in {sorted(names)}])"
    pods.create("second", "", subdomain="gang", container={"command": ["python", "-c", show], "env": variables})
    pods.when("second", "Succeeded")
    other, peer, short, url = pods.log("second").split()
    assert (other, short, url) == ("first.others", "gang", "http://first.gang")
    # It is known before the pod is there, and is its own.
    pods.create("a", "true", hostname="first", subdomain="gang")
    assert pods.when("a", "Succeeded")["status"]["podIP"] == peer
    pods.create("b", "true", hostname="second", subdomain="gang")
    assert pods.when("b", "Succeeded")["status"]["podIP"] != peer


def test_each_pod_has_an_address(pods: Pods) -> None:
    with socket.socket() as probe:
        # Free on all addresses, so that nobody who listens on 0.0.0.0 is in the way.
        probe.bind(("0.0.0.0", 0))
        port = probe.getsockname()[1]
    script = (
        f"import os, socket; s = socket.create_server((os.environ['POD_IP'], {port})); print('listening', flush=True); "
        "c, _ = s.accept(); c.sendall(os.environ['POD_NAME'].encode())"
    )
    variables = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
    ]
    for name in ("a", "b"):
        pods.create(name, "", container={"command": ["python", "-c", script], "env": variables})
    for name in ("a", "b"):
        pods.says(name, "listening")
        address = pods.get(name)["status"]["podIP"]
        assert address.startswith("127.")
        with socket.create_connection((address, port), timeout=10) as connection:
            assert connection.recv(10) == name.encode()
    assert pods.get("a")["status"]["podIP"] != pods.get("b")["status"]["podIP"]


def test_stopping_tells_the_first_process_only(pods: Pods, running: TestServer) -> None:
    """As in a container: a child hears nothing until the grace period is over."""
    child = "trap 'echo child told' TERM; while true; do sleep 0.1; done"
    ending = "echo first told; while [ ! -e $GO ]; do sleep 0.05; done; exit 54"
    container = {
        "env": [{"name": "GO", "value": "/shared/go"}],
        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
    }
    script = f"({child}) & trap '{ending}' TERM; echo ready; {UNTIL_STOPPED}"
    created = pods.create("p", script, container=container, volumes=[{"name": "shared", "emptyDir": {}}])
    pods.says("p", "ready")
    with pods.client.watch(pods.path) as watched:
        pods.client.delete(f"{pods.path}/p")
        assert "child told" not in pods.says("p", "first told")
        (running.kubeconfig.parent / "pods" / created["metadata"]["uid"] / "volumes" / "shared" / "go").touch()
        events = watched.until(lambda events: bool(events) and events[-1]["type"] == "DELETED")
    assert exit_of(events[-1]["object"]) == (54, "Error")
    states = [(event["type"], event["object"]["status"]["phase"]) for event in events]
    assert states[-2:] == [("MODIFIED", "Failed"), ("DELETED", "Failed")]


def test_a_process_that_dies_of_sigterm_has_exit_code_143(pods: Pods) -> None:
    pods.create("p", "", container={"command": ["sleep", "1000"]})
    pods.when("p", "Running")
    with pods.client.watch(pods.path) as watched:
        pods.client.delete(f"{pods.path}/p")
        events = watched.until(lambda events: bool(events) and events[-1]["type"] == "DELETED")
    assert exit_of(events[-1]["object"]) == (143, "Error")


@pytest.mark.skipif(sys.platform != "linux", reason="finding what left its session needs /proc")
@pytest.mark.parametrize("end", ["exit", "delete", "force"])
def test_nothing_of_a_pod_is_left(pods: Pods, end: str) -> None:
    word = f"marker-{end}-{pods.namespace}"
    # A child, a grandchild in a session of its own, and one that ignores SIGTERM.
    script = (
        f"sh -c 'sleep 1000; : {word}' & "
        f"setsid sh -c 'sleep 1000; : {word}' & "
        f"sh -c \"trap '' TERM; sleep 1000; : {word}\" & "
        "echo started; "
    )
    pods.create("p", script + ("sleep 0.3; exit 3" if end == "exit" else "trap '' TERM; " + UNTIL_STOPPED))
    if end == "exit":
        assert exit_of(pods.when("p", "Failed")) == (3, "Error")
    else:
        pods.says("p", "started")
        eventually(lambda: len(processes_with(word)) >= 3)
        pods.client.delete(f"{pods.path}/p", gracePeriodSeconds=1 if end == "delete" else 0)
        pods.gone("p")
    eventually(lambda: processes_with(word) == [])


def test_members_of_a_process_group_are_found() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 1000 & wait"], start_new_session=True) as leader:
        found = eventually(lambda: len(members := group_members({leader.pid})) == 2 and members)
        assert leader.pid in found
        os.killpg(leader.pid, 9)
    eventually(lambda: group_members({leader.pid}) == [])


def test_files_go_with_the_pod(pods: Pods, running: TestServer) -> None:
    uid = pods.create("p", "echo hello")["metadata"]["uid"]
    pods.when("p", "Succeeded")
    folder = running.kubeconfig.parent / "pods" / uid
    assert folder.exists()
    pods.client.delete(f"{pods.path}/p")
    pods.gone("p")
    eventually(lambda: not folder.exists())


def test_init_containers_run_one_after_the_other(pods: Pods) -> None:
    def init(name: str, script: str) -> dict[str, Any]:
        mount = [{"name": "shared", "mountPath": "/shared"}]
        return {"name": name, "image": "x", "command": ["sh", "-c", script, "/shared/log"], "volumeMounts": mount}

    volumes = [{"name": "shared", "emptyDir": {}}]
    mounts = {"volumeMounts": [{"name": "shared", "mountPath": "/shared"}], "args": ["/shared/log"]}
    inits = [init("a", "echo a >> $0"), init("b", "echo b >> $0")]
    main = {**mounts, "command": ["cat"]}
    pods.create("good", "", container=main, initContainers=inits, volumes=volumes)
    pods.when("good", "Succeeded")
    assert pods.log("good", container="main") == "a\nb\n"
    inits[0]["command"][2] = "exit 9"
    pods.create("bad", "", container=main, initContainers=inits, volumes=volumes)
    status = pods.when("bad", "Failed")["status"]
    codes = [item["state"].get("terminated", {}).get("exitCode") for item in status["initContainerStatuses"]]
    assert codes == [9, None]
    assert "waiting" in status["containerStatuses"][0]["state"]


def test_several_containers(pods: Pods) -> None:
    second = {"name": "second", "image": "x", "command": ["sh", "-c", "echo two; exit 4"]}
    spec = pod_spec("echo one")
    spec["containers"].append(second)
    pods.client.create(pods.path, {"metadata": {"name": "p"}, "spec": spec})
    status = pods.when("p", "Failed")["status"]
    codes = {item["name"]: item["state"]["terminated"]["exitCode"] for item in status["containerStatuses"]}
    assert codes == {"main": 0, "second": 4}
    assert (pods.log("p", container="main"), pods.log("p", container="second")) == ("one\n", "two\n")
    answer = pods.client.get(f"{pods.path}/p/log")
    assert answer.code == 400
    assert answer.message == "a container name must be specified for pod p, choose one of: [main second]"


def test_a_container_is_restarted_on_failure(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_worker, "BACKOFF_SECONDS", 0.05)
    mount = {"volumeMounts": [{"name": "work", "mountPath": "/work"}], "args": ["/work/tried"]}
    script = 'if [ -e "$0" ]; then echo again; exit 0; fi; touch "$0"; exit 5'
    pods.create("p", script, container=mount, volumes=[{"name": "work", "emptyDir": {}}], restartPolicy="OnFailure")
    (status,) = pods.when("p", "Succeeded")["status"]["containerStatuses"]
    assert status["restartCount"] == 1
    assert status["lastState"]["terminated"]["exitCode"] == 5
    assert pods.log("p") == "again\n"


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is known from /proc")
def test_a_container_that_exceeds_its_memory_is_killed_as_a_whole(pods: Pods, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_worker, "MEMORY_SECONDS", 0.05)
    word = f"marker-memory-{pods.namespace}"
    hold = "import sys, time; held = bytes(range(256)) * int(sys.argv[1]) * 4096; print('held', flush=True); "
    child = [sys.executable, "-c", hold + f"time.sleep(1000)  # {word}"]
    script = f"sh -c 'sleep 1000; : {word}' & {shlex.join(child)} $0"
    limits = {"resources": {"limits": {"memory": "64Mi"}}}
    pods.create("small", script, container=limits | {"args": ["10"]})
    pods.create("large", script, container=limits | {"args": ["100"]})
    assert exit_of(pods.when("large", "Failed")) == (137, "OOMKilled")
    pods.says("small", "held")
    pods.client.delete(f"{pods.path}/small", gracePeriodSeconds=0)
    eventually(lambda: processes_with(word) == [])


def test_what_is_missing_is_waited_for(pods: Pods) -> None:
    volumes = [
        {"name": "document", "configMap": {"name": "document"}},
        {"name": "cache", "persistentVolumeClaim": {"claimName": "cache"}},
    ]
    mounts = [{"name": "document", "mountPath": "/doc"}, {"name": "cache", "mountPath": "/cache"}]
    container = {"volumeMounts": mounts, "args": ["/doc/k", "/cache/kept"]}
    script = 'cat "$0"; echo kept > "$1"'
    pods.create("p", script, container=container, volumes=volumes)
    events = f"/api/v1/namespaces/{pods.namespace}/events"
    selector = "involvedObject.name=p,reason=FailedMount"

    def complaints() -> list[str]:
        return [item["message"] for item in pods.client.get(events, fieldSelector=selector).body["items"]]

    eventually(
        lambda: complaints() == ['MountVolume.SetUp failed for volume "document" : configmap "document" not found']
    )
    pods.object("configmaps", "document", data={"k": "v"})
    claim = 'MountVolume.SetUp failed for volume "cache" : persistentvolumeclaim "cache" not found'
    eventually(lambda: claim in complaints())
    claim_spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    pods.object("persistentvolumeclaims", "cache", spec=claim_spec)
    pods.when("p", "Succeeded")
    assert pods.log("p") == "v"
    # What is in a claim outlives the pod.
    container["command"] = ["cat", "/cache/kept"]
    container["args"] = []
    pods.create("q", "", container=container, volumes=volumes)
    pods.when("q", "Succeeded")
    assert pods.log("q") == "kept\n"


def test_a_pod_is_deleted_while_it_waits(pods: Pods) -> None:
    reference = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "none", "key": "key"}}}
    pods.create("p", "true", container={"env": [reference]})
    eventually(lambda: "waiting" in json.dumps(pods.get("p")["status"]))
    pods.client.delete(f"{pods.path}/p")
    pods.gone("p")


def test_an_image_without_a_command_says_so(pods: Pods) -> None:
    spec = {"restartPolicy": "Never", "containers": [{"name": "main", "image": "x"}]}
    pods.client.create(pods.path, {"metadata": {"name": "p"}, "spec": spec})

    def waiting() -> str:
        statuses = pods.get("p")["status"].get("containerStatuses", [{"state": {}}])
        return str(statuses[0]["state"].get("waiting", {}).get("message", ""))

    message = "the local runner ignores images, so the container needs a command"
    eventually(lambda: waiting() == message)


def test_a_long_log_comes_whole_and_by_its_tail(pods: Pods) -> None:
    pods.create("p", "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done")
    pods.when("p", "Succeeded")
    lines = pods.log("p").splitlines()
    assert (len(lines), lines[-1]) == (20000, "line 19999")
    assert pods.log("p", tailLines=3) == "line 19997\nline 19998\nline 19999\n"
    assert pods.log("p", tailLines=10**6).count("\n") == 20000


def test_the_last_words_may_come_from_the_log(pods: Pods) -> None:
    policy = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    pods.create("p", "echo what went wrong; exit 1", container=policy)
    (status,) = pods.when("p", "Failed")["status"]["containerStatuses"]
    assert status["state"]["terminated"]["message"] == "what went wrong\n"


def test_a_message_written_beforehand_survives_a_kill(pods: Pods) -> None:
    variable = {"env": [{"name": "TERMINATION", "value": "/dev/termination-log"}]}
    pods.create("p", "echo -n provisional > $TERMINATION; sh -c 'kill -9 $PPID'", container=variable)
    (status,) = pods.when("p", "Failed")["status"]["containerStatuses"]
    terminated = status["state"]["terminated"]
    assert (terminated["exitCode"], terminated["message"]) == (137, "provisional")


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pods]:
    """A machine with two GPUs, as nvidia-smi would describe them."""

    async def detect() -> Hardware:
        return Hardware(2, {"nvidia.com/gpu.memory": "81920"})

    monkeypatch.setattr("finetune_operator.local.runner.detect", detect)
    environment = {"AWS_REGION": "eu-west-1", "PLAIN": "default"}
    for cluster in in_thread(lambda: LocalCluster(tmp_path / "state", pod_environment=environment)):
        yield Pods(Client(cluster.kubeconfig), "default")


def test_gpus_are_handed_out_and_taken_back(two_gpus: Pods) -> None:
    pods = two_gpus
    node = pods.client.get("/api/v1/nodes/local").body
    assert node["status"]["allocatable"]["nvidia.com/gpu"] == "2"
    assert node["metadata"]["labels"]["nvidia.com/gpu.memory"] == "81920"

    def wanting(gpus: int) -> dict[str, Any]:
        return {"resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}

    script = f"echo gpus $CUDA_VISIBLE_DEVICES; trap 'exit 0' TERM; {UNTIL_STOPPED}"
    pods.create("a", script, container=wanting(1))
    pods.says("a", "gpus 0")
    pods.create("b", script, container=wanting(1))
    pods.says("b", "gpus 1")
    pods.create("c", script, container=wanting(1))
    (condition,) = eventually(lambda: pods.get("c")["status"].get("conditions"))
    assert condition["reason"] == "Unschedulable"
    assert condition["message"].startswith("0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")
    pods.client.delete(f"{pods.path}/a")
    pods.says("c", "gpus 0")
    pods.client.patch("/api/v1/nodes/local", {"spec": {"unschedulable": True}})
    pods.create("d", "true")
    (condition,) = eventually(lambda: pods.get("d")["status"].get("conditions"))
    assert "1 node(s) were unschedulable" in condition["message"]
    pods.client.patch("/api/v1/nodes/local", {"spec": {"unschedulable": None}})
    pods.when("d", "Succeeded")


def test_what_every_pod_is_given_can_be_overruled(two_gpus: Pods) -> None:
    variables = [{"name": "PLAIN", "value": "own"}]
    two_gpus.create("p", "echo $AWS_REGION $PLAIN", container={"env": variables})
    two_gpus.when("p", "Succeeded")
    assert two_gpus.log("p") == "eu-west-1 own\n"


class Process:
    """A cluster as a process of its own, that can be killed."""

    def __init__(self, folder: Path) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.unlink(missing_ok=True)
        command = [sys.executable, "-m", "finetune_operator.local.cluster", "--state", str(folder / "state")]
        self.process = subprocess.Popen([*command, "--kubeconfig", str(self.kubeconfig)], stderr=subprocess.DEVNULL)
        eventually(self.kubeconfig.exists)
        self.pods = Pods(Client(self.kubeconfig), "default")


@pytest.mark.skipif(sys.platform != "linux", reason="finding processes by their command line needs /proc")
def test_a_killed_runner_s_pods_have_failed(tmp_path: Path) -> None:
    """As after a reboot of the node: no process is left, and a pod that is not restarted has failed."""
    word = f"marker-{time.time_ns()}"
    script = f"setsid sh -c 'sleep 1000; : {word}' & echo ready; while true; do sleep 0.1; : {word}; done"
    first = Process(tmp_path)
    first.pods.create("p", script)
    first.pods.create("done", "echo kept")
    first.pods.says("p", "ready")
    first.pods.when("done", "Succeeded")
    first.process.kill()
    first.process.wait(10)
    assert len(processes_with(word)) >= 2
    second = Process(tmp_path)
    try:
        assert processes_with(word) == []
        pod = second.pods.get("p")
        assert pod["status"]["phase"] == "Failed"
        assert exit_of(pod) == (255, "Unknown")
        assert "DisruptionTarget" not in json.dumps(pod["status"])
        assert second.pods.get("done")["status"]["phase"] == "Succeeded"
        assert second.pods.log("done") == "kept\n"
        second.pods.client.delete(f"{second.pods.path}/p")
        second.pods.gone("p")
        second.pods.create("again", "echo hello")
        second.pods.when("again", "Succeeded")
    finally:
        second.process.kill()
        second.process.wait(10)


def test_a_shutdown_disrupts_the_pods(tmp_path: Path) -> None:
    """Who stops the cluster must not have the job blamed for it."""
    first = Process(tmp_path)
    first.pods.create("p", f"trap 'sleep 0.2; exit 75' TERM; echo ready; {UNTIL_STOPPED}")
    first.pods.says("p", "ready")
    first.process.terminate()
    assert first.process.wait(30) == 0
    second = Process(tmp_path)
    try:
        pod = second.pods.get("p")
        assert (pod["status"]["phase"], exit_of(pod)) == ("Failed", (75, "Error"))
        condition = next(item for item in pod["status"]["conditions"] if item["type"] == "DisruptionTarget")
        assert (condition["status"], condition["reason"]) == ("True", "TerminationByKubelet")
    finally:
        second.process.kill()
        second.process.wait(10)


def job_pod(script: str, **spec: Any) -> dict[str, Any]:
    """The pod of a FineTuneJob's prepare stage, as the operator builds it, with a script in place of the trainer."""
    body = job_body(**spec)
    body["spec"] = schema().defaulted(body)["spec"]
    job = FineTuneJob.parse(body)
    assert job.spec is not None, job.spec_problem
    built: dict[str, Any] = children.build(job, job.spec, Stage.PREPARE, 1, Settings())[1]["spec"]["template"]["spec"]
    built["containers"][0]["command"] = ["sh", "-c", script]
    # The operator's name for it ends with a digest of its content.
    built["volumes"][0]["configMap"]["name"] = "bot-prepare-1"
    return built


def test_what_a_job_adds_to_its_pods(pods: Pods) -> None:
    pods.object("configmaps", "bot-prepare-1", data={"job.json": "{}"})
    pods.object("configmaps", "conf", data={"nccl.conf": "fast"})
    pods.object("secrets", "keys", stringData={"token": "open sesame", "corp.pem": "certificate"})
    pods.object("persistentvolumeclaims", "data", spec={"accessModes": ["ReadWriteOnce"]})
    template = {
        "env": [
            {"name": "HUB", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "token"}}},
            {"name": "MODE", "valueFrom": {"configMapKeyRef": {"name": "conf", "key": "nccl.conf"}}},
            {"name": "DATA", "value": "/mnt/data"},
            {"name": "ALL", "value": "/mnt/all"},
        ],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
            {"name": "scratch", "emptyDir": {}},
            {
                "name": "all",
                "projected": {"sources": [{"secret": {"name": "keys"}}, {"configMap": {"name": "conf"}}]},
            },
        ],
        "volumeMounts": [
            {"name": "data", "mountPath": "/mnt/data"},
            {"name": "scratch", "mountPath": "/scratch"},
            {"name": "all", "mountPath": "/mnt/all"},
        ],
    }
    storage = {"caBundle": {"secretKeyRef": {"name": "keys", "key": "corp.pem"}}}
    stages = {"prepare": {"storageClassName": "fast"}}
    script = (
        'echo "$HUB $MODE $(cat "$FINETUNE_CA_BUNDLE") $(cat "$ALL/nccl.conf")"; '
        'echo kept >> "$DATA/file"; wc -l < "$DATA/file"; touch "$FINETUNE_WORK_DIR/x"'
    )
    spec = job_pod(script, podTemplate=template, storage=storage, stages=stages)
    for name, lines in (("first", 1), ("second", 2)):
        assert pods.client.create(pods.path, {"metadata": {"name": name}, "spec": spec}).code == 201
        pods.when(name, "Succeeded")
        # A claim outlives the pod.
        assert pods.log(name) == f"open sesame fast certificate fast\n{lines}\n"


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ({"csi": {"driver": "secrets-store.csi.k8s.io"}}, "csi"),
        (
            {"projected": {"sources": [{"serviceAccountToken": {"audience": "x", "path": "token"}}]}},
            "serviceAccountToken",
        ),
    ],
)
def test_volumes_that_do_not_exist_here_are_named(pods: Pods, source: dict[str, Any], kind: str) -> None:
    pods.create("p", "true", volumes=[{"name": "v", **source}])
    events = f"/api/v1/namespaces/{pods.namespace}/events"

    def message() -> str:
        found = pods.client.get(events).body["items"]
        return next((str(event["message"]) for event in found if event["reason"] == "FailedMount"), "")

    assert f"the local runner has no volumes of type {kind}" in eventually(message)


def test_places_that_do_not_exist_here_are_waited_for(pods: Pods) -> None:
    spec = job_pod("true", stages={"prepare": {"nodeSelector": {"pool": "cpu"}}})
    pods.object("configmaps", "bot-prepare-1", data={"job.json": "{}"})
    assert pods.client.create(pods.path, {"metadata": {"name": "p"}, "spec": spec}).code == 201
    (condition,) = eventually(lambda: pods.get("p")["status"].get("conditions"))
    assert condition["reason"] == "Unschedulable"
    assert "1 node(s) didn't match Pod's node affinity/selector" in condition["message"]
    labels = {"metadata": {"labels": {"pool": "cpu"}}}
    pods.client.patch("/api/v1/nodes/local", labels)
    pods.when("p", "Succeeded")
    pods.client.patch("/api/v1/nodes/local", {"metadata": {"labels": {"pool": None}}})


def test_company_is_waited_for(pods: Pods) -> None:
    term = {"labelSelector": {"matchLabels": {"app": "cache"}}, "topologyKey": "kubernetes.io/hostname"}
    near = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    pods.create("p", "true", affinity=near)
    (condition,) = eventually(lambda: pods.get("p")["status"].get("conditions"))
    assert "1 node(s) didn't match pod affinity rules" in condition["message"]
    pods.create("cache", UNTIL_STOPPED, labels={"app": "cache"})
    pods.when("p", "Succeeded")
