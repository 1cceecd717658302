"""The chart grants the operator exactly the verbs that its code uses.

What the code uses is seen, not declared: the whole operator runs, without kopf, on an API server of a few lines that
notes each request. Nothing is forgotten, since every call of `Kube` in the code must have been reached. What kopf asks
for follows from the handlers: it lists and watches what they name, and only writes for kinds of handlers that we do not
have.
"""

from __future__ import annotations

import ast
import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import UID, child_job, job_body
from helm_chart import NAMESPACE, Object, of_kind, operator_environment, rendered_example, the

from finetune_api import GROUP, VERSION
from finetune_api.names import LABEL_ATTEMPT, LABEL_JOB_UID, LABEL_QUEUED_JOB_UID, LABEL_STAGE, Stage
from finetune_operator import handlers, kube
from finetune_operator.config import Settings
from finetune_operator.handlers import Operator, build_registry

Right = tuple[str, str, str]
"""API group, resource, verb."""

CODE = Path(handlers.__file__).parent
VERBS = {"GET": "get", "POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}
LEASE = "tuner-finetune-operator"
LONG_AGO = "2026-01-01T00:00:00Z"
NAMES = ("free", "blocked", "halted", "queued", "over", "several")
KUEUE = "/apis/{}kueue.x-k8s.io/v1beta2/namespaces/team"
POSITION = {LABEL_STAGE: "prepare", LABEL_ATTEMPT: "1"}
OVER = {
    "completionTime": LONG_AGO,
    "conditions": [
        {"type": "Failed", "status": "True", "reason": "UserError", "message": "", "lastTransitionTime": LONG_AGO}
    ],
}

PREPARED = {
    "conditions": [
        {"type": "Validated", "status": "True", "reason": "Validated", "message": "", "lastTransitionTime": LONG_AGO}
    ],
}


class Response:
    def __init__(self, status: int, body: Object) -> None:
        self.status = status
        self.headers: dict[str, str] = {}
        self._body = body

    async def read(self) -> bytes:
        return json.dumps(self._body).encode()


class ApiServer:
    """Stands in for the HTTP client; keeps objects by path, and notes which rights were used from where."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.rights: set[Right] = set()
        self.callers: set[tuple[str, int]] = set()

    async def param_serialize(self, method: str, path: str, **rest: Any) -> tuple[str, str, str, Any]:
        selector = dict(rest["query_params"]).get("labelSelector", "")
        return method, path, selector, rest["body"]

    async def call_api(self, method: str, path: str, selector: str, body: Any, **_: Any) -> Response:
        group, resource, name, subresource = parse(path)
        verb = "list" if method == "GET" and not name else VERBS[method]
        self.rights.add((group, f"{resource}/{subresource}" if subresource else resource, verb))
        self.callers.add(caller())
        if verb == "list":
            return Response(200, {"items": list(self._find(group, resource, selector))})
        if verb == "create":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.objects:
                return Response(409, {"message": "already exists"})
            self.objects[path] = {**body, "metadata": {**body["metadata"], "creationTimestamp": LONG_AGO}}
        path = path.removesuffix("/status")
        if path not in self.objects:
            return Response(404, {"message": "not found"})
        if verb == "update":
            self.objects[path] = body
        found = self.objects[path]
        if verb == "patch":
            found["status"] = body["status"]
        return Response(200, found)

    async def close(self) -> None:
        pass

    def _find(self, group: str, resource: str, selector: str) -> Iterator[Object]:
        for path, item in self.objects.items():
            pairs = {f"{key}={value}" for key, value in item["metadata"].get("labels", {}).items()}
            if parse(path)[:2] == (group, resource) and (not selector or selector in pairs):
                yield item


def parse(path: str) -> tuple[str, str, str, str]:
    """Group, resource, name and subresource of a request."""
    root, *rest = path.strip("/").split("/")
    group = rest.pop(0) if root == "apis" else ""
    rest.pop(0)  # the version
    if rest[0] == "namespaces":
        rest = rest[2:]
    resource, name, subresource = (*rest, "", "")[:3]
    return group, resource, name, subresource


def caller() -> tuple[str, int]:
    """File and line that called `Kube`."""
    frame = sys._getframe()
    while frame.f_back and (Path(frame.f_code.co_filename).parent != CODE or frame.f_code.co_filename == kube.__file__):
        frame = frame.f_back
    return Path(frame.f_code.co_filename).name, frame.f_lineno


def calls() -> list[tuple[str, range]]:
    """File and lines of every call of `Kube` by the operator. Commands for people have those people's rights."""
    verbs = {name for name, value in vars(kube.Kube).items() if callable(value) and not name.startswith("_")}
    return [
        (path.name, range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for path in CODE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in verbs
        and ast.unparse(node.func.value) in ("kube", "self._kube")
    ]


def jobs_in_all_situations() -> dict[str, Object]:
    """Objects by path: one job whose way is free, two whose children's names are somebody else's, one that waits in a
    queue, one that is over and has left a child, and one that is to train on several nodes."""
    objects: dict[str, Object] = {
        "/api/v1/namespaces/team/services/several-train": {"metadata": {"name": "several-train"}},
        "/apis/batch/v1/namespaces/team/jobs/halted-prepare-1": {"metadata": {"name": "halted-prepare-1"}},
    }
    # Of a Job that this server gave no uid.
    objects[KUEUE.format("") + "/workloads/w"] = {"metadata": {"name": "w", "labels": {LABEL_QUEUED_JOB_UID: ""}}}
    objects[KUEUE.format("visibility.") + "/localqueues/team-a/pendingworkloads"] = {"metadata": {}, "items": []}
    child = child_job(Stage.PREPARE)
    child["metadata"] |= {
        "name": "over-prepare-1",
        "labels": {LABEL_JOB_UID: f"{UID}-over", **POSITION},
        "ownerReferences": [{"uid": f"{UID}-over"}],
    }
    objects["/apis/batch/v1/namespaces/team/jobs/over-prepare-1"] = child
    for name in NAMES:
        status = {"over": OVER, "several": PREPARED}.get(name)
        scheduling = {"cpuQueueName": "team-a"} if name == "queued" else {}
        resources = {"nodes": 2 if name == "several" else 1}
        job = job_body(status, ttlSecondsAfterFinished=0, scheduling=scheduling, resources=resources)
        job["metadata"] |= {"name": name, "uid": f"{UID}-{name}"}
        objects[f"/apis/{GROUP}/{VERSION}/namespaces/team/finetunejobs/{name}"] = job
    return objects


@pytest.fixture
async def used(monkeypatch: pytest.MonkeyPatch) -> set[Right]:
    """The rights that the operator and kopf use."""
    server = ApiServer()
    server.objects = jobs_in_all_situations()
    lease = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/{LEASE}"

    async def load_client() -> ApiServer:
        return server

    monkeypatch.setattr(handlers, "load_client", load_client)
    settings = Settings(http_host="127.0.0.1", http_port=0, lease_name=LEASE, lease_namespace=NAMESPACE)
    for operator in (Operator(settings), Operator(settings)):
        # The first one makes the lease and releases it, the second one takes it.
        await operator.open()
        await operator.lead()
        if server.objects[lease]["spec"]["leaseTransitions"] == 0:
            await operator.stop()
    await operator.start()
    missing = calls()
    for _ in range(100):
        for name in NAMES:
            operator.mark("team", name)
        await asyncio.sleep(0.02)
        missing = [
            (file, lines)
            for file, lines in calls()
            if not any(file == f and line in lines for f, line in server.callers)
        ]
        if not missing:
            break
    await operator.stop()
    assert calls()
    assert not missing, "no situation of this test reaches these calls: add one"
    return server.rights | kopf_rights()


def kopf_rights() -> set[Right]:
    registry = build_registry(Operator(Settings()))
    # Their handlers would need patch on what they are for.
    for part in (registry._changing, registry._spawning):
        assert not part.get_all_handlers()
    selectors = registry._watching.get_all_selectors()
    assert selectors
    return {(item.group or "", item.any_name or "", verb) for item in selectors for verb in ("list", "watch")}


def granted(role: Object) -> list[Right]:
    return [
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]


def leases(rights: set[Right]) -> set[Right]:
    return {right for right in rights if right[:2] == ("coordination.k8s.io", "leases")}


def test_cluster_role_is_what_the_code_uses(used: set[Right]) -> None:
    rights = granted(the(rendered_example("default"), "ClusterRole", "tuner-finetune-operator"))
    assert sorted(rights) == sorted(used - leases(used))


def test_the_lease_is_the_only_one_and_in_the_operators_namespace(used: set[Right]) -> None:
    assert leases(used)
    role = the(rendered_example("default"), "Role")
    assert role["metadata"]["namespace"] == NAMESPACE
    assert sorted(granted(role)) == sorted(leases(used))
    # What is created has no name yet to be compared with.
    assert {verb for rule in role["rules"] for verb in rule["verbs"] if "resourceNames" not in rule} == {"create"}
    settings = Settings.from_environment(operator_environment(rendered_example("default")))
    assert {name for rule in role["rules"] for name in rule.get("resourceNames", ())} == {settings.lease_name}


def test_a_role_in_each_namespace_is_the_same() -> None:
    rules = the(rendered_example("default"), "ClusterRole", "tuner-finetune-operator")["rules"]
    objects = rendered_example("namespaced")
    assert not of_kind(objects, "ClusterRole")
    assert not of_kind(objects, "ClusterRoleBinding")
    roles = {role["metadata"]["namespace"]: role["rules"] for role in of_kind(objects, "Role")}
    assert roles.pop(NAMESPACE) == the(rendered_example("default"), "Role")["rules"]
    assert roles == {"team-a": rules, "team-b": rules}


@pytest.mark.parametrize("example", ["default", "everything", "namespaced"])
def test_bindings_bind_the_operator(example: str) -> None:
    objects = rendered_example(example)
    account = the(objects, "ServiceAccount")["metadata"]["name"]
    roles = {(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in objects}
    bindings = of_kind(objects, "ClusterRoleBinding") + of_kind(objects, "RoleBinding")
    assert bindings
    for binding in bindings:
        reference = binding["roleRef"]
        assert (reference["kind"], binding["metadata"].get("namespace"), reference["name"]) in roles
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}]


def test_people_get_the_job_and_nothing_else() -> None:
    objects = rendered_example("default")
    people = {}
    for audience in ("view", "edit"):
        role = the(objects, "ClusterRole", f"tuner-finetune-operator-{audience}")
        assert role["metadata"]["labels"][f"rbac.authorization.k8s.io/aggregate-to-{audience}"] == "true"
        rights = granted(role)
        assert {(group, resource) for group, resource, _ in rights} == {(GROUP, "finetunejobs")}
        people[audience] = {verb for _, _, verb in rights}
    # The cluster's edit role holds its view role.
    assert people["view"] == {"get", "list", "watch"}
    assert people["edit"] == {"create", "delete", "deletecollection", "patch", "update"}
