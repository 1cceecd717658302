"""Settings of the operator, read once from the environment. The Helm chart sets them from its values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

PREFIX = "FINETUNE_"

LogFormat = Literal["text", "json"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

_ABOVE_ZERO = {"resync_seconds", "poll_seconds", "stall_seconds", "workers", "kube_qps", "kube_burst"}


@dataclass(frozen=True)
class Settings:
    trainer_image: str = "ghcr.io/finetune-operator/trainer:latest"
    """Image of the pods; FINETUNE_TRAINER_IMAGE."""

    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """FINETUNE_IMAGE_PULL_POLICY."""

    image_pull_secrets: tuple[str, ...] = ()
    """Names of pull secrets in the job's namespace, comma-separated; FINETUNE_IMAGE_PULL_SECRETS."""

    http_proxy: str = ""
    """HTTP_PROXY of the pods; FINETUNE_HTTP_PROXY."""

    https_proxy: str = ""
    """HTTPS_PROXY of the pods; FINETUNE_HTTPS_PROXY."""

    no_proxy: str = ""
    """NO_PROXY of the pods; FINETUNE_NO_PROXY."""

    spot_labels: tuple[str, ...] = (
        "cloud.google.com/gke-spot=true",
        "eks.amazonaws.com/capacityType=SPOT",
        "karpenter.sh/capacity-type=spot",
        "kubernetes.azure.com/scalesetpriority=spot",
    )
    """Labels of nodes that the cloud may take back, LABEL=VALUE, comma-separated; their taints are the same.
    FINETUNE_SPOT_LABELS."""

    gpu_type_labels: tuple[str, ...] = (
        "amd.com=amd.com/gpu.product-name",
        "nvidia.com=nvidia.com/gpu.product",
    )
    """For each vendor of a GPU resource the label of nodes with the product name, VENDOR=LABEL, comma-separated; others
    have theirs in VENDOR/gpu.product. FINETUNE_GPU_TYPE_LABELS."""

    namespaces: tuple[str, ...] = ()
    """Namespaces to watch, comma-separated; empty watches all. FINETUNE_NAMESPACES."""

    s3_endpoint: str = ""
    """Default of storage.endpoint; empty means AWS. FINETUNE_S3_ENDPOINT."""

    s3_region: str = ""
    """Default of storage.region; FINETUNE_S3_REGION."""

    s3_addressing_style: Literal["Auto", "Path", "Virtual"] = "Auto"
    """Default of storage.addressingStyle: Auto, Path or Virtual. FINETUNE_S3_ADDRESSING_STYLE."""

    allow_files: bool = False
    """Allow file:// URIs. Only where pods share a file system with the user; FINETUNE_ALLOW_FILES."""

    http_host: str = ""
    """Address of /metrics, /healthz and /readyz; empty is every address, IPv4 and IPv6. FINETUNE_HTTP_HOST."""

    http_port: int = 8080
    """Their port; FINETUNE_HTTP_PORT."""

    resync_seconds: float = 60.0
    """Every job is looked at again so often, whatever events were missed; FINETUNE_RESYNC_SECONDS."""

    poll_seconds: float = 5.0
    """Progress of a running job is read so often; FINETUNE_POLL_SECONDS."""

    progress_seconds: float = 10.0
    """Progress alone is written to the API server at most so often; FINETUNE_PROGRESS_SECONDS."""

    stall_seconds: int = 1800
    """Training that makes no step for so long is ended; FINETUNE_STALL_SECONDS."""

    workers: int = 16
    """Jobs that are looked at at the same time; FINETUNE_WORKERS."""

    log_format: LogFormat = "text"
    """text for people, json for one object each line; FINETUNE_LOG_FORMAT."""

    log_level: LogLevel = "INFO"
    """The least of DEBUG, INFO, WARNING and ERROR that is written; FINETUNE_LOG_LEVEL."""

    kube_qps: float = 100.0
    """Requests to the API server each second, watches aside; FINETUNE_KUBE_QPS."""

    kube_burst: int = 200
    """Requests at once after a quiet time; FINETUNE_KUBE_BURST."""

    lease_name: str = ""
    """The Lease whose holder works while other replicas stand by; empty for one process alone. FINETUNE_LEASE_NAME."""

    lease_namespace: str = ""
    """Its namespace, that of the operator; FINETUNE_LEASE_NAMESPACE."""

    lease_seconds: int = 15
    """A leader that is not heard of for so long is replaced; FINETUNE_LEASE_SECONDS."""

    pod_name: str = ""
    """Names the leader in the Lease; empty is the name of the host. FINETUNE_POD_NAME."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a setting cannot be used; the message names its variable.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and (value < 0 or (value == 0 and field.name in _ABOVE_ZERO)):
                raise ValueError(f"{variable(field.name)}={value} is too small")
        if self.lease_seconds < 3:
            # A single slow request would cost the lease.
            raise ValueError(f"{variable('lease_seconds')}={self.lease_seconds} is too small: 3 is the least")
        if self.lease_name and not self.lease_namespace:
            raise ValueError(f"{variable('lease_name')} needs {variable('lease_namespace')}")
        if not self.spot_labels:
            raise ValueError("FINETUNE_SPOT_LABELS is empty: name a label that marks spot nodes, LABEL=VALUE")
        for name in ("spot_labels", "gpu_type_labels"):
            for item in getattr(self, name):
                if not all(item.partition("=")):
                    raise ValueError(f"FINETUNE_{name.upper()} has {item!r}: write two words with '=' between them")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """
        Raises:
            ValueError: a variable cannot be read; the message names it.
        """
        environment = os.environ if environment is None else environment
        values: dict[str, object] = {}
        for name, kind in get_type_hints(cls).items():
            text = environment.get(variable(name))
            if text is None:
                continue
            try:
                values[name] = _parse(text, kind)
            except ValueError as error:
                raise ValueError(f"{variable(name)}={text!r} cannot be read: {error}") from error
        return cls(**values)  # type: ignore[arg-type]

    @classmethod
    def unknown(cls, environment: Mapping[str, str] | None = None) -> list[str]:
        """Variables that look like settings and are none."""
        known = {variable(field.name) for field in fields(cls)}
        names = os.environ if environment is None else environment
        return sorted(name for name in names if name.startswith(PREFIX) and name not in known)


def variable(setting: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{setting.upper()}"


def _parse(text: str, kind: Any) -> object:
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"write one of {', '.join(get_args(kind))}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("write true or false")
        return text.lower() == "true"
    if get_origin(kind) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    value: object = kind(text)
    return value
