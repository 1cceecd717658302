"""What a container sees: its volumes, its environment and its command line, without a container.

A process cannot mount anything, so paths are translated instead. Each volume of a pod is a folder below the pod's own
folder, and wherever a command, an argument, an environment value or the working directory *begins* with the mountPath
of one of the container's volume mounts (or is its terminationMessagePath), that beginning is replaced by the real
folder:

    mountPath /work, env WORK_DIR=/work/cache   ->   WORK_DIR=<pod folder>/volumes/work/cache

An environment value that is the name of a pod behind the same Service becomes its address (see `addresses`).

Paths in the middle of a value, and paths written into files, stay as they are: a program that is to run here takes its
paths from its arguments or environment. The image is ignored; programs come from the PATH of the Python that runs this,
and HOME and TMPDIR are folders of the pod.
"""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_operator.local.addresses import resolved
from finetune_operator.local.apiserver.api import Api
from finetune_operator.local.apiserver.store import Object
from finetune_operator.local.processes import MARK

_KEPT_VARIABLES = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "SSL_CERT_FILE", "TZ", "VIRTUAL_ENV")
"""Variables of this process that the pods' processes get too: what they need to run at all on this machine."""
_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_.-][A-Za-z0-9_.-]*)\)")
_KEYED_FIELD = re.compile(r"(metadata\.(?:labels|annotations))\['([^']+)'\]")


class ConfigError(Exception):
    """The container cannot be configured yet: something it refers to is missing. Worded like the kubelet's."""


class MountError(ConfigError):
    """A volume cannot be made yet."""


@dataclass(frozen=True)
class Launch:
    """How to start a container's process."""

    argv: list[str]
    environment: dict[str, str]
    folder: Path
    log: Path
    termination: Path
    leader: Path
    """Where the process is remembered."""


