"""What a create, an update and a delete do: the rules between HTTP and the store.

Nothing here awaits, so each call is atomic in the event loop, and controllers in the same process may call it as the
HTTP handlers do. Objects that come back are shared with the store: read them, do not change them.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from finetune_operator.local.apiserver import definitions, errors, resources
from finetune_operator.local.apiserver.kinds import (
    IMMUTABLE,
    KINDS,
    PLAIN,
    generated_name,
    metadata_errors,
)
from finetune_operator.local.apiserver.resources import Resource
from finetune_operator.local.apiserver.selection import Predicate
from finetune_operator.local.apiserver.store import Object, Store
from finetune_operator.schema import (
    ErrorType,
    FieldError,
    StructuralSchema,
    forbidden,
    format_path,
    invalid,
    strict_decoding_error,
    without_nulls,
)

Change = Callable[[Object], Object]
"""Makes the new object from a private copy of the stored one."""

TERMINAL = ("Succeeded", "Failed")
"""Phases of a pod that has ended."""
EVENT_LIFETIME = timedelta(hours=1)
ORPHAN_FINALIZER = "orphan"
FOREGROUND_FINALIZER = "foregroundDeletion"


@dataclass(frozen=True)
class WriteOptions:
    """How to write."""

    dry_run: bool = False
    field_validation: Literal["Ignore", "Warn", "Strict"] = "Strict"
    warnings: list[str] = field(default_factory=list)
    """Collects what the client is to be warned of."""
    is_replacement: bool = False
    """A PUT, as opposed to a patch of what is stored."""


@dataclass(frozen=True)
class DeleteOptions:
    """How to delete. Absent values are those of the kind."""

    grace_seconds: int | None = None
    propagation: str | None = None
    uid: str | None = None
    version: str | None = None
    dry_run: bool = False


_METADATA = StructuralSchema(
    {"type": "object", "properties": {"metadata": {"$ref": "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}}},
    definitions.load(),
)
_WRITE = WriteOptions()
_DELETE = DeleteOptions()


def utc_now() -> datetime:
    return datetime.now(UTC)


def timestamp(moment: datetime) -> str:
    """A time as Kubernetes writes it, in whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Api:
    """All operations on all kinds."""

    def __init__(self, store: Store, now: Callable[[], datetime] = utc_now) -> None:
        self.store = store
        self.now = now
        self._resources = {(item.group, item.plural): item for item in resources.builtins()}
        self.namespaces = self._resources["", "namespaces"]
        self.pods = self._resources["", "pods"]
        self.events = self._resources["", "events"]
        self.jobs = self._resources["batch", "jobs"]
        self._crds = self._resources["apiextensions.k8s.io", "customresourcedefinitions"]
        for crd in store.objects(self._crds.key):
            self._register(crd)

    def resources(self) -> list[Resource]:
        """All kinds that are served."""
        return list(self._resources.values())

    def resource(self, group: str, version: str, plural: str) -> Resource:
        """The kind at a path; 404 where there is none."""
        resource = self._resources.get((group, plural))
        if resource is None or resource.version != version:
            raise errors.path_not_found()
        return resource

    def by_kind(self, api_version: str, kind: str) -> Resource | None:
        """The kind that an owner reference names."""
        matches = (item for item in self._resources.values() if (item.api_version, item.kind) == (api_version, kind))
        return next(matches, None)

    # -- reading

    def get(self, resource: Resource, namespace: str, name: str) -> Object:
        """One object; 404 where there is none."""
        obj = self.store.get(resource.key, namespace, name)
        if obj is None:
            raise errors.not_found(resource, name)
        return obj

    def find(self, resource: Resource, namespace: str, name: str) -> Object | None:
        """One object, or None."""
        return self.store.get(resource.key, namespace, name)

    def objects(self, resource: Resource, namespace: str | None = None) -> list[Object]:
        """All objects of a kind, in one namespace or in all."""
        return self.store.objects(resource.key, namespace)

    # -- create

    def create(self, resource: Resource, namespace: str, body: Any, options: WriteOptions = _WRITE) -> Object:
        """Store a new object."""
        obj = self._decoded(resource, body, options)
        metadata = obj["metadata"]
        if namespace and metadata.setdefault("namespace", namespace) != namespace:
            raise errors.bad_request(
                "the namespace of the provided object does not match the namespace sent on the request"
            )
        if "resourceVersion" in metadata:
            raise errors.bad_request("resourceVersion should not be set on objects to be created")
        if namespace:
            self._check_namespace(resource, namespace, metadata.get("name", ""))
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = generated_name(metadata["generateName"])
        name = metadata.get("name", "")
        for owned in ("deletionTimestamp", "deletionGracePeriodSeconds", "generation"):
            metadata.pop(owned, None)
        metadata["uid"] = str(uuid.uuid4())
        metadata["creationTimestamp"] = timestamp(self.now())
        if resource.has_generation:
            metadata["generation"] = 1
        if resource.is_custom and resource.has_status:
            obj.pop("status", None)
        self._refuse(resource, name, self._structural_errors(resource, obj, None))
        kind = KINDS.get(resource.key, PLAIN)
        kind.prepare_create(obj)
        if resource is self.pods:
            self._check_quota(obj)
        self._refuse(resource, name, list(kind.validate(obj)))
        if self.store.get(resource.key, namespace, name):
            raise errors.already_exists(resource, name)
        if options.dry_run:
            return obj
        if resource is self.events:
            self._forget_old_events()
        obj = self.store.put(resource.key, obj)
        self._after_write(resource, obj)
        return obj

    def _check_namespace(self, resource: Resource, namespace: str, name: str) -> None:
        parent = self.get(self.namespaces, "", namespace)
        if "deletionTimestamp" in parent["metadata"]:
            what = f"unable to create new content in namespace {namespace} because it is being terminated"
            raise errors.forbidden(resource, name, what)

    def _check_quota(self, pod: Object) -> None:
        """Refuse a pod where a quota on the number of pods is used up: one way to see an operator handle refusals."""
        namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]
        quotas = self.resource("", "v1", "resourcequotas")
        live = [item for item in self.objects(self.pods, namespace) if item["status"].get("phase") not in TERMINAL]
        for quota in self.objects(quotas, namespace):
            limit = quota.get("spec", {}).get("hard", {}).get("pods")
            if limit is not None and len(live) >= int(limit):
                amounts = f"requested: pods=1, used: pods={len(live)}, limited: pods={limit}"
                what = f"exceeded quota: {quota['metadata']['name']}, {amounts}"
                raise errors.forbidden(self.pods, name, what)

    # -- update

    def update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        change: Change,
        subresource: Literal["", "status"] = "",
        options: WriteOptions = _WRITE,
    ) -> Object:
        """Change a stored object, or only its status."""
        old = self.get(resource, namespace, name)
        if resource.is_custom:
            # It may be older than a field with a default, which rules then take for granted.
            old = resource.schema.defaulted(old)
        new = self._decoded(resource, change(copy.deepcopy(old)), options, is_patch=not options.is_replacement)
        self._check_identity(resource, old, new, options)
        new["metadata"] = _kept_metadata(old["metadata"], new["metadata"])
        if resource.has_status:
            new = _isolated(resource, old, new, subresource)
        if new == old:
            return old
        if resource.has_generation and _content(new) != _content(old):
            new["metadata"]["generation"] = old["metadata"]["generation"] + 1
        problems = self._structural_errors(resource, new, old)
        kind = KINDS.get(resource.key, PLAIN)
        if not problems and subresource != "status":
            problems = [*kind.validate(new), *kind.validate_update(new, old)]
        self._refuse(resource, name, [*_finalizer_errors(old, new), *problems])
        if options.dry_run:
            return new
        metadata = new["metadata"]
        if "deletionTimestamp" in metadata and _may_go(metadata):
            return self._remove(resource, new)
        new = self.store.put(resource.key, new)
        self._after_write(resource, new)
        return new

    def update_status(self, resource: Resource, obj: Object, status: Object) -> Object:
        """Replace the status of exactly this version of an object; 409 when it has moved on."""
        metadata = obj["metadata"]

        def change(stored: Object) -> Object:
            stored["metadata"]["resourceVersion"] = metadata["resourceVersion"]
            return {**stored, "status": status}

        return self.update(resource, metadata.get("namespace", ""), metadata["name"], change, "status")

    def _check_identity(self, resource: Resource, old: Object, new: Object, options: WriteOptions) -> None:
        name, metadata = old["metadata"]["name"], new["metadata"]
        if metadata.get("name") != name:
            found = metadata.get("name", "")
            message = f"the name of the object ({found}) does not match the name on the URL ({name})"
            raise errors.bad_request(message)
        if metadata.get("namespace", old["metadata"].get("namespace")) != old["metadata"].get("namespace"):
            raise errors.bad_request(
                "the namespace of the provided object does not match the namespace sent on the request"
            )
        version = metadata.get("resourceVersion")
        if version is None and options.is_replacement and not resource.unconditional_update:
            problem = invalid(("metadata", "resourceVersion"), 0, "must be specified for an update")
            raise errors.invalid(resource, name, [problem])
        uid = metadata.get("uid", old["metadata"]["uid"])
        if uid != old["metadata"]["uid"]:
            if not options.is_replacement:
                raise errors.invalid(resource, name, [invalid(("metadata", "uid"), uid, IMMUTABLE)])
            what = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {old['metadata']['uid']}"
            raise errors.conflict(resource, name, what)
        if version not in (None, old["metadata"]["resourceVersion"]):
            raise errors.modified(resource, name)

    # -- delete

    def delete(self, resource: Resource, namespace: str, name: str, options: DeleteOptions = _DELETE) -> Object:
        """Start or finish a deletion. Returns the object as it is stored now, or its last state when it is gone."""
        obj = self.get(resource, namespace, name)
        self._check_preconditions(resource, obj, options)
        metadata = dict(obj["metadata"])
        grace = KINDS.get(resource.key, PLAIN).grace_seconds(obj, options.grace_seconds)
        if "deletionTimestamp" in metadata:
            # A deletion under way can only be hurried.
            grace = min(grace, metadata.get("deletionGracePeriodSeconds", grace))
            if grace == metadata.get("deletionGracePeriodSeconds") and not _may_go(metadata):
                return obj
        else:
            self._add_propagation(resource, metadata, options)
            if metadata.get("generation"):
                metadata["generation"] += 1
        metadata["deletionTimestamp"] = timestamp(self.now() + timedelta(seconds=grace))
        metadata["deletionGracePeriodSeconds"] = grace
        new = {**obj, "metadata": metadata}
        if options.dry_run:
            return new
        if resource is self.namespaces and obj.get("spec", {}).get("finalizers"):
            return self.store.put(resource.key, {**new, "status": {"phase": "Terminating"}})
        if _may_go(metadata):
            return self._remove(resource, new if metadata.get("finalizers") else obj)
        return self.store.put(resource.key, new)

    def delete_collection(
        self, resource: Resource, namespace: str, matches: Predicate, options: DeleteOptions
    ) -> list[Object]:
        """Delete all that match; returns them as they were."""
        found = [obj for obj in self.objects(resource, namespace or None) if matches(obj)]
        for obj in found:
            self.delete(resource, obj["metadata"].get("namespace", ""), obj["metadata"]["name"], options)
        return found

    def finalize_namespace(self, namespace: Object) -> None:
        """Remove a namespace that has been emptied."""
        self.store.remove(self.namespaces.key, namespace)

    def bind(self, namespace: str, name: str, node: str) -> Object:
        """Assign a pod to a node: what a scheduler does."""
        pod = self.get(self.pods, namespace, name)
        if "nodeName" in pod["spec"]:
            where = f"pod {name} is already assigned to node {json.dumps(pod['spec']['nodeName'])}"
            raise errors.conflict(self.pods, name, where)
        condition = {
            "type": "PodScheduled",
            "status": "True",
            "lastProbeTime": None,
            "lastTransitionTime": timestamp(self.now()),
        }
        others = [item for item in pod["status"].get("conditions", ()) if item["type"] != "PodScheduled"]
        status = {**pod["status"], "conditions": [*others, condition]}
        return self.store.put(self.pods.key, {**pod, "spec": {**pod["spec"], "nodeName": node}, "status": status})

    def evict(self, namespace: str, name: str, options: DeleteOptions) -> None:
        """Mark a pod as disrupted, then delete it: what a drain does."""
        pod = self.get(self.pods, namespace, name)
        if not options.dry_run and pod["status"].get("phase") not in TERMINAL:
            condition = {
                "type": "DisruptionTarget",
                "status": "True",
                "lastTransitionTime": timestamp(self.now()),
                "reason": "EvictionByEvictionAPI",
                "message": "Eviction API: evicting",
            }
            others = [item for item in pod["status"].get("conditions", ()) if item["type"] != "DisruptionTarget"]
            self.update_status(self.pods, pod, {**pod["status"], "conditions": [*others, condition]})
        self.delete(self.pods, namespace, name, options)

    def _check_preconditions(self, resource: Resource, obj: Object, options: DeleteOptions) -> None:
        metadata = obj["metadata"]
        if options.uid not in (None, metadata["uid"]):
            raise errors.precondition_failed(
                resource,
                metadata["name"],
                f"the UID in the precondition ({options.uid}) does not match the UID in record ({metadata['uid']}). "
                "The object might have been deleted and then recreated",
            )
        if options.version not in (None, metadata["resourceVersion"]):
            raise errors.precondition_failed(
                resource,
                metadata["name"],
                f"the ResourceVersion in the precondition ({options.version}) does not match the ResourceVersion in "
                f"record ({metadata['resourceVersion']}). The object might have been modified",
            )

    def _add_propagation(self, resource: Resource, metadata: Object, options: DeleteOptions) -> None:
        propagation = options.propagation or KINDS.get(resource.key, PLAIN).default_propagation
        finalizer = {"Orphan": ORPHAN_FINALIZER, "Foreground": FOREGROUND_FINALIZER}.get(propagation)
        if finalizer and finalizer not in metadata.get("finalizers", ()):
            metadata["finalizers"] = [*metadata.get("finalizers", ()), finalizer]

    def _remove(self, resource: Resource, obj: Object) -> Object:
        if resource is self._crds:
            custom = self._resources.pop((obj["spec"]["group"], obj["spec"]["names"]["plural"]))
            for instance in self.objects(custom):
                self.store.remove(custom.key, instance)
        return self.store.remove(resource.key, obj)

    # -- shared

    def _decoded(self, resource: Resource, body: Any, options: WriteOptions, *, is_patch: bool = False) -> Object:
        """The body as an object of this kind: known fields of the right types, without nulls, with defaults."""
        if not isinstance(body, dict) or not isinstance(body.get("metadata", {}), dict):
            raise errors.undecodable(resource, "the body is not an object")
        # JSON round trip: a private copy, in which no caller holds a part.
        obj: Object = json.loads(json.dumps(body))
        if obj.setdefault("apiVersion", resource.api_version) != resource.api_version:
            raise errors.bad_request(
                f"the API version in the data ({obj['apiVersion']}) does not match the expected API version "
                f"({resource.api_version})"
            )
        if obj.setdefault("kind", resource.kind) != resource.kind:
            problem = invalid(("kind",), obj["kind"], f"must be {resource.kind}")
            raise errors.invalid(resource, obj.get("metadata", {}).get("name", ""), [problem])
        metadata = without_nulls(obj.get("metadata") or {})
        obj["metadata"] = {key: value for key, value in metadata.items() if value not in ([], {}, "")}
        if not resource.is_custom:
            obj = without_nulls(obj)
        self._check_unknown(resource, obj, options, is_patch=is_patch)
        obj = resource.schema.pruned({**obj, **_METADATA.pruned({"metadata": obj["metadata"]})})
        wrong = _METADATA.structure_errors({"metadata": obj["metadata"]})
        if resource.is_custom:
            obj = resource.schema.defaulted(obj)
        else:
            KINDS.get(resource.key, PLAIN).normalise(obj)
            wrong += resource.schema.structure_errors(obj)
        for error in wrong:
            if error.type is ErrorType.TYPE_INVALID:
                raise errors.undecodable(resource, _go_error(resource, error))
        return obj

    def _check_unknown(self, resource: Resource, obj: Object, options: WriteOptions, *, is_patch: bool) -> None:
        if options.field_validation == "Ignore":
            return
        # The fields of metadata are found by both schemas where the kind's own describes them too.
        unknown = list(
            dict.fromkeys(
                [*_METADATA.unknown_fields({"metadata": obj["metadata"]}), *resource.schema.unknown_fields(obj)]
            )
        )
        if resource.is_custom:
            unknown.sort(key=lambda error: error.message)
        if unknown and options.field_validation == "Strict":
            if is_patch:
                raise errors.invalid_patch(obj, strict_decoding_error(unknown))
            raise errors.undecodable(resource, strict_decoding_error(unknown))
        options.warnings.extend(error.message for error in unknown)

    def _structural_errors(self, resource: Resource, obj: Object, old: Object | None) -> list[FieldError]:
        if resource.is_custom:
            return [*metadata_errors(obj), *resource.schema.validate(obj, old)]
        return [*metadata_errors(obj), *resource.schema.structure_errors(obj)]

    def _refuse(self, resource: Resource, name: str, problems: list[FieldError]) -> None:
        if problems:
            raise errors.invalid(resource, name, problems)

    def _after_write(self, resource: Resource, obj: Object) -> None:
        if resource is self._crds:
            self._register(obj)

    def _register(self, crd: Object) -> None:
        custom = resources.from_crd(crd)
        self._resources[custom.group, custom.plural] = custom

    def _forget_old_events(self) -> None:
        oldest = timestamp(self.now() - EVENT_LIFETIME)
        for event in self.objects(self.events):
            if event["metadata"]["creationTimestamp"] < oldest:
                self.store.remove(self.events.key, event)


