"""Suspending, clocks, lost nodes, rules and accounts as tables: what is seen, and what follows."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from builders import (
    NOW,
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
    failed,
    report,
    running_pod,
)
from test_plan import document, progress, saved

from finetune_api.failures import FailureClass
from finetune_api.names import Stage
from finetune_api.status import MAX_HISTORY, CheckpointResult, Phase
from finetune_operator.observe import Waiting, Workload, own_jobs, own_pods
from finetune_operator.plan import NODE_LOST_SECONDS
from finetune_operator.resource import format_time, parse_time

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT
PREPARED = complete(PREPARE)
BEGIN = {PREPARE: Story.look, TRAIN: Story.prepared, EXPORT: Story.trained}
STORED = CheckpointResult(step=5, uri="s3://w/c/5")
UNSCHEDULABLE = child_pod(
    TRAIN,
    conditions=[
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/3 nodes are available",
        }
    ],
)


def suspend(story: Story, value: bool = True) -> None:
    story.body["spec"]["suspend"] = value


def running(stage: Stage, attempt: int = 1) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    return [child_job(stage, attempt)], [running_pod(stage, attempt)]


class TestSuspending:
    @pytest.mark.parametrize("stage", list(Stage))
    def test_a_running_attempt_is_told_to_stop_once_the_status_says_so(self, stage: Stage) -> None:
        story = Story()
        BEGIN[stage](story)
        story.look(*running(stage))
        suspend(story)
        notes: list[str] = []
        planned = story.look(*running(stage))
        notes += [note.reason for note in planned.notes]
        assert story.condition("Suspended") == ("False", "Suspending")
        assert deleted(planned) == [f"bot-{stage}-1"]
        # The Job is gone at once, its pod has time to save.
        planned = story.look([], [running_pod(stage, delete_by=NOW)])
        assert story.condition("Suspended") == ("False", "Suspending"), "a pod is left"
        assert planned.status.phase is not Phase.SUSPENDED
        planned = story.look()
        notes += [note.reason for note in planned.notes]
        assert story.condition("Suspended") == ("True", "SuspendedByUser")
        assert planned.status.phase is Phase.SUSPENDED
        assert planned.status.failure is None
        assert planned.status.restarts is not None
        assert (planned.status.restarts.charged, planned.status.restarts.preemptions) == (0, 0)
        assert story.body["status"]["history"][-1]["outcome"] == "Suspended"
        assert story.look(after=10**6).create == (), "suspended is suspended"
        suspend(story, False)
        planned = story.look()
        notes += [note.reason for note in planned.notes]
        assert created(planned)[1] == f"Job/bot-{stage}-2"
        assert story.condition("Suspended") == ("False", "Resumed")
        assert notes == ["Suspending", "SuspendedByUser", "Resumed", "StageStarted"]

    def test_the_next_attempt_may_read_the_checkpoints_of_the_suspended_one(self) -> None:
        story = Story()
        story.prepared()
        story.look(*running(TRAIN), live=saved(TRAIN, 1, 0, 40))
        suspend(story)
        story.look(*running(TRAIN))
        story.look()
        (message,) = [c["message"] for c in story.body["status"]["conditions"] if c["type"] == "Suspended"]
        assert "the checkpoint of step 40 is stored" in message
        suspend(story, False)
        assert document(story.look())["earlierAttempts"] == [1]

    def test_a_job_that_is_created_suspended_has_no_children(self) -> None:
        story = Story(suspend=True)
        planned = story.look()
        assert planned.create == ()
        assert planned.status.phase is Phase.SUSPENDED
        suspend(story, False)
        assert created(story.look())[1] == "Job/bot-prepare-1"

    def test_a_stage_that_ends_while_it_is_told_to_stop_has_ended(self) -> None:
        story = Story()
        story.prepared()
        story.look(*running(TRAIN))
        suspend(story)
        story.look(*running(TRAIN))
        planned = story.look([complete(TRAIN)])
        assert story.condition("Running") == ("False", "Finished")
        assert story.condition("Suspended") == ("True", "SuspendedByUser")
        assert planned.create == ()
        suspend(story, False)
        assert created(story.look())[1] == "Job/bot-export-1"

    def test_a_failure_of_its_own_is_still_one(self) -> None:
        story = Story()
        story.prepared()
        story.look(*running(TRAIN))
        suspend(story)
        story.look(*running(TRAIN))
        story.look([failed(TRAIN, 1, FailureClass.LOSS_DIVERGED)])
        assert story.condition("Failed") == ("True", "LossDiverged")

    @pytest.mark.parametrize("end", [exited(TRAIN, 1, 75), exited(TRAIN, 1, 137), disrupted(TRAIN, 1)])
    def test_how_a_stopped_pod_ends_is_no_failure(self, end: dict[str, Any]) -> None:
        story = Story()
        story.prepared()
        story.look(*running(TRAIN))
        suspend(story)
        story.look(*running(TRAIN))
        planned = story.look([end])
        assert planned.status.phase is Phase.SUSPENDED
        assert planned.status.failure is None

    def test_suspending_in_a_pause_ends_in_no_pause(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 3600})
        story.prepared()
        story.look([exited(TRAIN, 1, 69)])
        suspend(story)
        planned = story.look([exited(TRAIN, 1, 69)])
        assert planned.status.phase is Phase.SUSPENDED
        suspend(story, False)
        planned = story.look([exited(TRAIN, 1, 69)], after=5)
        assert planned.create == (), "the pause goes on where there was one"
        assert planned.status.phase is Phase.RESTARTING
        assert created(story.look([exited(TRAIN, 1, 69)], after=3600))[1] == "Job/bot-train-2"

    def test_a_suspension_that_is_taken_back_in_time_changes_nothing(self) -> None:
        story = Story()
        story.prepared()
        story.look(*running(TRAIN))
        suspend(story)
        story.look(*running(TRAIN))
        suspend(story, False)
        planned = story.look(*running(TRAIN))
        assert deleted(planned) == []
        assert story.condition("Suspended") == ("False", "Resumed")
        story.look([exited(TRAIN, 1, 75)])
        assert story.body["status"]["restarts"]["charged"] == 1, "a stop that nobody asked for"

    def test_suspending_twice(self) -> None:
        story = Story()
        story.prepared()
        for attempt in (1, 2):
            story.look(*running(TRAIN, attempt))
            suspend(story)
            story.look(*running(TRAIN, attempt))
            assert story.look([], [ended_pod(TRAIN, attempt, 75)]).status.phase is Phase.SUSPENDED
            suspend(story, False)
            assert created(story.look())[1] == f"Job/bot-train-{attempt + 1}"
            active = story.body["status"]["usage"]["activeSeconds"]
            assert active == 20 * (attempt + 1), "that of prepare and of each attempt"

    def test_a_child_that_a_queue_keeps_back_is_queued(self) -> None:
        story = Story()
        story.prepared()
        planned = story.look([child_job(TRAIN, suspended=True)])
        assert planned.status.phase is Phase.QUEUED
        assert story.condition("Running") == ("False", "Queued")
        assert planned.delete == ()

    @pytest.mark.parametrize("code", [75, 137, 143])
    def test_a_pod_that_a_queue_took_away_was_preempted(self, code: int) -> None:
        story = Story()
        story.prepared()
        child = exited(TRAIN, 1, code)
        child["spec"]["suspend"] = True
        story.look([child])
        assert story.body["status"]["failure"]["class"] == "Preempted"
        assert story.body["status"]["restarts"]["charged"] == 0


class TestTheNextAttempt:
    """What of an attempt that has ended is not true of the next one."""

    def failed_once(self) -> Story:
        """Train attempt 1 has failed at step 40, and 2 is created."""
        story = Story(failurePolicy={"backoffSeconds": 0})
        story.prepared()
        story.look(*running(TRAIN), live=report(TRAIN, progress=progress(40), resumed_from_step=0))
        assert story.body["status"]["progress"]["eta"] == "2m"
        story.look([exited(TRAIN, 1, 69)], [ended_pod(TRAIN, 1, 69)])
        assert story.body["status"]["attempt"]["number"] == 2
        return story

    def test_it_starts_and_runs_as_the_first_one_did(self) -> None:
        story = self.failed_once()
        assert "restartTime" not in story.body["status"]
        assert story.look([child_job(TRAIN, 2)], [child_pod(TRAIN, 2)]).status.phase is Phase.STARTING
        assert story.look(*running(TRAIN, 2)).status.phase is Phase.RUNNING

    def test_its_speed_is_not_yet_known(self) -> None:
        shown = self.failed_once().body["status"]["progress"]
        assert shown["currentStep"] == 40
        assert not {"stepSeconds", "eta", "estimatedRemainingSeconds"} & shown.keys()

    def test_an_attempt_that_has_ended_has_no_time_left(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 3600})
        story.prepared()
        story.look(*running(TRAIN), live=report(TRAIN, progress=progress(40)))
        story.look([exited(TRAIN, 1, 69)], [ended_pod(TRAIN, 1, 69)])
        assert not {"eta", "estimatedRemainingSeconds"} & story.body["status"]["progress"].keys()

    def test_jobs_that_one_cause_has_ended_do_not_come_back_together(self) -> None:
        def pause(uid: str) -> float:
            story = Story(failurePolicy={"backoffSeconds": 100})
            story.body["metadata"]["uid"] = uid
            story.prepared()
            story.look([exited(TRAIN, 1, 69)])
            return (parse_time(story.body["status"]["restartTime"]) - story.now).total_seconds()

        pauses = [pause(f"{number}") for number in range(20)]
        assert all(80 <= seconds <= 120 for seconds in pauses)
        assert max(pauses) - min(pauses) > 10
        assert pause("7") == pauses[7], "the same for whoever asks again"


class TestHowSoon:
    """Why a job has no pod that runs is shown soon, also when no event tells that there is something to see."""

    REFUSED = 'pods "bot-train-1-0" is forbidden: exceeded quota: gpus'
    MOUNT = 'MountVolume.SetUp failed for volume "rules" : configmap "rules" not found'

    @staticmethod
    def pod(reason: str, message: str = "") -> list[dict[str, Any]]:
        pod = child_pod(TRAIN, state={"waiting": {"reason": reason, "message": message}})
        pod["metadata"]["creationTimestamp"] = format_time(NOW)
        return [pod]

    @pytest.mark.parametrize(
        ("reason", "words", "pods", "warnings", "workload"),
        [
            ("PodsRefused", REFUSED, [], (Waiting("FailedCreate", REFUSED),), None),
            ("ImagePullFailed", "no such image", pod("ErrImagePull", "no such image"), (), None),
            ("ContainerConfigError", 'secret "s3"', pod("CreateContainerConfigError", 'secret "s3"'), (), None),
            ("VolumeNotReady", MOUNT, pod("ContainerCreating"), (Waiting("FailedMount", MOUNT),), None),
            ("Unschedulable", "0/3 nodes", [UNSCHEDULABLE], (), None),
            ("Queued", "no quota", [], (), Workload("job-bot", message="no quota")),
        ],
        ids=["quota", "image", "secret", "volume", "nodes", "queue"],
    )
    def test_a_reason_is_shown_within_15_seconds(
        self,
        reason: str,
        words: str,
        pods: list[dict[str, Any]],
        warnings: tuple[Waiting, ...],
        workload: Workload | None,
    ) -> None:
        story = Story(scheduling={"queueName": "team-a"}) if workload else Story()
        story.look()
        planned = story.look([PREPARED])
        assert created(planned)[1] == "Job/bot-train-1"
        jobs = [child_job(TRAIN, age=0, suspended=workload is not None, queue="team-a" if workload else "")]
        while story.condition("Running") != ("False", reason) or words not in self.message(story):
            assert planned.look_again is not None
            planned = story.look(jobs, pods, after=planned.look_again)
            # What is asked for is read in the same look.
            if planned.needs_events_of is not None:
                planned = story.look(jobs, pods, warnings=warnings)
            if planned.needs_workload_of is not None:
                planned = story.look(jobs, pods, workload=workload)
            assert story.now - NOW <= timedelta(seconds=15)

    @pytest.mark.parametrize("after", [1, 5, 9.9])
    @pytest.mark.parametrize("has_pod", [False, True])
    def test_a_look_in_between_does_not_put_it_off(self, after: float, has_pod: bool) -> None:
        story = Story()
        story.prepared()
        jobs, pods = [child_job(TRAIN, age=0)], self.pod("ContainerCreating") if has_pod else []
        planned = story.look(jobs, pods, after=after)
        while planned.needs_events_of is None:
            planned = story.look(jobs, pods, after=planned.look_again or 0)
        assert story.now - NOW <= timedelta(seconds=15)

    @staticmethod
    def message(story: Story) -> str:
        (message,) = [c["message"] for c in story.body["status"]["conditions"] if c["type"] == "Running"]
        return str(message)


class TestClocks:
    def test_only_active_time_counts(self) -> None:
        """The job is suspended for a day, waits for a day, and has its whole time left."""
        story = Story(activeDeadlineSeconds=3600)
        story.prepared()
        story.look(*running(TRAIN))
        suspend(story)
        story.look(*running(TRAIN), after=580)
        story.look([], [ended_pod(TRAIN, 1, 75)], after=0)
        assert story.body["status"]["usage"]["activeSeconds"] == 40, "20 s of each pod"
        suspend(story, False)
        story.look(after=86_400)
        story.look([child_job(TRAIN, 2)], [child_pod(TRAIN, 2)], after=86_400)
        assert story.condition("Failed") is None

    def test_a_job_over_its_time_fails_and_its_pod_goes(self) -> None:
        story = Story(activeDeadlineSeconds=80)
        story.prepared()
        planned = story.look(*running(TRAIN))
        assert planned.look_again == pytest.approx(5)
        planned = story.look(*running(TRAIN), after=37)
        assert planned.look_again == pytest.approx(3), "not later than it must be"
        planned = story.look(*running(TRAIN), after=3)
        assert story.condition("Failed") == ("True", "DeadlineExceeded")
        assert deleted(planned) == ["bot-train-1"]
        assert "activeDeadlineSeconds" in story.body["status"]["failure"]["message"]
        assert story.body["status"]["usage"]["activeSeconds"] == 80
        assert story.body["status"]["history"][-1]["class"] == "DeadlineExceeded"
        assert story.look().delete == ()

    def test_active_time_adds_up_over_attempts(self) -> None:
        story = Story(activeDeadlineSeconds=70, failurePolicy={"backoffSeconds": 0})
        story.prepared()
        for attempt in (1, 2):
            story.look(*running(TRAIN, attempt))
            story.look([exited(TRAIN, attempt, 69)], [ended_pod(TRAIN, attempt, 69)])
        assert story.body["status"]["usage"]["activeSeconds"] == 60
        story.look(*running(TRAIN, 3))
        assert story.condition("Failed") == ("True", "DeadlineExceeded")

    def test_a_limit_that_is_lowered_in_a_pause_is_kept_at_once(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 3600})
        story.prepared()
        story.look([exited(TRAIN, 1, 69)], [ended_pod(TRAIN, 1, 69)])
        assert story.condition("Failed") is None
        story.body["spec"]["activeDeadlineSeconds"] = 20
        story.look([exited(TRAIN, 1, 69)])
        assert story.condition("Failed") == ("True", "DeadlineExceeded")

    def test_an_operator_that_was_away_counts_until_the_end_of_the_pod(self) -> None:
        story = Story()
        story.prepared()
        story.look(*running(TRAIN))
        story.now += timedelta(hours=5)
        story.look([exited(TRAIN, 1, 69)])
        assert story.body["status"]["usage"]["activeSeconds"] == 40, "the Job's condition says when"

    @pytest.mark.parametrize(
        ("pods", "words"),
        [
            (
                [UNSCHEDULABLE],
                "0/3 nodes are available",
            ),
            ([], "Waiting for the train pod"),
        ],
    )
    def test_a_job_that_waits_too_long_says_for_what(self, pods: list[dict[str, Any]], words: str) -> None:
        story = Story(preRunningDeadlineSeconds=300)
        story.prepared()
        jobs = [child_job(TRAIN, age=0)]
        planned = story.look(jobs, pods, after=295)
        assert planned.look_again == pytest.approx(5)
        planned = story.look(jobs, pods, after=5)
        assert story.condition("Failed") == ("True", "PreRunningDeadlineExceeded")
        assert words in story.body["status"]["failure"]["message"]
        assert deleted(planned) == ["bot-train-1"]

    def test_suspended_time_is_no_waiting(self) -> None:
        story = Story(preRunningDeadlineSeconds=300, suspend=True)
        story.look()
        suspend(story, False)
        planned = story.look(after=86_400)
        assert created(planned)[1] == "Job/bot-prepare-1"
        assert story.condition("Failed") is None

    def test_a_running_job_does_not_wait(self) -> None:
        story = Story(preRunningDeadlineSeconds=300)
        story.prepared()
        story.look(*running(TRAIN), after=86_400)
        assert story.condition("Failed") is None

    def test_a_job_that_is_refused_waits_too(self) -> None:
        story = Story(preRunningDeadlineSeconds=300)
        story.look(create_error="exceeded quota")
        story.look(create_error="exceeded quota", after=300)
        assert story.condition("Failed") == ("True", "PreRunningDeadlineExceeded")
        assert "exceeded quota" in story.body["status"]["failure"]["message"]

    @pytest.mark.parametrize(
        ("changes", "succeeds", "expected"),
        [
            ({}, True, None),
            ({"ttlSecondsAfterFinished": 100}, True, 100),
            ({"ttlSecondsAfterFinished": 100}, False, 100),
            ({"ttlSecondsAfterFailed": 100}, True, None),
            ({"ttlSecondsAfterFinished": 100, "ttlSecondsAfterFailed": 1000}, False, 1000),
            ({"ttlSecondsAfterFinished": 0}, True, 0),
        ],
    )
    def test_a_finished_job_goes_when_it_was_to(
        self, changes: dict[str, Any], succeeds: bool, expected: int | None
    ) -> None:
        story = Story(**changes)
        story.trained()
        planned = story.look([complete(EXPORT) if succeeds else failed(EXPORT, 1, FailureClass.ACCESS_DENIED)])
        if expected is None:
            assert (planned.expired, planned.look_again) == (False, None)
            return
        assert planned.expired is (expected == 0)
        if expected:
            assert planned.look_again == pytest.approx(expected)
            assert not story.look(after=expected - 1).expired
            assert story.look(after=1).expired


def test_a_pod_that_ends_slowly_is_not_written_down_at_each_look() -> None:
    """Its container has ended, and another one in it has not, or its phase comes late."""
    story = Story()
    story.prepared()
    story.look(*running(TRAIN))
    pod = ended_pod(TRAIN, 1, 75)
    pod["status"]["phase"] = "Running"
    writes = 0
    for _ in range(30):
        before = story.body["status"]
        story.look([], [pod], after=1)
        writes += story.body["status"] != before
    assert writes <= 4


class TestLostNodes:
    def test_training_goes_on_elsewhere(self) -> None:
        story = Story()
        story.prepared()
        jobs, pods = [child_job(TRAIN)], [running_pod(TRAIN, delete_by=NOW)]
        story.look(jobs, pods, live=saved(TRAIN, 1, 0, 40))
        assert story.look(jobs, pods, after=1000).delete == (), "whose clock is wrong is not known"
        assert story.look(jobs, pods, after=NODE_LOST_SECONDS).delete == (), "it may just be late"
        planned = story.look(jobs, pods, after=1)
        assert story.body["status"]["failure"]["class"] == "NodeLost"
        assert "node node1" in story.body["status"]["failure"]["message"]
        assert deleted(planned) == ["bot-train-1"], "else it would make another pod one day"
        assert planned.create == ()
        planned = story.look([], pods)
        assert created(planned)[1] == "Job/bot-train-2"
        assert story.body["status"]["restarts"] == {"charged": 0, "preemptions": 1, "outOfMemory": 0}

    def test_a_pod_that_answers_is_not_lost(self) -> None:
        story = Story()
        story.prepared()
        jobs, pods = [child_job(TRAIN)], [running_pod(TRAIN, delete_by=NOW)]
        for _ in range(10):
            alive = frozenset({pods[0]["metadata"]["name"]})
            story.look(jobs, pods, live=saved(TRAIN, 1, 0, 40), alive=alive, after=60)
        assert "failure" not in story.body["status"]
        story.look(jobs, pods, after=1)
        story.look(jobs, pods, after=NODE_LOST_SECONDS)
        assert "failure" not in story.body["status"], "it has been silent for a moment only"
        story.look(jobs, pods, after=1)
        assert story.body["status"]["failure"]["class"] == "NodeLost"

    def test_a_job_that_has_failed_already_does_not_wait_for_the_node(self) -> None:
        story = Story()
        story.prepared()
        jobs, pods = [disrupted(TRAIN, 1, gone=False)], [running_pod(TRAIN, delete_by=NOW)]
        assert story.look(jobs, pods, after=1).delete == ()
        planned = story.look(jobs, pods, after=NODE_LOST_SECONDS + 1)
        assert deleted(planned) == ["bot-train-1"]
        assert created(story.look([], pods))[1] == "Job/bot-train-2"
        assert story.body["status"]["restarts"]["preemptions"] == 1, "one loss, counted once"

    def test_a_suspended_job_does_not_wait_for_the_node(self) -> None:
        story = Story()
        story.prepared()
        story.look(*running(TRAIN))
        suspend(story)
        story.look(*running(TRAIN))
        pods = [running_pod(TRAIN, delete_by=NOW)]
        assert story.look([], pods, after=1).status.phase is not Phase.SUSPENDED
        assert story.look([], pods, after=NODE_LOST_SECONDS + 1).status.phase is Phase.SUSPENDED


class TestOutOfMemory:
    def test_the_micro_batch_is_halved_twice_and_the_batch_stays(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 0}, hyperparameters={"batchSize": 16})
        story.prepared()
        for attempt, limit in ((1, 4), (2, 2)):
            planned = story.look([failed(TRAIN, attempt, FailureClass.OUT_OF_MEMORY_GPU)])
            assert document(planned)["microBatchLimit"] == limit
            assert document(planned)["spec"]["hyperparameters"]["batchSize"] == 16
            assert f"micro-batch of {limit} instead of {2 * limit}" in story.body["status"]["failure"]["message"]
        story.look([failed(TRAIN, 3, FailureClass.OUT_OF_MEMORY_GPU)])
        assert story.condition("Failed") == ("True", "OutOfMemoryGPU")
        assert "halved 2 times" in story.body["status"]["failure"]["message"]

    def test_a_rule_that_says_restart_halves_it_too(self) -> None:
        """Else it would run out of memory in the same way again."""
        rule = {"class": "OutOfMemoryGPU", "action": "Restart"}
        story = Story(failurePolicy={"rules": [rule], "backoffSeconds": 0})
        story.prepared()
        planned = story.look([failed(TRAIN, 1, FailureClass.OUT_OF_MEMORY_GPU)])
        assert document(planned)["microBatchLimit"] == 4

    def test_it_is_remembered_over_other_restarts(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 0})
        story.prepared()
        story.look([failed(TRAIN, 1, FailureClass.OUT_OF_MEMORY_GPU)])
        planned = story.look([exited(TRAIN, 2, 69)])
        assert document(planned)["microBatchLimit"] == 4

    def test_one_row_cannot_be_halved(self) -> None:
        story = Story(hyperparameters={"batchSize": 4, "microBatchSize": 1})
        story.prepared()
        story.look([failed(TRAIN, 1, FailureClass.OUT_OF_MEMORY_GPU)])
        assert story.condition("Failed") == ("True", "OutOfMemoryGPU")
        assert "One row at a time" in story.body["status"]["failure"]["message"]

    def test_odd_shares_are_divided_evenly(self) -> None:
        story = Story(hyperparameters={"batchSize": 9, "microBatchSize": 9}, failurePolicy={"backoffSeconds": 0})
        story.prepared()
        planned = story.look([failed(TRAIN, 1, FailureClass.OUT_OF_MEMORY_GPU)])
        assert document(planned)["microBatchLimit"] == 3


class TestRules:
    def test_the_same_unknown_failure_twice_is_enough(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 0, "maxRestarts": 10})
        story.prepared()
        assert created(story.look([exited(TRAIN, 1, 70)])) != []
        story.look([exited(TRAIN, 2, 70)])
        assert story.condition("Failed") == ("True", "Unknown")
        assert "in the same way" in story.body["status"]["failure"]["message"]

    def test_another_exit_code_is_another_failure(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 0, "maxRestarts": 10})
        story.prepared()
        for attempt, code in ((1, 70), (2, 139), (3, 134)):
            assert created(story.look([exited(TRAIN, attempt, code)])) != []
        assert story.condition("Failed") is None

    def test_preemptions_in_between_do_not_hide_it(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 0, "maxRestarts": 10})
        story.prepared()
        story.look([exited(TRAIN, 1, 70)])
        story.look([disrupted(TRAIN, 2)])
        story.look([exited(TRAIN, 3, 70)])
        assert story.condition("Failed") == ("True", "Unknown")

    @pytest.mark.parametrize(
        ("failure_class", "action", "failed_at_once"),
        [
            (FailureClass.STORAGE_UNAVAILABLE, "Fail", True),
            (FailureClass.NOT_FOUND, "Restart", False),
            (FailureClass.NO_PROGRESS, "Fail", True),
        ],
    )
    def test_a_rule_decides_instead(self, failure_class: FailureClass, action: str, failed_at_once: bool) -> None:
        story = Story(failurePolicy={"rules": [{"class": failure_class, "action": action}]})
        story.prepared()
        story.look([failed(TRAIN, 1, failure_class)])
        assert (story.condition("Failed") is not None) is failed_at_once
        if not failed_at_once:
            assert story.body["status"]["restarts"]["charged"] == 1

    def test_a_preemption_can_be_charged(self) -> None:
        story = Story(failurePolicy={"rules": [{"class": "Preempted", "action": "Restart"}], "maxRestarts": 0})
        story.prepared()
        story.look([disrupted(TRAIN, 1)])
        assert story.condition("Failed") == ("True", "Preempted")

    def test_restarts_are_always_bounded(self) -> None:
        story = Story(failurePolicy={"rules": [{"class": "Unknown", "action": "Restart"}], "backoffSeconds": 0})
        story.prepared()
        for attempt in (1, 2, 3):
            assert created(story.look([exited(TRAIN, attempt, 70)])) != []
        story.look([exited(TRAIN, 4, 70)])
        assert "tried 4 times" in story.body["status"]["failure"]["message"]

    def test_the_limit_of_no_progress_reaches_the_pod(self) -> None:
        story = Story(failurePolicy={"noProgressSeconds": 600})
        assert document(story.look())["stallSeconds"] == 600
        assert document(Story().look())["stallSeconds"] == 1800


class TestAccounts:
    def test_gpu_time_and_what_of_it_was_for_nothing(self) -> None:
        """20 s on 4 GPUs: 5 steps of 2 s reached a checkpoint, 2 more were lost, the rest was loading."""
        story = Story(resources={"gpusPerNode": 4}, failurePolicy={"backoffSeconds": 0})
        story.prepared()
        live = report(TRAIN, resumed_from_step=0, progress=progress(7), checkpoint=STORED)
        story.look(*running(TRAIN), live=live)
        story.look([disrupted(TRAIN, 1)], [ended_pod(TRAIN, 1, 75, live)])
        usage = story.body["status"]["usage"]
        assert (usage["gpuSeconds"], usage["wastedGPUSeconds"]) == (80, 40)
        final = report(TRAIN, 2, resumed_from_step=5, progress=progress(10, 10))
        story.look(*running(TRAIN, 2), live=final)
        story.look([complete(TRAIN, 2)], [ended_pod(TRAIN, 2, 0, final)])
        usage = story.body["status"]["usage"]
        assert (usage["gpuSeconds"], usage["wastedGPUSeconds"]) == (160, 80), "5 steps of 2 s in 20 s"

    def test_cpu_stages_take_no_gpu_time(self) -> None:
        story = Story()
        story.look()
        story.look(*running(PREPARE))
        story.look([complete(PREPARE)], [ended_pod(PREPARE)])
        assert story.body["status"]["usage"] == {"activeSeconds": 20, "gpuSeconds": 0, "wastedGPUSeconds": 0}

    def test_the_last_ten_attempts_are_kept(self) -> None:
        story = Story()
        story.prepared()
        for attempt in range(1, 15):
            story.look([child_job(TRAIN, attempt)], [running_pod(TRAIN, attempt)], live=saved(TRAIN, attempt, 0, 5))
            story.look([disrupted(TRAIN, attempt)])
        history = story.body["status"]["history"]
        assert len(history) == MAX_HISTORY
        assert [entry["number"] for entry in history] == list(range(5, 15))
        assert history[-1] == {
            "stage": "train",
            "number": 14,
            "outcome": "Preempted",
            "class": "Preempted",
            "message": "The cluster took the pod away (preemption, drain, eviction or node loss).",
            "startTime": format_time(NOW - timedelta(seconds=20)),
            "endTime": format_time(NOW),
            "fromStep": 0,
            "pod": "bot-train-14-0-x7k2p",
            "node": "node1",
        }

    def test_the_node_of_a_pod_that_failed_is_kept(self) -> None:
        """Failures that follow each other on one node are those of the node."""
        story = Story(failurePolicy={"backoffSeconds": 0})
        story.prepared()
        story.look(*running(TRAIN))
        story.look([exited(TRAIN, 1, 69)], [ended_pod(TRAIN, 1, 69)])
        past = story.body["status"]["history"][-1]
        assert (past["node"], past["exitCode"], past["pod"]) == ("node1", 69, "bot-train-1-0-x7k2p")

    def test_an_attempt_that_succeeded_is_in_the_history_too(self) -> None:
        story = Story()
        story.look()
        story.look([complete(PREPARE)], [ended_pod(PREPARE)])
        assert [(entry["stage"], entry["outcome"]) for entry in story.body["status"]["history"]] == [
            ("prepare", "Succeeded")
        ]


class TestEndsThatTakeTime:
    """A pod whose Job is gone has its grace, and what it does in it counts."""

    def told_to_stop(self) -> Story:
        story = Story(resources={"gpusPerNode": 4})
        story.prepared()
        story.look(*running(TRAIN), live=saved(TRAIN, 1, 0, 10))
        suspend(story)
        story.look(*running(TRAIN), live=saved(TRAIN, 1, 0, 10), after=580)
        return story

    def test_what_it_saves_in_its_grace_is_known(self) -> None:
        story = self.told_to_stop()
        stopping = [running_pod(TRAIN, delete_by=NOW + timedelta(seconds=700))]
        story.look([], stopping, live=saved(TRAIN, 1, 0, 90), after=30)
        assert story.body["status"]["checkpoint"]["step"] == 90
        assert story.body["status"]["attempt"].get("outcome") is None, "it has not ended"
        story.look()
        (message,) = [c["message"] for c in story.body["status"]["conditions"] if c["type"] == "Suspended"]
        assert "the checkpoint of step 90" in message

    def test_its_time_is_counted_though_nobody_saw_it_end(self) -> None:
        story = self.told_to_stop()
        story.look([], [running_pod(TRAIN, delete_by=NOW + timedelta(seconds=700))], after=20)
        story.look(after=5)
        (past,) = [entry for entry in story.body["status"]["history"] if entry["stage"] == "train"]
        assert past["endTime"] == format_time(NOW + timedelta(seconds=600))
        assert story.body["status"]["usage"]["gpuSeconds"] == 4 * 620

    @pytest.mark.parametrize("stage", [PREPARE, EXPORT])
    def test_time_of_every_stage_is_counted(self, stage: Stage) -> None:
        story = Story()
        BEGIN[stage](story)
        before = (story.body["status"].get("usage") or {}).get("activeSeconds", 0)
        story.look(*running(stage))
        story.look(*running(stage), after=3000)
        suspend(story)
        story.look(*running(stage))
        story.look()
        assert story.body["status"]["usage"]["activeSeconds"] - before == 3020

    def test_a_running_pod_is_written_down_once_a_minute(self) -> None:
        story = Story()
        story.prepared()
        written = []
        for _ in range(60):
            story.look(*running(TRAIN), after=5)
            written.append(story.body["status"]["attempt"].get("seenTime"))
        assert 4 <= len(set(written) - {None}) <= 6

    def test_an_attempt_that_made_no_step_used_its_time_for_nothing(self) -> None:
        """Numbers of the attempt before are not its own."""
        story = Story(resources={"gpusPerNode": 1}, failurePolicy={"backoffSeconds": 0})
        story.prepared()
        live = report(TRAIN, resumed_from_step=0, progress=progress(7), checkpoint=STORED)
        story.look(*running(TRAIN), live=live)
        story.look([disrupted(TRAIN, 1)], [ended_pod(TRAIN, 1, 75, live)])
        before = story.body["status"]["usage"]
        story.look(*running(TRAIN, 2))
        story.look([disrupted(TRAIN, 2)], [ended_pod(TRAIN, 2, 75)])
        usage = story.body["status"]["usage"]
        assert usage["wastedGPUSeconds"] - before["wastedGPUSeconds"] == 20
        assert "toStep" not in story.body["status"]["history"][-1]


class TestOlderOperators:
    """What was stored before an attempt had an outcome, and what an older operator makes of a newer status."""

    def failed_before(self, **status: Any) -> Story:
        story = Story(failurePolicy={"maxRestarts": 1, "backoffSeconds": 0})
        story.prepared()
        story.look([exited(TRAIN, 1, 69, gone=False)])
        for field in ("history", "usage"):
            story.body["status"].pop(field)
        for field in ("outcome", "endTime", "gpus"):
            story.body["status"]["attempt"].pop(field)
        story.body["status"] |= status
        return story

    def test_a_failure_that_was_counted_is_not_counted_again(self) -> None:
        story = self.failed_before()
        planned = story.look([exited(TRAIN, 1, 69)])
        assert story.condition("Failed") is None
        assert created(planned)[1] == "Job/bot-train-2"
        assert story.body["status"]["restarts"]["charged"] == 1

    def test_an_outcome_that_an_older_operator_left_is_not_the_next_attempts(self) -> None:
        """It merges its own fields into the attempt, and leaves the others."""
        story = Story(failurePolicy={"backoffSeconds": 0})
        story.prepared()
        story.look([exited(TRAIN, 1, 69)])
        left = {"outcome": "Failed", "endTime": format_time(NOW)}
        story.body["status"]["attempt"] = {"stage": "train", "number": 2, "jobName": "bot-train-2", **left}
        planned = story.look([exited(TRAIN, 1, 69), complete(TRAIN, 2)])
        assert created(planned)[1] == "Job/bot-export-1"
        assert story.body["status"]["trainedAttempt"] == 2

    def test_gpus_of_an_attempt_that_did_not_say_are_those_of_the_spec(self) -> None:
        story = Story(resources={"gpusPerNode": 4}, hyperparameters={"batchSize": 16})
        story.prepared()
        story.body["status"]["attempt"].pop("gpus")
        story.look(*running(TRAIN))
        story.look([failed(TRAIN, 1, FailureClass.OUT_OF_MEMORY_GPU)], [ended_pod(TRAIN, 1, 80)])
        assert story.body["status"]["usage"]["gpuSeconds"] == 80
        assert story.body["status"]["microBatchLimit"] == 2

    def test_the_longest_message_of_any_version_can_be_read(self) -> None:
        story = Story()
        story.prepared()
        story.body["status"]["conditions"][0]["message"] = "x" * 1024
        assert story.job.status_problem == ""


class TestWhoseItIs:
    def test_a_condition_of_an_earlier_attempt_says_nothing_of_the_next(self) -> None:
        """Suspended, resumed, and the operator died after it had created the next attempt."""
        story = Story()
        story.prepared()
        story.look(*running(TRAIN))
        suspend(story)
        story.look(*running(TRAIN))
        story.look([], [running_pod(TRAIN, delete_by=NOW + timedelta(seconds=60))])
        suspend(story, False)
        story.look([exited(TRAIN, 2, 137)])
        assert story.body["status"]["failure"]["class"] == "Killed"
        assert story.body["status"]["restarts"]["charged"] == 1

    def test_a_copy_of_a_child_is_not_one(self) -> None:
        child = child_job(TRAIN)
        child["metadata"]["ownerReferences"] = [{"uid": UID}]
        copy = child_job(TRAIN, 2)
        copy["metadata"]["name"] = "my-debug-copy"
        renamed = child_job(TRAIN, 2)
        renamed["metadata"] |= {"name": "my-debug-copy", "ownerReferences": [{"uid": UID}]}
        assert own_jobs([copy, renamed, child], "bot", UID) == [child]
        pod = running_pod(TRAIN)
        pod["metadata"]["ownerReferences"] = [{"kind": "Job", "name": "bot-train-1", "uid": "gone"}]
        stray = running_pod(TRAIN)
        stray["metadata"]["ownerReferences"] = [{"kind": "Job", "name": "my-debug-copy", "uid": "x"}]
        assert own_pods([running_pod(TRAIN), stray, pod], "bot") == [pod]

    def test_a_document_is_named_by_its_content(self) -> None:
        """One that was left by a creation that failed half-way is not given to a Job of another content."""

        def named(story: Story) -> tuple[str, str]:
            config_map, job = story.look().create
            (volume,) = [v for v in job["spec"]["template"]["spec"]["volumes"] if v["name"] == "document"]
            return config_map["metadata"]["name"], volume["configMap"]["name"]

        first, second = named(Story()), named(Story(resources={"gpusPerNode": 4}))
        assert first[0] == first[1] != second[0]
        assert first == named(Story())


class TestMessages:
    def test_a_refusal_of_any_length_is_an_end(self) -> None:
        story = Story()
        story.look(create_error="x" * 5000, create_invalid=True)
        assert story.condition("Failed") == ("True", "UserError")
        assert len(story.body["status"]["failure"]["message"]) == 2048

    @pytest.mark.parametrize("named", ["Killed", "OutOfMemoryHost"])
    def test_a_kill_is_ruled_by_both_of_its_names(self, named: str) -> None:
        story = Story(failurePolicy={"rules": [{"class": named, "action": "Fail"}]})
        story.prepared()
        story.look([exited(TRAIN, 1, 137)], [ended_pod(TRAIN, 1, 137, reason="OOMKilled")])
        assert story.condition("Failed") == ("True", "OutOfMemoryHost")
