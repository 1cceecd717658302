"""An attempt of several pods: the first one speaks, the last one to come says whether it runs, the culprit is named."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from builders import (
    NOW,
    Story,
    child_job,
    child_pod,
    complete,
    created,
    deleted,
    ended_pod,
    exited,
    failure_report,
    of_node,
    report,
    running_pod,
)

from finetune_api.failures import FailureClass
from finetune_api.names import Stage
from finetune_api.report import Report, StepProgress
from finetune_api.status import CheckpointResult, Phase
from finetune_operator.observe import Waiting
from finetune_operator.plan import NODE_LOST_SECONDS
from finetune_operator.resource import format_time

TRAIN = Stage.TRAIN
NODES = 4
UNSCHEDULABLE = [
    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
]


@pytest.fixture
def story() -> Story:
    started = Story(resources={"nodes": NODES, "gpusPerNode": 2}, failurePolicy={"backoffSeconds": 0})
    started.prepared()
    return started


def child(*conditions: tuple[str, str, str], **more: Any) -> dict[str, Any]:
    return child_job(TRAIN, 1, *conditions, nodes=NODES, **more)


def failing(index: int, code: int, *, gone: bool = False) -> dict[str, Any]:
    """The Job, when its controller has seen a pod fail."""
    text = (
        f"Container main for pod team/bot-train-1-{index}-x7k2p failed with exit code {code} matching FailJob rule at "
        "index 1"
    )
    kinds = ("FailureTarget", "Failed") if gone else ("FailureTarget",)
    return child(*((kind, "PodFailurePolicy", text) for kind in kinds))


def pods(**states: dict[str, Any]) -> list[dict[str, Any]]:
    """All four, running unless said otherwise: p2=..."""
    return [of_node(index, states.get(f"p{index}", running_pod(TRAIN))) for index in range(NODES)]


def at_work(step: int = 5) -> Report:
    stored = CheckpointResult(step=4, uri="s3://w/train/1/checkpoints/4")
    return report(TRAIN, 1, phase="Training", progress=StepProgress(step=step, total_steps=9), checkpoint=stored)


class TestStarting:
    def test_the_service_is_made_before_the_job(self) -> None:
        story = Story(resources={"nodes": NODES})
        story.look()
        planned = story.look([complete(Stage.PREPARE)], [ended_pod(Stage.PREPARE)])
        assert created(planned) == ["ConfigMap/bot-train-1", "Service/bot-train", "Job/bot-train-1"]

    def test_it_runs_when_all_run(self, story: Story) -> None:
        story.look([child()], pods(p3=child_pod(TRAIN, conditions=UNSCHEDULABLE)))
        assert story.condition("Running") == ("False", "Unschedulable")
        assert story.job.status.phase is Phase.STARTING
        text = story.body["status"]["conditions"][-1]["message"]
        assert text.startswith("No node can take pod bot-train-1-3-x7k2p (0/3 nodes are available).")
        assert text.endswith("3 of 4 pods run.")
        story.look([child()], pods(), live=at_work())
        assert story.condition("Running") == ("True", "Training")
        assert story.job.status.phase is Phase.RUNNING
        (running,) = [item for item in story.body["status"]["conditions"] if item["type"] == "Running"]
        assert "4 pods, of which bot-train-1-0-x7k2p is the first (Training)" in running["message"]

    def test_of_several_that_wait_the_first_is_named(self, story: Story) -> None:
        waiting = {f"p{index}": child_pod(TRAIN, conditions=UNSCHEDULABLE) for index in (1, 2)}
        story.look([child()], pods(**waiting))
        text = story.body["status"]["conditions"][-1]["message"]
        assert "bot-train-1-1-x7k2p" in text
        assert text.endswith("2 of 4 pods run.")

    def test_pods_that_the_cluster_refuses_are_explained(self, story: Story) -> None:
        """A quota that is enough for three of four."""
        planned = story.look([child()], pods()[:3])
        assert planned.needs_events_of == ("Job", "bot-train-1")
        story.look([child()], pods()[:3], warnings=(Waiting("FailedCreate", "exceeded quota: gpus"),))
        assert story.condition("Running") == ("False", "PodsRefused")
        assert story.body["status"]["conditions"][-1]["message"].endswith("3 of 4 pods run.")

    def test_the_time_to_come_to_run_is_over_when_all_run(self) -> None:
        story = Story(resources={"nodes": NODES}, preRunningDeadlineSeconds=100)
        story.prepared()
        story.look([child(age=99)], pods(p1=child_pod(TRAIN)))
        assert story.condition("Failed") is None
        story.look([child(age=101)], pods(p1=child_pod(TRAIN)))
        assert story.condition("Failed") == ("True", "PreRunningDeadlineExceeded")

    def test_gpus_of_all_nodes_are_counted_from_when_all_run(self, story: Story) -> None:
        late = running_pod(TRAIN)
        late["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] = (
            NOW - timedelta(seconds=10)
        ).strftime("%Y-%m-%dT%H:%M:%SZ")
        story.look([child()], pods(p2=late), live=at_work())
        attempt = story.job.status.attempt
        assert attempt is not None
        assert attempt.gpus == 8
        story.look([failing(1, 70)], pods(p1=ended_pod(TRAIN, 1, 70)))
        assert story.job.status.usage is not None
        assert story.job.status.usage.gpu_seconds == 80


class TestProgress:
    def test_the_first_pod_speaks_for_all(self, story: Story) -> None:
        """What another one left behind is not taken for the attempt's."""
        other = failure_report(
            TRAIN, 1, FailureClass.COMMUNICATION, "lost", progress=StepProgress(step=0, total_steps=9)
        )
        story.look([child()], pods(p2=ended_pod(TRAIN, 1, 84, other)), live=at_work(7))
        status = story.job.status
        assert status.progress is not None
        assert status.progress.current_step == 7


