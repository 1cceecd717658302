"""Kueue: children that wait in a queue, are taken away by it, and come back; nothing of it is ever fought over."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from builders import (
    NOW,
    SETTINGS,
    UID,
    Story,
    child_job,
    child_pod,
    complete,
    created,
    deleted,
    disrupted,
    ended_pod,
    exited,
    report,
    running_pod,
)
from test_plan import progress, saved

from finetune_api.names import Stage
from finetune_api.status import Phase, QueueStatus
from finetune_operator.kube import JOBS, PENDING, WORKLOADS, ApiError, Kind
from finetune_operator.metrics import Metrics
from finetune_operator.observe import Workload, read_position, read_workload
from finetune_operator.progress import ProgressReader
from finetune_operator.reconcile import Key, Reconciler
from finetune_operator.resource import format_time

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT
QUEUED: dict[str, Any] = {"scheduling": {"queueName": "team-a"}}


def job_of(planned: Any) -> dict[str, Any]:
    (job,) = [item for item in planned.create if item["kind"] == "Job"]
    found: dict[str, Any] = job
    return found


def waiting(**fields: Any) -> list[dict[str, Any]]:
    return [child_job(TRAIN, suspended=True, queue="team-a", **fields)]


class TestChildren:
    def test_a_queued_child_is_created_suspended_with_the_labels_of_the_queue(self) -> None:
        story = Story(scheduling={"queueName": "team-a", "workloadPriorityClassName": "urgent"})
        prepare = job_of(story.look())
        assert prepare["spec"]["suspend"] is False
        assert not [label for label in prepare["metadata"]["labels"] if "kueue" in label]
        train = job_of(story.look([complete(PREPARE)]))
        assert train["spec"]["suspend"] is True
        assert train["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
        assert train["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "urgent"

    def test_the_cpu_stages_have_a_queue_of_their_own(self) -> None:
        story = Story(scheduling={"cpuQueueName": "cpu"})
        assert job_of(story.look())["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "cpu"
        assert job_of(story.look([complete(PREPARE)]))["spec"]["suspend"] is False
        assert job_of(story.look([complete(PREPARE), complete(TRAIN)]))["spec"]["suspend"] is True

    @pytest.mark.parametrize(
        ("topology", "expected"),
        [
            ({"mode": "Required", "level": "rack"}, {"kueue.x-k8s.io/podset-required-topology": "rack"}),
            ({"mode": "Preferred", "level": "rack"}, {"kueue.x-k8s.io/podset-preferred-topology": "rack"}),
            ({"mode": "Unconstrained"}, {"kueue.x-k8s.io/podset-unconstrained-topology": "true"}),
        ],
    )
    def test_topology(self, topology: dict[str, str], expected: dict[str, str]) -> None:
        story = Story(scheduling={"queueName": "team-a", "topology": topology}, podTemplate={"annotations": {"a": "b"}})
        assert job_of(story.look())["spec"]["template"]["metadata"]["annotations"] == {"a": "b"}
        annotations = job_of(story.look([complete(PREPARE)]))["spec"]["template"]["metadata"]["annotations"]
        assert annotations == {"a": "b", **expected}

    def test_a_job_outlives_a_pod_that_its_queue_takes_away_and_nothing_else(self) -> None:
        story = Story(**QUEUED)
        story.look()
        rules = job_of(story.look([complete(PREPARE)]))["spec"]["podFailurePolicy"]["rules"]
        assert [rule["action"] for rule in rules] == ["FailJob", "Ignore", "FailJob"]
        assert rules[1]["onExitCodes"] == {"operator": "In", "values": [75, 143]}
        plain = Story()
        assert [rule["action"] for rule in job_of(plain.look())["spec"]["podFailurePolicy"]["rules"]] == [
            "FailJob",
            "FailJob",
        ]


class TestWaiting:
    def test_what_kueue_says_is_shown(self) -> None:
        story = Story(**QUEUED)
        story.prepared()
        planned = story.look(waiting())
        assert planned.needs_workload_of is not None
        assert planned.needs_workload_of.name == "bot-train-1"
        workload = Workload(
            "job-bot", message="couldn't assign flavors: insufficient quota for nvidia.com/gpu", position=3
        )
        planned = story.look(waiting(), workload=workload)
        assert planned.status.phase is Phase.QUEUED
        assert planned.status.queue == QueueStatus(name="team-a", workload="job-bot", position=3)
        assert story.condition("Running") == ("False", "Queued")
        (message,) = [c.message for c in planned.status.conditions if c.type == "Running"]
        assert "position 3, waits in queue team-a" in message
        assert "insufficient quota" in message

    def test_once_it_runs_only_who_admitted_it_stays(self) -> None:
        story = Story(**QUEUED)
        story.prepared()
        story.look(waiting(), workload=Workload("job-bot", cluster_queue="gpus"))
        planned = story.look([child_job(TRAIN, queue="team-a")], [running_pod(TRAIN)])
        assert planned.needs_workload_of is None
        assert planned.status.queue == QueueStatus(name="team-a", workload="job-bot", cluster_queue="gpus")
        assert planned.status.phase is Phase.RUNNING

    def test_who_is_admitted_has_no_place_in_the_queue(self) -> None:
        story = Story(**QUEUED)
        story.prepared()
        story.look(waiting(), workload=Workload("job-bot", position=3))
        planned = story.look([child_job(TRAIN, queue="team-a")])
        assert planned.status.queue == QueueStatus(name="team-a", workload="job-bot")
        # Kueue has written the Workload, and not yet the Job.
        planned = story.look(waiting(), workload=Workload("job-bot", cluster_queue="gpus", position=1))
        assert planned.status.queue == QueueStatus(name="team-a", workload="job-bot", cluster_queue="gpus")

    def test_a_cluster_without_kueue_is_named_with_an_event(self) -> None:
        story = Story(**QUEUED)
        story.prepared()
        planned = story.look(waiting(), no_kueue=True)
        assert story.condition("Running") == ("False", "QueueMissing")
        assert [note.reason for note in planned.notes] == ["QueueMissing"]
        (message,) = [c.message for c in planned.status.conditions if c.type == "Running"]
        assert "Install Kueue" in message

    def test_a_workload_that_was_taken_out_is_named(self) -> None:
        story = Story(**QUEUED)
        story.prepared()
        planned = story.look(waiting(), workload=Workload("job-bot", active=False))
        (message,) = [c.message for c in planned.status.conditions if c.type == "Running"]
        assert "spec.active to true" in message

    def test_nobody_is_asked_about_a_job_without_a_queue(self) -> None:
        story = Story()
        story.prepared()
        assert story.look([child_job(TRAIN, suspended=True)]).needs_workload_of is None
        assert story.condition("Running") == ("False", "Queued")

    def test_a_job_that_waits_in_a_queue_can_be_suspended(self) -> None:
        story = Story(**QUEUED)
        story.prepared()
        story.look(waiting())
        story.body["spec"]["suspend"] = True
        assert deleted(story.look(waiting())) == ["bot-train-1"]
        assert story.look().status.phase is Phase.SUSPENDED

    def test_a_queue_that_takes_too_long(self) -> None:
        story = Story(**QUEUED, preRunningDeadlineSeconds=600)
        story.prepared()
        story.look(waiting(age=0), workload=Workload("job-bot", message="no quota"), after=599)
        assert story.condition("Failed") is None
        story.look(waiting(age=0), after=1)
        assert story.condition("Failed") == ("True", "PreRunningDeadlineExceeded")
        assert "no quota" in story.body["status"]["failure"]["message"]


def test_a_pod_that_runs_before_anybody_looks_has_no_place_in_the_queue() -> None:
    story = Story(**QUEUED)
    story.prepared()
    story.look(waiting(), workload=Workload("job-bot", position=3))
    planned = story.look([child_job(TRAIN, queue="team-a")], [running_pod(TRAIN)])
    assert planned.status.queue == QueueStatus(name="team-a", workload="job-bot")


class TestEviction:
    def evicted(self) -> Story:
        story = Story(**QUEUED)
        story.prepared()
        story.look([child_job(TRAIN, queue="team-a")], [running_pod(TRAIN)], live=saved(TRAIN, 1, 0, 40))
        stopping = [running_pod(TRAIN, delete_by=NOW + timedelta(seconds=60))]
        planned = story.look(waiting(), stopping, live=saved(TRAIN, 1, 0, 45))
        assert planned.status.phase is not Phase.QUEUED, "it still saves"
        return story

    def test_it_keeps_job_and_attempt_and_is_free(self) -> None:
        story = self.evicted()
        planned = story.look(waiting())
        assert planned.status.phase is Phase.QUEUED
        assert (planned.create, planned.delete) == ((), ())
        assert story.body["status"]["attempt"]["number"] == 1
        assert story.body["status"]["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}
        assert [note.reason for note in planned.notes] == ["Preempted", "Queued"]
        assert story.look(waiting()).notes == (), "said once, counted once"
        again = [running_pod(TRAIN, since=NOW + timedelta(seconds=100))]
        planned = story.look([child_job(TRAIN, queue="team-a")], again, live=saved(TRAIN, 1, 45, 45), after=120)
        assert planned.status.attempt is not None
        assert planned.status.attempt.resumed_from_step == 45
        assert planned.status.phase is Phase.RUNNING
        assert [(entry["outcome"], entry["number"]) for entry in story.body["status"]["history"][1:]] == [
            ("Preempted", 1)
        ]

    def test_time_in_which_a_replacement_waits_does_not_count(self) -> None:
        """Somebody deleted the pod; the Job makes another one, which nobody has room for."""
        story = Story(**QUEUED, activeDeadlineSeconds=600)
        story.prepared()
        child = child_job(TRAIN, queue="team-a")
        story.look([child], [running_pod(TRAIN)])
        replacement = child_pod(TRAIN)
        replacement["metadata"]["creationTimestamp"] = format_time(NOW)
        for _ in range(60):
            story.look([child], [ended_pod(TRAIN, 1, 143), replacement], after=60)
        assert story.condition("Failed") is None
        assert story.body["status"]["usage"]["activeSeconds"] == 40, "20 s of each pod"
        assert story.body["status"]["restarts"]["preemptions"] == 1
        assert story.condition("Running") == ("False", "WaitingForPod")

    def test_a_pod_that_the_cluster_took_away_is_counted_once(self) -> None:
        """It has saved and ended, and the Job controller has not said yet what it makes of that."""
        story = Story(**QUEUED)
        story.prepared()
        child = child_job(TRAIN, queue="team-a")
        story.look([child], [running_pod(TRAIN)])
        story.look([child], [ended_pod(TRAIN, 1, 75)], after=1)
        story.look([disrupted(TRAIN, 1, gone=False)], [ended_pod(TRAIN, 1, 75)], after=1)
        assert story.body["status"]["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}
        assert [entry["stage"] for entry in story.body["status"]["history"]] == ["prepare", "train"]
        assert story.body["status"]["usage"]["activeSeconds"] == 40, "20 s of each pod"

    def test_a_pod_that_both_took_away_is_counted_once(self) -> None:
        """The cluster takes the pod, and the queue suspends the Job before its controller has ended it."""
        story = Story(**QUEUED)
        story.prepared()
        story.look([child_job(TRAIN, queue="team-a")], [running_pod(TRAIN)])
        ended = ended_pod(TRAIN, 1, 75)
        ended["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
        story.look([child_job(TRAIN, queue="team-a", suspended=True)], [ended], after=1)
        story.look([disrupted(TRAIN, 1, gone=False)], [ended], after=1)
        assert story.body["status"]["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}

    def test_a_pod_that_the_queue_took_away_is_counted_once_when_its_job_goes(self) -> None:
        """The queue has taken the pod, and before it is admitted again somebody suspends the job."""
        story = Story(**QUEUED)
        story.prepared()
        child = child_job(TRAIN, queue="team-a")
        story.look([child], [running_pod(TRAIN)])
        ended = ended_pod(TRAIN, 1, 75)
        story.look([child_job(TRAIN, queue="team-a", suspended=True)], [ended], after=1)
        assert story.body["status"]["restarts"]["preemptions"] == 1
        counted = story.body["status"]["usage"]
        story.body["spec"]["suspend"] = True
        story.look([child_job(TRAIN, queue="team-a", suspended=True)], [ended], after=1)
        story.look([], [ended], after=1)
        story.look([], [ended], after=1)
        assert story.condition("Suspended")[0] == "True"
        assert story.body["status"]["usage"] == counted

    @pytest.mark.parametrize(
        "state",
        [None, {"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown", "startedAt": None}}],
        ids=["nothing", "unknown"],
    )
    def test_a_pod_whose_start_is_forgotten_is_no_other_one(self, state: dict[str, Any] | None) -> None:
        """Its node was started anew."""
        story = Story(**QUEUED)
        story.prepared()
        child = child_job(TRAIN, queue="team-a")
        story.look([child], [running_pod(TRAIN)])
        planned = story.look([child], [child_pod(TRAIN, phase="Failed", state=state)], after=60)
        assert planned.notes == ()
        assert story.body["status"]["restarts"]["preemptions"] == 0

    def test_the_condition_running_follows_the_pod(self) -> None:
        """`kubectl wait --for=condition=Running` ends when it runs again, neither before nor never."""
        story = self.evicted()
        story.look(waiting())
        assert story.condition("Running") == ("False", "Queued")
        child = child_job(TRAIN, queue="team-a")
        story.look([child], [child_pod(TRAIN)], after=60)
        assert story.condition("Running") == ("False", "WaitingForPod")
        story.look([child], [running_pod(TRAIN, since=story.now)], after=60)
        assert story.condition("Running") == ("True", "Training")
        (since,) = [c["lastTransitionTime"] for c in story.body["status"]["conditions"] if c["type"] == "Running"]
        assert since == format_time(story.now)

    def test_it_has_no_time_left_while_it_waits(self) -> None:
        story = Story(**QUEUED)
        story.prepared()
        live = report(TRAIN, progress=progress(40))
        story.look([child_job(TRAIN, queue="team-a")], [running_pod(TRAIN)], live=live)
        assert story.body["status"]["progress"]["eta"] == "2m"
        story.look(waiting())
        assert not {"eta", "estimatedRemainingSeconds"} & story.body["status"]["progress"].keys()

    def test_clocks_stop_in_the_queue(self) -> None:
        story = self.evicted()
        story.look(waiting())
        before = story.body["status"]["usage"]
        story.look(waiting(), after=86_400)
        assert story.body["status"]["usage"] == before
        again = [running_pod(TRAIN, since=story.now)]
        story.look([child_job(TRAIN, queue="team-a")], again, after=30)
        assert story.body["status"]["attempt"]["startTime"] == format_time(story.now - timedelta(seconds=30))

    def test_an_eviction_that_nobody_saw_is_counted_when_its_end_is(self) -> None:
        """The operator was away while the queue took the pod and gave it back."""
        story = Story(**QUEUED)
        story.prepared()
        story.look([child_job(TRAIN, queue="team-a")], [running_pod(TRAIN)])
        for _ in range(3):
            story.look(
                [child_job(TRAIN, queue="team-a")], [running_pod(TRAIN, since=NOW + timedelta(hours=1))], after=7200
            )
        assert story.body["status"]["restarts"]["preemptions"] == 1
        assert story.body["status"]["attempt"]["startTime"] == format_time(NOW + timedelta(hours=1))

    def test_a_pod_that_was_killed_while_its_queue_took_it_away_costs_nothing_either(self) -> None:
        """The grace was too short: the Job fails, and the next attempt waits in the queue."""
        story = self.evicted()
        child = exited(TRAIN, 1, 137)
        child["spec"]["suspend"] = True
        planned = story.look([child])
        assert created(planned) == ["ConfigMap/bot-train-2", "Job/bot-train-2"]
        assert job_of(planned)["spec"]["suspend"] is True
        assert story.body["status"]["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}


class TestAsking:
    """A look at a train Job in a queue, and what the cluster answers when it is asked for Workloads."""

    NO, NEVER = ApiError(404, "no such resource"), ApiError(403, "workloads is forbidden")

    async def ask(self, *answers: Any) -> tuple[str, str]:
        """Reason and message of the condition that the look writes."""
        story = Story(**QUEUED)
        story.prepared()
        left, written = list(answers), {}

        class Cluster:
            async def get(self, kind: Kind, *_: Any) -> dict[str, Any]:
                if kind in PENDING:
                    raise ApiError(503, "the visibility server is away")
                return story.body

            async def list(self, kind: Kind, *_: Any, **__: Any) -> list[dict[str, Any]]:
                if kind in WORKLOADS:
                    if isinstance(answer := left.pop(0), Exception):
                        raise answer
                    return [answer]
                (job,) = waiting()
                job["metadata"]["ownerReferences"] = [{"uid": UID}]
                return [job] if kind is JOBS else []

            async def patch_status(self, kind: Kind, namespace: str, name: str, body: dict[str, Any]) -> None:
                for condition in body["status"]["conditions"]:
                    written[condition["type"]] = (condition["reason"], condition["message"])

            async def create(self, *_: Any) -> None:
                pass

        reconcile = Reconciler(Cluster(), ProgressReader(), SETTINGS, Metrics(), lambda *_: None, clock=lambda: NOW)  # type: ignore[arg-type]
        await reconcile(Key("team", "bot"))
        assert left == []
        return written["Running"]

    async def test_an_operator_that_may_not_look_waits_all_the_same(self) -> None:
        reason, message = await self.ask(self.NEVER)
        assert (reason, message) == ("Queued", "Waiting for Kueue to see Job bot-train-1 in queue team-a.")

    async def test_an_older_kueue_is_asked_in_its_version(self) -> None:
        told = {"type": "QuotaReserved", "status": "False", "message": "no room"}
        reason, message = await self.ask(self.NO, {"metadata": {"name": "job-bot"}, "status": {"conditions": [told]}})
        assert (reason, message) == ("Queued", "Workload job-bot waits in queue team-a: no room")

    async def test_a_cluster_that_knows_no_version_has_no_kueue(self) -> None:
        reason, _ = await self.ask(self.NO, self.NO)
        assert reason == "QueueMissing"


class TestReading:
    def test_a_workload(self) -> None:
        item = {
            "metadata": {"name": "job-bot-train-1-4f2c1"},
            "spec": {"active": True},
            "status": {
                "conditions": [
                    {"type": "QuotaReserved", "status": "False", "reason": "Pending", "message": "no room"},
                ]
            },
        }
        assert read_workload(item) == Workload("job-bot-train-1-4f2c1", message="no room")
        item["status"] = {
            "admission": {"clusterQueue": "gpus"},
            "conditions": [{"type": "QuotaReserved", "status": "True", "message": "Quota reserved in gpus"}],
        }
        assert read_workload(item) == Workload("job-bot-train-1-4f2c1", cluster_queue="gpus")
        assert read_workload({"metadata": {"name": "new"}, "spec": {"active": False}}) == Workload("new", active=False)

    def test_a_place_in_the_queue(self) -> None:
        pending = {"items": [{"metadata": {"name": name}, "positionInLocalQueue": i} for i, name in enumerate("abc")]}
        assert read_position(pending, "a") == 1
        assert read_position(pending, "c") == 3
        assert read_position(pending, "d") is None
        assert read_position({}, "a") is None
