"""What a job may say about its pods: where they run, and what is added to them.

A whitelist in the words of Kubernetes. Whatever could take a pod out of the `restricted` Pod Security profile, or break
what the operator itself puts into it, has no field here or is refused by a rule.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import ApiModel, ObjectName, Quantity, cel, validations
from finetune_api.names import CA_MOUNT, CACHE_MOUNT, DOCUMENT_MOUNT, WORK_MOUNT

_QUALIFIED = "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
_A_KEY = "such as team or example.com/team: letters, digits, '-', '_' and '.', with a domain before '/' or without"

LabelKey = Annotated[
    str,
    StringConstraints(min_length=1, max_length=317),
    Field(json_schema_extra=cel(f"self.matches('{_QUALIFIED}')", f"write a label key {_A_KEY}")),
]
LabelValue = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
#: Name of something inside the pod: a volume or a claim.
PartName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", min_length=1, max_length=63)]
DataKey = Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z0-9]+$", min_length=1, max_length=253)]

_KEYS_RULE = {"rule": f"self.all(key, key.matches('{_QUALIFIED}'))", "message": f"write keys {_A_KEY}"}


def _keyed_by(key: str) -> dict[str, object]:
    """Schema extras of a list whose items are told apart by one field."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


def _exactly_one(fields: tuple[str, ...], message: str) -> tuple[str, str]:
    count = " + ".join(f"(has(self.{field}) ? 1 : 0)" for field in fields)
    return f"{count} == 1", message


Labels = Annotated[
    dict[str, LabelValue], Field(json_schema_extra={"maxProperties": 32, "x-kubernetes-validations": [_KEYS_RULE]})
]


# Where pods run


class Toleration(ApiModel):
    """A Kubernetes toleration."""

    model_config = validations(
        ("self.operator != 'Exists' || !has(self.value)", "operator Exists takes no value: remove value"),
        ("has(self.key) || self.operator == 'Exists'", "a toleration without key needs operator Exists"),
        (
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            "tolerationSeconds needs effect NoExecute",
        ),
    )

    key: Annotated[str, StringConstraints(max_length=317)] | None = None
    """Taint key; absent with operator Exists matches all."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How the value is compared."""
    value: Annotated[str, StringConstraints(max_length=63)] | None = None
    """Taint value for operator Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; absent matches all."""
    toleration_seconds: Annotated[int, Field(ge=0)] | None = None
    """With NoExecute: how long the taint is tolerated."""


class NodeRequirement(ApiModel):
    """What one label of a node must be."""

    model_config = validations(
        (
            "(self.operator in ['Exists', 'DoesNotExist']) != has(self.values)",
            "operators In, NotIn, Gt and Lt need values; Exists and DoesNotExist take none",
        ),
        (
            "!(self.operator in ['Gt', 'Lt']) || !has(self.values) || "
            "(size(self.values) == 1 && self.values[0].matches('^-?[0-9]+$'))",
            'operators Gt and Lt compare with one whole number: write one value such as "80000"',
        ),
    )

    key: LabelKey
    """Label of the node."""
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    """How its value is compared."""
    values: Annotated[list[LabelValue], Field(min_length=1, max_length=16)] | None = None
    """What it is compared with."""


class NodeSelectorTerm(ApiModel):
    """Requirements that a node must meet all together."""

    match_expressions: Annotated[list[NodeRequirement], Field(min_length=1, max_length=8)]
    """Requirements on the node's labels."""


class NodeSelector(ApiModel):
    """Alternatives: a node must meet one term."""

    node_selector_terms: Annotated[list[NodeSelectorTerm], Field(min_length=1, max_length=8)]
    """The alternatives."""


class PreferredNode(ApiModel):
    """Nodes that are liked better."""

    weight: Annotated[int, Field(ge=1, le=100)]
    """How much better."""
    preference: NodeSelectorTerm
    """Which nodes."""


