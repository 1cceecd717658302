"""HTTP in front of `api`: paths, methods, media types, authentication.

Whoever may create a pod here runs a process as this user. Therefore every request needs the token, and the Host header
must be this server's own: a web page that rebinds its name to 127.0.0.1 sends its own name.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import random
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Literal, Protocol

from aiohttp import web

from finetune_operator.local.apiserver import definitions, discovery, errors, openapi, protobuf, resources
from finetune_operator.local.apiserver.api import Api, Change, DeleteOptions, WriteOptions
from finetune_operator.local.apiserver.errors import ApiError
from finetune_operator.local.apiserver.kinds import KINDS, PLAIN
from finetune_operator.local.apiserver.patches import PatchError, json_patch, merge_patch, strategic_merge
from finetune_operator.local.apiserver.resources import Resource
from finetune_operator.local.apiserver.selection import Predicate, field_predicate, label_predicate
from finetune_operator.local.apiserver.store import Object
from finetune_operator.local.apiserver.tables import IncludeObject, table
from finetune_operator.local.apiserver.watch import WatchOptions, watch
from finetune_operator.schema import StructuralSchema, forbidden, not_supported

logger = logging.getLogger(__name__)

_EVICTION = definitions.schema("io.k8s.api.policy.v1.Eviction")

HOST = "127.0.0.1"
MAX_BODY = 3 * 1024 * 1024
WRITE_SECONDS = 60.0
"""A client that takes nothing of a stream for so long is cut off."""


class LogReader(Protocol):
    """Whoever runs the pods can read what they write."""

    def read(self, pod: Object, container: str, *, follow: bool, tail_lines: int | None) -> AsyncIterator[bytes]:
        """The log of a container, and with `follow` what is appended until it ends."""


class Server:
    """The API server on one port of 127.0.0.1."""

    def __init__(self, api: Api, tls: ssl.SSLContext, token: str, port: int = 0, logs: LogReader | None = None) -> None:
        self._api = api
        self._tls = tls
        self._token = token
        self._logs = logs
        self._runner: web.AppRunner | None = None
        self.port = port

    async def start(self) -> None:
        """Listen; `port` is then the real one."""
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_route("*", "/{path:.*}", self._handle)
        # Streams end when their clients leave or when they are cancelled; nobody is waited for.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, HOST, self.port, ssl_context=self._tls)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening and cut open streams off."""
        if self._runner:
            await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            self._admit(request)
            return await self._dispatch(request)
        except ApiError as error:
            return _json(error.status(), error.code)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            return _json(ApiError(500, "InternalError", "Internal error occurred: see the server's log").status(), 500)

    def _admit(self, request: web.Request) -> None:
        if request.host not in (f"{HOST}:{self.port}", f"localhost:{self.port}"):
            raise ApiError(421, "MisdirectedRequest", f"this server is not {request.host}")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not secrets.compare_digest(token.encode(), self._token.encode()):
            raise ApiError(401, "Unauthorized", "Unauthorized")

    async def _dispatch(self, request: web.Request) -> web.StreamResponse:
        steps = [step for step in request.path.split("/") if step]
        served = self._api.resources()
        match steps:
            case ["readyz" | "livez" | "healthz"]:
                return web.Response(text="ok")
            case ["version"]:
                return _json(discovery.VERSION)
            case ["api"]:
                return _json(discovery.api_versions())
            case ["apis"]:
                return _json(discovery.groups(served))
            case ["apis", group]:
                return _json(discovery.group(served, group))
            case ["api", version]:
                return _json(discovery.kinds(served, "", version))
            case ["apis", group, version]:
                return _json(discovery.kinds(served, group, version))
            case ["openapi", "v3"]:
                return _json(openapi.index(served))
            case ["openapi", "v3", *path]:
                return _json(openapi.document(served, "/".join(path)))
            case ["api", version, *path]:
                return await self._object(request, "", version, path)
            case ["apis", group, version, *path]:
                return await self._object(request, group, version, path)
        raise errors.path_not_found()

    async def _object(self, request: web.Request, group: str, version: str, path: list[str]) -> web.StreamResponse:
        namespace = ""
        if path[0] == "namespaces" and len(path) > 2 and path[2] != "status":
            namespace, path = path[1], path[2:]
        resource = self._api.resource(group, version, path[0])
        if namespace and not resource.namespaced:
            raise errors.path_not_found()
        call = _Call(self._api, self._logs, request, resource, namespace)
        handlers: dict[tuple[str, int], Callable[..., Awaitable[web.StreamResponse]]] = {
            ("GET", 1): call.list_or_watch,
            ("POST", 1): call.create,
            ("DELETE", 1): call.delete_collection,
            ("GET", 2): call.get,
            ("PUT", 2): call.replace,
            ("PATCH", 2): call.patch,
            ("DELETE", 2): call.delete,
            ("GET", 3): call.get_subresource,
            ("PUT", 3): call.replace,
            ("PATCH", 3): call.patch,
            ("POST", 3): call.create_subresource,
        }
        handler = handlers.get((request.method, len(path)))
        if handler is None or (resource.verbs == ("create",) and request.method != "POST"):
            raise errors.method_not_allowed()
        if len(path) == 3 and path[2] not in resource.subresources:
            raise errors.path_not_found()
        return await handler(*path[1:])


