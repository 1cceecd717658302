"""The real operator against an API server, with pods that follow a script."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from api_client import eventually
from conftest import Kubectl, TestServer
from finetune_job import STAGES, Job, play, play_before
from operator_process import OperatorProcess
from scripted import ScriptedKubelet, agent

from finetune_api.failures import FailureClass, exit_code_of
from finetune_api.names import LABEL_ATTEMPT, LABEL_JOB_NAME, LABEL_JOB_UID, LABEL_STAGE
from finetune_api.report import Outcome, ReportedFailure, StepProgress
from finetune_api.status import ArtifactResult, CheckpointResult


def test_a_job_goes_through_its_stages_to_complete(
    job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess, namespace: str
) -> None:
    job.create()
    job.until(phase="Pending")
    pod = kubelet.pod("prepare")
    kubelet.run(pod)
    job.until(phase="Preparing")
    kubelet.succeed(pod, kubelet.report(pod))
    job.until(phase="Starting")
    with agent() as speaker:
        pod = kubelet.pod("train")
        speaker.report = kubelet.report(pod, phase="Training")
        kubelet.run(pod, speaker.address)
        job.until(phase="Running")
        seen = []
        for step in (1, 5, 10):
            speaker.report = kubelet.report(
                pod,
                phase="Training",
                progress=StepProgress(step=step, total_steps=10, loss=2.5 / step, step_seconds=3.0),
                checkpoint=CheckpointResult(step=step, uri=f"s3://w/{step}"),
            )
            eventually(lambda s=step: job.status().get("progress", {}).get("currentStep") == s, describe=operator.log)
            seen.append(job.status()["progress"]["percent"])
        assert seen == ["10%", "50%", "100%"]
        assert job.conditions()["ProgressAvailable"] == ("True", "ProgressReceived")
        assert job.conditions()["Checkpointed"] == ("True", "CheckpointSaved")
        kubelet.succeed(pod, speaker.report)
    job.until(phase="Exporting")
    artifact = ArtifactResult(name="Merged", uri="s3://models/support-bot")
    play(job, kubelet, "export", artifacts=[artifact])
    status = job.until(phase="Succeeded")
    assert status["observedGeneration"] == 1
    assert status["artifacts"] == [{"name": "Merged", "uri": "s3://models/support-bot"}]
    assert {kind: value[0] for kind, value in job.conditions().items()} == {
        "Validated": "True",
        "Running": "False",
        "ProgressAvailable": "False",
        "Checkpointed": "True",
        "Exported": "True",
        "Complete": "True",
    }
    stages = ["StageStarted"] * 3 + ["Preparing", "Validated", "Training", "Finished"]
    expected = sorted([*stages, "FirstStep", "CheckpointSaved", "TrainingComplete"])

    def told() -> list[str]:
        # A real scheduler finds no node for these pods, which is a warning; and the export may be over in a moment.
        return sorted(reason for kind, reason in job.events() if kind == "Normal" and reason != "Exporting")

    eventually(lambda: told() == expected, describe=lambda: f"{told()}")


def test_nothing_of_kopf_is_left_on_any_object(job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess) -> None:
    job.create()
    play(job, kubelet, "prepare")
    kubelet.run(kubelet.pod("train"))
    job.until(phase="Running")
    for item in [job.body(), *job.children("jobs"), *job.children("configmaps")]:
        metadata = item["metadata"]
        assert not [f for f in metadata.get("finalizers", []) if "finetune" in f or "kopf" in f]
        assert not [a for a in metadata.get("annotations", {}) if "kopf" in a or a.startswith("finetune.dev")]


def test_deleting_a_job_takes_its_children_with_it_even_without_the_operator(
    scripted_server: TestServer, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create()
    kubelet.run(kubelet.pod("prepare"))
    operator.kill()
    assert scripted_server.client.delete(job.path).code == 200
    eventually(lambda: not any(job.children(plural) for plural in ("jobs", "configmaps", "pods")), 60)


def test_delete_and_create_again_at_once_starts_over(
    scripted_server: TestServer, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create()
    first = kubelet.pod("prepare")
    kubelet.run(first)
    job.until(phase="Preparing")
    scripted_server.client.delete(job.path)
    job.create()
    uid = job.body()["metadata"]["uid"]

    def again() -> dict[str, Any] | None:
        pod = kubelet.pod("prepare")
        # By the label: the ConfigMap of the old pod may be gone before the pod is.
        return pod if pod["metadata"]["labels"][LABEL_JOB_UID] == uid else None

    kubelet.run(eventually(again, 60))
    job.until(phase="Preparing")


def test_somebody_elses_object_is_left_alone(
    scripted_server: TestServer, namespace: str, job: Job, operator: OperatorProcess
) -> None:
    path = f"/apis/batch/v1/namespaces/{namespace}/jobs"
    pod = {"restartPolicy": "Never", "containers": [{"name": "main", "image": "theirs"}]}
    # A copy of a child, labels and all; only its owner is missing.
    labels = {LABEL_JOB_NAME: "bot", LABEL_STAGE: "prepare", LABEL_ATTEMPT: "1"}
    theirs = {"metadata": {"name": "bot-prepare-1", "labels": labels}, "spec": {"template": {"spec": pod}}}
    assert scripted_server.client.create(path, theirs).code == 201
    uid = scripted_server.client.get(f"{path}/bot-prepare-1").body["metadata"]["uid"]
    job.create()
    job.until_condition("Validated", "False", "NameConflict")
    job.change(suspend=True)
    job.until(phase="Suspended")
    assert scripted_server.client.get(f"{path}/bot-prepare-1").body["metadata"]["uid"] == uid
    scripted_server.client.delete(f"{path}/bot-prepare-1")


@pytest.mark.parametrize("stage", STAGES)
def test_an_operator_killed_in_any_stage_goes_on_where_it_was(
    job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess, stage: str
) -> None:
    job.create()
    play_before(job, kubelet, stage)
    pod = kubelet.pod(stage)
    operator.kill()
    kubelet.run(pod)
    operator.start()
    job.until(phase={"prepare": "Preparing", "train": "Running", "export": "Exporting"}[stage])
    operator.kill()
    kubelet.succeed(pod, kubelet.report(pod))
    operator.start()
    for later in STAGES[STAGES.index(stage) + 1 :]:
        play(job, kubelet, later)
    job.until(phase="Succeeded")
    assert sorted(item["metadata"]["name"] for item in job.children()) == [f"bot-{s}-1" for s in sorted(STAGES)]


DEATHS = {
    "preempted": (75, FailureClass.PREEMPTED),
    "deleted by a person": (75, FailureClass.TERMINATED),
    "killed": (137, FailureClass.KILLED),
    "bad data": (65, FailureClass.DATA_ERROR),
    "unknown": (1, FailureClass.UNKNOWN),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_death_is_classified_the_same_whether_the_operator_saw_it_or_was_away(
    scripted_server: TestServer, namespace: str, kubelet: ScriptedKubelet, operator: OperatorProcess, death: str
) -> None:
    """The pod's object goes with its exit code and its words, before the operator is back."""
    code, expected = DEATHS[death]
    outcomes = []
    for name, away in (("seen", False), ("away", True)):
        job = Job(scripted_server.client, namespace, name)
        job.create()
        pod = kubelet.pod("prepare")
        kubelet.run(pod)
        job.until(phase="Preparing")
        if away:
            operator.kill()
        (kubelet.disrupt if death == "preempted" else kubelet.fail)(pod, code)
        if away:
            child = job.children()[0]["metadata"]["name"]
            path = f"/apis/batch/v1/namespaces/{namespace}/jobs/{child}"
            eventually(
                lambda p=path: any(
                    c["type"] == "Failed" for c in scripted_server.client.get(p).body["status"].get("conditions", [])
                )
            )
            kubelet.remove(pod)
            operator.start()
        eventually(lambda j=job: j.status().get("failure"), describe=operator.log)
        status = job.status()
        failure = {key: value for key, value in status["failure"].items() if key not in ("time", "pod", "node")}
        outcomes.append((failure, status["restarts"], job.conditions().get("Failed")))
        scripted_server.client.delete(job.path)
        eventually(lambda j=job: not j.children("pods"), 60)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0]["class"] == expected
    free = expected is FailureClass.PREEMPTED
    assert outcomes[0][1]["preemptions"] == (1 if free else 0)