class NodeAffinity(ApiModel):
    """Which nodes may, and which should rather, take the pod."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = None
    """Only these nodes."""
    preferred_during_scheduling_ignored_during_execution: (
        Annotated[list[PreferredNode], Field(min_length=1, max_length=8)] | None
    ) = None
    """Rather these nodes."""


class LabelSelector(ApiModel):
    """Pods by their labels."""

    match_labels: Annotated[
        dict[str, LabelValue],
        Field(json_schema_extra={"minProperties": 1, "maxProperties": 8, "x-kubernetes-validations": [_KEYS_RULE]}),
    ]
    """Labels that they have, all of them."""


class PodAffinityTerm(ApiModel):
    """The places where certain pods of the same namespace are."""

    label_selector: LabelSelector
    """Which pods."""
    topology_key: LabelKey
    """Label of nodes that says what a place is, such as kubernetes.io/hostname or topology.kubernetes.io/zone."""


class PreferredPod(ApiModel):
    """Places that are liked better."""

    weight: Annotated[int, Field(ge=1, le=100)]
    """How much better."""
    pod_affinity_term: PodAffinityTerm
    """Which places."""


class PodAffinity(ApiModel):
    """Near which other pods the pod must, or should rather, be; or far from which."""

    required_during_scheduling_ignored_during_execution: (
        Annotated[list[PodAffinityTerm], Field(min_length=1, max_length=8)] | None
    ) = None
    """Only there."""
    preferred_during_scheduling_ignored_during_execution: (
        Annotated[list[PreferredPod], Field(min_length=1, max_length=8)] | None
    ) = None
    """Rather there."""


class Affinity(ApiModel):
    """The Kubernetes affinity of a pod, without the parts that one pod alone does not need."""

    node_affinity: NodeAffinity | None = None
    """Which nodes."""
    pod_affinity: PodAffinity | None = None
    """Near which other pods."""
    pod_anti_affinity: PodAffinity | None = None
    """Far from which other pods."""


class Placement(ApiModel):
    """Where a pod may run, and how it is started there."""

    node_selector: Labels = {}
    """Labels that the node must have."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    """Taints that the pod tolerates."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pod: who waits, and who is preempted, when there is not room for all."""
    runtime_class_name: ObjectName | None = None
    """RuntimeClass of the pod, such as nvidia where that is not the nodes' default."""
    scheduler_name: ObjectName | None = None
    """Scheduler that places the pod. Absent: the cluster's default."""


class Capacity(StrEnum):
    ANY = "Any"
    ON_DEMAND = "OnDemand"
    SPOT = "Spot"


class TopologyMode(StrEnum):
    REQUIRED = "Required"
    PREFERRED = "Preferred"
    UNCONSTRAINED = "Unconstrained"


class Topology(ApiModel):
    """How close together a queue places the pods of one attempt."""

    model_config = validations(
        (
            "has(self.level) == (self.mode != 'Unconstrained')",
            "topology with mode Required or Preferred needs level, a node label such as cloud.provider.com/rack; "
            "Unconstrained takes none",
        ),
    )

    mode: TopologyMode
    """Required: all within one domain of the level, or not at all. Preferred: within one if there is room.
    Unconstrained: anywhere in the topology."""
    level: Annotated[str, StringConstraints(min_length=1, max_length=317)] | None = None
    """Node label that names the domain."""


class Scheduling(Placement):
    """Where and when train pods may run."""

    model_config = validations(
        ("!has(self.topology) || has(self.queueName)", "topology is kept by a queue: set scheduling.queueName too"),
        (
            "!has(self.workloadPriorityClassName) || has(self.queueName) || has(self.cpuQueueName)",
            "workloadPriorityClassName orders jobs in a queue: set scheduling.queueName or cpuQueueName too",
        ),
    )

    queue_name: ObjectName | None = None
    """Kueue LocalQueue that admits the train pods. They are created suspended, and start when the queue lets them."""
    cpu_queue_name: ObjectName | None = None
    """Kueue LocalQueue that admits the pods of prepare and export."""
    workload_priority_class_name: ObjectName | None = None
    """Kueue WorkloadPriorityClass: who is admitted first, and who has to give way."""
    topology: Topology | None = None
    """Kueue topology-aware placement of the train pods."""
    affinity: Affinity | None = None
    """Nodes and neighbours that are required or preferred."""
    gpu_types: (
        Annotated[
            list[Annotated[LabelValue, StringConstraints(min_length=1)]],
            Field(min_length=1, max_length=16, json_schema_extra={"x-kubernetes-list-type": "set"}),
        ]
        | None
    ) = None
    """GPUs that will do, such as NVIDIA-H100-80GB-HBM3: product names in a label of the nodes, which is
    nvidia.com/gpu.product or amd.com/gpu.product-name unless the operator's settings name another one."""
    capacity: Capacity = Capacity.ANY
    """Spot takes only nodes that the cloud may take back, and tolerates their taint; OnDemand takes only others. Which
    labels mark such nodes is an operator setting. A spot node that is taken back costs no restart."""


