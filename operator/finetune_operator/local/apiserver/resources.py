"""What the server serves: the built-in kinds as data, and custom kinds made from their CustomResourceDefinition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_operator.local.apiserver import definitions
from finetune_operator.schema import StructuralSchema

ALL_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")

JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"


@dataclass(frozen=True)
class Resource:
    """One kind and how it is addressed."""

    group: str
    version: str
    plural: str
    kind: str
    schema: StructuralSchema
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ALL_VERBS
    singular: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Field selectors beside the metadata ones: name to path. An absent field reads as ""."""
    has_generation: bool = False
    """Whether metadata.generation counts the changes of everything except metadata and status."""
    unconditional_update: bool = True
    """Whether a PUT may leave out metadata.resourceVersion."""
    columns: tuple[Mapping[str, Any], ...] | None = None
    """Printer columns of a custom kind; those of built-in kinds are in `tables`."""

    @property
    def key(self) -> str:
        """`jobs.batch`, or `pods` in the core group."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified_kind(self) -> str:
        """`Job.batch`, or `Pod` in the core group: how error messages name a kind."""
        return f"{self.kind}.{self.group}" if self.group else self.kind

    @property
    def has_status(self) -> bool:
        return "status" in self.subresources

    @property
    def is_custom(self) -> bool:
        return self.columns is not None

    @property
    def patch_types(self) -> tuple[str, ...]:
        """Media types of PATCH: custom kinds have no strategic merge, for want of merge keys."""
        return (JSON_PATCH, MERGE_PATCH) if self.is_custom else (JSON_PATCH, MERGE_PATCH, STRATEGIC_MERGE_PATCH)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _builtin(kind: str, plural: str, group: str = "", package: str = "io.k8s.api.core.v1", **more: Any) -> Resource:
    return Resource(group, "v1", plural, kind, definitions.schema(f"{package}.{kind}"), singular=kind.lower(), **more)


def builtins() -> list[Resource]:
    """The kinds that a small operator, its children and kubectl need."""
    authorization = "io.k8s.api.authorization.v1"
    return [
        _builtin("Namespace", "namespaces", namespaced=False, short_names=("ns",), subresources=("status",)),
        _builtin(
            "Node",
            "nodes",
            namespaced=False,
            short_names=("no",),
            subresources=("status",),
            fields=_same("spec.unschedulable"),
        ),
        _builtin(
            "Pod",
            "pods",
            short_names=("po",),
            categories=("all",),
            subresources=("status", "log", "eviction", "binding"),
            has_generation=True,
            fields=_same(
                "spec.nodeName",
                "spec.restartPolicy",
                "spec.schedulerName",
                "spec.serviceAccountName",
                "status.phase",
                "status.podIP",
            ),
        ),
        _builtin("ConfigMap", "configmaps", short_names=("cm",)),
        _builtin("Secret", "secrets", fields=_same("type")),
        _builtin(
            "Event",
            "events",
            short_names=("ev",),
            fields=_same(
                "involvedObject.kind",
                "involvedObject.namespace",
                "involvedObject.name",
                "involvedObject.uid",
                "involvedObject.apiVersion",
                "involvedObject.resourceVersion",
                "involvedObject.fieldPath",
                "reason",
                "type",
            )
            | {"source": "source.component", "reportingComponent": "reportingComponent"},
        ),
        _builtin("Service", "services", short_names=("svc",), categories=("all",), subresources=("status",)),
        _builtin("ResourceQuota", "resourcequotas", short_names=("quota",), subresources=("status",)),
        _builtin("ServiceAccount", "serviceaccounts", short_names=("sa",)),
        _builtin("PersistentVolumeClaim", "persistentvolumeclaims", short_names=("pvc",), subresources=("status",)),
        _builtin(
            "Job",
            "jobs",
            "batch",
            "io.k8s.api.batch.v1",
            categories=("all",),
            subresources=("status",),
            has_generation=True,
            fields={"status.successful": "status.succeeded"},
        ),
        _builtin("Lease", "leases", "coordination.k8s.io", "io.k8s.api.coordination.v1", unconditional_update=False),
        _builtin(
            "CustomResourceDefinition",
            "customresourcedefinitions",
            "apiextensions.k8s.io",
            "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1",
            namespaced=False,
            short_names=("crd", "crds"),
            categories=("api-extensions",),
            subresources=("status",),
            has_generation=True,
            unconditional_update=False,
        ),
        # Reviews are answered, not stored: `kubectl auth can-i`, and kopf's checks of its own rights.
        *(
            _builtin(kind, plural, "authorization.k8s.io", authorization, namespaced=False, verbs=("create",))
            for kind, plural in (
                ("SelfSubjectAccessReview", "selfsubjectaccessreviews"),
                ("SelfSubjectRulesReview", "selfsubjectrulesreviews"),
            )
        ),
    ]


def from_crd(crd: Mapping[str, Any]) -> Resource:
    """The storage version of a custom kind; others are not served, for there is no conversion here."""
    spec = crd["spec"]
    names = spec["names"]
    version = next(version for version in spec["versions"] if version.get("storage"))
    paths = [item["jsonPath"].removeprefix(".") for item in version.get("selectableFields", ())]
    return Resource(
        group=spec["group"],
        version=version["name"],
        plural=names["plural"],
        kind=names["kind"],
        schema=StructuralSchema(version.get("schema", {}).get("openAPIV3Schema", {"type": "object"})),
        namespaced=spec["scope"] == "Namespaced",
        short_names=tuple(names.get("shortNames", ())),
        categories=tuple(names.get("categories", ())),
        subresources=("status",) if "status" in version.get("subresources", {}) else (),
        singular=names.get("singular") or names["kind"].lower(),
        fields=_same(*paths),
        has_generation=True,
        unconditional_update=False,
        columns=tuple(
            version.get("additionalPrinterColumns")
            or [{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}]
        ),
    )
