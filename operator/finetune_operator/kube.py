"""The only module that speaks to the API server: a handful of verbs over plain JSON objects.

The generated classes of the client are not used: they cost a deep copy of every object, and reject fields they do not
know yet.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp
from kubernetes.aio import client, config

from finetune_api import GROUP, PLURAL, VERSION
from finetune_operator.limiter import TokenBucket

REQUEST_TIMEOUT = 20.0
RETRIES = 3
"""How often a request that the API server has put off is sent again."""
PATIENCE = 10.0
"""Seconds that it is put off for at most; beyond that the caller is told, and has other things to do meanwhile."""
MERGE_PATCH = "application/merge-patch+json"


@dataclass(frozen=True)
class Kind:
    """Where objects of a kind live."""

    group: str
    version: str
    plural: str

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, *(["namespaces", namespace] if namespace else []), self.plural]
        return "/".join(part for part in [*parts, name, subresource] if part)


JOBS = Kind("batch", "v1", "jobs")
PODS = Kind("", "v1", "pods")
CONFIG_MAPS = Kind("", "v1", "configmaps")
SERVICES = Kind("", "v1", "services")
EVENTS = Kind("", "v1", "events")
LEASES = Kind("coordination.k8s.io", "v1", "leases")
FINETUNE_JOBS = Kind(GROUP, VERSION, PLURAL)
WORKLOADS = [Kind("kueue.x-k8s.io", version, "workloads") for version in ("v1beta2", "v1beta1")]
"""Kueue's, in the versions that a cluster may serve, newest first."""
PENDING = [Kind("visibility.kueue.x-k8s.io", version, "localqueues") for version in ("v1beta2", "v1beta1")]
BY_NAME = {"ConfigMap": CONFIG_MAPS, "Service": SERVICES, "Job": JOBS}


class ApiError(Exception):
    """The API server said no."""

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.retry_after = retry_after


class Observer(Protocol):
    """Counts what `Kube` does."""

    def request(self, verb: str, resource: str, code: int, seconds: float) -> None:
        """One request was answered."""

    def throttled(self, by: str, seconds: float) -> None:
        """One request waits: by "client", for our own limit, or by "server", which asked for it."""


async def load_client() -> client.ApiClient:
    """A client from the pod's service account, or from the kubeconfig file."""
    configuration = client.Configuration()
    try:
        config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except config.ConfigException:
        await config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    return client.ApiClient(configuration)


async def load_client_of_user(kubeconfig: str | None, context: str | None) -> tuple[client.ApiClient, str]:
    """A client and the default namespace, as kubectl would have them.

    Raises:
        config.ConfigException: there is no usable kubeconfig.
    """
    configuration = client.Configuration()
    loader = await config.load_kube_config(  # type: ignore[no-untyped-call]
        config_file=kubeconfig, context=context, client_configuration=configuration
    )
    namespace = loader.current_context["context"].get("namespace") or "default"
    return client.ApiClient(configuration), namespace