class _Call:
    """One request on one kind."""

    def __init__(
        self, api: Api, logs: LogReader | None, request: web.Request, resource: Resource, namespace: str
    ) -> None:
        self._api = api
        self._logs = logs
        self._request = request
        self._query = request.query
        self._resource = resource
        self._namespace = namespace

    # -- reading

    async def get(self, name: str) -> web.StreamResponse:
        obj = self._api.get(self._resource, self._namespace, name)
        include = _table_rows(self._request)
        if include is None:
            return _json(obj)
        metadata = {"resourceVersion": obj["metadata"]["resourceVersion"]}
        return _json(table(self._resource, [obj], metadata, self._api.now(), include))

    async def list_or_watch(self) -> web.StreamResponse:
        if _flag(self._query.get("watch")):
            return await self._watch()
        wanted = self._number("resourceVersion") or 0
        if wanted > self._api.store.version:
            raise errors.too_large_version(wanted, self._api.store.version)
        matches = self._selection()
        found = [obj for obj in self._api.objects(self._resource) if matches(obj)]
        found, metadata = self._page(found)
        include = _table_rows(self._request)
        if include is not None:
            return _json(table(self._resource, found, metadata, self._api.now(), include))
        if not self._resource.is_custom:
            # Like the real server: the list says what its items are.
            found = [{key: obj[key] for key in obj if key not in ("kind", "apiVersion")} for obj in found]
        return _json(
            {
                "kind": f"{self._resource.kind}List",
                "apiVersion": self._resource.api_version,
                "metadata": metadata,
                "items": found,
            }
        )

    def _page(self, found: list[Object]) -> tuple[list[Object], dict[str, Any]]:
        """One page, and the metadata of the list. Later pages carry the version of the first: a watch that starts
        there misses nothing."""
        version, after = str(self._api.store.version), None
        if "continue" in self._query:
            version, *after = _continued(self._query["continue"])
            found = [obj for obj in found if _position(obj) > after]
        limit = self._number("limit") or 0
        metadata: dict[str, Any] = {"resourceVersion": version}
        if limit and len(found) > limit:
            metadata["remainingItemCount"] = len(found) - limit
            found = found[:limit]
            token = json.dumps([version, *_position(found[-1])])
            metadata["continue"] = base64.urlsafe_b64encode(token.encode()).decode()
        return found, metadata

    def _selection(self) -> Predicate:
        labels = label_predicate(self._query.get("labelSelector", ""))
        fields = field_predicate(self._resource, self._query.get("fieldSelector", ""))
        namespace = self._namespace
        return lambda obj: (
            (not namespace or obj["metadata"].get("namespace") == namespace) and labels(obj) and fields(obj)
        )

    async def _watch(self) -> web.StreamResponse:
        initial = _flag(self._query.get("sendInitialEvents"))
        if initial and self._query.get("resourceVersionMatch") != "NotOlderThan":
            problem = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
            raise errors.invalid_options("ListOptions", forbidden(("resourceVersionMatch",), problem))
        version = self._number("resourceVersion")
        options = WatchOptions(
            matches=self._selection(),
            version=version or None,
            initial_events=initial,
            bookmarks=_flag(self._query.get("allowWatchBookmarks")),
            # Like the real server: clients that do not ask are spread over time.
            timeout_seconds=self._number("timeoutSeconds") or random.uniform(1800, 3600),
        )
        include = _table_rows(self._request)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        async with aclosing(watch(self._api.store, self._resource, options)) as events:
            first = True
            async for event in events:
                if not response.prepared:
                    await response.prepare(self._request)
                if include is not None and event["type"] != "ERROR":
                    event = {**event, "object": self._row(event, include, with_columns=first)}
                    first = False
                await _write(self._request, response, json.dumps(event, separators=(",", ":")).encode() + b"\n")
        if not response.prepared:
            await response.prepare(self._request)
        await response.write_eof()
        return response

    def _row(self, event: dict[str, Any], include: IncludeObject, *, with_columns: bool) -> dict[str, Any]:
        obj = event["object"]
        metadata = {"resourceVersion": obj["metadata"]["resourceVersion"]}
        rows = [] if event["type"] == "BOOKMARK" else [obj]
        return table(self._resource, rows, metadata, self._api.now(), include, with_columns=with_columns)

    # -- writing

    async def create(self) -> web.StreamResponse:
        body = await self._body()
        if self._resource.verbs == ("create",):
            return _json(_review(body), 201)
        if self._resource.namespaced and not self._namespace:
            raise errors.method_not_allowed()
        options = self._write_options()
        return _json(self._api.create(self._resource, self._namespace, body, options), 201, options.warnings)

    async def replace(self, name: str, subresource: str = "") -> web.StreamResponse:
        body = await self._body()
        return self._update(name, subresource, lambda stored: body, is_replacement=True)

    async def patch(self, name: str, subresource: str = "") -> web.StreamResponse:
        media_type = self._request.content_type
        if media_type not in self._resource.patch_types:
            if media_type == resources.APPLY_PATCH:
                raise ApiError(
                    415,
                    "UnsupportedMediaType",
                    "the embedded API server has no server-side apply: use kubectl apply without --server-side",
                )
            raise errors.unsupported_media_type(self._resource.patch_types)
        patch = await self._json("error decoding patch: ")

        def change(stored: Object) -> Object:
            try:
                if media_type == resources.JSON_PATCH:
                    changed: Object = json_patch(stored, patch)
                elif media_type == resources.MERGE_PATCH:
                    changed = merge_patch(stored, patch)
                else:
                    changed = strategic_merge(stored, patch, self._resource.schema)
            except PatchError as error:
                logger.debug("%s %s: %s", self._resource.key, name, error)
                raise errors.unprocessable_patch() from error
            return changed

        return self._update(name, subresource, change)

    def _update(
        self, name: str, subresource: str, change: Change, *, is_replacement: bool = False
    ) -> web.StreamResponse:
        part: Literal["", "status"] = "status" if subresource == "status" else ""
        options = self._write_options(is_replacement=is_replacement)
        obj = self._api.update(self._resource, self._namespace, name, change, part, options)
        return _json(obj, 200, options.warnings)

    async def delete(self, name: str) -> web.StreamResponse:
        options = await self._delete_options()
        obj = self._api.delete(self._resource, self._namespace, name, options)
        stored = self._api.find(self._resource, self._namespace, name)
        if stored or KINDS.get(self._resource.key, PLAIN).returns_deleted:
            return _json(obj)
        details = {**errors.object_details(self._resource, name), "uid": obj["metadata"]["uid"]}
        return _json(_success(details))

    async def delete_collection(self) -> web.StreamResponse:
        options = await self._delete_options()
        deleted = self._api.delete_collection(self._resource, self._namespace, self._selection(), options)
        return _json(
            {
                "kind": f"{self._resource.kind}List",
                "apiVersion": self._resource.api_version,
                "metadata": {"resourceVersion": str(self._api.store.version)},
                "items": deleted,
            }
        )

    # -- subresources

    async def get_subresource(self, name: str, subresource: str) -> web.StreamResponse:
        if subresource == "status":
            return await self.get(name)
        if subresource == "log":
            return await self._log(name)
        raise errors.method_not_allowed()

    async def create_subresource(self, name: str, subresource: str) -> web.StreamResponse:
        body = await self._body(_EVICTION if subresource == "eviction" else None)
        match subresource:
            case "eviction":
                options = _delete_options(body.get("deleteOptions", {}), self._dry_run())
                self._api.evict(self._namespace, name, options)
            case "binding":
                self._api.bind(self._namespace, name, body["target"]["name"])
            case _:
                raise errors.method_not_allowed()
        return _json(_success(None), 201)

    async def _log(self, name: str) -> web.StreamResponse:
        pod = self._api.get(self._resource, self._namespace, name)
        if self._logs is None:
            raise ApiError(503, "ServiceUnavailable", "nothing runs the pods of this cluster, so they write no logs")
        container = self._query.get("container") or _only_container(pod)
        if _flag(self._query.get("previous")):
            raise errors.bad_request(f'previous terminated container "{container}" in pod "{name}" not found')
        for option in ("timestamps", "sinceSeconds", "sinceTime", "limitBytes"):
            if self._query.get(option) not in (None, "", "false"):
                raise errors.bad_request(f"the local runner keeps plain logs: {option} is not available")
        chunks = self._logs.read(
            pod,
            container,
            follow=_flag(self._query.get("follow")),
            tail_lines=self._number("tailLines"),
        )
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        async for chunk in chunks:
            if not response.prepared:
                await response.prepare(self._request)
            await _write(self._request, response, chunk)
        if not response.prepared:
            await response.prepare(self._request)
        await response.write_eof()
        return response

    # -- options and bodies

    async def _body(self, schema: StructuralSchema | None = None) -> Any:
        """The object in the body; `schema` is that of another kind than the resource's."""
        schema = schema or self._resource.schema
        if self._request.content_type == protobuf.CONTENT_TYPE and not self._resource.is_custom:
            try:
                return protobuf.decode(await self._read(), schema)
            except ValueError as error:
                raise errors.undecodable(self._resource, f"protobuf: {error}") from error
        if self._request.content_type not in ("application/json", "application/octet-stream"):
            raise errors.unsupported_media_type(["application/json", protobuf.CONTENT_TYPE])
        kind = self._resource.kind
        body = await self._json(
            f"the object provided is unrecognized (must be of type {kind}): couldn't get version/kind; "
            "json parse error: "
        )
        if not isinstance(body, dict):
            raise errors.undecodable(self._resource, "the body is not an object")
        return body

    async def _read(self) -> bytes:
        try:
            return await self._request.read()
        except web.HTTPRequestEntityTooLarge as error:
            message = f"Request entity too large: limit is {MAX_BODY}"
            raise ApiError(413, "RequestEntityTooLarge", message) from error

    async def _json(self, complaint: str) -> Any:
        data = await self._read()
        try:
            return json.loads(data)
        except ValueError as error:
            raise errors.bad_request(f"{complaint}{error}") from error

    def _number(self, option: str) -> int | None:
        text = self._query.get(option, "")
        if not text:
            return None
        if not text.isdecimal():
            raise errors.bad_request(f"{option}: {text!r} is not a number")
        return int(text)

    def _dry_run(self) -> bool:
        wanted = self._query.getall("dryRun", [])
        if wanted and wanted != ["All"]:
            problem = not_supported(("dryRun",), wanted, ["All"])
            raise errors.invalid_options("CreateOptions", problem)
        return bool(wanted)

    def _write_options(self, *, is_replacement: bool = False) -> WriteOptions:
        validation: Any = self._query.get("fieldValidation") or "Warn"
        if validation not in ("Ignore", "Warn", "Strict"):
            problem = not_supported(("fieldValidation",), validation, ["", "Ignore", "Strict", "Warn"])
            raise errors.invalid_options("CreateOptions", problem)
        return WriteOptions(self._dry_run(), validation, is_replacement=is_replacement)

    async def _delete_options(self) -> DeleteOptions:
        body = await self._json("error decoding options: ") if await self._read() else {}
        if not isinstance(body, dict):
            raise errors.bad_request("the body is not a DeleteOptions object")
        for key in ("gracePeriodSeconds", "propagationPolicy"):
            if key in self._query:
                body[key] = self._query[key]
        return _delete_options(body, self._dry_run())