class PodFiles:
    """The folder of one pod."""

    def __init__(self, api: Api, root: Path, pod: Object, environment: Mapping[str, str]) -> None:
        self._api = api
        self._pod = pod
        self._base_environment = environment
        self._namespace: str = pod["metadata"]["namespace"]
        self._claims: Path = root / "claims" / self._namespace
        self.folder: Path = pod_folder(root, pod["metadata"]["uid"])

    def mount(self) -> None:
        """Make all volumes; MountError says which one cannot be made, and why."""
        for volume in self._pod["spec"].get("volumes", ()):
            try:
                self._make(volume)
            except ConfigError as error:
                what = f'MountVolume.SetUp failed for volume "{volume["name"]}" : {error}'
                raise MountError(what) from error

    def launch(self, container: Object, ip: str, gpus: Iterable[int]) -> Launch:
        """Everything that is needed to start a container; ConfigError says what is missing."""
        place = container_folder(self.folder, container["name"])
        place.mkdir(parents=True, exist_ok=True)
        termination = place / "termination"
        termination.write_bytes(b"")
        mounts = [(container["terminationMessagePath"], termination)]
        for mount in container.get("volumeMounts", ()):
            mounts.append((mount["mountPath"], self._volume(mount["name"]) / mount.get("subPath", "")))
        environment = self._environment(container, mounts, ip, gpus)
        command = [*container.get("command", ()), *container.get("args", ())]
        if not container.get("command"):
            raise ConfigError("the local runner ignores images, so the container needs a command")
        argv = [translated(expanded(part, environment), mounts) for part in command]
        folder = self.folder / "home"
        folder.mkdir(exist_ok=True)
        if "workingDir" in container:
            folder = Path(translated(container["workingDir"], mounts))
        return Launch(argv, environment, folder, place / "log", termination, place / "process.json")

    # -- volumes

    def _volume(self, name: str) -> Path:
        source: Object = next(volume for volume in self._pod["spec"]["volumes"] if volume["name"] == name)
        if "persistentVolumeClaim" in source:
            claim: str = source["persistentVolumeClaim"]["claimName"]
            return self._claims / claim
        if "hostPath" in source:
            return Path(str(source["hostPath"]["path"]))
        return self.folder / "volumes" / name

    def _make(self, volume: Object) -> None:
        folder = self._volume(volume["name"])
        (kind,) = [key for key in volume if key != "name"] or ["emptyDir"]
        source = volume.get(kind, {})
        if kind == "persistentVolumeClaim":
            claims = self._api.resource("", "v1", "persistentvolumeclaims")
            if self._api.find(claims, self._namespace, source["claimName"]) is None:
                raise ConfigError(f'persistentvolumeclaim "{source["claimName"]}" not found')
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "projected":
            for part in source.get("sources", ()):
                ((inner, projection),) = part.items()
                self._write_files(folder, inner, projection)
        elif kind not in ("emptyDir", "ephemeral", "persistentVolumeClaim", "hostPath"):
            self._write_files(folder, kind, source)

    def _write_files(self, folder: Path, kind: str, source: Object) -> None:
        for path, content in self._files(kind, source).items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            # Secrets are for this user's eyes only, whatever mode the pod asks for.
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(content)

    def _files(self, kind: str, source: Object) -> dict[str, bytes]:
        if kind == "downwardAPI":
            return {
                item["path"]: self._field(item["fieldRef"]["fieldPath"], "").encode()
                for item in source.get("items", ())
            }
        if kind not in ("configMap", "secret"):
            raise ConfigError(f"the local runner has no volumes of type {kind}")
        name: str = source["secretName"] if "secretName" in source else source["name"]
        data = self._data(kind, name, optional=source.get("optional", False))
        items = source.get("items")
        if items is None:
            return data
        missing = [item["key"] for item in items if item["key"] not in data]
        if missing and not source.get("optional"):
            raise ConfigError(f"references non-existent {kind} key: {missing[0]}")
        return {item["path"]: data[item["key"]] for item in items if item["key"] in data}

    def _data(self, kind: str, name: str, *, optional: bool) -> dict[str, bytes]:
        """The content of a ConfigMap or Secret."""
        plural = {"configMap": "configmaps", "secret": "secrets"}[kind]
        obj = self._api.find(self._api.resource("", "v1", plural), self._namespace, name)
        if obj is None:
            if optional:
                return {}
            raise ConfigError(f'{kind.lower()} "{name}" not found')
        encoded = obj.get("data", {}) if kind == "secret" else obj.get("binaryData", {})
        plain = {} if kind == "secret" else obj.get("data", {})
        return {key: value.encode() for key, value in plain.items()} | {
            key: base64.b64decode(value) for key, value in encoded.items()
        }

    # -- environment

    def _environment(
        self, container: Object, mounts: list[tuple[str, Path]], ip: str, gpus: Iterable[int]
    ) -> dict[str, str]:
        home = self.folder / "home"
        scratch = self.folder / "tmp"
        for folder in (home, scratch):
            folder.mkdir(parents=True, exist_ok=True)
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environment |= self._base_environment
        environment |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "HOME": str(home),
            "TMPDIR": str(scratch),
            "HOSTNAME": self._pod["spec"].get("hostname", self._pod["metadata"]["name"]),
            "CUDA_VISIBLE_DEVICES": ",".join(str(gpu) for gpu in gpus),
            MARK: f"{self._pod['metadata']['uid']}/{container['name']}",
        }
        given: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            kind = "secret" if "secretRef" in source else "configMap"
            reference = source[f"{kind}Ref"]
            data = self._data(kind, reference["name"], optional=reference.get("optional", False))
            given |= {source.get("prefix", "") + key: value.decode() for key, value in data.items()}
        for variable in container.get("env", ()):
            value = self._value(variable, given, ip)
            if value is not None:
                given[variable["name"]] = value
        return environment | {name: resolved(translated(value, mounts), self._pod) for name, value in given.items()}

    def _value(self, variable: Object, known: Mapping[str, str], ip: str) -> str | None:
        source = variable.get("valueFrom")
        if source is None:
            return expanded(variable.get("value", ""), known)
        ((kind, reference),) = source.items()
        if kind == "fieldRef":
            return self._field(reference["fieldPath"], ip)
        if kind not in ("secretKeyRef", "configMapKeyRef"):
            raise ConfigError(f"the local runner cannot take a variable from {kind}")
        kind = kind.removesuffix("KeyRef")
        optional = reference.get("optional", False)
        data = self._data(kind, reference["name"], optional=optional)
        if reference["key"] in data:
            return data[reference["key"]].decode()
        if optional:
            return None
        shown = {"secret": "Secret", "configMap": "ConfigMap"}[kind]
        where = f"{shown} {self._namespace}/{reference['name']}"
        raise ConfigError(f"couldn't find key {reference['key']} in {where}")

    def _field(self, path: str, ip: str) -> str:
        """A value of the pod itself (downward API)."""
        keyed = _KEYED_FIELD.fullmatch(path)
        steps = [*keyed[1].split("."), keyed[2]] if keyed else path.split(".")
        if path in ("status.podIP", "status.podIPs"):
            return ip
        if path in ("status.hostIP", "status.hostIPs"):
            return "127.0.0.1"
        value: Any = self._pod
        for step in steps:
            value = value.get(step, "") if isinstance(value, dict) else ""
        if isinstance(value, dict):
            return "\n".join(f'{key}="{item}"' for key, item in sorted(value.items()))
        return str(value)


def pod_folder(root: Path, uid: str) -> Path:
    """Where a pod lives."""
    return root / uid


def container_folder(pod: Path, name: str) -> Path:
    """Where log, termination message and process record of a container are."""
    return pod / "containers" / name


def expanded(text: str, known: Mapping[str, str]) -> str:
    """Replace `$(NAME)` by what is known; `$$` is a dollar, and unknown names stay as they are."""

    def replacement(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return known.get(match[1], match[0])

    return _REFERENCE.sub(replacement, text)


def translated(text: str, mounts: Iterable[tuple[str, Path]]) -> str:
    """Replace a mountPath at the beginning by the real folder; the longest one wins."""
    for path, real in sorted(mounts, key=lambda mount: len(mount[0]), reverse=True):
        path = path.rstrip("/") or "/"
        if text == path:
            return str(real)
        if text.startswith(f"{path}/"):
            return f"{real}{text[len(path) :]}"
    return text
