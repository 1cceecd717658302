"""Stock kubectl, without extra flags."""

from __future__ import annotations

import json
import re
import secrets
import stat
from pathlib import Path
from typing import Any

import pytest
from api_client import eventually
from conftest import Kubectl, TestServer
from objects import job, manifest

pytestmark = pytest.mark.usefixtures("embedded")


@pytest.fixture
def tunes(namespace: str) -> str:
    return f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"


def apply(kubectl: Kubectl, body: dict[str, Any]) -> str:
    return kubectl.run("apply", "-f", "-", stdin=json.dumps(body))


def test_version_and_api_resources(kubectl: Kubectl) -> None:
    assert "Server Version: v1." in kubectl.run("version")
    listed = kubectl.run("api-resources")
    assert re.search(r"finetunejobs\s+ftj\s+finetune.dev/v1alpha1\s+true\s+FineTuneJob", listed)
    assert re.search(r"jobs\s+batch/v1\s+true\s+Job", listed)
    assert "finetunejobs" in kubectl.run("api-resources", "--categories", "ai", "-o", "name")
    assert "finetune.dev/v1alpha1" in kubectl.run("api-versions")


def test_apply_create_unchanged_configure(kubectl: Kubectl) -> None:
    body = manifest()
    assert apply(kubectl, body) == "finetunejob.finetune.dev/support-bot created\n"
    assert apply(kubectl, body) == "finetunejob.finetune.dev/support-bot unchanged\n"
    body["spec"]["failurePolicy"] = {"maxRestarts": 7}
    assert apply(kubectl, body) == "finetunejob.finetune.dev/support-bot configured\n"
    assert kubectl.run("get", "ftj", "support-bot", "-o", "jsonpath={.spec.failurePolicy}") == (
        '{"backoffSeconds":30,"maxRestarts":7,"rules":[]}'
    )
    assert kubectl.run("diff", "-f", "-", stdin=json.dumps(body)) == ""


def test_apply_of_a_built_in_kind_merges_strategically(kubectl: Kubectl) -> None:
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a": "1", "b": "2"}}
    assert apply(kubectl, body) == "configmap/c created\n"
    kubectl.run("annotate", "configmap", "c", "by=hand")
    body["data"] = {"a": "3"}
    assert apply(kubectl, body) == "configmap/c configured\n"
    found = json.loads(kubectl.run("get", "configmap", "c", "-o", "json"))
    assert found["data"] == {"a": "3"}
    assert found["metadata"]["annotations"]["by"] == "hand"


def test_apply_refuses_what_the_schema_refuses(kubectl: Kubectl) -> None:
    printed = kubectl.fail("apply", "-f", "-", stdin=json.dumps(manifest(foo=1)))
    assert 'strict decoding error: unknown field "spec.foo"' in printed
    printed = kubectl.fail("create", "-f", "-", stdin=json.dumps(manifest(foo=1)))
    assert 'strict decoding error: unknown field "spec.foo"' in printed
    printed = kubectl.fail("apply", "-f", "-", stdin=json.dumps(manifest(output={"uri": "ftp://x"})))
    assert printed.startswith(
        'The FineTuneJob "support-bot" is invalid: spec.output.uri: Invalid value: "ftp://x": the URI must start with'
    )
    apply(kubectl, manifest())
    printed = kubectl.fail("apply", "-f", "-", stdin=json.dumps(manifest(model={"uri": "s3://models/other"})))
    assert "spec: Invalid value: model cannot be changed after the job was created" in printed
    typo = {**job("j"), "spec": {**job("j")["spec"], "backofLimit": 1}}
    assert 'unknown field "spec.backofLimit"' in kubectl.fail("apply", "-f", "-", stdin=json.dumps(typo))


def test_server_side_apply_says_what_to_do(kubectl: Kubectl) -> None:
    printed = kubectl.fail("apply", "--server-side", "-f", "-", stdin=json.dumps(manifest()))
    assert "use kubectl apply without --server-side" in printed


