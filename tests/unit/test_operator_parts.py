"""Children, settings, redaction of nothing, patches and formats: the small pure parts of the operator."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from builders import SETTINGS, job_body
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.document import JobDocument
from finetune_api.names import DOCUMENT_FILE, Stage
from finetune_api.spec import MAX_NAME_LENGTH
from finetune_api.status import Resolved
from finetune_operator import children, sizes
from finetune_operator.config import Settings
from finetune_operator.kube import merge_patch
from finetune_operator.metrics import Metrics
from finetune_operator.resource import FineTuneJob
from finetune_operator.status import format_duration


def build(
    stage: Stage = Stage.TRAIN,
    attempt: int = 1,
    settings: Settings = SETTINGS,
    status: dict[str, Any] | None = None,
    **spec: Any,
) -> tuple[dict[str, Any], ...]:
    job = FineTuneJob.parse(job_body({"trainedAttempt": 2, **(status or {})}, **spec))
    assert job.spec is not None, job.spec_problem
    return children.build(job, job.spec, stage, attempt, settings)


def pod_spec(*args: Any, **kwargs: Any) -> dict[str, Any]:
    spec: dict[str, Any] = build(*args, **kwargs)[-1]["spec"]["template"]["spec"]
    return spec


def container(*args: Any, **kwargs: Any) -> dict[str, Any]:
    only: dict[str, Any] = pod_spec(*args, **kwargs)["containers"][0]
    return only


def document(*args: Any, **kwargs: Any) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(build(*args, **kwargs)[0]["data"][DOCUMENT_FILE])
    return loaded


class TestChildren:
    def test_the_document_names_the_attempts_whose_checkpoints_may_be_read(self) -> None:
        assert document(Stage.TRAIN, 4)["earlierAttempts"] == [3, 2, 1]
        assert document(Stage.EXPORT, 3)["earlierAttempts"] == [2]
        assert document(Stage.PREPARE, 3)["earlierAttempts"] == []

    def test_children_belong_to_the_job_and_hold_nothing_up(self) -> None:
        for child in build():
            (owner,) = child["metadata"]["ownerReferences"]
            assert owner["controller"] is True
            assert owner["blockOwnerDeletion"] is False
            assert "finalizers" not in child["metadata"]

    @pytest.mark.parametrize("stage", list(Stage))
    def test_kubernetes_tries_nothing_again_by_itself(self, stage: Stage) -> None:
        """Who else starts pods again counts them in another way."""
        *_, job = build(stage)
        assert job["spec"]["backoffLimit"] == 0
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"

    def test_the_pod_gets_secrets_by_reference_only(self) -> None:
        config_map, job = build(storage={"secretRef": {"name": "s3"}})
        assert container(storage={"secretRef": {"name": "s3"}})["envFrom"] == [{"secretRef": {"name": "s3"}}]
        assert "AWS_SECRET" not in json.dumps([config_map, job])

    @pytest.mark.parametrize("stage", list(Stage))
    def test_the_restricted_profile_admits_the_pod(self, stage: Stage) -> None:
        pod = pod_spec(stage)
        assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert pod["automountServiceAccountToken"] is False
        security = pod["containers"][0]["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert all(next(iter(volume.keys() - {"name"})) in ("configMap", "emptyDir") for volume in pod["volumes"])

    def test_gpus_are_asked_for_by_their_resource_name(self) -> None:
        resources = container(resources={"gpusPerNode": 4, "gpuResourceName": "amd.com/gpu"})["resources"]
        assert resources["limits"]["amd.com/gpu"] == resources["requests"]["amd.com/gpu"] == "4"
        assert resources["requests"]["cpu"] == "16"
        assert document(resources={"gpusPerNode": 4}, hyperparameters={"batchSize": 16})["processes"] == 4

    def test_training_on_cpu_asks_for_no_gpu(self) -> None:
        resources = container(resources={"gpusPerNode": 0})["resources"]
        assert "nvidia.com/gpu" not in resources["limits"]
        assert resources["requests"]["cpu"] == "1"
        assert document(resources={"gpusPerNode": 0})["processes"] == 1

    def test_several_nodes_are_pods_of_one_job_with_names(self) -> None:
        objects = build(Stage.TRAIN, 3, resources={"nodes": 4})
        document, service, job = objects
        assert [item["kind"] for item in objects] == ["ConfigMap", "Service", "Job"]
        assert (service["metadata"]["name"], job["metadata"]["name"]) == ("bot-train", "bot-train-3")
        assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (4, 4)
        # The name is made from the host name that Kubernetes gives to the first pod, and from the Service.
        pod = job["spec"]["template"]["spec"]
        variables = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
        assert (pod["subdomain"], variables["MASTER_ADDR"]) == ("bot-train", "bot-train-3-0.bot-train")
        assert {"configMap": {"name": document["metadata"]["name"]}, "name": "document"} in pod["volumes"]
        assert service["spec"]["clusterIP"] == "None"
        assert service["spec"]["publishNotReadyAddresses"] is True
        assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
        # It is for all attempts, so that it does not differ between them.
        assert service == build(Stage.TRAIN, 1, resources={"nodes": 4})[1]
        # Sizes are those of each pod.
        assert pod["containers"][0]["resources"] == container(Stage.TRAIN)["resources"]

    def test_host_names_fit(self) -> None:
        job = FineTuneJob.parse(job_body(resources={"nodes": 64}, hyperparameters={"batchSize": 64}))
        assert job.spec is not None, job.spec_problem
        longest = replace(job, name="b" * MAX_NAME_LENGTH)
        _, service, child = children.build(longest, job.spec, Stage.TRAIN, 101, SETTINGS)
        assert len(f"{child['metadata']['name']}-63") <= 63
        assert len(service["metadata"]["name"]) <= 63

    def test_attempts_that_share_a_machine_meet_at_ports_of_their_own(self) -> None:
        def port(attempt: int) -> int:
            env = container(Stage.TRAIN, attempt, resources={"nodes": 2})["env"]
            return int(next(item["value"] for item in env if item["name"] == "MASTER_PORT"))

        # Below the ports that the kernel hands out.
        assert all(1024 < port(attempt) < 32768 for attempt in range(1, 20))
        assert len({port(attempt) for attempt in range(1, 20)}) == 19

    @pytest.mark.parametrize("stage", [Stage.PREPARE, Stage.EXPORT])
    def test_the_other_stages_have_one_pod(self, stage: Stage) -> None:
        _, job = build(stage, resources={"nodes": 4})
        assert job["spec"]["completions"] == 1
        assert "subdomain" not in job["spec"]["template"]["spec"]
        # Prepare says how large the world will be.
        assert document(stage, resources={"nodes": 4})["nodes"] == 4

    def test_one_node_is_a_pod_without_a_name(self) -> None:
        assert [item["kind"] for item in build(Stage.TRAIN)] == ["ConfigMap", "Job"]
        assert "subdomain" not in pod_spec(Stage.TRAIN)
        assert not {"MASTER_ADDR", "MASTER_PORT"} & {item["name"] for item in container(Stage.TRAIN)["env"]}

    @pytest.mark.parametrize(
        ("gpus", "nodes", "limit", "expected"), [(1, 1, None, 8), (4, 1, None, 8), (4, 4, None, 4), (0, 3, 5, 4)]
    )
    def test_the_batch_is_shared_among_all_nodes(self, gpus: int, nodes: int, limit: int | None, expected: int) -> None:
        size = 64 if nodes != 3 else 48
        loaded = document(
            resources={"gpusPerNode": gpus, "nodes": nodes},
            hyperparameters={"batchSize": size},
            status={"microBatchLimit": limit} if limit else None,
        )
        assert JobDocument.model_validate(loaded).micro_batch_size == expected

    def test_only_the_train_pod_takes_gpus_and_goes_where_gpus_are(self) -> None:
        scheduling = {"nodeSelector": {"gpu": "yes"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
        assert pod_spec(Stage.TRAIN, scheduling=scheduling)["nodeSelector"] == {"gpu": "yes"}
        for stage in (Stage.PREPARE, Stage.EXPORT):
            pod = pod_spec(stage, scheduling=scheduling)
            assert "nodeSelector" not in pod
            assert "nvidia.com/gpu" not in pod["containers"][0]["resources"]["limits"]

    def test_memory_follows_the_size_of_the_model(self) -> None:
        def memory(stage: Stage, gpus: int, resolved: Resolved | None) -> str:
            status = {"resolved": resolved.to_json_dict()} if resolved else {}
            limit: str = container(stage, status=status, resources={"gpusPerNode": gpus})["resources"]["limits"][
                "memory"
            ]
            return limit

        eight_billion = Resolved(weight_bytes=16 * 10**9, largest_tensor_bytes=10**9)
        assert memory(Stage.TRAIN, 1, eight_billion) == "29Gi"
        assert memory(Stage.TRAIN, 0, Resolved(weight_bytes=538 * 10**6)) == "9Gi"
        assert memory(Stage.TRAIN, 1, None) == "16Gi"
        assert memory(Stage.EXPORT, 1, eight_billion) == "11Gi"
        assert memory(Stage.PREPARE, 1, eight_billion) == "2Gi"
        assert container(resources={"memory": "1Gi"})["resources"]["limits"]["memory"] == "1Gi"

    def test_storage_settings_of_the_job_win_over_those_of_the_operator(self) -> None:
        settings = Settings(s3_endpoint="https://ours", s3_region="eu-1", s3_addressing_style="Virtual")
        assert document(settings=settings)["storage"] == {
            "endpoint": "https://ours",
            "region": "eu-1",
            "pathStyle": False,
            "allowFiles": False,
        }
        theirs = document(settings=settings, storage={"endpoint": "http://minio:9000", "addressingStyle": "Path"})
        assert theirs["storage"]["endpoint"] == "http://minio:9000"
        assert theirs["storage"]["pathStyle"] is True

    def test_an_endpoint_of_ones_own_means_paths_and_aws_is_left_to_the_client(self) -> None:
        assert document(storage={"endpoint": "http://minio:9000"})["storage"]["pathStyle"] is True
        assert "pathStyle" not in document()["storage"]

    def test_work_files_of_two_jobs_never_share_a_folder(self) -> None:
        assert document()["workURI"].startswith("s3://models/tuned/.finetune/3a977917")
        assert document(storage={"workURI": "s3://scratch/w/"})["workURI"].startswith("s3://scratch/w/3a977917")

    @pytest.mark.parametrize(
        ("text", "size"), [("5", 5), ("1k", 1000), ("2Ki", 2048), ("1.5Gi", 3 * 2**29), ("1M", 10**6)]
    )
    def test_quantities(self, text: str, size: int) -> None:
        assert sizes.quantity_bytes(text) == size


class TestSettings:
    def test_every_setting_comes_from_its_variable(self) -> None:
        settings = Settings.from_environment(
            {
                "FINETUNE_NAMESPACES": "a, b",
                "FINETUNE_HTTP_PORT": "9",
                "FINETUNE_ALLOW_FILES": "true",
                "FINETUNE_POLL_SECONDS": "0.5",
            }
        )
        assert settings == Settings(namespaces=("a", "b"), http_port=9, allow_files=True, poll_seconds=0.5)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("FINETUNE_LOG_FORMAT", "yaml"),
            ("FINETUNE_LOG_LEVEL", "info"),
            ("FINETUNE_S3_ADDRESSING_STYLE", "path"),
            ("FINETUNE_WORKERS", "0"),
            ("FINETUNE_WORKERS", "1.5"),
            ("FINETUNE_KUBE_QPS", "0"),
            ("FINETUNE_RESYNC_SECONDS", "-1"),
            ("FINETUNE_PROGRESS_SECONDS", "-1"),
            ("FINETUNE_LEASE_SECONDS", "2"),
            ("FINETUNE_LEASE_NAME", "a-lease-without-a-namespace"),
        ],
    )
    def test_a_value_that_makes_no_sense_is_refused(self, name: str, text: str) -> None:
        with pytest.raises(ValueError, match=name):
            Settings.from_environment({name: text})

    def test_variables_that_are_no_settings_are_found(self) -> None:
        environment = {"FINETUNE_WORKERS": "4", "FINETUNE_WROKERS": "8", "PATH": "/bin"}
        assert Settings.unknown(environment) == ["FINETUNE_WROKERS"]

    @pytest.mark.parametrize("text", ["yes", "x"])
    def test_a_value_that_cannot_be_read_names_its_variable(self, text: str) -> None:
        with pytest.raises(ValueError, match="FINETUNE_ALLOW_FILES"):
            Settings.from_environment({"FINETUNE_ALLOW_FILES": text})


class TestSeriesOfJobs:
    RAN: dict[str, Any] = {
        "attempt": {"stage": "train", "number": 1, "jobName": "bot-train-1", "gpus": 4},
        "startTime": "2026-11-21T12:10:00Z",
    }
    ENDED: dict[str, Any] = {**RAN, "completionTime": "2026-11-21T12:30:00Z"}
    FAILED: dict[str, Any] = {
        **ENDED,
        "phase": "Failed",
        "failure": {
            "class": "LossDiverged",
            "message": "x",
            "disposition": "Terminal",
            "stage": "train",
            "attempt": 1,
            "time": "2026-11-21T12:30:00Z",
        },
    }

    def observe(self, metrics: Metrics, before: dict[str, Any], after: dict[str, Any]) -> None:
        metrics.observe(FineTuneJob.parse(job_body(before)), FineTuneJob.parse(job_body(after)).status)

    @pytest.mark.parametrize(
        ("end", "result", "reason"),
        [({**ENDED, "phase": "Succeeded"}, "succeeded", ""), (FAILED, "failed", "LossDiverged")],
    )
    def test_an_end_is_counted_once_with_the_time_since_the_first_pod(
        self, end: dict[str, Any], result: str, reason: str
    ) -> None:
        metrics = Metrics()

        def value(name: str, **labels: str) -> float | None:
            return metrics.registry.get_sample_value(name, {"result": result, **labels})

        self.observe(metrics, {}, self.RAN)
        assert value("finetune_jobs_finished_total", reason=reason) == 0
        self.observe(metrics, self.RAN, end)
        for _ in range(3):
            self.observe(metrics, end, end)
        assert value("finetune_jobs_finished_total", reason=reason) == 1
        assert value("finetune_job_duration_seconds_count") == 1
        assert value("finetune_job_duration_seconds_sum") == 1200

    def gpu_seconds(self, metrics: Metrics) -> float | None:
        labels = {"namespace": "team", "name": "bot"}
        return metrics.registry.get_sample_value("finetune_job_gpu_seconds_total", labels)

    def used(self, seconds: int) -> dict[str, Any]:
        return {"usage": {"activeSeconds": seconds, "gpuSeconds": seconds, "wastedGPUSeconds": 0}}

    def test_gpu_time_never_goes_back(self) -> None:
        """Of an attempt that runs it is known by the operator's clock, and of one that has ended by the node's."""
        metrics = Metrics()
        attempt = {**self.RAN["attempt"], "startTime": "2026-11-21T12:00:00Z"}
        progress = {"percent": "1%", "currentStep": 1, "totalSteps": 100, "lastUpdatedTime": "2026-11-21T12:01:40Z"}
        for status, expected in (
            ({"attempt": attempt, "progress": progress}, 400),
            (self.used(360), 400),
            (self.used(500), 500),
        ):
            self.observe(metrics, {}, status)
            assert self.gpu_seconds(metrics) == expected

    def test_a_job_of_the_same_name_starts_from_nothing(self) -> None:
        metrics = Metrics()
        self.observe(metrics, {}, self.used(400))
        assert self.gpu_seconds(metrics) == 400
        metrics.forget("team", "bot")
        assert self.gpu_seconds(metrics) is None
        self.observe(metrics, {}, self.used(10))
        assert self.gpu_seconds(metrics) == 10


def apply_merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = apply_merge_patch(result.get(key), value)
    return result


_leaf = st.one_of(st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
_objects = st.recursive(
    st.dictionaries(st.sampled_from("abcd"), _leaf, max_size=4),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), st.one_of(_leaf, inner), max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(_objects, _objects)
def test_a_merge_patch_turns_one_object_into_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert apply_merge_patch(before, merge_patch(before, after)) == after


@settings(deadline=None)
@given(_objects)
def test_nothing_to_change_is_an_empty_patch(value: dict[str, Any]) -> None:
    assert merge_patch(value, value) == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (45, "45s"), (90, "1m30s"), (120, "2m"), (3600, "1h"), (4320, "1h12m"), (183_600, "2d3h"), (-5, "0s")],
)
def test_durations_read_like_ages_in_kubectl(seconds: int, text: str) -> None:
    assert format_duration(seconds) == text
