"""The pods of a job: every field that places them or adds to them, and the profile that they never leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import pytest
import yaml
from builders import SETTINGS, Story, complete, job_body
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pod_security import violations

from finetune_api.document import spec_digest
from finetune_api.names import DOCUMENT_FILE, Stage
from finetune_api.pod import OWN_VARIABLES, OWN_VOLUMES
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator import children, pods
from finetune_operator.cli.validation import schema, validate
from finetune_operator.config import Settings
from finetune_operator.resource import FineTuneJob
from finetune_trainer import agent

ROOT = Path(__file__).parents[2]
CPU_STAGES = (Stage.PREPARE, Stage.EXPORT)
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def build(
    stage: Stage = Stage.TRAIN, status: dict[str, Any] | None = None, with_settings: Settings = SETTINGS, **spec: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """ConfigMap and Job of a spec that the API takes."""
    body = job_body({"trainedAttempt": 1, **(status or {})}, **spec)
    body["spec"] = schema().defaulted(body)["spec"]
    assert [str(error) for error in schema().validate(body)] == []
    assert schema().unknown_fields({**body, "status": {}}) == []
    job = FineTuneJob.parse(body)
    assert job.spec is not None, job.spec_problem
    return children.build(job, job.spec, stage, 1, with_settings)


def template(*args: Any, **kwargs: Any) -> dict[str, Any]:
    found: dict[str, Any] = build(*args, **kwargs)[-1]["spec"]["template"]
    return found


def pod(*args: Any, **kwargs: Any) -> dict[str, Any]:
    spec: dict[str, Any] = template(*args, **kwargs)["spec"]
    return spec


def container(*args: Any, **kwargs: Any) -> dict[str, Any]:
    (only,) = pod(*args, **kwargs)["containers"]
    found: dict[str, Any] = only
    return found


def environment(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return {item["name"]: item for item in container(*args, **kwargs)["env"]}


def terms(**scheduling: Any) -> list[list[dict[str, Any]]]:
    """The alternatives of required node labels."""
    with_settings = scheduling.pop("with_settings", SETTINGS)
    resources = scheduling.pop("resources", {})
    built = pod(scheduling=scheduling, resources=resources, with_settings=with_settings)
    selector = built["affinity"]["nodeAffinity"][REQUIRED]
    return [term["matchExpressions"] for term in selector["nodeSelectorTerms"]]


def node_affinity(*alternatives: dict[str, Any]) -> dict[str, Any]:
    required = {"nodeSelectorTerms": [{"matchExpressions": [expression]} for expression in alternatives]}
    return {"nodeAffinity": {REQUIRED: required}}


class TestPlacement:
    PLACE = {
        "nodeSelector": {"pool": "a"},
        "tolerations": [{"key": "pool", "operator": "Equal", "value": "a", "effect": "NoSchedule"}],
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "schedulerName": "gpu-scheduler",
    }

    @pytest.mark.parametrize("stage", Stage)
    def test_each_stage_has_its_own_place_and_no_other(self, stage: Stage) -> None:
        field = {"scheduling": self.PLACE} if stage is Stage.TRAIN else {"stages": {stage: self.PLACE}}
        for each in Stage:
            found = {name: value for name, value in pod(each, **field).items() if name in self.PLACE}
            assert found == (self.PLACE if each is stage else {})

    def test_affinity_goes_into_the_pod_as_it_is(self) -> None:
        near = {"labelSelector": {"matchLabels": {"app": "cache"}}, "topologyKey": "kubernetes.io/hostname"}
        zone = {"key": "zone", "operator": "In", "values": ["a", "b"]}
        affinity = {
            "nodeAffinity": {
                REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [zone]}]},
                PREFERRED: [{"weight": 9, "preference": {"matchExpressions": [{"key": "fast", "operator": "Exists"}]}}],
            },
            "podAffinity": {PREFERRED: [{"weight": 1, "podAffinityTerm": near}]},
            "podAntiAffinity": {REQUIRED: [near]},
        }
        assert pod(scheduling={"affinity": affinity})["affinity"] == affinity
        assert all("affinity" not in pod(stage, scheduling={"affinity": affinity}) for stage in CPU_STAGES)

    @pytest.mark.parametrize(
        ("resource", "label"),
        [
            ("nvidia.com/gpu", "nvidia.com/gpu.product"),
            ("nvidia.com/mig-3g.40gb", "nvidia.com/gpu.product"),
            ("amd.com/gpu", "amd.com/gpu.product-name"),
            ("gpu.intel.com/xe", "gpu.intel.com/gpu.product"),
        ],
    )
    def test_the_type_of_a_gpu_is_a_label_of_its_vendor(self, resource: str, label: str) -> None:
        found = terms(gpuTypes=["A", "B"], resources={"gpuResourceName": resource})
        assert found == [[{"key": label, "operator": "In", "values": ["A", "B"]}]]

    def test_another_label_for_types_can_be_set(self) -> None:
        ours = Settings(gpu_type_labels=("nvidia.com=cloud.google.com/gke-accelerator",))
        (((expression,),),) = [terms(gpuTypes=["nvidia-h100-80gb"], with_settings=ours)]
        assert expression["key"] == "cloud.google.com/gke-accelerator"

    def test_spot_is_the_mark_of_any_cloud_and_its_taint_is_tolerated(self) -> None:
        mine = [{"key": "gpu", "operator": "Exists"}]
        built = pod(scheduling={"capacity": "Spot", "tolerations": mine})
        marks = [item.split("=") for item in SETTINGS.spot_labels]
        assert terms(capacity="Spot") == [[{"key": key, "operator": "In", "values": [value]}] for key, value in marks]
        assert built["tolerations"] == [
            *mine,
            *({"key": key, "operator": "Equal", "value": value} for key, value in marks),
        ]

    def test_on_demand_is_a_node_without_any_such_mark(self) -> None:
        (expressions,) = terms(capacity="OnDemand")
        assert {expression["operator"] for expression in expressions} == {"NotIn"}
        assert len(expressions) == len(SETTINGS.spot_labels)
        assert "tolerations" not in pod(scheduling={"capacity": "OnDemand"})

    def test_any_capacity_says_nothing(self) -> None:
        assert {"affinity", "tolerations"} & pod(scheduling={"capacity": "Any"}).keys() == set()

    def test_what_is_asked_for_in_several_ways_holds_in_every_alternative(self) -> None:
        zones = [{"key": "zone", "operator": "In", "values": [zone]} for zone in "ab"]
        ours = Settings(spot_labels=("x=1", "y=2"))
        found = terms(affinity=node_affinity(*zones), gpuTypes=["T"], capacity="Spot", with_settings=ours)
        kind = {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["T"]}
        marks = [{"key": "x", "operator": "In", "values": ["1"]}, {"key": "y", "operator": "In", "values": ["2"]}]
        assert found == [[zone, kind, mark] for zone in zones for mark in marks]

    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("FINETUNE_SPOT_LABELS", ""),
            ("FINETUNE_SPOT_LABELS", "spot"),
            ("FINETUNE_SPOT_LABELS", "spot="),
            ("FINETUNE_GPU_TYPE_LABELS", "a=b,=c"),
        ],
    )
    def test_settings_that_would_place_nothing_are_refused(self, variable: str, value: str) -> None:
        with pytest.raises(ValueError, match=variable):
            Settings.from_environment({variable: value})


class TestDevices:
    def test_gpus_of_claims_are_not_asked_for_twice(self) -> None:
        claims = [
            {"name": "gpus", "resourceClaimTemplateName": "two-h100"},
            {"name": "nic", "resourceClaimName": "rdma"},
        ]
        asked = {"gpusPerNode": 2, "gpuAllocation": "ResourceClaims", "resourceClaims": claims}
        built = pod(resources=asked)
        assert built["resourceClaims"] == claims
        resources = built["containers"][0]["resources"]
        assert resources["claims"] == [{"name": "gpus"}, {"name": "nic"}]
        assert "nvidia.com/gpu" not in resources["requests"] | resources["limits"]
        document = json.loads(build(resources=asked)[0]["data"][DOCUMENT_FILE])
        assert document["processes"] == 2

    def test_claims_beside_gpus_of_a_device_plugin(self) -> None:
        claim = {"name": "nic", "resourceClaimName": "rdma"}
        resources = container(resources={"resourceClaims": [claim]})["resources"]
        assert resources["limits"]["nvidia.com/gpu"] == "1"
        assert resources["claims"] == [{"name": "nic"}]

    @pytest.mark.parametrize("stage", CPU_STAGES)
    def test_other_stages_have_no_devices(self, stage: Stage) -> None:
        asked = {"resourceClaims": [{"name": "nic", "resourceClaimName": "rdma"}]}
        built = pod(stage, resources=asked)
        assert "resourceClaims" not in built
        assert "claims" not in built["containers"][0]["resources"]


BILLION = 10**9
EIGHT_BILLION = {
    "resolved": {"weightBytes": 16 * BILLION, "parameters": 8 * BILLION, "largestTensorBytes": BILLION},
    "dataset": {
        "format": "Chat",
        "trainRows": 1,
        "validationRows": 0,
        "trainTokens": 2 * BILLION,
        "supervisedTokens": 1,
        "sha256": "",
    },
}


class TestDisk:
    @pytest.mark.parametrize(
        ("stage", "adapter", "size"),
        [
            # 2 GiB; base 16 GB; 4-bit base 4.8 GB; rows 32 GB; three checkpoints and the result of 80 M parameters.
            (Stage.TRAIN, "QLoRA", 55),
            (Stage.TRAIN, "LoRA", 50),
            # Three checkpoints of 12 bytes for each parameter, and the result of 4.
            (Stage.TRAIN, "Full", 345),
            # 2 GiB; what was trained; the model that is published; a file of the base.
            (Stage.EXPORT, "QLoRA", 32),
            (Stage.EXPORT, "LoRA", 28),
            (Stage.EXPORT, "Full", 57),
            (Stage.PREPARE, "QLoRA", 2),
        ],
    )
    def test_the_request_follows_the_size_of_the_model(self, stage: Stage, adapter: str, size: int) -> None:
        resources = container(stage, EIGHT_BILLION, method={"adapter": {"type": adapter}})["resources"]
        assert resources["requests"]["ephemeral-storage"] == f"{size}Gi"
        # An estimate may be wrong, and a limit kills.
        assert "ephemeral-storage" not in resources["limits"]

    def test_a_larger_rank_and_a_wider_output_need_more(self) -> None:
        def request(stage: Stage, **spec: Any) -> int:
            text: str = container(stage, EIGHT_BILLION, **spec)["resources"]["requests"]["ephemeral-storage"]
            return int(text.removesuffix("Gi"))

        large = {"adapter": {"type": "LoRA", "lora": {"rank": 256}}}
        assert request(Stage.TRAIN, method=large) > request(Stage.TRAIN, method={"adapter": {"type": "LoRA"}}) + 40
        wide = {"uri": "s3://models/tuned", "dtype": "F32"}
        assert request(Stage.EXPORT, output=wide) == request(Stage.EXPORT) + 15

    @pytest.mark.parametrize("stage", [Stage.TRAIN, Stage.EXPORT])
    def test_an_unknown_model_still_asks_for_something(self, stage: Stage) -> None:
        assert container(stage)["resources"]["requests"]["ephemeral-storage"] == "20Gi"

    @pytest.mark.parametrize("stage", Stage)
    def test_a_chosen_size_is_a_limit_too(self, stage: Stage) -> None:
        resources = container(stage, **self.asked(stage, ephemeralStorage="70Gi"))["resources"]
        assert resources["requests"]["ephemeral-storage"] == resources["limits"]["ephemeral-storage"] == "70Gi"

    def test_zero_asks_for_nothing(self) -> None:
        resources = container(resources={"ephemeralStorage": "0"})["resources"]
        assert "ephemeral-storage" not in resources["requests"] | resources["limits"]

    @pytest.mark.parametrize("stage", Stage)
    def test_a_storage_class_makes_a_volume_of_the_pods_own(self, stage: Stage) -> None:
        built = pod(stage, **self.asked(stage, storageClassName="fast", ephemeralStorage="70Gi"))
        (work,) = [volume for volume in built["volumes"] if volume["name"] == "work"]
        claim = work["ephemeral"]["volumeClaimTemplate"]["spec"]
        assert claim == {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": "fast",
            "resources": {"requests": {"storage": "70Gi"}},
        }
        assert "ephemeral-storage" not in built["containers"][0]["resources"]["requests"]
        # The volume belongs to root, and the process is somebody else.
        assert built["securityContext"]["fsGroup"] == pods.IMAGE_USER
        assert violations(built) == []

    def test_its_size_is_derived_where_none_is_chosen(self) -> None:
        built = pod(Stage.TRAIN, EIGHT_BILLION, resources={"storageClassName": "fast"})
        (work,) = [volume for volume in built["volumes"] if volume["name"] == "work"]
        claim = work["ephemeral"]["volumeClaimTemplate"]["spec"]
        assert claim["resources"]["requests"]["storage"] == "55Gi"

    def test_a_group_of_ones_own_wins(self) -> None:
        context = {"securityContext": {"fsGroup": 7}}
        assert pod(resources={"storageClassName": "fast"}, podTemplate=context)["securityContext"]["fsGroup"] == 7
        assert "fsGroup" not in pod()["securityContext"]

    def test_what_a_pod_asks_for_is_in_the_status(self) -> None:
        story = Story(resources={"memory": "48Gi"})
        story.prepared()
        story.look([complete(Stage.PREPARE), complete(Stage.TRAIN)])
        resolved = story.body["status"]["resolved"]
        assert resolved == {
            "trainMemory": "48Gi",
            "trainEphemeralStorage": "20Gi",
            "exportMemory": "8Gi",
            "exportEphemeralStorage": "20Gi",
        }

    @staticmethod
    def asked(stage: Stage, **fields: Any) -> dict[str, Any]:
        return {"resources": fields} if stage is Stage.TRAIN else {"stages": {stage: fields}}


EVERYTHING: dict[str, Any] = {
    "labels": {"team": "blue", "azure.workload.identity/use": "true"},
    "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
    "image": "registry.example.com:5000/ml/trainer@sha256:" + 64 * "a",
    "imagePullSecrets": [{"name": "mine"}],
    "env": [
        {"name": "HF_ENDPOINT", "value": "https://hub.example.com"},
        {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token", "optional": False}}},
        {"name": "MODE", "valueFrom": {"configMapKeyRef": {"name": "modes", "key": "mode", "optional": True}}},
        {"name": "TEAM", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['team']"}}},
    ],
    "volumes": [
        {"name": "conf", "configMap": {"name": "conf", "optional": False, "defaultMode": 420}},
        {
            "name": "keys",
            "secret": {"secretName": "keys", "items": [{"key": "a", "path": "b/c"}], "optional": False},
        },
        {"name": "data", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}},
        {"name": "scratch", "emptyDir": {"sizeLimit": "5Gi"}},
        {
            "name": "token",
            "projected": {
                "sources": [
                    {
                        "serviceAccountToken": {
                            "audience": "sts.amazonaws.com",
                            "expirationSeconds": 3600,
                            "path": "token",
                        }
                    },
                    {"secret": {"name": "more", "optional": True}},
                ]
            },
        },
        {
            "name": "vault",
            "csi": {
                "driver": "secrets-store.csi.k8s.io",
                "readOnly": True,
                "volumeAttributes": {"secretProviderClass": "s3"},
                "nodePublishSecretRef": {"name": "vault"},
            },
        },
    ],
    "volumeMounts": [
        {"name": "data", "mountPath": "/mnt/data", "readOnly": True, "subPath": "team/blue"},
        {"name": "scratch", "mountPath": "/scratch", "readOnly": False},
    ],
    "securityContext": {
        "runAsUser": 1000,
        "runAsGroup": 0,
        "fsGroup": 2000,
        "fsGroupChangePolicy": "OnRootMismatch",
        "supplementalGroups": [3000],
    },
}


class TestPodTemplate:
    @pytest.mark.parametrize("stage", Stage)
    def test_everything_reaches_every_pod(self, stage: Stage) -> None:
        plain, built = template(stage), template(stage, podTemplate=EVERYTHING)
        assert built["metadata"]["labels"] == EVERYTHING["labels"] | plain["metadata"]["labels"]
        assert built["metadata"]["annotations"] == EVERYTHING["annotations"]
        (before,), (main,) = plain["spec"]["containers"], built["spec"]["containers"]
        assert main["image"] == EVERYTHING["image"]
        assert built["spec"]["imagePullSecrets"] == EVERYTHING["imagePullSecrets"]
        assert main["env"] == before["env"] + EVERYTHING["env"]
        # The first is the document, which names its content.
        assert built["spec"]["volumes"][1:] == plain["spec"]["volumes"][1:] + EVERYTHING["volumes"]
        assert main["volumeMounts"] == before["volumeMounts"] + EVERYTHING["volumeMounts"]
        assert built["spec"]["securityContext"] == {
            **EVERYTHING["securityContext"],
            **plain["spec"]["securityContext"],
        }

    @pytest.mark.parametrize("version", ["1.32.0", "1.37.0"])
    @pytest.mark.parametrize("stage", Stage)
    def test_the_job_is_valid_and_its_pod_restricted(self, stage: Stage, version: str) -> None:
        claims = [{"name": "gpus", "resourceClaimTemplateName": "gpus"}]
        built = build(
            stage,
            resources={"resourceClaims": claims, "storageClassName": "fast"},
            scheduling={**TestPlacement.PLACE, "capacity": "Spot", "gpuTypes": ["T"]},
            stages={"prepare": TestPlacement.PLACE, "export": {"storageClassName": "fast"}},
            storage={
                "caBundle": {"secretKeyRef": {"name": "ca", "key": "ca.crt"}},
                "modelCache": {"claimName": "models"},
            },
            podTemplate=EVERYTHING,
        )
        for child in built:
            kubernetes_validate.validate(child, version, strict=True)
        assert violations(built[1]["spec"]["template"]["spec"]) == []

    def test_the_manifest_will_name_the_image_that_ran(self) -> None:
        config_map, _ = build(podTemplate={"image": "mine:1"})
        assert json.loads(config_map["data"][DOCUMENT_FILE])["trainerImage"] == "mine:1"

    def test_pull_secrets_are_added_to_the_operators(self) -> None:
        ours = Settings(image_pull_secrets=("ours", "shared"))
        asked = {"imagePullSecrets": [{"name": "shared"}, {"name": "mine"}]}
        found = pod(podTemplate=asked, with_settings=ours)["imagePullSecrets"]
        assert [secret["name"] for secret in found] == ["ours", "shared", "mine"]

    def test_a_pod_without_a_template_is_as_before(self) -> None:
        assert "annotations" not in template()["metadata"]
        assert {"imagePullSecrets", "affinity", "priorityClassName"} & pod().keys() == set()


class TestSettings:
    """What a job or the operator says of its pods, and is there as it was said."""

    @pytest.mark.parametrize("stage", Stage)
    def test_what_trains_has_time_to_save(self, stage: Stage) -> None:
        grace = pod(stage, checkpoint={"gracePeriodSeconds": 600})["terminationGracePeriodSeconds"]
        assert grace == (600 if stage is Stage.TRAIN else pods.PREPARE_GRACE_SECONDS)

    @pytest.mark.parametrize("stage", Stage)
    def test_a_service_account_is_that_of_every_pod(self, stage: Stage) -> None:
        assert pod(stage, storage={"serviceAccountName": "reader"})["serviceAccountName"] == "reader"
        assert "serviceAccountName" not in pod(stage)

    def test_shared_memory_is_as_large_as_was_asked_for(self) -> None:
        built = pod(resources={"sharedMemory": "3Gi"})
        (volume,) = [item for item in built["volumes"] if item["name"] == "shm"]
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "3Gi"}
        assert {"name": "shm", "mountPath": "/dev/shm"} in built["containers"][0]["volumeMounts"]

    @pytest.mark.parametrize("policy", ["Always", "Never"])
    def test_images_are_pulled_as_the_operator_is_told(self, policy: Literal["Always", "Never"]) -> None:
        assert container(with_settings=Settings(image_pull_policy=policy))["imagePullPolicy"] == policy


class TestProxiesAndTrust:
    PROXIES = Settings(http_proxy="http://proxy:1", https_proxy="http://proxy:2", no_proxy=".svc,10.0.0.0/8")

    @pytest.mark.parametrize("stage", Stage)
    def test_proxies_of_the_operator_are_those_of_the_pods(self, stage: Stage) -> None:
        found = environment(stage, with_settings=self.PROXIES)
        assert found["HTTP_PROXY"]["value"] == "http://proxy:1"
        assert found["HTTPS_PROXY"]["value"] == "http://proxy:2"
        assert found["NO_PROXY"]["value"] == ".svc,10.0.0.0/8"
        assert not {name for name in environment(stage) if "PROXY" in name}

    def test_a_job_may_have_others(self) -> None:
        asked = {"env": [{"name": "HTTPS_PROXY", "value": ""}]}
        variables = container(with_settings=self.PROXIES, podTemplate=asked)["env"]
        assert [item for item in variables if item["name"] == "HTTPS_PROXY"] == asked["env"]
        assert len({item["name"] for item in variables}) == len(variables)

    @pytest.mark.parametrize(
        ("bundle", "source"),
        [
            ({"configMapKeyRef": {"name": "ca", "key": "corp.pem"}}, {"configMap": {"name": "ca"}}),
            ({"secretKeyRef": {"name": "ca", "key": "corp.pem"}}, {"secret": {"secretName": "ca"}}),
        ],
    )
    @pytest.mark.parametrize("stage", Stage)
    def test_certificates_are_a_file_that_the_trainer_is_told_of(
        self, stage: Stage, bundle: dict[str, Any], source: dict[str, Any]
    ) -> None:
        built = pod(stage, storage={"caBundle": bundle})
        ((kind, fields),) = source.items()
        (volume,) = [item for item in built["volumes"] if item["name"] == "ca-bundle"]
        assert volume[kind] == {**fields, "items": [{"key": "corp.pem", "path": "ca.crt"}]}
        (mount,) = [item for item in built["containers"][0]["volumeMounts"] if item["name"] == "ca-bundle"]
        assert mount["readOnly"] is True
        found = environment(stage, storage={"caBundle": bundle})["FINETUNE_CA_BUNDLE"]["value"]
        assert found == f"{mount['mountPath']}/ca.crt"


class TestModelCache:
    CACHE = {"modelCache": {"claimName": "models"}}

    @pytest.mark.parametrize("stage", [Stage.TRAIN, Stage.EXPORT])
    def test_the_claim_is_where_weights_are_read(self, stage: Stage) -> None:
        built = pod(stage, storage=self.CACHE)
        (volume,) = [item for item in built["volumes"] if item["name"] == "model-cache"]
        assert volume["persistentVolumeClaim"] == {"claimName": "models"}
        (mount,) = [item for item in built["containers"][0]["volumeMounts"] if item["name"] == "model-cache"]
        assert mount == {"name": "model-cache", "mountPath": "/cache"}
        assert environment(stage, storage=self.CACHE)["FINETUNE_MODEL_CACHE"]["value"] == "/cache"
        # The process must be able to write, and a large cache keeps its owner.
        assert built["securityContext"]["fsGroup"] == pods.IMAGE_USER
        assert built["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        assert violations(built) == []

    def test_prepare_reads_no_weights(self) -> None:
        plain, cached = pod(Stage.PREPARE), pod(Stage.PREPARE, storage=self.CACHE)
        # The first volume is the document, which names its content.
        assert cached["volumes"][1:] == plain["volumes"][1:]
        assert cached["containers"] == plain["containers"]

    def test_it_decides_nothing_about_the_result(self) -> None:
        body = job_body(storage=self.CACHE)["spec"]
        assert spec_digest(FineTuneJobSpec.model_validate(body)) == spec_digest(
            FineTuneJobSpec.model_validate({**body, "storage": {}})
        )


# What is refused, and what is said


def refusals(**spec: Any) -> list[tuple[str, str]]:
    """Field and message of everything that `finetune validate` has to say."""
    body = {key: value for key, value in job_body(**spec).items() if key != "status"}
    body["metadata"] = {"name": "bot"}
    return [(problem.field, problem.message) for problem in validate(yaml.safe_dump(body)).problems]


def test_own_names_are_those_of_the_pod() -> None:
    """What the rules refuse is what operator and agent set; no more than that is theirs."""
    storage = {
        "caBundle": {"secretKeyRef": {"name": "ca", "key": "ca.crt"}},
        "modelCache": {"claimName": "models"},
    }
    built = pod(storage=storage, resources={"nodes": 2})
    assert {volume["name"] for volume in built["volumes"]} == set(OWN_VOLUMES)
    names = {name for name in environment(storage=storage, resources={"nodes": 2}) if not name.startswith("FINETUNE_")}
    assert names < set(OWN_VARIABLES)
    source = Path(agent.__file__).read_text()
    others = {name for name in OWN_VARIABLES if name.endswith("_VISIBLE_DEVICES")} | {"JOB_COMPLETION_INDEX"}
    assert all(f'"{name}"' in source for name in set(OWN_VARIABLES) - names - others)


@pytest.mark.parametrize("name", [*OWN_VARIABLES, "FINETUNE_DOCUMENT", "FINETUNE_ANYTHING"])
def test_variables_of_the_operator_cannot_be_set(name: str) -> None:
    ((field, message),) = refusals(podTemplate={"env": [{"name": name, "value": "x"}]})
    assert field == "spec.podTemplate.env[0].name"
    assert "remove it, or choose another name" in message


@pytest.mark.parametrize("name", ["LD_PRELOAD", "HF_HUB_OFFLINE", "AWS_PROFILE", "HTTPS_PROXY", "NCCL_DEBUG"])
def test_other_variables_are_the_jobs_own_affair(name: str) -> None:
    assert refusals(podTemplate={"env": [{"name": name, "value": "x"}]}) == []


def mounted(path: str) -> list[tuple[str, str]]:
    volumes = [{"name": "a", "emptyDir": {}}]
    return refusals(podTemplate={"volumes": volumes, "volumeMounts": [{"name": "a", "mountPath": path}]})


@pytest.mark.parametrize(
    "path",
    [
        *(mount["mountPath"] for mount in container()["volumeMounts"]),
        *(
            "/etc",
            "/etc/finetune-ca",
            "/dev",
            "/dev/termination-log",
            "/proc",
            "/proc/1",
            "/sys",
            "/tmp/a",
            "/work/a/b",
        ),
    ],
)
def test_nothing_is_mounted_over_what_a_pod_needs(path: str) -> None:
    ((field, message),) = mounted(path)
    assert field == "spec.podTemplate.volumeMounts[0].mountPath"
    assert "mount below /mnt" in message


@pytest.mark.parametrize("path", ["/", "//", "/a/", "a", "/a/../etc", "/..", "/a//b", "/.", "/mnt/a:b", "/mnt/ü"])
def test_paths_that_are_no_plain_ones_are_refused(path: str) -> None:
    assert mounted(path) != []


@pytest.mark.parametrize(
    "path", ["/mnt", "/mnt/a.b/c_d-e", "/etc/ssl", "/etc/finetune-more", "/workspace", "/a/.cache"]
)
def test_other_paths_are_free(path: str) -> None:
    assert mounted(path) == []


@pytest.mark.parametrize("kind", ["labels", "annotations"])
@pytest.mark.parametrize(
    ("key", "fits"),
    [
        ("team", True),
        ("example.com/team", True),
        ("sidecar.istio.io/inject", True),
        ("azure.workload.identity/use", True),
        ("karpenter.sh/do-not-disrupt", True),
        ("k8s.v1.cni.cncf.io/networks", True),
        ("cluster-autoscaler.kubernetes.io/safe-to-evict", True),
        ("mykubernetes.io/x", True),
        ("finetune.dev/job-uid", False),
        ("sub.finetune.dev/x", False),
        ("app.kubernetes.io/name", False),
        ("kubernetes.io/x", False),
        ("batch.kubernetes.io/job-name", False),
        ("container.apparmor.security.beta.kubernetes.io/main", False),
        ("seccomp.security.alpha.kubernetes.io/pod", False),
        ("kueue.x-k8s.io/queue-name", False),
        ("jobset.sigs.k8s.io/x", False),
    ],
)
def test_keys_of_others_are_theirs(kind: str, key: str, fits: bool) -> None:
    found = refusals(podTemplate={kind: {key: "true"}})
    assert (found == []) is fits
    if not fits:
        ((field, message),) = found
        assert (field, "use a domain of your own" in message) == (f"spec.podTemplate.{kind}", True)


FIELD = {"fieldRef": {"fieldPath": "metadata.name"}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("spec.podTemplate.securityContext.runAsUser", {"securityContext": {"runAsUser": 0}}, "pods never run as root"),
    ("spec.podTemplate.volumes[0].hostPath", {"volumes": [{"name": "a", "hostPath": {"path": "/"}}]}, "unknown field"),
    ("spec.podTemplate.hostNetwork", {"hostNetwork": True}, "unknown field"),
    ("spec.podTemplate.serviceAccountName", {"serviceAccountName": "x"}, "unknown field"),
    ("spec.podTemplate.securityContext.runAsNonRoot", {"securityContext": {"runAsNonRoot": False}}, "unknown field"),
    (
        "spec.podTemplate.volumes[0]",
        {"volumes": [{"name": "a", "emptyDir": {}, "secret": {"secretName": "b"}}]},
        "exactly one of",
    ),
    ("spec.podTemplate.volumes[0].name", {"volumes": [{"name": "shm", "emptyDir": {}}]}, "choose another name"),
    (
        "spec.podTemplate.volumes[1]",
        {"volumes": [{"name": "a", "emptyDir": {}}, {"name": "a", "emptyDir": {}}]},
        "Duplicate value",
    ),
    ("spec.podTemplate", {"volumeMounts": [{"name": "a", "mountPath": "/mnt/a"}]}, "add the volume"),
    ("spec.podTemplate.env[0]", {"env": [{"name": "A", "value": "b", "valueFrom": FIELD}]}, "one of them"),
    ("spec.podTemplate.image", {"image": "my image"}, "registry.example.com/ml/trainer"),
]


@pytest.mark.parametrize(("field", "asked", "message"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_a_template_may_not_say(field: str, asked: dict[str, Any], message: str) -> None:
    assert [where for where, said in refusals(podTemplate=asked) if message in said] == [field]


# Whatever is written, the pod stays within the profile


def mostly(good: list[Any], bad: list[Any]) -> st.SearchStrategy[Any]:
    """Often enough good that the whole is, and bad often enough to matter."""
    return st.sampled_from(good * (1 + 9 * len(bad) // len(good)) + bad)


_names = mostly(["a", "b", "c", "d"], list(OWN_VOLUMES))
_keys = mostly(["team", "example.com/x"], ["finetune.dev/stage", "app.kubernetes.io/name", "job-name"])
_paths = mostly(["/mnt/a", "/mnt/b", "/data"], ["/work", "/dev/shm", "/tmp/x", "/etc/finetune", "/", "/a/../b"])
_ids = mostly([1, 1000, 65532], [0, -1, 2**40])
_one = {"name": "x"}
_sources = mostly(
    [
        {"emptyDir": {}},
        {"emptyDir": {"medium": "Memory"}},
        {"configMap": _one},
        {"secret": {"secretName": "x"}},
        {"persistentVolumeClaim": {"claimName": "x"}},
        {"csi": {"driver": "d.example.com"}},
        {"projected": {"sources": [{"secret": _one}]}},
        {"emptyDir": {}, "hostPath": {"path": "/"}},
    ],
    [{"hostPath": {"path": "/"}}, {"nfs": {"server": "x", "path": "/"}}, {"image": {"reference": "x"}}],
)
_variables = st.fixed_dictionaries(
    {"name": mostly(["A", "B", "HTTPS_PROXY"], [*OWN_VARIABLES, "FINETUNE_WORK_DIR"]), "value": st.just("x")}
)
_contexts = st.fixed_dictionaries(
    {},
    optional={
        "runAsUser": _ids,
        "fsGroup": _ids,
        "supplementalGroups": st.lists(_ids, min_size=1, max_size=2),
        # Nothing of this is in the API: it must be lost on the way.
        "runAsNonRoot": st.booleans(),
        "privileged": st.booleans(),
        "seccompProfile": st.just({"type": "Unconfined"}),
        "sysctls": st.just([{"name": "kernel.msgmax", "value": "1"}]),
    },
)
_templates = st.fixed_dictionaries(
    {"volumes": st.lists(st.builds(lambda name, source: {"name": name, **source}, _names, _sources), min_size=1)},
    optional={
        "labels": st.dictionaries(_keys, st.just("x"), max_size=2),
        "annotations": st.dictionaries(_keys, st.just("x"), max_size=2),
        "env": st.lists(_variables, min_size=1, max_size=2, unique_by=lambda item: str(item["name"])),
        "securityContext": _contexts,
        "hostNetwork": st.booleans(),
        "containers": st.just([{"name": "other", "image": "x", "securityContext": {"privileged": True}}]),
    },
)


@st.composite
def _with_mounts(draw: st.DrawFn) -> dict[str, Any]:
    asked = draw(_templates)
    asked["volumes"] = list({volume["name"]: volume for volume in asked["volumes"][:3]}.values())
    paths = draw(st.lists(_paths, min_size=1, max_size=2, unique=True))
    names = [volume["name"] for volume in asked["volumes"]]
    return {**asked, "volumeMounts": [{"name": draw(st.sampled_from(names)), "mountPath": path} for path in paths]}


@settings(max_examples=100, deadline=None)
@given(_with_mounts(), st.sampled_from(list(Stage)))
def test_no_template_leaves_the_profile_or_takes_what_is_the_operators(asked: dict[str, Any], stage: Stage) -> None:
    """The API server drops unknown fields where it is not told to refuse them; what is left obeys the rules."""
    engine = schema()
    body = engine.defaulted(engine.pruned(job_body(podTemplate=asked)))
    assume(not engine.validate(body))
    spec = FineTuneJobSpec.model_validate(body["spec"])
    status = FineTuneJobStatus(trained_attempt=1)
    built = pods.build(spec, status, stage, "document", SETTINGS)
    assert violations(built) == []
    plain = pods.build(
        spec.model_copy(update={"pod_template": type(spec.pod_template)()}), status, stage, "document", SETTINGS
    )
    (before,), (main,) = plain["containers"], built["containers"]
    assert main["env"][: len(before["env"])] == before["env"]
    assert built["volumes"][: len(plain["volumes"])] == plain["volumes"]
    paths = [mount["mountPath"] for mount in main["volumeMounts"]]
    assert len(paths) == len(set(paths))
    for item, key in ((built["volumes"], "name"), (main["env"], "name")):
        names = [entry[key] for entry in item]
        assert len(names) == len(set(names))