def test_get_prints_the_columns(kubectl: Kubectl, embedded: TestServer, tunes: str) -> None:
    apply(kubectl, manifest())
    progress = {
        "percent": "42%",
        "currentStep": 42,
        "totalSteps": 100,
        "eta": "1h12m",
        "loss": "0.71",
        "lastUpdatedTime": "2026-01-01T00:00:00Z",
    }
    restarts = {"charged": 1, "preemptions": 0}
    status = {"phase": "Running", "reason": "Training", "progress": progress, "restarts": restarts}
    assert embedded.client.patch(f"{tunes}/support-bot/status", {"status": status}).code == 200
    header, row = kubectl.run("get", "ftj").splitlines()
    assert header.split() == ["NAME", "PHASE", "REASON", "METHOD", "PROGRESS", "ETA", "LOSS", "RESTARTS", "AGE"]
    assert row.split()[:7] == ["support-bot", "Running", "Training", "QLoRA", "42%", "1h12m", "0.71"]
    header, row = kubectl.run("get", "finetunejobs", "-o", "wide").splitlines()
    assert header.split()[9:] == ["PREEMPTIONS", "QUEUED", "STEP", "PERPLEXITY", "OUTPUT"]
    assert row.split()[-1] == "s3://models/support-bot"
    assert kubectl.run("get", "ai", "-o", "name") == "finetunejob.finetune.dev/support-bot\n"
    assert "support-bot" in kubectl.run("get", "ftj", "-A")
    assert "phase: Running" in kubectl.run("get", "ftj", "support-bot", "-o", "yaml")


def test_get_by_selectable_field_and_label(kubectl: Kubectl, embedded: TestServer, tunes: str) -> None:
    for name in ("a", "b"):
        apply(kubectl, manifest(name))
    embedded.client.patch(f"{tunes}/b/status", {"status": {"phase": "Running"}})
    kubectl.run("label", "ftj", "a", "team=x")
    selected = kubectl.run("get", "ftj", "--field-selector", "status.phase=Running", "-o", "name")
    assert selected == "finetunejob.finetune.dev/b\n"
    assert kubectl.run("get", "ftj", "-l", "team=x", "-o", "name") == "finetunejob.finetune.dev/a\n"
    assert kubectl.run("label", "ftj", "a", "team-") == "finetunejob.finetune.dev/a unlabeled\n"


def test_get_watch_prints_each_change(kubectl: Kubectl, embedded: TestServer, tunes: str) -> None:
    apply(kubectl, manifest())
    watching = kubectl.start("get", "ftj", "-w")
    assert watching.stdout
    try:
        assert watching.stdout.readline().split()[:3] == ["NAME", "PHASE", "REASON"]
        assert watching.stdout.readline().split()[:2] == ["support-bot", "QLoRA"]
        for phase in ("Preparing", "Running"):
            embedded.client.patch(f"{tunes}/support-bot/status", {"status": {"phase": phase}})
            assert watching.stdout.readline().split()[:3] == ["support-bot", phase, "QLoRA"]
    finally:
        watching.kill()
        watching.communicate()


def test_patch_label_annotate(kubectl: Kubectl) -> None:
    apply(kubectl, manifest())
    patched = "finetunejob.finetune.dev/support-bot patched\n"
    merge = '{"spec":{"failurePolicy":{"maxRestarts":0}}}'
    assert kubectl.run("patch", "ftj", "support-bot", "--type", "merge", "-p", merge) == patched
    operations = '[{"op":"replace","path":"/spec/failurePolicy/maxRestarts","value":2}]'
    assert kubectl.run("patch", "ftj", "support-bot", "--type", "json", "-p", operations) == patched
    status = '{"status":{"phase":"Running"}}'
    assert (
        kubectl.run("patch", "ftj", "support-bot", "--subresource=status", "--type", "merge", "-p", status) == patched
    )
    assert "annotated" in kubectl.run("annotate", "ftj", "support-bot", "note=hello")
    path = "jsonpath={.spec.failurePolicy.maxRestarts} {.status.phase} {.metadata.annotations.note}"
    assert kubectl.run("get", "ftj", "support-bot", "-o", path) == "2 Running hello"