class Kube:
    """Verbs on objects. Errors are `ApiError`; network errors pass through as they are."""

    def __init__(
        self,
        api: client.ApiClient,
        observer: Observer | None = None,
        guard: Callable[[], None] = lambda: None,
        limiter: TokenBucket | None = None,
        retries: int = RETRIES,
    ) -> None:
        """`guard` is called before each write, and must not return when the process may not write."""
        self._api = api
        self._observer = observer
        self._guard = guard
        self._limiter = limiter
        self._retries = retries

    @property
    def server(self) -> str:
        """URL of the API server."""
        return str(self._api.configuration.host)

    async def get(self, kind: Kind, namespace: str, name: str, subresource: str = "") -> dict[str, Any] | None:
        """The object, or None when it does not exist."""
        try:
            return await self._request("GET", kind, kind.path(namespace, name, subresource))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: Kind, namespace: str | None, **query: str) -> list[dict[str, Any]]:
        """All objects. Query parameters: labelSelector, fieldSelector."""
        return [item async for page in self._pages(kind, namespace, query) for item in page]

    async def versions(self, kind: Kind, namespace: str | None, **query: str) -> dict[tuple[str, str], str]:
        """The version of each object by its namespace and name. Of the objects themselves only a page is in memory."""
        return {
            (item["metadata"]["namespace"], item["metadata"]["name"]): item["metadata"]["resourceVersion"]
            async for page in self._pages(kind, namespace, query)
            for item in page
        }

    async def create(self, kind: Kind, namespace: str, body: dict[str, Any], **query: str) -> dict[str, Any]:
        return await self._request("POST", kind, kind.path(namespace), query=query, body=body)

    async def replace(self, kind: Kind, namespace: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Write the whole object. A resourceVersion in the body makes it fail with 409 when the object changed."""
        return await self._request("PUT", kind, kind.path(namespace, name), body=body)

    async def delete(
        self, kind: Kind, namespace: str, name: str, uid: str | None = None, version: str | None = None
    ) -> None:
        """Delete an object, and its children after it; one that is gone already is fine. With a uid and a
        resourceVersion only if it is still as it was seen, else the error is 409."""
        seen = {key: value for key, value in (("uid", uid), ("resourceVersion", version)) if value}
        body: dict[str, Any] = {"propagationPolicy": "Background"} | ({"preconditions": seen} if seen else {})
        try:
            await self._request("DELETE", kind, kind.path(namespace, name), body=body)
        except ApiError as error:
            if error.status != 404:
                raise

    async def stream_log(self, namespace: str, pod: str, **query: str) -> AsyncIterator[bytes]:
        """The log of a pod, piece by piece; with follow="true" until it ends."""
        request = await self._api.param_serialize(
            "GET",
            PODS.path(namespace, pod, "log"),
            query_params=list(query.items()),
            header_params={"Accept": "*/*"},
            auth_settings=["BearerToken"],
        )
        endless = aiohttp.ClientTimeout(total=None, connect=REQUEST_TIMEOUT)
        response = await self._api.call_api(*request, _request_timeout=endless)
        if response.status >= 300:
            raise _error(response.status, response.headers, await response.read())  # type: ignore[no-untyped-call]
        async for piece in response.response.content.iter_any():
            yield piece

    async def patch(self, kind: Kind, namespace: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Merge patch."""
        return await self._request("PATCH", kind, kind.path(namespace, name), body=body)

    async def patch_status(self, kind: Kind, namespace: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Merge patch of the status. A resourceVersion in the body makes it fail with 409 when the object changed."""
        return await self._request("PATCH", kind, kind.path(namespace, name, "status"), body=body)

    async def _pages(
        self, kind: Kind, namespace: str | None, query: Mapping[str, str]
    ) -> AsyncIterator[Sequence[dict[str, Any]]]:
        parameters = {"limit": "500", **query}
        while True:
            page = await self._request("GET", kind, kind.path(namespace), query=parameters)
            yield page.get("items") or []
            more = (page.get("metadata") or {}).get("continue")
            if not more:
                return
            parameters["continue"] = more

    async def _request(
        self,
        method: str,
        kind: Kind,
        path: str,
        query: Mapping[str, str] | None = None,
        body: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = MERGE_PATCH if method == "PATCH" else "application/json"
        request = await self._api.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        retries = self._retries
        while True:
            if self._limiter:
                await self._wait("client", self._limiter.reserve())
            if method != "GET":
                self._guard()
            started = time.monotonic()
            response = await self._api.call_api(*request, _request_timeout=REQUEST_TIMEOUT)
            data: bytes = await response.read()  # type: ignore[no-untyped-call]
            if self._observer:
                self._observer.request(method, kind.plural, response.status, time.monotonic() - started)
            if response.status < 300:
                result: dict[str, Any] = json.loads(data)
                return result
            error = _error(response.status, response.headers, data)
            # A request that was put off was not carried out. One without an answer may have been: that is for the
            # caller, who looks first.
            later = error.retry_after if error.status in (429, 503) else None
            if later is None or not retries or not 0 <= later <= PATIENCE:
                raise error
            retries -= 1
            # Not all of those that were put off together come back together.
            await self._wait("server", later * random.uniform(1.0, 1.2))

    async def _wait(self, by: str, seconds: float) -> None:
        if seconds > 0:
            if self._observer:
                self._observer.throttled(by, seconds)
            await asyncio.sleep(seconds)


def _error(status: int, headers: Mapping[str, str], data: bytes) -> ApiError:
    try:
        message = str(json.loads(data).get("message") or "")
    except (ValueError, AttributeError):
        message = data[:300].decode(errors="replace")
    try:
        retry_after = float(headers["Retry-After"])
    except (KeyError, ValueError):
        retry_after = None
    return ApiError(status, message, retry_after)


def merge_patch(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The JSON merge patch that turns one object into the other (RFC 7396): null removes, lists are replaced whole."""
    patch: dict[str, Any] = dict.fromkeys(before.keys() - after.keys())
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if inner := merge_patch(old, value):
                patch[key] = inner
        elif key not in before or old != value:
            patch[key] = value
    return patch
