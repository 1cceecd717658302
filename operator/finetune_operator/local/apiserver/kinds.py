"""What is special about a kind: its defaults, its own rules, how long it takes to go.

A kind without an entry in `KINDS` is a plain record. Rules are those that a manifest of this project or its user can
break; wording follows the real server.
"""

from __future__ import annotations

import base64
import copy
import re
import secrets
from collections.abc import Iterator
from typing import Any, ClassVar

from finetune_operator.local.apiserver.store import Object
from finetune_operator.schema import ErrorType, FieldError, Path, forbidden, invalid, not_supported, required

JOB_TRACKING_FINALIZER = "batch.kubernetes.io/job-tracking"
JOB_NAME_LABELS = ("batch.kubernetes.io/job-name", "job-name")
JOB_UID_LABELS = ("batch.kubernetes.io/controller-uid", "controller-uid")

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DNS_SUBDOMAIN_TEXT = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_DNS_SUBDOMAIN = re.compile(_DNS_SUBDOMAIN_TEXT)
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_DATA_KEY = re.compile(r"[-._a-zA-Z0-9]+")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
IMMUTABLE = "field is immutable"


class Kind:
    """A plain record."""

    default_propagation: ClassVar[str] = "Background"
    returns_deleted: ClassVar[bool] = False
    """Whether DELETE answers with the object instead of a Status."""

    def prepare_create(self, obj: Object) -> None:
        """Fill in what the server decides; metadata has its name and uid already."""

    def normalise(self, obj: Object) -> None:
        """Bring what was written, on create or update, into the form that is stored."""

    def validate(self, obj: Object) -> Iterator[FieldError]:
        """Rules beyond the schema, on create and update."""
        yield from ()

    def validate_update(self, new: Object, old: Object) -> Iterator[FieldError]:
        """Rules on a change of anything except the status."""
        yield from ()

    def grace_seconds(self, obj: Object, requested: int | None) -> int:
        """How long a deletion waits for whoever runs the object; 0 removes it at once."""
        return 0


class _Namespace(Kind):
    returns_deleted = True

    def prepare_create(self, obj: Object) -> None:
        obj["spec"] = {"finalizers": ["kubernetes"]}
        obj["status"] = {"phase": "Active"}
        labels = obj["metadata"].setdefault("labels", {})
        labels["kubernetes.io/metadata.name"] = obj["metadata"]["name"]

    def validate(self, obj: Object) -> Iterator[FieldError]:
        if not _DNS_LABEL.fullmatch(obj["metadata"]["name"]):
            yield invalid(("metadata", "name"), obj["metadata"]["name"], "a lowercase RFC 1123 label is needed")


class _Data(Kind):
    """ConfigMaps and Secrets."""

    def validate(self, obj: Object) -> Iterator[FieldError]:
        for field in ("data", "binaryData"):
            for key in obj.get(field, {}):
                if not _DATA_KEY.fullmatch(key):
                    message = (
                        "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',"
                        "  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')"
                    )
                    yield invalid((f"{field}[{key}]",), key, message)

    def validate_update(self, new: Object, old: Object) -> Iterator[FieldError]:
        if not old.get("immutable"):
            return
        message = "field is immutable when `immutable` is set"
        if not new.get("immutable"):
            yield forbidden(("immutable",), message)
        for key in ("data", "binaryData"):
            if new.get(key) != old.get(key):
                yield forbidden((key,), message)


class _Secret(_Data):
    def prepare_create(self, obj: Object) -> None:
        obj.setdefault("type", "Opaque")

    def normalise(self, obj: Object) -> None:
        plain = obj.pop("stringData", {})
        if plain:
            encoded = {key: base64.b64encode(value.encode()).decode() for key, value in plain.items()}
            obj["data"] = {**obj.get("data", {}), **encoded}


class _Quota(Kind):
    def prepare_create(self, obj: Object) -> None:
        obj["status"] = {"hard": obj.get("spec", {}).get("hard", {})}


class _Claim(Kind):
    returns_deleted = True

    def prepare_create(self, obj: Object) -> None:
        obj["status"] = {"phase": "Pending"}


