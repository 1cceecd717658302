"""Whether a pod may be on the one node of the local cluster, judged like the real scheduler does."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.local.affinity import refusal

NODE = {"kubernetes.io/hostname": "local", "nvidia.com/gpu.product": "NVIDIA-H200", "nvidia.com/gpu.memory": "143771"}
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
WRONG_NODE = "1 node(s) didn't match Pod's node affinity/selector"


def pod(labels: dict[str, str] | None = None, namespace: str = "team", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": namespace, "labels": labels or {}}, "spec": spec}


def node_terms(*terms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": term} for term in terms]}}}


def expression(operator: str, *values: str, key: str = "nvidia.com/gpu.product") -> dict[str, Any]:
    return {"key": key, "operator": operator, **({"values": list(values)} if values else {})}


@pytest.mark.parametrize(
    ("item", "fits"),
    [
        (expression("In", "NVIDIA-H200", "NVIDIA-A100"), True),
        (expression("In", "NVIDIA-A100"), False),
        (expression("In", "spot", key="karpenter.sh/capacity-type"), False),
        (expression("NotIn", "NVIDIA-A100"), True),
        (expression("NotIn", "NVIDIA-H200"), False),
        (expression("NotIn", "spot", key="karpenter.sh/capacity-type"), True),
        (expression("Exists"), True),
        (expression("Exists", key="other"), False),
        (expression("DoesNotExist", key="other"), True),
        (expression("DoesNotExist"), False),
        (expression("Gt", "80000", key="nvidia.com/gpu.memory"), True),
        (expression("Gt", "143771", key="nvidia.com/gpu.memory"), False),
        (expression("Lt", "80000", key="nvidia.com/gpu.memory"), False),
        (expression("Lt", "200000", key="nvidia.com/gpu.memory"), True),
        (expression("Gt", "1"), False),
    ],
)
def test_requirements_on_the_node(item: dict[str, Any], fits: bool) -> None:
    assert refusal(pod(affinity=node_terms([item])), NODE, []) == (None if fits else WRONG_NODE)


def test_one_term_must_hold_as_a_whole() -> None:
    good, bad = expression("Exists"), expression("DoesNotExist")
    assert refusal(pod(affinity=node_terms([good, bad])), NODE, []) == WRONG_NODE
    assert refusal(pod(affinity=node_terms([good, bad], [good])), NODE, []) is None
    assert refusal(pod(affinity=node_terms([])), NODE, []) == WRONG_NODE


def test_the_selector_and_the_affinity_must_hold_both() -> None:
    mine = {"nodeSelector": {"kubernetes.io/hostname": "local"}}
    assert refusal(pod(**mine, affinity=node_terms([expression("Exists")])), NODE, []) is None
    assert refusal(pod(**mine, affinity=node_terms([expression("DoesNotExist")])), NODE, []) == WRONG_NODE
    assert refusal(pod(nodeSelector={"pool": "a"}), NODE, []) == WRONG_NODE


def neighbourly(kind: str, labels: dict[str, str], key: str = "kubernetes.io/hostname") -> dict[str, Any]:
    return {kind: {REQUIRED: [{"labelSelector": {"matchLabels": labels}, "topologyKey": key}]}}


def test_company_that_is_wanted() -> None:
    wanted = neighbourly("podAffinity", {"app": "cache"})
    alone = "1 node(s) didn't match pod affinity rules"
    assert refusal(pod(affinity=wanted), NODE, []) == alone
    assert refusal(pod(affinity=wanted), NODE, [pod({"app": "cache"}, "other")]) == alone
    assert refusal(pod(affinity=wanted), NODE, [pod({"app": "cache"})]) is None
    # Pods that want to be together: one must be the first.
    assert refusal(pod({"app": "cache"}, affinity=wanted), NODE, []) is None
    elsewhere = neighbourly("podAffinity", {"app": "cache"}, "topology.kubernetes.io/zone")
    assert refusal(pod(affinity=elsewhere), NODE, [pod({"app": "cache"})]) == alone


def test_company_that_is_not_wanted() -> None:
    unwanted = neighbourly("podAntiAffinity", {"app": "server"})
    assert refusal(pod({"app": "server"}, affinity=unwanted), NODE, []) is None
    near = [pod({"app": "server"})]
    assert refusal(pod(affinity=unwanted), NODE, near) == "1 node(s) didn't match pod anti-affinity rules"


def test_there_are_no_devices_to_claim() -> None:
    claims = [{"name": "gpus", "resourceClaimTemplateName": "gpus"}]
    assert refusal(pod(resourceClaims=claims), NODE, []) == "1 cannot allocate all claims"