@pytest.mark.parametrize("kind", ["ftj", "configmap"])
def test_edit(kubectl: Kubectl, tmp_path: Path, kind: str) -> None:
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nsed -i 's/maxRestarts: 3/maxRestarts: 9/; s/k: old/k: new/' \"$1\"\n")
    editor.chmod(editor.stat().st_mode | stat.S_IXUSR)
    if kind == "ftj":
        apply(kubectl, manifest("x"))
    else:
        apply(kubectl, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"k": "old"}})
    assert kubectl.run("edit", kind, "x", KUBE_EDITOR=str(editor)).endswith("/x edited\n")
    path = "jsonpath={.spec.failurePolicy.maxRestarts}{.data.k}"
    assert kubectl.run("get", kind, "x", "-o", path) == ("9" if kind == "ftj" else "new")


def test_explain(kubectl: Kubectl) -> None:
    explained = kubectl.run("explain", "finetunejob.spec.method")
    assert "How the model learns." in explained
    assert re.search(r"type\s+<string>\n\s+enum: SFT", explained)
    assert "batch/v1" not in explained
    assert re.search(r"backoffLimit\s+<integer>", kubectl.run("explain", "job.spec"))
    assert "metadata" in kubectl.run("explain", "ftj", "--recursive")


def test_delete_waits_for_finalizers(kubectl: Kubectl, embedded: TestServer, tunes: str) -> None:
    body = manifest()
    body["metadata"]["finalizers"] = ["example.com/hold"]
    apply(kubectl, body)
    deleting = kubectl.start("delete", "ftj", "support-bot")
    found = eventually(lambda: "deletionTimestamp" in embedded.client.get(f"{tunes}/support-bot").body["metadata"])
    assert found
    assert deleting.poll() is None
    embedded.client.patch(f"{tunes}/support-bot", {"metadata": {"finalizers": None}})
    printed, _ = deleting.communicate(timeout=30)
    assert deleting.returncode == 0
    assert printed.startswith('finetunejob.finetune.dev "support-bot" deleted')
    assert "NotFound" in kubectl.fail("get", "ftj", "support-bot")


def test_wait_for_a_condition(kubectl: Kubectl, embedded: TestServer, tunes: str) -> None:
    apply(kubectl, manifest())
    waiting = kubectl.start("wait", "--for=condition=Complete", "ftj/support-bot", "--timeout=30s")
    condition = {
        "type": "Complete",
        "status": "True",
        "reason": "TrainingComplete",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    embedded.client.patch(f"{tunes}/support-bot/status", {"status": {"conditions": [condition]}})
    printed, _ = waiting.communicate(timeout=30)
    assert (waiting.returncode, printed) == (0, "finetunejob.finetune.dev/support-bot condition met\n")
    printed = kubectl.fail("wait", "--for=condition=Failed", "ftj/support-bot", "--timeout=1s")
    assert "timed out waiting for the condition" in printed
    kubectl.run("delete", "ftj", "support-bot", "--wait=false")
    kubectl.run("wait", "--for=delete", "ftj/support-bot", "--timeout=10s")


def test_describe_shows_events(kubectl: Kubectl, embedded: TestServer, namespace: str, tunes: str) -> None:
    apply(kubectl, manifest())
    metadata = embedded.client.get(f"{tunes}/support-bot").body["metadata"]
    involved = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        **{key: metadata[key] for key in ("name", "namespace", "uid")},
    }
    event = {
        "metadata": {"name": "support-bot.1"},
        "involvedObject": involved,
        "reason": "StageStarted",
        "message": "Started to prepare the data",
        "type": "Normal",
        "firstTimestamp": metadata["creationTimestamp"],
        "lastTimestamp": metadata["creationTimestamp"],
        "count": 1,
        "source": {"component": "finetune-operator"},
    }
    assert embedded.client.create(f"/api/v1/namespaces/{namespace}/events", event).code == 201
    described = kubectl.run("describe", "ftj", "support-bot")
    assert re.search(r"Normal\s+StageStarted\s+\S+\s+finetune-operator\s+Started to prepare the data", described)
    assert "StageStarted" in kubectl.run("events", "--for", "ftj/support-bot")
    assert re.search(r"StageStarted\s+finetunejob/support-bot\s+Started to prepare", kubectl.run("get", "events"))


