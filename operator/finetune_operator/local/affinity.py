"""Whether a pod wants to be on the one node there is: selectors, affinity and claims, as the scheduler judges them.

What is only preferred is left out: with one node there is nothing to prefer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetune_operator.local.apiserver.store import Object

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def refusal(pod: Object, labels: Mapping[str, str], neighbours: Sequence[Object]) -> str | None:
    """Why the pod cannot be on a node with these labels and pods, in the scheduler's words."""
    spec = pod["spec"]
    affinity = spec.get("affinity", {})
    if not _may_be_on(spec.get("nodeSelector", {}), affinity.get("nodeAffinity", {}), labels):
        return "1 node(s) didn't match Pod's node affinity/selector"
    near = affinity.get("podAffinity", {}).get(_REQUIRED, ())
    # The first of pods that want to be together has nobody to join.
    if not all(_present(term, labels, pod, [*neighbours, pod]) for term in near):
        return "1 node(s) didn't match pod affinity rules"
    far = affinity.get("podAntiAffinity", {}).get(_REQUIRED, ())
    if any(_present(term, labels, pod, neighbours) for term in far):
        return "1 node(s) didn't match pod anti-affinity rules"
    if spec.get("resourceClaims"):
        return "1 cannot allocate all claims"
    return None


def _may_be_on(selector: Mapping[str, str], affinity: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if not selector.items() <= labels.items():
        return False
    if _REQUIRED not in affinity:
        return True
    # A term without expressions stands for no node at all.
    terms = [term.get("matchExpressions") for term in affinity[_REQUIRED]["nodeSelectorTerms"]]
    return any(expressions and all(_meets(labels, item) for item in expressions) for expressions in terms)


def _present(term: Mapping[str, Any], labels: Mapping[str, str], pod: Object, others: Sequence[Object]) -> bool:
    """Whether one of the pods that a term speaks of is in the same place, and the place exists."""
    selector = term.get("labelSelector", {})
    namespaces = term.get("namespaces") or [pod["metadata"]["namespace"]]
    return term["topologyKey"] in labels and any(
        other["metadata"]["namespace"] in namespaces and _selects(selector, other["metadata"].get("labels") or {})
        for other in others
    )


def _selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        _meets(labels, item) for item in selector.get("matchExpressions", ())
    )


def _meets(labels: Mapping[str, str], requirement: Mapping[str, Any]) -> bool:
    value, values = labels.get(requirement["key"]), requirement.get("values", ())
    match requirement["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt" | "Lt" as operator:
            if value is None or not value.isdigit():
                return False
            return int(value) > int(values[0]) if operator == "Gt" else int(value) < int(values[0])
    return False