def test_a_failed_attempt_is_followed_by_one_that_may_resume(
    job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create()
    play(job, kubelet, "prepare")
    for attempt in (1, 2):
        pod = kubelet.pod("train", attempt)
        kubelet.run(pod)
        kubelet.fail(pod, 137)
    pod = kubelet.pod("train", 3)
    assert kubelet.document(pod)["earlierAttempts"] == [2, 1]
    kubelet.run(pod)
    play(job, kubelet, "train", 3)
    export = kubelet.pod("export")
    assert kubelet.document(export)["earlierAttempts"] == [3]
    play(job, kubelet, "export")
    status = job.until(phase="Succeeded")
    assert status["restarts"] == {"charged": 2, "preemptions": 0, "outOfMemory": 0}
    assert [(entry["stage"], entry["outcome"]) for entry in status["history"]] == [
        ("prepare", "Succeeded"),
        ("train", "Failed"),
        ("train", "Failed"),
        ("train", "Succeeded"),
        ("export", "Succeeded"),
    ]
    assert "failure" not in status


def test_there_is_never_more_than_one_active_train_job(
    scripted_server: TestServer, namespace: str, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create()
    play(job, kubelet, "prepare")
    with scripted_server.client.watch(
        f"/apis/batch/v1/namespaces/{namespace}/jobs", labelSelector="finetune.dev/stage=train"
    ) as watched:
        for attempt in range(1, 6):
            pod = kubelet.pod("train", attempt)
            kubelet.run(pod)
            operator.kill()
            kubelet.disrupt(pod)
            operator.start()
        kubelet.pod("train", 6)
    active: set[str] = set()
    for event in watched.events:
        name = event["object"]["metadata"]["name"]
        conditions = event["object"].get("status", {}).get("conditions", [])
        ended = event["type"] == "DELETED" or any(c["type"] in ("Failed", "Complete") for c in conditions)
        (active.discard if ended else active.add)(name)
        assert len(active) <= 1, active


def test_a_failure_says_what_to_do_and_keeps_the_log(
    job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create()
    pod = kubelet.pod("prepare")
    kubelet.run(pod)
    said = ReportedFailure(
        failure_class=FailureClass.DATA_ERROR,
        message="3 of 10 rows cannot be used: train.jsonl row 7: not JSON. Mend them.",
        exit_code=exit_code_of(FailureClass.DATA_ERROR),
        rank=0,
        log_tail="the last line",
    )
    report = kubelet.report(pod, outcome=Outcome.FAILED, failure=said, log_uri="s3://w/log.txt")
    kubelet.fail(pod, 65, report)
    status = job.until(phase="Failed")
    assert status["failure"]["message"] == said.message
    assert status["failure"]["logTail"] == "the last line"
    assert status["failure"]["logURI"] == "s3://w/log.txt"
    assert status["failure"]["disposition"] == "Terminal"
    assert job.conditions()["Validated"] == ("False", "DataError")
    assert job.conditions()["Failed"] == ("True", "DataError")
    eventually(lambda: ("Warning", "DataError") in job.events())


def test_a_pod_that_the_cluster_refuses_is_explained(
    scripted_server: TestServer, namespace: str, job: Job, operator: OperatorProcess
) -> None:
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    assert scripted_server.client.create(path, quota).code == 201
    eventually(lambda: scripted_server.client.get(f"{path}/none").body.get("status", {}).get("hard"))
    job.create()
    eventually(
        lambda: job.conditions().get("Validated") == ("Unknown", "PodsRefused"),
        60,
        lambda: f"{job.conditions()} {operator.log()}",
    )
    (condition,) = [c for c in job.status()["conditions"] if c["type"] == "Validated"]
    assert "exceeded quota" in condition["message"]


def test_kubectl_shows_phases_and_a_rising_progress(
    kubectl: Kubectl, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create()
    watching = kubectl.start("get", "ftj", "-w")
    play(job, kubelet, "prepare")
    with agent() as speaker:
        pod = kubelet.pod("train")
        speaker.report = kubelet.report(pod)
        kubelet.run(pod, speaker.address)
        for step in (10, 60):
            progress = StepProgress(step=step, total_steps=100, loss=1.5, step_seconds=2.0)
            speaker.report = kubelet.report(pod, phase="Training", progress=progress)
            eventually(lambda s=step: job.status().get("progress", {}).get("currentStep") == s)
        kubelet.succeed(pod, speaker.report)
    play(job, kubelet, "export")
    job.until(phase="Succeeded")
    lines: list[str] = []
    assert watching.stdout is not None
    for line in watching.stdout:
        lines.append(line)
        if "Succeeded" in line:
            break
    watching.kill()
    watching.wait()
    assert re.split(r"\s{2,}", lines[0].strip()) == [
        "NAME",
        "PHASE",
        "REASON",
        "METHOD",
        "PROGRESS",
        "ETA",
        "LOSS",
        "RESTARTS",
        "AGE",
    ]
    # A line from before the operator's first look has no phase; its second word is the method.
    phases = [word for line in lines[1:] if (word := line.split()[1]) != "QLoRA"]
    assert list(dict.fromkeys(phases)) == [
        phase for phase in ("Pending", "Preparing", "Starting", "Running", "Exporting", "Succeeded") if phase in phases
    ]
    assert {"Running", "Exporting", "Succeeded"} <= set(phases)
    text = "".join(lines)
    assert text.index("10%") < text.index("60%")
    assert "1m20s" in text, "the ETA of 40 steps of 2 s"
    described = kubectl.run("describe", "ftj", "bot")
    assert "TrainingComplete" in described


def test_health_and_metrics(job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess) -> None:
    job.create()
    kubelet.run(kubelet.pod("prepare"))
    job.until(phase="Preparing")
    eventually(lambda: re.search(r'finetune_jobs\{namespace="[^"]+",phase="Preparing"\} 1.0', operator.get("/metrics")))
    text = operator.get("/metrics")
    assert 'finetune_operator_reconcile_total{result="success"}' in text
    assert "finetune_operator_build_info" in text
    assert operator.get("/readyz") == "ok\n"


def test_lines_are_objects_that_name_the_job_and_no_secret(
    scripted_server: TestServer, job: Job, kubelet: ScriptedKubelet, namespace: str, tmp_path: Path
) -> None:
    log = tmp_path / "operator.log"
    settings = {"FINETUNE_LOG_FORMAT": "json", "FINETUNE_LOG_LEVEL": "DEBUG", "FINETUNE_WROKERS": "4"}
    operator = OperatorProcess(scripted_server.kubeconfig, namespace, log, **settings)
    operator.start()
    try:
        job.create()
        play(job, kubelet, "prepare")
        kubelet.pod("train")
        assert operator.stop() == 0
    finally:
        operator.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len({line["logger"].partition(".")[0] for line in lines}) > 1, "libraries are among them"
    (created,) = [line for line in lines if line["msg"].endswith("created Job bot-train-1")]
    expected = {"namespace": namespace, "job": "bot", "uid": job.body()["metadata"]["uid"], "stage": "train"}
    assert created.items() >= (expected | {"attempt": 1, "level": "info"}).items()
    assert any("FINETUNE_WROKERS" in line["msg"] for line in lines)
    if scripted_server.client.token:
        assert scripted_server.client.token not in log.read_text()


def test_an_operator_that_cannot_start_says_why_in_a_line(tmp_path: Path) -> None:
    log = tmp_path / "operator.log"
    operator = OperatorProcess(tmp_path / "no-kubeconfig", "default", log, FINETUNE_LOG_FORMAT="json")
    operator.start(wait=False)
    assert eventually(operator.ended, 60) == 1
    *_, last = [json.loads(line) for line in log.read_text().splitlines()]
    assert last["level"] == "critical"
    assert "kube-config" in last["exception"]


def test_series_of_a_job_go_with_it(
    scripted_server: TestServer, job: Job, kubelet: ScriptedKubelet, operator: OperatorProcess
) -> None:
    job.create()
    kubelet.pod("prepare")
    eventually(lambda: 'name="bot"' in operator.get("/metrics"))
    scripted_server.client.delete(job.path)
    eventually(lambda: 'name="bot"' not in operator.get("/metrics"))


def test_the_operator_stops_in_order(operator: OperatorProcess) -> None:
    assert operator.stop() == 0