# What a train pod asks for besides numbers


class ResourceClaim(ApiModel):
    """Devices by dynamic resource allocation."""

    model_config = validations(
        _exactly_one(
            ("resourceClaimName", "resourceClaimTemplateName"),
            "name exactly one of resourceClaimName (a claim that is there) and resourceClaimTemplateName (a new claim "
            "for each pod)",
        )
    )

    name: PartName
    """Name of the claim inside the pod."""
    resource_claim_name: ObjectName | None = None
    """A ResourceClaim of the job's namespace."""
    resource_claim_template_name: ObjectName | None = None
    """A ResourceClaimTemplate of the job's namespace, from which each pod gets a claim of its own."""


# What is added to all pods of a job


class Reference(ApiModel):
    """An object in the job's own namespace."""

    name: ObjectName
    """Its name."""


class KeySelector(ApiModel):
    """One key of a ConfigMap or Secret in the job's own namespace."""

    name: ObjectName
    """Name of the ConfigMap or Secret."""
    key: DataKey
    """Key in it."""


class EnvironmentKey(KeySelector):
    """One key of a ConfigMap or Secret in the job's own namespace, for a variable."""

    optional: bool = False
    """Whether the pod starts without the variable when the key is not there."""


class PodField(ApiModel):
    """A field of the pod itself."""

    field_path: Annotated[
        str,
        StringConstraints(min_length=1, max_length=353),
        Field(
            json_schema_extra=cel(
                "self in ['metadata.name', 'metadata.namespace', 'metadata.uid', 'spec.nodeName', "
                "'spec.serviceAccountName', 'status.hostIP', 'status.podIP'] || "
                "self.matches(\"^metadata[.](labels|annotations)[[]'[^']+'[]]$\")",
                "write metadata.name, metadata.namespace, metadata.uid, metadata.labels['KEY'], "
                "metadata.annotations['KEY'], spec.nodeName, spec.serviceAccountName, status.hostIP or status.podIP",
            )
        ),
    ]
    """Path of the field."""


class EnvironmentSource(ApiModel):
    """Where a variable's value comes from."""

    model_config = validations(
        _exactly_one(
            ("secretKeyRef", "configMapKeyRef", "fieldRef"),
            "valueFrom names exactly one of secretKeyRef, configMapKeyRef and fieldRef",
        )
    )

    secret_key_ref: EnvironmentKey | None = None
    """A key of a Secret."""
    config_map_key_ref: EnvironmentKey | None = None
    """A key of a ConfigMap."""
    field_ref: PodField | None = None
    """A field of the pod."""