def _delete_options(body: dict[str, Any], dry_run: bool) -> DeleteOptions:
    preconditions = body.get("preconditions") or {}
    grace = body.get("gracePeriodSeconds")
    if grace is not None and not str(grace).isdecimal():
        raise errors.bad_request(f"gracePeriodSeconds: {grace!r} is not a number of seconds")
    propagation = body.get("propagationPolicy")
    if propagation not in (None, "Orphan", "Background", "Foreground"):
        problem = not_supported(("propagationPolicy",), propagation, ["Background", "Foreground", "Orphan"])
        raise errors.invalid_options("DeleteOptions", problem)
    return DeleteOptions(
        grace_seconds=None if grace is None else int(grace),
        propagation=propagation,
        uid=preconditions.get("uid"),
        version=preconditions.get("resourceVersion"),
        dry_run=dry_run or body.get("dryRun") == ["All"],
    )


def _review(body: Any) -> dict[str, Any]:
    """Whoever has the token may do everything."""
    if body.get("kind") == "SelfSubjectRulesReview":
        return {
            **body,
            "status": {
                "resourceRules": [{"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}],
                "nonResourceRules": [{"verbs": ["*"], "nonResourceURLs": ["*"]}],
                "incomplete": False,
            },
        }
    return {**body, "status": {"allowed": True}}


def _success(details: dict[str, Any] | None) -> dict[str, Any]:
    status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
    return status if details is None else {**status, "details": details}


def _only_container(pod: Object) -> str:
    names: list[str] = [container["name"] for container in pod["spec"]["containers"]]
    if len(names) > 1:
        shown = " ".join(names)
        name = pod["metadata"]["name"]
        raise errors.bad_request(f"a container name must be specified for pod {name}, choose one of: [{shown}]")
    return names[0]


def _position(obj: Object) -> list[str]:
    return [obj["metadata"].get("namespace", ""), obj["metadata"]["name"]]


def _continued(token: str) -> list[str]:
    try:
        version, namespace, name = json.loads(base64.urlsafe_b64decode(token))
    except (ValueError, binascii.Error) as error:
        raise errors.bad_request(f"continue key is not valid: {error}") from error
    return [version, namespace, name]


def _table_rows(request: web.Request) -> IncludeObject | None:
    """What the rows of a table are to carry; None when the client takes no table."""
    for accepted in request.headers.get("Accept", "").split(","):
        if "as=Table" in accepted and "v=v1;" in f"{accepted};":
            match request.query.get("includeObject", ""):
                case "None":
                    return "None"
                case "Object":
                    return "Object"
            return "Metadata"
    return None


def _flag(value: str | None) -> bool:
    return value in ("true", "1")


def _json(body: Any, code: int = 200, warnings: list[str] | None = None) -> web.Response:
    response = web.Response(
        body=json.dumps(body, separators=(",", ":")).encode(), status=code, content_type="application/json"
    )
    for warning in warnings or ():
        response.headers.add("Warning", f"299 - {json.dumps(warning)}")
    return response


async def _write(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Write to a stream; who does not read loses the connection, and the server no memory."""
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await response.write(data)
    except TimeoutError:
        if request.transport:
            request.transport.abort()
        raise ConnectionResetError("the client does not read") from None
