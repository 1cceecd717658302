"""The pods of the operator and of its jobs under the `restricted` Pod Security profile."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
from builders import job_body
from helm_chart import EXAMPLES, operator_container, pod_template, rendered_example
from pod_security import violations

from finetune_api.names import Stage
from finetune_operator import children
from finetune_operator.config import Settings
from finetune_operator.resource import FineTuneJob

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "cpu": {"resources": {"gpusPerNode": 0}},
    "everything": {
        "resources": {"gpusPerNode": 2, "cpu": "8", "memory": "64Gi", "sharedMemory": "4Gi"},
        "scheduling": {
            "nodeSelector": {"gpu": "h200"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        },
        "stages": {"prepare": {"cpu": "2", "memory": "4Gi"}, "export": {"cpu": "2", "memory": "4Gi"}},
        "storage": {"secretRef": {"name": "s3"}, "serviceAccountName": "trainer"},
    },
}


def build(stage: Stage, **spec: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    job = FineTuneJob.parse(job_body({"trainedAttempt": 1}, **spec))
    assert job.spec is not None, job.spec_problem
    return children.build(job, job.spec, stage, 1, Settings(image_pull_secrets=("registry",)))


@pytest.mark.parametrize("example", [path.name.removesuffix("-values.yaml") for path in EXAMPLES])
def test_operator_pod_is_restricted(example: str) -> None:
    objects = rendered_example(example)
    assert violations(pod_template(objects)["spec"]) == []
    assert operator_container(objects)["securityContext"]["readOnlyRootFilesystem"] is True


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", Stage)
def test_job_pods_are_restricted(stage: Stage, variant: str) -> None:
    _, job = build(stage, **VARIANTS[variant])
    assert violations(job["spec"]["template"]["spec"]) == []


@pytest.mark.parametrize("version", ["1.32.0", "1.37.0"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", Stage)
def test_children_are_valid(stage: Stage, variant: str, version: str) -> None:
    for child in build(stage, **VARIANTS[variant]):
        kubernetes_validate.validate(child, version, strict=True)


@pytest.mark.parametrize("stage", Stage)
def test_job_pods_write_only_to_volumes(stage: Stage) -> None:
    _, job = build(stage)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["automountServiceAccountToken"] is False
    home = next(item["value"] for item in container["env"] if item["name"] == "HOME")
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert home in writable


def restricted_pod() -> dict[str, Any]:
    return {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "main",
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }


def test_the_checker_admits_a_restricted_pod() -> None:
    assert violations(restricted_pod()) == []


@pytest.mark.parametrize(
    ("pod", "container", "context", "violation"),
    [
        ({"hostNetwork": True}, {}, {}, "hostNetwork"),
        ({"hostPID": True}, {}, {}, "hostPID"),
        ({"hostIPC": True}, {}, {}, "hostIPC"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, {}, {}, "volume v: hostPath"),
        ({"securityContext": {"runAsNonRoot": True}}, {}, {}, "container main: seccompProfile"),
        ({"securityContext": {"seccompProfile": {"type": "Localhost"}}}, {}, {}, "container main: runAsNonRoot"),
        ({"initContainers": [{"name": "init"}]}, {}, {}, "container init: capabilities.drop"),
        ({}, {"ports": [{"containerPort": 1, "hostPort": 1}]}, {}, "container main: hostPort"),
        ({}, {"livenessProbe": {"httpGet": {"host": "10.0.0.1"}}}, {}, "container main: host of a probe or handler"),
        (
            {},
            {"lifecycle": {"preStop": {"tcpSocket": {"host": "x"}}}},
            {},
            "container main: host of a probe or handler",
        ),
        ({}, {}, {"privileged": True}, "container main: privileged"),
        ({}, {}, {"procMount": "Unmasked"}, "container main: procMount"),
        ({}, {}, {"allowPrivilegeEscalation": True}, "container main: allowPrivilegeEscalation"),
        ({}, {}, {"capabilities": {"drop": ["NET_RAW"]}}, "container main: capabilities.drop"),
        ({}, {}, {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}, "container main: capabilities.add"),
        ({}, {}, {"runAsNonRoot": False}, "container main: runAsNonRoot"),
        ({}, {}, {"runAsUser": 0}, "container main: runAsUser"),
        ({}, {}, {"seccompProfile": {"type": "Unconfined"}}, "container main: seccompProfile"),
        ({}, {}, {"appArmorProfile": {"type": "Unconfined"}}, "container main: appArmorProfile"),
        ({}, {}, {"seLinuxOptions": {"type": "spc_t"}}, "container main: seLinuxOptions"),
        ({}, {}, {"windowsOptions": {"hostProcess": True}}, "container main: hostProcess"),
    ],
)
def test_the_checker_sees(
    pod: dict[str, Any], container: dict[str, Any], context: dict[str, Any], violation: str
) -> None:
    bad = restricted_pod() | pod
    main = bad["containers"][0]
    main |= container
    main["securityContext"] |= context
    assert violation in violations(bad)


def test_the_checker_sees_sysctls() -> None:
    bad = restricted_pod()
    bad["securityContext"]["sysctls"] = [{"name": "kernel.msgmax", "value": "1"}]
    assert violations(bad) == ["sysctl kernel.msgmax"]
