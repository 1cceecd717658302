"""What a job says about its pods, with the real operator, trainer and kubectl."""

from __future__ import annotations

from conftest import manifest
from local_up import LocalUp, eventually


def test_a_template_and_a_model_cache(up: LocalUp) -> None:
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    up.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "bases"}, "spec": claim})
    up.kubectl("create", "secret", "generic", "hub", "--from-literal=token=a-token-of-mine")
    up.kubectl("create", "configmap", "settings", "--from-literal=threads=1")
    template = {
        "labels": {"team": "blue"},
        "env": [
            {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
            {"name": "OMP_NUM_THREADS", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "threads"}}},
            {"name": "HF_HOME", "value": "/scratch/hf"},
        ],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    }
    spec = {"podTemplate": template, "storage": {"modelCache": {"claimName": "bases"}}}
    for name in ("templated", "templated-again"):
        up.apply(manifest(name, **spec))
        up.kubectl("wait", "ftj", name, "--for=condition=Complete", "--timeout=240s")
    stages = up.kubectl(
        "get", "pods", "-l", "team=blue", "-o", "jsonpath={.items[*].metadata.labels.finetune\\.dev/stage}"
    )
    assert sorted(stages.split()) == sorted(["prepare", "train", "export"] * 2)
    resolved = up.status("templated")["resolved"]
    assert (resolved["trainMemory"], resolved["trainEphemeralStorage"]) == ("7Gi", "3Gi")
    log = up.finetune("logs", "templated-again", "--stage", "train").stdout
    assert "model.safetensors is in the model cache" in log
    work = up.status("templated")["resolved"]["workURI"]
    assert not any(b"a-token-of-mine" in up.read(f"{work}/{key}") for key in up.keys(work) if key.endswith(".txt"))


def test_a_place_that_does_not_exist_is_waited_for(up: LocalUp) -> None:
    up.apply(manifest("spotty", scheduling={"capacity": "Spot"}))

    def waits() -> bool:
        conditions = {item["type"]: item for item in up.status("spotty").get("conditions", [])}
        running = conditions.get("Running", {})
        return running.get("reason") == "Unschedulable" and "didn't match Pod's node affinity" in running["message"]

    eventually(waits, "Unschedulable")
    up.kubectl("label", "node", "local", "karpenter.sh/capacity-type=spot")
    up.kubectl("wait", "ftj", "spotty", "--for=condition=Complete", "--timeout=240s")
    up.kubectl("label", "node", "local", "karpenter.sh/capacity-type-")
