"""Errors as Kubernetes answers them: a `Status` with code, reason, message and causes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from finetune_operator.local.apiserver.resources import Resource
from finetune_operator.schema import ErrorType, FieldError


class ApiError(Exception):
    """A request that failed; `status()` is the body of the answer."""

    def __init__(self, code: int, reason: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details

    def status(self) -> dict[str, Any]:
        """The `Status` object."""
        details = {} if self.details is None else {"details": self.details}
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            **details,
            "code": self.code,
        }


def object_details(resource: Resource, name: str, kind: str | None = None) -> dict[str, Any]:
    """Which object a Status speaks of. Without a name or a group the key is left out."""
    named = {"name": name, "group": resource.group, "kind": kind or resource.plural}
    return {key: value for key, value in named.items() if value}


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def undecodable(resource: Resource, what: str) -> ApiError:
    """A body that is JSON, but not an object of this kind."""
    return bad_request(
        f'{resource.kind} in version "{resource.version}" cannot be handled as a {resource.kind}: {what}'
    )


def path_not_found() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource", {})


def not_found(resource: Resource, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{resource.key} "{name}" not found', object_details(resource, name))


def already_exists(resource: Resource, name: str) -> ApiError:
    return ApiError(409, "AlreadyExists", f'{resource.key} "{name}" already exists', object_details(resource, name))


def conflict(resource: Resource, name: str, what: str) -> ApiError:
    message = f'Operation cannot be fulfilled on {resource.key} "{name}": {what}'
    return ApiError(409, "Conflict", message, object_details(resource, name))


def precondition_failed(resource: Resource, name: str, what: str) -> ApiError:
    """A delete was meant for another object or version. This conflict, unlike others, names the kind."""
    message = f'Operation cannot be fulfilled on {resource.qualified_kind} "{name}": {what}'
    return ApiError(409, "Conflict", message, object_details(resource, name, resource.kind))


def modified(resource: Resource, name: str) -> ApiError:
    """The caller looked at an older version."""
    return conflict(
        resource,
        name,
        "the object has been modified; please apply your changes to the latest version and try again",
    )


def forbidden(resource: Resource, name: str, what: str) -> ApiError:
    return ApiError(403, "Forbidden", f'{resource.key} "{name}" is forbidden: {what}', object_details(resource, name))


def invalid(resource: Resource, name: str, errors: Sequence[FieldError]) -> ApiError:
    """The object decoded, but breaks rules."""
    return _invalid(f'{resource.qualified_kind} "{name}"', object_details(resource, name, resource.kind), errors)


def invalid_options(kind: str, error: FieldError) -> ApiError:
    """A query parameter or option that is not allowed."""
    return _invalid(f'{kind}.meta.k8s.io ""', {"group": "meta.k8s.io", "kind": kind}, [error])


def _invalid(subject: str, details: dict[str, Any], errors: Sequence[FieldError]) -> ApiError:
    text = str(errors[0]) if len(errors) == 1 else f"[{', '.join(map(str, errors))}]"
    causes = [{"reason": error.type.value, "message": error.message, "field": error.field} for error in errors]
    return ApiError(422, "Invalid", f"{subject} is invalid: {text}", {**details, "causes": causes})


def invalid_patch(patched: Any, what: str) -> ApiError:
    """A patch whose result does not decode strictly."""
    shown = json.dumps(json.dumps(patched, separators=(",", ":")))
    problem = FieldError(("patch",), ErrorType.INVALID, f"Invalid value: {shown}: {what}")
    return _invalid(' ""', {}, [problem])


def unprocessable_patch() -> ApiError:
    """A JSON patch that cannot be applied: a test that failed, a path that is not there."""
    return ApiError(422, "Invalid", "the server rejected our request due to an error in our request", {})


def unsupported_media_type(accepted: Sequence[str]) -> ApiError:
    return ApiError(
        415,
        "UnsupportedMediaType",
        f"the body of the request was in an unknown format - accepted media types include: {', '.join(accepted)}",
    )


def expired(version: int, oldest: int) -> ApiError:
    """The history no longer reaches back to this resourceVersion: list again."""
    return ApiError(410, "Expired", f"too old resource version: {version} ({oldest})")


def too_large_version(version: int, current: int) -> ApiError:
    details = {
        "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
        "retryAfterSeconds": 1,
    }
    message = f"Timeout: Too large resource version: {version}, current: {current}"
    return ApiError(504, "Timeout", message, details)


def method_not_allowed() -> ApiError:
    message = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", message, {})