class _CustomResourceDefinition(Kind):
    def prepare_create(self, obj: Object) -> None:
        names = obj["spec"]["names"]
        names.setdefault("singular", names["kind"].lower())
        names.setdefault("listKind", f"{names['kind']}List")
        obj["spec"].setdefault("conversion", {"strategy": "None"})
        stored = [version["name"] for version in obj["spec"]["versions"] if version.get("storage")]
        obj["status"] = {
            "conditions": [
                _condition("NamesAccepted", "NoConflicts", "no conflicts found", obj),
                _condition("Established", "InitialNamesAccepted", "the initial names have been accepted", obj),
            ],
            "acceptedNames": names,
            "storedVersions": stored,
        }

    def validate(self, obj: Object) -> Iterator[FieldError]:
        spec = obj["spec"]
        expected = f"{spec['names']['plural']}.{spec['group']}"
        if obj["metadata"]["name"] != expected:
            yield invalid(("metadata", "name"), obj["metadata"]["name"], 'must be spec.names.plural+"."+spec.group')
        if sum(bool(version.get("storage")) for version in spec["versions"]) != 1:
            message = "must have exactly one version marked as storage version"
            yield FieldError(("spec", "versions"), ErrorType.INVALID, f"Invalid value: {message}")


def _condition(kind: str, reason: str, message: str, obj: Object) -> dict[str, Any]:
    return {
        "type": kind,
        "status": "True",
        "lastTransitionTime": obj["metadata"]["creationTimestamp"],
        "reason": reason,
        "message": message,
    }


class _Pod(Kind):
    returns_deleted = True

    def prepare_create(self, obj: Object) -> None:
        default_pod_spec(obj["spec"])
        obj["status"] = {"phase": "Pending", "qosClass": _qos_class(obj["spec"])}

    def validate(self, obj: Object) -> Iterator[FieldError]:
        yield from _pod_spec_errors(obj["spec"], ("spec",))

    def validate_update(self, new: Object, old: Object) -> Iterator[FieldError]:
        def fixed(obj: Object) -> Object:
            spec: Object = copy.deepcopy(obj["spec"])
            for container in spec["containers"]:
                container.pop("image", None)
            for field in ("activeDeadlineSeconds", "tolerations", "terminationGracePeriodSeconds"):
                spec.pop(field, None)
            return spec

        if fixed(new) != fixed(old):
            yield forbidden(
                ("spec",),
                "pod updates may not change fields other than `spec.containers[*].image`,"
                "`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to "
                "existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was "
                "previously negative)",
            )

    def grace_seconds(self, obj: Object, requested: int | None) -> int:
        if not obj["spec"].get("nodeName") or obj["status"].get("phase") in ("Succeeded", "Failed"):
            return 0
        seconds: int = obj["spec"]["terminationGracePeriodSeconds"] if requested is None else requested
        return max(seconds, 0)