class TestEnding:
    def test_the_pod_that_failed_is_named_with_what_it_said(self, story: Story) -> None:
        """The first pod lost it, and says so; the others are being removed. Neither is the cause."""
        story.look([child()], pods(), live=at_work())
        culprit = failure_report(TRAIN, 1, FailureClass.OUT_OF_MEMORY_GPU, "It was too much.", log_uri="s3://w/log-2")
        assert culprit.failure is not None
        culprit = culprit.model_copy(update={"failure": culprit.failure.model_copy(update={"rank": 5})})
        lost = failure_report(
            TRAIN, 1, FailureClass.COMMUNICATION, "lost", progress=StepProgress(step=6, total_steps=9)
        )
        story.look(
            [failing(2, 80)],
            pods(p0=ended_pod(TRAIN, 1, 84, lost), p2=ended_pod(TRAIN, 1, 80, culprit), p3=running_pod(TRAIN, 1, NOW)),
        )
        failure = story.job.status.failure
        assert failure is not None
        assert (failure.failure_class, failure.pod, failure.node, failure.rank, failure.log_uri) == (
            FailureClass.OUT_OF_MEMORY_GPU,
            "bot-train-1-2-x7k2p",
            "node3",
            5,
            "s3://w/log-2",
        )
        assert failure.message.startswith("It was too much.")
        # The progress is still that of the first one.
        assert story.job.status.progress is not None
        assert story.job.status.progress.current_step == 6

    def test_a_culprit_whose_object_is_gone_is_not_mixed_up_with_the_first_pod(self, story: Story) -> None:
        story.look([child()], pods(), live=at_work())
        lost = failure_report(TRAIN, 1, FailureClass.COMMUNICATION, "lost", log_uri="s3://w/log")
        ended = {f"p{index}": ended_pod(TRAIN, 1, 84, lost) for index in range(NODES)}
        left = [pod for pod in pods(**ended) if "-2-" not in pod["metadata"]["name"]]
        story.look([failing(2, 84)], left)
        failure = story.job.status.failure
        assert failure is not None
        assert (failure.pod, failure.rank, failure.log_uri) == ("bot-train-1-2-x7k2p", None, None)
        assert failure.node == "node3", "where it was seen to run"

    def test_the_next_attempt_waits_for_all_pods_of_the_last(self, story: Story) -> None:
        story.look([child()], pods(), live=at_work())
        planned = story.look([failing(1, 137)], pods(p1=ended_pod(TRAIN, 1, 137)))
        assert created(planned) == []
        ended = {f"p{index}": ended_pod(TRAIN, 1, 137 if index == 1 else 75) for index in range(NODES)}
        planned = story.look([failing(1, 137, gone=True)], pods(**ended))
        assert created(planned) == ["ConfigMap/bot-train-2", "Service/bot-train", "Job/bot-train-2"]
        assert story.job.status.restarts is not None
        assert story.job.status.restarts.charged == 1

    def test_a_disrupted_pod_costs_nothing_whatever_the_others_exit_with(self, story: Story) -> None:
        story.look([child()], pods(), live=at_work())
        text = "Pod team/bot-train-1-3-x7k2p has condition DisruptionTarget matching FailJob rule at index 0"
        ended = {f"p{index}": ended_pod(TRAIN, 1, 75) for index in range(NODES)}
        story.look([child(("FailureTarget", "PodFailurePolicy", text))], pods(**ended))
        status = story.job.status
        assert status.failure is not None
        assert status.failure.failure_class == FailureClass.PREEMPTED
        assert (status.failure.pod, status.failure.node) == ("bot-train-1-3-x7k2p", "node4")
        assert status.restarts is not None
        assert (status.restarts.charged, status.restarts.preemptions) == (0, 1)

    def test_a_job_that_has_decided_is_left_to_its_controller(self, story: Story) -> None:
        story.look([child()], pods(), live=at_work())
        ended = {f"p{index}": ended_pod(TRAIN, 1, 84) for index in range(NODES)}
        planned = story.look([failing(0, 84)], pods(**ended))
        assert (deleted(planned), created(planned)) == ([], []), "it is about to say Failed"
        assert created(story.look([exited(TRAIN, 1, 84)]))[-1] == "Job/bot-train-2"

    def test_a_pod_on_a_lost_node_ends_the_attempt_whichever_it_is(self, story: Story) -> None:
        story.look([child()], pods(), live=at_work())
        gone = running_pod(TRAIN, 1, delete_by=NOW - timedelta(seconds=1))
        story.look([child()], pods(p2=gone), live=at_work())
        assert story.job.status.failure is None, "it may just be late"
        planned = story.look([child()], pods(p2=gone), live=at_work(), after=NODE_LOST_SECONDS + 1)
        failure = story.job.status.failure
        assert failure is not None
        assert (failure.failure_class, failure.pod) == (FailureClass.NODE_LOST, "bot-train-1-2-x7k2p")
        assert deleted(planned) == ["bot-train-1"], "the others cannot train without it, and the Job does not know"
        stopping = running_pod(TRAIN, 1, delete_by=story.now + timedelta(seconds=60))
        planned = story.look([], pods(p0=stopping, p1=stopping, p2=gone, p3=stopping))
        assert created(planned) == [], "they still save"
        planned = story.look([], pods(p2=gone)[2:3])
        assert created(planned)[-1] == "Job/bot-train-2"
        assert story.body["status"]["restarts"]["preemptions"] == 1

    def test_a_pod_that_answers_is_not_lost_whichever_it_is(self, story: Story) -> None:
        late = running_pod(TRAIN, 1, delete_by=NOW - timedelta(seconds=1))
        for _ in range(3):
            story.look([child()], pods(p2=late), live=at_work(), alive=frozenset({"bot-train-1-2-x7k2p"}), after=60)
        assert story.job.status.failure is None

    def test_one_that_answers_is_not_lost_with_another(self, story: Story) -> None:
        alive = frozenset({"bot-train-1-0-x7k2p"})
        story.look([child()], pods(), live=at_work())
        left = [of_node(index, running_pod(TRAIN, 1, delete_by=NOW - timedelta(seconds=1))) for index in (0, 3)]
        for _ in range(5):
            planned = story.look([], left, alive=alive, after=NODE_LOST_SECONDS + 1)
            assert created(planned) == []
        assert created(story.look([], left[1:]))[-1] == "Job/bot-train-2"

    def test_what_the_others_could_see_of_a_lost_node_is_one_too(self, story: Story) -> None:
        """They lose it long before Kubernetes gives it up, and so the Job has failed by then."""
        story.look([child()], pods(), live=at_work())
        gone = running_pod(TRAIN, 1, delete_by=NOW)
        ended = {f"p{index}": ended_pod(TRAIN, 1, 84) for index in (0, 1, 3)}
        story.look([failing(0, 84)], pods(**ended, p2=gone), after=1)
        assert story.job.status.failure is None, "it may just be late"
        planned = story.look([failing(0, 84)], pods(**ended, p2=gone), after=NODE_LOST_SECONDS + 1)
        failure = story.job.status.failure
        assert failure is not None
        assert (failure.failure_class, failure.pod) == (FailureClass.NODE_LOST, "bot-train-1-2-x7k2p")
        assert story.body["status"]["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}
        assert deleted(planned) == ["bot-train-1"], "it waits for the lost pod"

    def test_what_a_drain_saves_is_known(self) -> None:
        """The pod that is drained has little to save, and is gone while the first one still uploads."""
        story = Story(resources={"nodes": NODES, "gpusPerNode": 2}, failurePolicy={"backoffSeconds": 3600})
        story.prepared()
        text = "Pod team/bot-train-1-3-x7k2p has condition DisruptionTarget matching FailJob rule at index 0"
        drained = child(("FailureTarget", "PodFailurePolicy", text))
        live = report(TRAIN, phase="Saving", resumed_from_step=0, progress=StepProgress(step=5, total_steps=9))
        story.look([child()], pods(), live=live)
        stopping = running_pod(TRAIN, 1, delete_by=NOW + timedelta(seconds=60))
        last = ended_pod(TRAIN, 1, 75)
        planned = story.look([drained], pods(p0=stopping, p1=stopping, p2=stopping, p3=last), live=live)
        assert (story.job.status.failure, planned.delete, created(planned)) == (None, (), [])
        (running,) = [item for item in story.body["status"]["conditions"] if item["type"] == "Running"]
        assert "(bot-train-1-3-x7k2p); the others save" in running["message"]
        saved = live.model_copy(update={"checkpoint": CheckpointResult(step=5, uri="s3://w/5")})
        ended = ended_pod(TRAIN, 1, 75, saved)
        planned = story.look([drained], pods(p0=ended, p1=last, p2=last, p3=last))
        status = story.job.status
        assert status.checkpoint is not None
        assert status.checkpoint.step == 5
        assert status.failure is not None
        assert (status.failure.failure_class, status.failure.pod) == (FailureClass.PREEMPTED, "bot-train-1-3-x7k2p")
        assert status.restart_time == format_time(NOW), "there is progress to go on from"

    def test_a_pod_that_was_deleted_before_it_ran_is_not_the_first_one(self, story: Story) -> None:
        words = ("BackoffLimitExceeded", "Job has reached the specified backoff limit")
        ended = {f"p{index}": ended_pod(TRAIN, 1, 75) for index in range(NODES)}
        story.look([child(("FailureTarget", *words), ("Failed", *words))], pods(**ended)[:3])
        failure = story.job.status.failure
        assert failure is not None
        assert (failure.failure_class, failure.pod, failure.node) == (FailureClass.TERMINATED, None, None)


class TestQueue:
    """In a queue the Job outlives pods that are told to stop, and their objects may stay."""

    @pytest.fixture
    def story(self) -> Story:
        started = Story(resources={"nodes": NODES}, scheduling={"queueName": "team-a"}, activeDeadlineSeconds=1000)
        started.prepared()
        return started

    def test_an_eviction_is_one_whatever_stays_of_the_pods(self, story: Story) -> None:
        story.look([child(queue="team-a")], pods(), live=at_work())
        left = pods(**{f"p{index}": ended_pod(TRAIN, 1, 75) for index in range(NODES)})[:2]
        for _ in range(3):
            planned = story.look([child(queue="team-a", suspended=True)], left, after=2000)
            assert planned.status.phase is Phase.QUEUED
            assert story.body["status"]["restarts"]["preemptions"] == 1
        assert story.body["status"]["usage"]["activeSeconds"] == 40, "those of prepare and of train ran for 20 s each"
        # It is admitted again.
        new = [of_node(index, running_pod(TRAIN, since=story.now)) for index in range(NODES)]
        for pod in new:
            pod["metadata"]["name"] += "2"
        planned = story.look([child(queue="team-a")], left + new, live=at_work())
        assert planned.status.phase is Phase.RUNNING
        assert story.condition("Failed") is None
        assert story.body["status"]["restarts"]["preemptions"] == 1

    def test_a_pod_that_is_replaced_takes_the_others_with_it_and_counts_once(self, story: Story) -> None:
        def at(seconds: int, index: int) -> dict[str, Any]:
            pod = of_node(index, running_pod(TRAIN, since=NOW + timedelta(seconds=seconds)))
            pod["metadata"]["name"] += str(seconds)
            return pod

        queued = child(queue="team-a")
        story.look([queued], [at(-20, index) for index in range(NODES)], live=at_work())
        for replaced in range(NODES):
            now = [at(10 * (index + 1) if index <= replaced else -20, index) for index in range(NODES)]
            story.look([queued], now, live=at_work(), after=10)
        assert story.body["status"]["restarts"]["preemptions"] == 1

    def test_an_eviction_of_pods_that_nobody_saw_run(self, story: Story) -> None:
        left = pods(**{f"p{index}": ended_pod(TRAIN, 1, 75, at_work()) for index in range(NODES)})
        for pod in left:
            state = pod["status"]["containerStatuses"][0]["state"]["terminated"]
            state["startedAt"], state["finishedAt"] = (format_time(NOW + timedelta(seconds=s)) for s in (10, 30))
        for _ in range(2):
            story.look([child(queue="team-a", suspended=True)], left, after=30)
        assert story.body["status"]["restarts"]["preemptions"] == 1
        assert story.body["status"]["checkpoint"]["step"] == 4
        assert story.body["status"]["usage"]["activeSeconds"] == 40

    def test_what_was_saved_at_an_eviction_is_known(self, story: Story) -> None:
        story.look([child(queue="team-a")], pods())
        left = pods(**{f"p{index}": ended_pod(TRAIN, 1, 75, at_work()) for index in range(NODES)})
        story.look([child(queue="team-a", suspended=True)], left)
        assert story.body["status"]["checkpoint"]["step"] == 4

    def test_pods_that_lost_each_other_in_an_eviction_cost_nothing(self, story: Story) -> None:
        story.look([child(queue="team-a")], pods(), live=at_work())
        ended = pods(**{f"p{index}": ended_pod(TRAIN, 1, 84) for index in range(NODES)})
        job = failing(0, 84, gone=True)
        job["spec"]["suspend"] = True
        story.look([job], ended)
        assert story.body["status"]["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}