def test_typed_commands_write_protobuf(kubectl: Kubectl) -> None:
    assert kubectl.run("create", "secret", "generic", "s3", "--from-literal=KEY=open sesame") == "secret/s3 created\n"
    secret = json.loads(kubectl.run("get", "secret", "s3", "-o", "json"))
    assert (secret["data"], secret["type"]) == ({"KEY": "b3BlbiBzZXNhbWU="}, "Opaque")
    kubectl.run("create", "configmap", "c", "--from-literal=a=b")
    assert kubectl.run("get", "configmap", "c", "-o", "jsonpath={.data.a}") == "b"
    kubectl.run("create", "job", "j", "--image=example.com/x", "--", "sh", "-c", "exit 0")
    assert kubectl.run("get", "job", "j", "-o", "jsonpath={.spec.template.spec.containers[0].command}") == (
        '["sh","-c","exit 0"]'
    )
    kubectl.run("create", "quota", "q", "--hard=pods=2,requests.memory=4Gi")
    assert json.loads(kubectl.run("get", "quota", "q", "-o", "jsonpath={.spec.hard}")) == {
        "pods": "2",
        "requests.memory": "4Gi",
    }
    assert kubectl.run("auth", "can-i", "create", "pods") == "yes\n"
    kubectl.run("create", "serviceaccount", "robot")
    assert "already exists" in kubectl.fail("create", "serviceaccount", "robot")


def test_get_all(kubectl: Kubectl) -> None:
    kubectl.run("create", "job", "j", "--image=example.com/x", "--", "true")
    eventually(lambda: "pod/j-" in kubectl.run("get", "all"))
    assert "job.batch/j" in kubectl.run("get", "all")
    assert kubectl.run("delete", "job", "j").startswith('job.batch "j" deleted')
    eventually(lambda: kubectl.run("get", "pods", "-o", "name") == "")


def test_logs_follow(kubectl_program: str, running: TestServer) -> None:
    """On the cluster that runs pods."""
    name = f"finetune-test-{secrets.token_hex(4)}"
    running.client.create("/api/v1/namespaces", {"metadata": {"name": name}})
    kubectl = Kubectl(kubectl_program, running.kubeconfig, name)
    script = "echo first; while [ ! -e $GO ]; do sleep 0.05; done; echo second; echo third >&2"
    body = job("j", script)
    spec = body["spec"]["template"]["spec"]
    spec["volumes"] = [{"name": "shared", "emptyDir": {}}]
    spec["containers"][0] |= {
        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
        "env": [{"name": "GO", "value": "/shared/go"}],
    }
    apply(kubectl, body)
    eventually(lambda: "Running" in kubectl.run("get", "pods"))
    pod = kubectl.run("get", "pods", "-o", "jsonpath={.items[0].metadata.name}")
    following = kubectl.start("logs", "-f", "job/j")
    assert following.stdout
    assert following.stdout.readline() == "first\n"
    uid = running.client.get(f"/api/v1/namespaces/{name}/pods/{pod}").body["metadata"]["uid"]
    (running.kubeconfig.parent / "pods" / uid / "volumes" / "shared" / "go").touch()
    printed, _ = following.communicate(timeout=30)
    assert printed == "second\nthird\n"
    assert kubectl.run("logs", pod, "--tail=1") == "third\n"
    assert kubectl.run("logs", pod, "--tail=0") == ""
    assert "previous terminated container" in kubectl.fail("logs", "-p", pod)
    assert "timestamps is not available" in kubectl.fail("logs", "--timestamps", pod)
    kubectl.run("wait", "--for=condition=Complete", "job/j", "--timeout=20s")
    running.client.delete(f"/api/v1/namespaces/{name}")