class _Job(Kind):
    # batch/v1 kept the behaviour of the first controllers: who does not ask for it keeps the pods.
    default_propagation = "Orphan"

    def prepare_create(self, obj: Object) -> None:
        spec = obj["spec"]
        template = spec["template"]
        if template.get("metadata", {}).get("labels") and not obj["metadata"].get("labels"):
            obj["metadata"]["labels"] = dict(template["metadata"]["labels"])
        if "completions" not in spec and "parallelism" not in spec:
            spec["completions"] = 1
        spec.setdefault("parallelism", 1)
        spec.setdefault("backoffLimit", 6)
        spec.setdefault("completionMode", "NonIndexed")
        spec.setdefault("suspend", False)
        spec.setdefault("manualSelector", False)
        spec.setdefault("podReplacementPolicy", "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed")
        for rule in spec.get("podFailurePolicy", {}).get("rules", ()):
            for pattern in rule.get("onPodConditions", ()):
                pattern.setdefault("status", "True")
        default_pod_spec(template.setdefault("spec", {}))
        if not spec["manualSelector"]:
            labels = template.setdefault("metadata", {}).setdefault("labels", {})
            for label in JOB_NAME_LABELS:
                labels.setdefault(label, obj["metadata"]["name"])
            for label in JOB_UID_LABELS:
                labels.setdefault(label, obj["metadata"]["uid"])
            selector = spec.setdefault("selector", {}).setdefault("matchLabels", {})
            selector.setdefault(JOB_UID_LABELS[0], obj["metadata"]["uid"])
        obj["status"] = {}

    def validate(self, obj: Object) -> Iterator[FieldError]:
        spec = obj["spec"]
        for field in (
            *("parallelism", "completions", "backoffLimit", "activeDeadlineSeconds"),
            "ttlSecondsAfterFinished",
        ):
            if spec.get(field, 0) < 0:
                yield invalid(("spec", field), spec[field], "must be greater than or equal to 0")
        for field in ("successPolicy", "backoffLimitPerIndex", "maxFailedIndexes", "managedBy"):
            if field in spec:
                yield forbidden(("spec", field), "the embedded control plane does not have this feature of Jobs")
        if spec["completionMode"] == "Indexed":
            yield from self._indexed_errors(obj)
        yield from self._policy_errors(spec)
        yield from _pod_spec_errors(spec["template"]["spec"], ("spec", "template", "spec"))

    def _indexed_errors(self, obj: Object) -> Iterator[FieldError]:
        spec, name = obj["spec"], obj["metadata"]["name"]
        if "completions" not in spec:
            yield required(("spec", "completions"), "when completion mode is Indexed")
        elif spec["completions"] > 0 and not _DNS_LABEL.fullmatch(f"{name}-{spec['completions'] - 1}"):
            hostname = f"{name}-{spec['completions'] - 1}"
            message = f"will not able to create pod with invalid DNS label: {hostname}"
            yield invalid(("metadata", "name"), name, message)

    def _policy_errors(self, spec: Object) -> Iterator[FieldError]:
        restart: Path = ("spec", "template", "spec", "restartPolicy")
        policy = spec["template"]["spec"]["restartPolicy"]
        if policy == "Always":
            yield not_supported(restart, policy, ["OnFailure", "Never"])
        if "podFailurePolicy" not in spec:
            return
        if policy != "Never":
            yield invalid(restart, policy, 'only "Never" is supported when podFailurePolicy is specified')
        if spec["podReplacementPolicy"] != "Failed":
            yield not_supported(("spec", "podReplacementPolicy"), spec["podReplacementPolicy"], ["Failed"])
        containers = {container["name"] for container in spec["template"]["spec"]["containers"]}
        for index, rule in enumerate(spec["podFailurePolicy"]["rules"]):
            yield from _rule_errors(rule, containers, ("spec", "podFailurePolicy", "rules", index))

    def validate_update(self, new: Object, old: Object) -> Iterator[FieldError]:
        for field in ("completions", "selector", "template", "completionMode", "podFailurePolicy"):
            if new["spec"].get(field) != old["spec"].get(field) and not (
                field == "template" and _only_placement_differs(new, old)
            ):
                yield invalid(("spec", field), new["spec"].get(field), IMMUTABLE)


def _only_placement_differs(new: Object, old: Object) -> bool:
    """A suspended Job without pods may still be told where to run: that is how queueing systems place it."""
    may_change = old["spec"].get("suspend") and "startTime" not in old.get("status", {})

    def fixed(obj: Object) -> Object:
        template: Object = copy.deepcopy(obj["spec"]["template"])
        for field in ("nodeSelector", "tolerations", "affinity", "schedulingGates"):
            template["spec"].pop(field, None)
        template["metadata"] = {}
        return template

    return bool(may_change) and fixed(new) == fixed(old)


def _rule_errors(rule: Object, containers: set[str], path: Path) -> Iterator[FieldError]:
    if rule["action"] not in ("Count", "FailJob", "Ignore"):
        yield not_supported((*path, "action"), rule["action"], ["Count", "FailJob", "Ignore"])
    codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
    if bool(codes) == bool(conditions):
        problem = "specifying both OnExitCodes and OnPodConditions is not supported"
        if not codes:
            problem = "specifying one of OnExitCodes and OnPodConditions is required"
        yield FieldError(path, ErrorType.INVALID, f"Invalid value: {problem}")
    if not codes:
        return
    path = (*path, "onExitCodes")
    values = codes.get("values", [])
    if codes["operator"] not in ("In", "NotIn"):
        yield not_supported((*path, "operator"), codes["operator"], ["In", "NotIn"])
    if "containerName" in codes and codes["containerName"] not in containers:
        message = "must be one of the container or initContainer names in the pod template"
        yield invalid((*path, "containerName"), codes["containerName"], message)
    if not values:
        yield invalid((*path, "values"), values, "at least one value is required")
    if codes["operator"] == "In" and 0 in values:
        yield invalid((*path, "values", values.index(0)), 0, "must not be 0 for the In operator")
    if values != sorted(values):
        yield invalid((*path, "values"), values, "must be ordered")