OWN_VARIABLES = (
    *("HOME", "POD_NAME", "POD_IP", "NODE_NAME", "PYTHONUNBUFFERED"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "JOB_COMPLETION_INDEX",
    # With these a pod would see GPUs that it did not ask for, or none.
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"),
    *("AMD_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
)
"""Variables that others set: operator, trainer, device plugins, Kubernetes. Those that begin with FINETUNE_ are
theirs, too."""

OWN_VOLUMES = ("document", "work", "tmp", "shm", "ca-bundle", "model-cache")
"""Names of the operator's own volumes."""


class EnvironmentVariable(ApiModel):
    """A variable of the container."""

    model_config = validations(("has(self.value) != has(self.valueFrom)", "set value or valueFrom, one of them"))

    name: Annotated[
        str,
        StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$", min_length=1, max_length=128),
        Field(
            json_schema_extra=cel(
                f"!self.startsWith('FINETUNE_') && !(self in {list(OWN_VARIABLES)})",
                "this variable is set by the operator, the trainer or the device plugin: remove it, or choose another "
                "name",
            )
        ),
    ]
    """Name of the variable."""
    value: Annotated[str, StringConstraints(max_length=4096)] | None = None
    """Its value. $(NAME) stands for a variable before it. Secrets belong into valueFrom."""
    value_from: EnvironmentSource | None = None
    """Where its value comes from."""


_RELATIVE = cel(
    "!self.startsWith('/') && !self.matches('(^|/)[.][.](/|$)')", "write a relative path without '..', such as conf/a"
)
RelativePath = Annotated[str, StringConstraints(min_length=1, max_length=256), Field(json_schema_extra=_RELATIVE)]
FileMode = Annotated[int, Field(ge=0, le=0o777)]


class KeyToPath(ApiModel):
    """A key as a file."""

    key: DataKey
    """The key."""
    path: RelativePath
    """The file, relative to the volume."""


_Items = Annotated[list[KeyToPath], Field(min_length=1, max_length=16)]


class Projection(ApiModel):
    """The keys of a ConfigMap or Secret as files."""

    name: ObjectName
    """Name of the ConfigMap or Secret."""
    items: _Items | None = None
    """Keys that become files. Absent: all."""
    optional: bool = False
    """Whether the pod starts without it."""


class ConfigMapVolume(Projection):
    """The keys of a ConfigMap as files."""

    default_mode: FileMode | None = None
    """Mode of the files, as a decimal number. Absent: 420, which is 0644."""


class SecretVolume(ApiModel):
    """The keys of a Secret as files."""

    secret_name: ObjectName
    """Name of the Secret."""
    items: _Items | None = None
    """Keys that become files. Absent: all."""
    optional: bool = False
    """Whether the pod starts without it."""
    default_mode: FileMode | None = None
    """Mode of the files, as a decimal number. Absent: 420, which is 0644."""


class ClaimVolume(ApiModel):
    """A PersistentVolumeClaim of the job's namespace."""

    claim_name: ObjectName
    """Name of the claim."""
    read_only: bool = False
    """Whether it is attached for reading only."""


class EmptyDirVolume(ApiModel):
    """An empty folder that is gone with the pod."""

    medium: Literal["Memory"] | None = None
    """Memory counts towards the memory of the pod. Absent: the node's disk."""
    size_limit: Quantity | None = None
    """The pod is evicted when the folder grows larger."""


class TokenProjection(ApiModel):
    """A token of the pods' service account for somebody outside, as a file."""

    audience: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    """Whom the token is for, such as sts.amazonaws.com."""
    expiration_seconds: Annotated[int, Field(ge=600, le=86_400)] = 3600
    """How long a token is good; it is renewed in time."""
    path: RelativePath
    """The file, relative to the volume."""


class ProjectedSource(ApiModel):
    """One part of a projected volume."""

    model_config = validations(
        _exactly_one(
            ("configMap", "secret", "serviceAccountToken"),
            "a source is exactly one of configMap, secret and serviceAccountToken",
        )
    )

    config_map: Projection | None = None
    """The keys of a ConfigMap."""
    secret: Projection | None = None
    """The keys of a Secret."""
    service_account_token: TokenProjection | None = None
    """A token of the pods' service account."""


class ProjectedVolume(ApiModel):
    """Several sources in one folder."""

    sources: Annotated[list[ProjectedSource], Field(min_length=1, max_length=8)]
    """The sources."""
    default_mode: FileMode | None = None
    """Mode of the files, as a decimal number. Absent: 420, which is 0644."""


class CSIVolume(ApiModel):
    """A volume that a CSI driver makes for the pod, such as keys from a vault."""

    driver: Annotated[
        str, StringConstraints(pattern=r"^[a-z0-9A-Z]([-a-z0-9A-Z.]*[a-z0-9A-Z])?$", min_length=1, max_length=63)
    ]
    """Name of the driver."""
    read_only: bool = False
    """Whether it is for reading only."""
    volume_attributes: Annotated[
        dict[str, Annotated[str, StringConstraints(max_length=1024)]],
        Field(json_schema_extra={"maxProperties": 16}),
    ] = {}
    """What the driver wants to know."""
    node_publish_secret_ref: Reference | None = None
    """Secret that the driver gets."""


class Volume(ApiModel):
    """A volume of the pod. Folders of the node (hostPath) are not among them."""

    model_config = validations(
        _exactly_one(
            ("configMap", "secret", "persistentVolumeClaim", "emptyDir", "projected", "csi"),
            "a volume is exactly one of configMap, secret, persistentVolumeClaim, emptyDir, projected and csi",
        )
    )

    name: Annotated[
        PartName,
        Field(
            json_schema_extra=cel(
                f"!(self in {list(OWN_VOLUMES)})", "the operator has a volume of this name: choose another name"
            )
        ),
    ]
    """Name of the volume inside the pod."""
    config_map: ConfigMapVolume | None = None
    """The keys of a ConfigMap."""
    secret: SecretVolume | None = None
    """The keys of a Secret."""
    persistent_volume_claim: ClaimVolume | None = None
    """A PersistentVolumeClaim."""
    empty_dir: EmptyDirVolume | None = None
    """An empty folder that is gone with the pod."""
    projected: ProjectedVolume | None = None
    """Several sources in one folder."""
    csi: CSIVolume | None = None
    """A volume of a CSI driver."""


_OWN_PATHS = "|".join(path.removeprefix("/") for path in ("/dev", "/proc", "/sys", "/tmp", WORK_MOUNT, CACHE_MOUNT))
_OWN_FILES = "|".join(path.removeprefix("/") for path in (DOCUMENT_MOUNT, CA_MOUNT))


class VolumeMount(ApiModel):
    """A volume as a folder of the container."""

    name: PartName
    """Name of the volume, which is in podTemplate.volumes."""
    mount_path: Annotated[
        str,
        StringConstraints(min_length=2, max_length=256),
        Field(
            json_schema_extra={
                "x-kubernetes-validations": [
                    {
                        "rule": "self.matches('^(/[.]?[A-Za-z0-9_-][A-Za-z0-9._-]*)+$')",
                        "message": "write an absolute path without '..' and without '/' at its end, such as /mnt/data",
                    },
                    {
                        "rule": f"!self.matches('^/(etc$|({_OWN_PATHS}|{_OWN_FILES})(/|$))')",
                        "message": "the operator or the system needs this path itself: mount below /mnt, for example",
                    },
                ]
            }
        ),
    ]
    """Where the folder is."""
    sub_path: RelativePath | None = None
    """Folder or file in the volume that is mounted instead of the whole of it."""
    read_only: bool = False
    """Whether it is for reading only."""


_Id = Annotated[int, Field(ge=0, le=2_147_483_647, json_schema_extra={"format": "int64"})]


class PodSecurityContext(ApiModel):
    """Whom the pods' processes run as. Everything else about their security is fixed."""

    run_as_user: (
        Annotated[
            _Id,
            Field(
                json_schema_extra=cel(
                    "self > 0", "pods never run as root: choose another user, or leave it to the image (65532)"
                )
            ),
        ]
        | None
    ) = None
    """User number. Absent: that of the image."""
    run_as_group: _Id | None = None
    """Group number. Absent: that of the image."""
    fs_group: _Id | None = None
    """Group that owns the pod's volumes, so that the processes may write to them. Absent: 65532 where the operator
    mounts a volume that must be written to (storageClassName, storage.modelCache), else none."""
    fs_group_change_policy: Literal["OnRootMismatch", "Always"] | None = None
    """OnRootMismatch changes the owner of a volume's files only when that of the root is wrong, which is fast."""
    supplemental_groups: Annotated[list[_Id], Field(min_length=1, max_length=16)] | None = None
    """More groups of the processes."""


_FOREIGN_KEYS = {
    "rule": "self.all(key, !key.matches('^((.*[.])?finetune[.]dev|(.*[.-])?(kubernetes|k8s)[.]io)/') || "
    "key.startsWith('cluster-autoscaler.kubernetes.io/'))",
    "message": "keys of finetune.dev, kubernetes.io and k8s.io belong to the operator and to Kubernetes (except "
    "cluster-autoscaler.kubernetes.io): use a domain of your own",
}
_JOB_KEYS = {
    "rule": "!('job-name' in self) && !('controller-uid' in self)",
    "message": "job-name and controller-uid are set by the Job controller: remove them",
}
_PodLabels = Annotated[
    dict[str, LabelValue],
    Field(json_schema_extra={"maxProperties": 16, "x-kubernetes-validations": [_KEYS_RULE, _FOREIGN_KEYS, _JOB_KEYS]}),
]
_PodAnnotations = Annotated[
    dict[str, Annotated[str, StringConstraints(max_length=4096)]],
    Field(json_schema_extra={"maxProperties": 16, "x-kubernetes-validations": [_KEYS_RULE, _FOREIGN_KEYS]}),
]


class PodTemplate(ApiModel):
    """What is added to all pods of the job. They stay within the restricted Pod Security profile whatever is written
    here. The service account is storage.serviceAccountName."""

    model_config = validations(
        (
            "!has(self.volumeMounts) || self.volumeMounts.all(mount, "
            "has(self.volumes) && self.volumes.exists(volume, volume.name == mount.name))",
            "each of volumeMounts must name one of volumes: correct the name, or add the volume",
        ),
    )

    labels: _PodLabels = {}
    """More labels of the pods."""
    annotations: _PodAnnotations = {}
    """Annotations of the pods."""
    image: (
        Annotated[
            str,
            StringConstraints(min_length=1, max_length=512),
            Field(
                json_schema_extra=cel(
                    "self.matches('^[A-Za-z0-9][-A-Za-z0-9._:/]*(@sha256:[0-9a-f]{64})?$')",
                    "write an image such as registry.example.com/ml/trainer:0.1.0",
                )
            ),
        ]
        | None
    ) = None
    """Image of the pods instead of the operator's: one that is made from the trainer's. The published model's manifest
    names it."""
    image_pull_secrets: (
        Annotated[list[Reference], Field(min_length=1, max_length=8, json_schema_extra=_keyed_by("name"))] | None
    ) = None
    """Secrets for pulling the image, besides the operator's."""
    env: (
        Annotated[list[EnvironmentVariable], Field(min_length=1, max_length=64, json_schema_extra=_keyed_by("name"))]
        | None
    ) = None
    """More variables of the container. They win over the operator's proxies and over storage.secretRef."""
    volumes: Annotated[list[Volume], Field(min_length=1, max_length=16, json_schema_extra=_keyed_by("name"))] | None = (
        None
    )
    """More volumes."""
    volume_mounts: (
        Annotated[list[VolumeMount], Field(min_length=1, max_length=16, json_schema_extra=_keyed_by("mountPath"))]
        | None
    ) = None
    """Where they are mounted."""
    security_context: PodSecurityContext | None = None
    """Whom the pods' processes run as."""


# How storage is reached


class CABundle(ApiModel):
    """Certificates in PEM of authorities that are trusted besides the well-known ones."""

    model_config = validations(
        _exactly_one(
            ("configMapKeyRef", "secretKeyRef"),
            "caBundle names exactly one of configMapKeyRef and secretKeyRef",
        )
    )

    config_map_key_ref: KeySelector | None = None
    """A key of a ConfigMap."""
    secret_key_ref: KeySelector | None = None
    """A key of a Secret."""


class ModelCache(ApiModel):
    """A volume on which base models are kept between jobs."""

    claim_name: ObjectName
    """A PersistentVolumeClaim of the job's namespace. Jobs that run at once need one that can be mounted by several
    pods (ReadWriteMany)."""