def _content(obj: Object) -> Object:
    return {key: value for key, value in obj.items() if key not in ("metadata", "status")}


def _may_go(metadata: Object) -> bool:
    return not metadata.get("finalizers") and not metadata.get("deletionGracePeriodSeconds")


def _kept_metadata(old: Object, new: Object) -> Object:
    """The new metadata with everything that only the server writes."""
    owned = (
        *("uid", "resourceVersion", "creationTimestamp", "generation", "namespace", "generateName"),
        *("deletionTimestamp", "deletionGracePeriodSeconds"),
    )
    kept = {key: value for key, value in new.items() if key not in owned}
    return {**kept, **{key: old[key] for key in owned if key in old}}


def _isolated(resource: Resource, old: Object, new: Object, subresource: str) -> Object:
    """A write to the object leaves the status alone, and one to the status everything else."""
    if subresource == "status":
        metadata = old["metadata"] if resource.is_custom else new["metadata"]
        result = {**old, "metadata": metadata}
        result.pop("status", None)
        return {**result, "status": new["status"]} if "status" in new else result
    result = {key: value for key, value in new.items() if key != "status"}
    return {**result, "status": old["status"]} if "status" in old else result


def _finalizer_errors(old: Object, new: Object) -> Iterator[FieldError]:
    if "deletionTimestamp" in old["metadata"]:
        known = old["metadata"].get("finalizers", [])
        added = [name for name in new["metadata"].get("finalizers", []) if name not in known]
        if added:
            shown = ", ".join(json.dumps(name) for name in added)
            what = "no new finalizers can be added if the object is being deleted, found new finalizers "
            yield forbidden(("metadata", "finalizers"), f"{what}[]string{{{shown}}}")


def _go_error(resource: Resource, error: FieldError) -> str:
    """A wrong type as the JSON decoder of Go words it."""
    found, expected = error.message.split('"')[1], error.message.rpartition("of type ")[2].partition(":")[0]
    field_name = format_path(tuple(step for step in error.path if isinstance(step, str)))
    found = {"integer": "number", "boolean": "bool"}.get(found, found)
    expected = {"integer": "int32", "boolean": "bool"}.get(expected, expected)
    return f"json: cannot unmarshal {found} into Go struct field {resource.kind}.{field_name} of type {expected}"