def default_pod_spec(spec: Object) -> None:
    """What the server fills into the spec of a pod or of a Job's template."""
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("schedulerName", "default-scheduler")
    spec.setdefault("securityContext", {})
    for container in [*spec.get("initContainers", ()), *spec.get("containers", ())]:
        container.setdefault("terminationMessagePath", "/dev/termination-log")
        container.setdefault("terminationMessagePolicy", "File")
        _, _, tag = container.get("image", "").rpartition(":")
        container.setdefault(
            "imagePullPolicy", "Always" if tag in ("latest", container.get("image")) else "IfNotPresent"
        )
        resources = container.setdefault("resources", {})
        for name, limit in resources.get("limits", {}).items():
            resources.setdefault("requests", {}).setdefault(name, limit)
        for port in container.get("ports", ()):
            port.setdefault("protocol", "TCP")
        for variable in container.get("env", ()):
            if "fieldRef" in variable.get("valueFrom", {}):
                variable["valueFrom"]["fieldRef"].setdefault("apiVersion", "v1")
    for volume in spec.get("volumes", ()):
        for source in ("configMap", "secret", "projected"):
            if source in volume:
                volume[source].setdefault("defaultMode", 0o644)


def _qos_class(spec: Object) -> str:
    resources = [container["resources"] for container in spec["containers"]]
    if not any(item.get("requests") or item.get("limits") for item in resources):
        return "BestEffort"
    guaranteed = all(
        {"cpu", "memory"} <= item.get("limits", {}).keys() and item["limits"] == item.get("requests")
        for item in resources
    )
    return "Guaranteed" if guaranteed else "Burstable"


def _pod_spec_errors(spec: Object, path: Path) -> Iterator[FieldError]:
    volumes = {volume["name"] for volume in spec.get("volumes", ())}
    names = set()
    for field in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(field, ())):
            here = (*path, field, index)
            if not _DNS_LABEL.fullmatch(container["name"]):
                yield invalid((*here, "name"), container["name"], "a lowercase RFC 1123 label is needed")
            if container["name"] in names:
                shown = f'Duplicate value: "{container["name"]}"'
                yield FieldError((*here, "name"), ErrorType.DUPLICATE, shown)
            names.add(container["name"])
            if not container.get("image"):
                yield required((*here, "image"))
            for number, mount in enumerate(container.get("volumeMounts", ())):
                if mount["name"] not in volumes:
                    shown = f'Not found: "{mount["name"]}"'
                    yield FieldError((*here, "volumeMounts", number, "name"), ErrorType.INVALID, shown)


def metadata_errors(obj: Object) -> Iterator[FieldError]:
    """Rules on names, labels and annotations, which all kinds share."""
    metadata = obj["metadata"]
    name = metadata.get("name", "")
    if not name:
        yield required(("metadata", "name"), "name or generateName is required")
    elif len(name) > 253 or not _DNS_SUBDOMAIN.fullmatch(name):
        yield invalid(
            ("metadata", "name"),
            name,
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must "
            "start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
            f"'{_DNS_SUBDOMAIN_TEXT}')",
        )
    for key, value in metadata.get("labels", {}).items():
        if not _LABEL_KEY.fullmatch(key):
            yield invalid(
                ("metadata", "labels"), key, "name part must consist of alphanumeric characters, '-', '_' or '.'"
            )
        if len(value) > 63 or not _LABEL_VALUE.fullmatch(value):
            yield invalid(
                ("metadata", "labels"),
                value,
                "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and "
                "must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', "
                "regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')",
            )


def generated_name(prefix: str) -> str:
    """A name from generateName, with the five characters that Kubernetes appends."""
    alphabet = "bcdfghjklmnpqrstvwxz2456789"
    return prefix[:58] + "".join(secrets.choice(alphabet) for _ in range(5))


PLAIN = Kind()
KINDS: dict[str, Kind] = {
    "namespaces": _Namespace(),
    "pods": _Pod(),
    "configmaps": _Data(),
    "secrets": _Secret(),
    "persistentvolumeclaims": _Claim(),
    "resourcequotas": _Quota(),
    "jobs.batch": _Job(),
    "customresourcedefinitions.apiextensions.k8s.io": _CustomResourceDefinition(),
}
