"""The life of Jobs and their pods: what is seen of it in watches, conditions and Events.

Pods really run here. How long an intermediate state lasts is not part of a case: sequences are compared without
repetitions and without the states that a fast machine skips.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import pytest
from api_client import Client, Watched, eventually
from conftest import TestServer
from objects import job, pod_spec

FAILURE_POLICY = {
    "rules": [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget"}]},
        {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": [0]}},
    ]
}
# Until it is told to stop, and then with an exit code of its own. In the foreground `sleep` would delay the trap.
UNTIL_STOPPED = "trap 'echo -n stopped > $TERMINATION; exit 54' TERM; echo ready; while true; do sleep 0.1; done"


class Cluster:
    """One namespace of a server, with the words of these cases."""

    def __init__(self, client: Client, namespace: str) -> None:
        self.client = client
        self.namespace = namespace
        self.jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        self.pods = f"/api/v1/namespaces/{namespace}/pods"
        self.events = f"/api/v1/namespaces/{namespace}/events"

    def pods_of(self, name: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.client.get(
            self.pods, labelSelector=f"batch.kubernetes.io/job-name={name}"
        ).body["items"]
        return items

    def running_pod(self, name: str) -> dict[str, Any]:
        """The pod of a Job, once it runs and its trap is set."""

        def running() -> dict[str, Any] | None:
            for pod in self.pods_of(name):
                path = f"{self.pods}/{pod['metadata']['name']}/log"
                if pod["status"]["phase"] == "Running" and "ready" in str(self.client.get(path).body):
                    return pod
            return None

        found: dict[str, Any] = eventually(running)
        return found

    def job_when(self, name: str, condition: str) -> dict[str, Any]:
        """The Job, once it has a condition."""

        def reached() -> dict[str, Any] | None:
            found: dict[str, Any] = self.client.get(f"{self.jobs}/{name}").body
            return found if condition in conditions(found) else None

        result: dict[str, Any] = eventually(reached, 60, lambda: str(self.client.get(f"{self.jobs}/{name}").body))
        return result

    def job_events(self, name: str) -> set[tuple[str, str, str]]:
        """Events on a Job, with pod names cut."""
        selector = f"involvedObject.kind=Job,involvedObject.name={name}"
        items = self.client.get(self.events, fieldSelector=selector).body["items"]
        return {(item["type"], item["reason"], item["message"].split(f"{name}-")[0]) for item in items}

    @contextmanager
    def watching(self) -> Iterator[tuple[Watched, Watched]]:
        with self.client.watch(self.jobs) as jobs, self.client.watch(self.pods) as pods:
            yield jobs, pods


@pytest.fixture
def cluster(server: TestServer, namespace: str) -> Cluster:
    nodes = server.client.get("/api/v1/nodes").body["items"]
    if not any(
        item["type"] == "Ready" and item["status"] == "True" for n in nodes for item in n["status"]["conditions"]
    ):
        pytest.skip("the server of FINETUNE_TEST_KUBECONFIG has no ready node, so pods do not run")
    return Cluster(server.client, namespace)


def conditions(found: dict[str, Any]) -> list[str]:
    return [item["type"] for item in found["status"].get("conditions", []) if item["status"] == "True"]


def stages(events: list[dict[str, Any]], name: str) -> list[tuple[str, ...]]:
    """The conditions of a Job over time, without repetitions."""
    own = [event["object"] for event in events if event["object"]["metadata"]["name"] == name]
    return [key for key, _ in groupby(tuple(conditions(found)) for found in own)]


def life(events: list[dict[str, Any]], name: str) -> list[tuple[str, str]]:
    """A pod over time: type of event and phase (or Terminating), without repetitions."""
    own = [event for event in events if event["object"]["metadata"]["name"] == name]
    return [key for key, _ in groupby((event["type"], look(event["object"])) for event in own)]


def look(pod: dict[str, Any]) -> str:
    phase = str(pod["status"]["phase"])
    return f"{phase}, deleting" if "deletionTimestamp" in pod["metadata"] else phase


def policy_job(name: str, script: str, **spec: Any) -> dict[str, Any]:
    body = job(name, script, podFailurePolicy=FAILURE_POLICY, **spec)
    container = body["spec"]["template"]["spec"]["containers"][0]
    container["env"] = [{"name": "TERMINATION", "value": "/dev/termination-log"}]
    return body


def failed(events: list[dict[str, Any]], name: str) -> bool:
    return ("FailureTarget", "Failed") in stages(events, name)


def test_what_the_server_adds_to_a_job(cluster: Cluster) -> None:
    body = policy_job("j", "true", suspend=True)
    created = cluster.client.create(cluster.jobs, body).body
    uid, spec = created["metadata"]["uid"], created["spec"]
    labels = {
        "batch.kubernetes.io/controller-uid": uid,
        "batch.kubernetes.io/job-name": "j",
        "controller-uid": uid,
        "job-name": "j",
    }
    assert spec["selector"] == {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    assert spec["template"]["metadata"]["labels"] == labels
    assert spec["podFailurePolicy"]["rules"][0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    expected = {
        "parallelism": 1,
        "completions": 1,
        "completionMode": "NonIndexed",
        "podReplacementPolicy": "Failed",
        "backoffLimit": 0,
        "manualSelector": False,
    }
    assert {key: spec[key] for key in expected} == expected
    pod = spec["template"]["spec"]
    assert (pod["dnsPolicy"], pod["terminationGracePeriodSeconds"]) == ("ClusterFirst", 30)
    assert pod["containers"][0]["terminationMessagePath"] == "/dev/termination-log"
    assert created["status"] == {}
    assert created["metadata"]["generation"] == 1


def test_success(cluster: Cluster) -> None:
    with cluster.watching() as (jobs, pods):
        cluster.client.create(cluster.jobs, job("j", "exit 0"))
        complete = ("SuccessCriteriaMet", "Complete")
        events = jobs.until(lambda events: complete in stages(events, "j"))
        (name,) = [pod["metadata"]["name"] for pod in cluster.pods_of("j")]
        released = pods.until(lambda events: "finalizers" not in events[-1]["object"]["metadata"])
    assert stages(events, "j") == [(), ("SuccessCriteriaMet",), complete]
    lived = [step for step in life(released, name) if step != ("MODIFIED", "Running")]
    assert lived == [("ADDED", "Pending"), ("MODIFIED", "Pending"), ("MODIFIED", "Succeeded")]
    status = events[-1]["object"]["status"]
    assert status["succeeded"] == 1
    assert "failed" not in status
    assert "active" not in status
    assert (status["ready"], status["terminating"], status["uncountedTerminatedPods"]) == (0, 0, {})
    assert {"startTime", "completionTime"} <= status.keys()
    reason = {(item["reason"], item["message"]) for item in status["conditions"]}
    assert reason == {("CompletionsReached", "Reached expected number of succeeded pods")}
    eventually(lambda: ("Normal", "Completed", "Job completed") in cluster.job_events("j"))
    assert ("Normal", "SuccessfulCreate", "Created pod: ") in cluster.job_events("j")


def test_pods_are_marked_as_the_job_s_own(cluster: Cluster) -> None:
    created = cluster.client.create(cluster.jobs, policy_job("j", UNTIL_STOPPED)).body
    pod = cluster.running_pod("j")
    metadata = pod["metadata"]
    assert metadata["generateName"] == "j-"
    assert metadata["finalizers"] == ["batch.kubernetes.io/job-tracking"]
    assert metadata["ownerReferences"] == [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "name": "j",
            "uid": created["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]
    status = pod["status"]
    assert status["podIP"]
    assert {"Ready", "ContainersReady", "Initialized", "PodScheduled"} <= set(conditions(pod))
    container = status["containerStatuses"][0]
    assert container["ready"] is True
    assert "running" in container["state"]
    running = eventually(lambda: cluster.client.get(f"{cluster.jobs}/j").body["status"].get("ready"))
    assert running == 1


def test_an_exit_code_fails_the_job_by_policy(cluster: Cluster) -> None:
    with cluster.watching() as (jobs, pods):
        cluster.client.create(cluster.jobs, policy_job("j", "echo -n bad > $TERMINATION; exit 42"))
        events = jobs.until(lambda events: failed(events, "j"))
        pods.until(lambda events: "finalizers" not in events[-1]["object"]["metadata"])
    (pod,) = cluster.pods_of("j")
    name = pod["metadata"]["name"]
    message = (
        f"Container main for pod {cluster.namespace}/{name} failed with exit code 42 matching FailJob rule at index 1"
    )
    assert stages(events, "j") == [(), ("FailureTarget",), ("FailureTarget", "Failed")]
    status = events[-1]["object"]["status"]
    assert {(item["reason"], item["message"]) for item in status["conditions"]} == {("PodFailurePolicy", message)}
    assert status["failed"] == 1
    # A pod that failed by itself stays, with its last words.
    assert look(pod) == "Failed"
    terminated = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (terminated["exitCode"], terminated["reason"]) == (42, "Error")
    eventually(lambda: ("Warning", "PodFailurePolicy") in {event[:2] for event in cluster.job_events("j")})


def test_an_eviction_is_a_disruption(cluster: Cluster) -> None:
    with cluster.watching() as (jobs, pods):
        cluster.client.create(cluster.jobs, policy_job("j", UNTIL_STOPPED))
        name = cluster.running_pod("j")["metadata"]["name"]
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
        answer = cluster.client.create(f"{cluster.pods}/{name}/eviction", eviction)
        assert (answer.code, answer.body["status"]) == (201, "Success")
        events = jobs.until(lambda events: failed(events, "j"))
        lived = pods.until(lambda events: events[-1]["type"] == "DELETED")
    assert stages(events, "j") == [(), ("FailureTarget",), ("FailureTarget", "Failed")]
    message = f"Pod {cluster.namespace}/{name} has condition DisruptionTarget matching FailJob rule at index 0"
    assert {item["message"] for item in events[-1]["object"]["status"]["conditions"]} == {message}
    assert life(lived, name)[-3:] == [
        ("MODIFIED", "Running, deleting"),
        ("MODIFIED", "Failed, deleting"),
        ("DELETED", "Failed, deleting"),
    ]
    disrupted = [event["object"] for event in lived if "DisruptionTarget" in conditions(event["object"])]
    # The condition comes before the deletion, and is there to the end.
    assert look(disrupted[0]) == "Running"
    condition = next(item for item in disrupted[-1]["status"]["conditions"] if item["type"] == "DisruptionTarget")
    assert (condition["reason"], condition["message"]) == ("EvictionByEvictionAPI", "Eviction API: evicting")
    assert lived[-1]["object"]["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 54


def test_a_plain_deletion_is_no_disruption(cluster: Cluster) -> None:
    with cluster.watching() as (jobs, pods):
        cluster.client.create(cluster.jobs, policy_job("j", UNTIL_STOPPED))
        name = cluster.running_pod("j")["metadata"]["name"]
        answer = cluster.client.delete(f"{cluster.pods}/{name}")
        assert answer.body["metadata"]["deletionGracePeriodSeconds"] == 30
        events = jobs.until(lambda events: failed(events, "j"))
        lived = pods.until(lambda events: events[-1]["type"] == "DELETED")
    message = (
        f"Container main for pod {cluster.namespace}/{name} failed with exit code 54 matching FailJob rule at index 1"
    )
    assert {item["message"] for item in events[-1]["object"]["status"]["conditions"]} == {message}
    assert life(lived, name)[-3:] == [
        ("MODIFIED", "Running, deleting"),
        ("MODIFIED", "Failed, deleting"),
        ("DELETED", "Failed, deleting"),
    ]
    assert not any("DisruptionTarget" in conditions(event["object"]) for event in lived)
    assert cluster.pods_of("j") == []


def test_a_pod_that_ends_well_when_stopped_has_succeeded(cluster: Cluster) -> None:
    script = "trap 'exit 0' TERM; echo ready; while true; do sleep 0.1; done"
    cluster.client.create(cluster.jobs, policy_job("j", script))
    cluster.client.delete(f"{cluster.pods}/{cluster.running_pod('j')['metadata']['name']}")
    assert conditions(cluster.job_when("j", "Complete")) == ["SuccessCriteriaMet", "Complete"]


def test_a_pod_that_ignores_sigterm_is_killed_after_its_grace(cluster: Cluster) -> None:
    cluster.client.create(cluster.jobs, policy_job("j", "trap '' TERM; echo ready; while true; do sleep 0.1; done"))
    name = cluster.running_pod("j")["metadata"]["name"]
    cluster.client.delete(f"{cluster.pods}/{name}", gracePeriodSeconds=1)
    message = cluster.job_when("j", "Failed")["status"]["conditions"][0]["message"]
    assert "failed with exit code 137" in message


def test_a_pod_deleted_before_it_ran_exceeds_the_limit(cluster: Cluster) -> None:
    body = policy_job("j", "true")
    container = body["spec"]["template"]["spec"]["containers"][0]
    container["resources"] = {"limits": {"example.com/none": "1"}}
    cluster.client.create(cluster.jobs, body)
    (pod,) = eventually(lambda: [p for p in cluster.pods_of("j") if p["status"].get("conditions")])
    assert pod["status"]["phase"] == "Pending"
    (condition,) = pod["status"]["conditions"]
    assert (condition["type"], condition["status"], condition["reason"]) == ("PodScheduled", "False", "Unschedulable")
    assert condition["message"].startswith("0/1 nodes are available: 1 Insufficient example.com/none.")
    cluster.client.delete(f"{cluster.pods}/{pod['metadata']['name']}")
    found = cluster.job_when("j", "Failed")
    assert {item["reason"] for item in found["status"]["conditions"]} == {"BackoffLimitExceeded"}


def test_without_a_policy_the_limit_counts(cluster: Cluster) -> None:
    cluster.client.create(cluster.jobs, job("j", "exit 1"))
    found = cluster.job_when("j", "Failed")
    assert conditions(found) == ["FailureTarget", "Failed"]
    assert {(item["reason"], item["message"]) for item in found["status"]["conditions"]} == {
        ("BackoffLimitExceeded", "Job has reached the specified backoff limit")
    }
    eventually(lambda: ("Warning", "BackoffLimitExceeded") in {event[:2] for event in cluster.job_events("j")})


def test_a_deadline_waits_for_the_pods(cluster: Cluster) -> None:
    with cluster.watching() as (jobs, _):
        cluster.client.create(cluster.jobs, policy_job("j", UNTIL_STOPPED, activeDeadlineSeconds=2))
        events = jobs.until(lambda events: failed(events, "j"))
    assert stages(events, "j") == [(), ("FailureTarget",), ("FailureTarget", "Failed")]
    assert {(item["reason"], item["message"]) for item in events[-1]["object"]["status"]["conditions"]} == {
        ("DeadlineExceeded", "Job was active longer than specified deadline")
    }
    target = next(event["object"] for event in events if conditions(event["object"]) == ["FailureTarget"])
    assert target["status"]["terminating"] == 1
    assert cluster.pods_of("j") == []


def test_suspending_stops_the_pods_and_fails_nothing(cluster: Cluster) -> None:
    # Without a pod failure policy: with one, Kubernetes may count a pod that it has just deleted as failed.
    cluster.client.create(cluster.jobs, job("j", UNTIL_STOPPED.replace("$TERMINATION", "/dev/null")))
    first = cluster.running_pod("j")["metadata"]["name"]
    path = f"{cluster.jobs}/j"
    answer = cluster.client.patch(path, {"spec": {"suspend": True}})
    assert answer.body["metadata"]["generation"] == 2
    eventually(lambda: cluster.pods_of("j") == [])
    suspended = cluster.job_when("j", "Suspended")
    assert conditions(suspended) == ["Suspended"]
    status = eventually(lambda: _without_pods(cluster.client.get(path).body["status"]))
    assert "failed" not in status
    assert "startTime" not in status
    cluster.client.patch(path, {"spec": {"suspend": False}})
    second = cluster.running_pod("j")["metadata"]["name"]
    assert first != second
    resumed = cluster.client.get(path).body["status"]
    (condition,) = resumed["conditions"]
    assert (condition["type"], condition["status"], condition["reason"]) == ("Suspended", "False", "JobResumed")
    assert "startTime" in resumed
    expected = {
        ("Normal", "Suspended", "Job suspended"),
        ("Normal", "Resumed", "Job resumed"),
        ("Normal", "SuccessfulDelete", "Deleted pod: "),
    }
    eventually(lambda: expected <= cluster.job_events("j"))


def _without_pods(status: dict[str, Any]) -> dict[str, Any] | None:
    return status if not status.get("active") and not status.get("terminating") else None


def test_an_indexed_job_keeps_the_failed_rank_only(cluster: Cluster) -> None:
    script = f'if [ "$JOB_COMPLETION_INDEX" = 1 ]; then sleep 1; exit 7; fi; {UNTIL_STOPPED}'
    body = policy_job("j", script, completionMode="Indexed", completions=3, parallelism=3)
    cluster.client.create(cluster.jobs, body)
    found = cluster.job_when("j", "Failed")
    message = found["status"]["conditions"][0]["message"]
    assert message.startswith(f"Container main for pod {cluster.namespace}/j-1-")
    assert "failed with exit code 7 matching FailJob rule at index 1" in message
    (pod,) = cluster.pods_of("j")
    metadata = pod["metadata"]
    assert metadata["annotations"]["batch.kubernetes.io/job-completion-index"] == "1"
    assert metadata["labels"]["batch.kubernetes.io/job-completion-index"] == "1"
    assert pod["spec"]["hostname"] == "j-1"


def test_an_indexed_job_completes_by_index(cluster: Cluster) -> None:
    body = job("j", "exit 0", completionMode="Indexed", completions=4, parallelism=2)
    cluster.client.create(cluster.jobs, body)
    status = cluster.job_when("j", "Complete")["status"]
    assert (status["completedIndexes"], status["succeeded"]) == ("0-3", 4)


@pytest.mark.parametrize(("completions", "length"), [(1, 63), (2, 61), (2, 62), (11, 60), (11, 61)])
def test_names_of_indexed_jobs_must_leave_room(cluster: Cluster, completions: int, length: int) -> None:
    name = "a" * length
    body = job(name, "exit 0", completionMode="Indexed", completions=completions, suspend=True)
    answer = cluster.client.create(cluster.jobs, body, dryRun="All")
    hostname = f"{name}-{completions - 1}"
    if len(hostname) <= 63:
        assert answer.code == 201
    else:
        assert answer.code == 422
        message = f"will not able to create pod with invalid DNS label: {hostname}"
        assert ("FieldValueInvalid", "metadata.name", f'Invalid value: "{name}": {message}') in answer.causes


def test_what_jobs_refuse(cluster: Cluster) -> None:
    def causes(body: dict[str, Any]) -> set[tuple[str, str]]:
        answer = cluster.client.create(cluster.jobs, body)
        assert answer.code == 422
        return {(field, message) for _, field, message in answer.causes}

    body = job("j")
    body["spec"]["template"]["spec"]["restartPolicy"] = "Always"
    restart = "spec.template.spec.restartPolicy"
    assert any(field == restart for field, _ in causes(body))
    body = policy_job("j", "true")
    body["spec"]["template"]["spec"]["restartPolicy"] = "OnFailure"
    message = 'Invalid value: "OnFailure": only "Never" is supported when podFailurePolicy is specified'
    assert (restart, message) in causes(body)
    assert ("spec.completions", "Required value: when completion mode is Indexed") in causes(
        job("j", completionMode="Indexed", parallelism=1)
    )
    rule = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [3, 2]}}
    found = causes(job("j", podFailurePolicy={"rules": [rule]}))
    assert any(field.endswith("onExitCodes.values") and "must be ordered" in message for field, message in found)


def test_the_template_of_a_job_is_immutable(cluster: Cluster) -> None:
    cluster.client.create(cluster.jobs, job("j", "exit 0", suspend=True))
    eventually(lambda: "Suspended" in conditions(cluster.client.get(f"{cluster.jobs}/j").body))
    patch = {"spec": {"template": {"spec": {"serviceAccountName": "other"}}}}
    answer = cluster.client.patch(f"{cluster.jobs}/j", patch)
    assert answer.code == 422
    assert all(message.endswith("field is immutable") for _, _, message in answer.causes)
    # A suspended Job may be told where to run: that is how queueing systems place it.
    placed = {"spec": {"template": {"spec": {"nodeSelector": {"pool": "a"}}}}}
    assert cluster.client.patch(f"{cluster.jobs}/j", placed).code == 200


@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
def test_a_deleted_job_takes_its_pods_along(cluster: Cluster, propagation: str) -> None:
    cluster.client.create(cluster.jobs, policy_job("j", UNTIL_STOPPED))
    cluster.running_pod("j")
    with cluster.watching() as (jobs, pods):
        cluster.client.delete(f"{cluster.jobs}/j", {"propagationPolicy": propagation})
        pods.until(lambda events: events and events[-1]["type"] == "DELETED")
        jobs.until(lambda events: events and events[-1]["type"] == "DELETED")
    assert cluster.pods_of("j") == []
    assert cluster.client.get(f"{cluster.jobs}/j").code == 404


def test_a_job_deleted_without_a_policy_leaves_its_pods(cluster: Cluster) -> None:
    cluster.client.create(cluster.jobs, job("j", "exit 0"))
    cluster.job_when("j", "Complete")
    cluster.client.delete(f"{cluster.jobs}/j")
    eventually(lambda: cluster.client.get(f"{cluster.jobs}/j").code == 404)
    (pod,) = cluster.pods_of("j")
    assert "ownerReferences" not in pod["metadata"]
    assert "finalizers" not in pod["metadata"]


def test_a_finished_job_goes_after_its_time_to_live(cluster: Cluster) -> None:
    cluster.client.create(cluster.jobs, job("j", "exit 0", ttlSecondsAfterFinished=1))
    eventually(lambda: cluster.client.get(f"{cluster.jobs}/j").code == 404)
    eventually(lambda: cluster.pods_of("j") == [])


def test_refused_pods_are_an_event_only(cluster: Cluster) -> None:
    quotas = f"/api/v1/namespaces/{cluster.namespace}/resourcequotas"
    cluster.client.create(quotas, {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}})
    eventually(lambda: cluster.client.get(f"{quotas}/none").body["status"].get("hard"))
    cluster.client.create(cluster.jobs, job("j", "exit 0"))
    selector = "involvedObject.name=j,reason=FailedCreate"
    (event, *_) = eventually(lambda: cluster.client.get(cluster.events, fieldSelector=selector).body["items"])
    assert event["type"] == "Warning"
    assert event["message"].startswith('Error creating: pods "j-')
    assert event["message"].endswith(
        "is forbidden: exceeded quota: none, requested: pods=1, used: pods=0, limited: pods=0"
    )
    assert cluster.pods_of("j") == []
    status = cluster.client.get(f"{cluster.jobs}/j").body["status"]
    assert "active" not in status
    assert "conditions" not in status


def test_a_missing_secret_is_read_from_the_waiting_reason(cluster: Cluster) -> None:
    reference = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "key"}}}
    spec = pod_spec("echo $KEY", container={"env": [reference]})
    cluster.client.create(cluster.pods, {"metadata": {"name": "p"}, "spec": spec})

    def waiting() -> dict[str, Any] | None:
        statuses = cluster.client.get(f"{cluster.pods}/p").body["status"].get("containerStatuses", [{}])
        state: dict[str, Any] = statuses[0].get("state", {}).get("waiting", {})
        return state if state.get("reason") == "CreateContainerConfigError" else None

    assert eventually(waiting) == {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}
    answer = cluster.client.get(f"{cluster.pods}/p/log")
    assert answer.code == 400
    assert answer.message == 'container "main" in pod "p" is waiting to start: CreateContainerConfigError'
    path = f"/api/v1/namespaces/{cluster.namespace}/secrets"
    cluster.client.create(path, {"metadata": {"name": "s3"}, "stringData": {"key": "open sesame"}})
    eventually(lambda: cluster.client.get(f"{cluster.pods}/p").body["status"]["phase"] == "Succeeded", 60)
    assert cluster.client.get(f"{cluster.pods}/p/log").body == "open sesame\n"


def test_the_termination_message_is_the_end_of_what_was_written(cluster: Cluster) -> None:
    script = (
        "i=0; while [ $i -lt 1000 ]; do echo -n 12345678 >> $TERMINATION; i=$((i+1)); done; echo -n end >> $TERMINATION"
    )
    variable = {"name": "TERMINATION", "value": "/dev/termination-log"}
    spec = pod_spec(script, container={"env": [variable]})
    cluster.client.create(cluster.pods, {"metadata": {"name": "p"}, "spec": spec})
    eventually(lambda: cluster.client.get(f"{cluster.pods}/p").body["status"]["phase"] == "Succeeded", 60)
    status = cluster.client.get(f"{cluster.pods}/p").body["status"]["containerStatuses"][0]
    message = status["state"]["terminated"]["message"]
    assert len(message) == 4096
    assert message.endswith("5678end")


def test_a_command_that_does_not_exist(cluster: Cluster) -> None:
    spec = pod_spec("", container={"command": ["no-such-program"]})
    cluster.client.create(cluster.pods, {"metadata": {"name": "p"}, "spec": spec})
    eventually(lambda: cluster.client.get(f"{cluster.pods}/p").body["status"]["phase"] == "Failed", 60)
    status = cluster.client.get(f"{cluster.pods}/p").body["status"]["containerStatuses"][0]
    terminated = status["state"]["terminated"]
    assert (terminated["exitCode"], terminated["reason"]) == (128, "StartError")
    assert 'exec: "no-such-program": executable file not found in $PATH' in terminated["message"]
