"""The life of a job as tables: what is seen, and what follows."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from builders import (
    NOW,
    SETTINGS,
    Story,
    child_job,
    child_pod,
    complete,
    created,
    deleted_while_pending,
    disrupted,
    ended_pod,
    exited,
    failed,
    failure_report,
    job_body,
    observe,
    report,
    running_pod,
)

from finetune_api.failures import RULES, Disposition, FailureClass, disposition_of
from finetune_api.names import DOCUMENT_FILE, Stage
from finetune_api.report import Outcome, Report, StepProgress
from finetune_api.status import (
    ArtifactResult,
    CheckpointResult,
    EvaluationResult,
    Measurement,
    Phase,
    Resolved,
    Verification,
)
from finetune_operator.config import Settings
from finetune_operator.observe import Conflict, Waiting, read_warnings
from finetune_operator.plan import plan
from finetune_operator.resource import FineTuneJob, format_time

PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT


def document(planned: Any) -> dict[str, Any]:
    (config_map,) = [item for item in planned.create if item["kind"] == "ConfigMap"]
    loaded: dict[str, Any] = json.loads(config_map["data"][DOCUMENT_FILE])
    return loaded


def saved(stage: Stage, attempt: int, resumed_from: int, step: int) -> Report:
    """The report of an attempt that has stored a checkpoint."""
    checkpoint = CheckpointResult(step=step, uri=f"s3://w/train/{attempt}/checkpoints/{step}")
    return report(stage, attempt, resumed_from_step=resumed_from, checkpoint=checkpoint)


def progress(step: int, total: int = 100, **fields: Any) -> StepProgress:
    return StepProgress(step=step, total_steps=total, step_seconds=2.0, **fields)


class TestTheStraightWay:
    def test_a_new_job_is_prepared_first(self) -> None:
        planned = Story().look()
        assert created(planned) == ["ConfigMap/bot-prepare-1", "Job/bot-prepare-1"]
        assert planned.status.phase is Phase.PENDING
        assert planned.status.observed_generation == 3

    def test_the_stages_follow_each_other_without_a_look_in_between(self) -> None:
        story = Story()
        story.look()
        planned = story.look([complete(PREPARE)], [ended_pod(PREPARE)])
        assert story.condition("Validated") == ("True", "Validated")
        assert created(planned) == ["ConfigMap/bot-train-1", "Job/bot-train-1"]
        planned = story.look([complete(PREPARE), complete(TRAIN)])
        assert story.condition("Running") == ("False", "Finished")
        assert created(planned) == ["ConfigMap/bot-export-1", "Job/bot-export-1"]
        assert document(planned)["earlierAttempts"] == [1]
        planned = story.look([complete(PREPARE), complete(TRAIN), complete(EXPORT)])
        assert created(planned) == []
        assert planned.status.phase is Phase.SUCCEEDED
        assert story.condition("Complete") == ("True", "TrainingComplete")
        assert story.condition("Exported") == ("True", "Published")
        assert planned.status.completion_time == format_time(story.now)

    @pytest.mark.parametrize(
        ("stage", "pod", "phase"),
        [
            (PREPARE, None, Phase.PENDING),
            (PREPARE, running_pod(PREPARE), Phase.PREPARING),
            (PREPARE, ended_pod(PREPARE), Phase.PREPARING),
            (TRAIN, child_pod(TRAIN), Phase.STARTING),
            (TRAIN, running_pod(TRAIN), Phase.RUNNING),
            (EXPORT, None, Phase.EXPORTING),
            (EXPORT, running_pod(EXPORT), Phase.EXPORTING),
        ],
    )
    def test_phases(self, stage: Stage, pod: dict[str, Any] | None, phase: Phase) -> None:
        story = Story()
        {PREPARE: story.look, TRAIN: story.prepared, EXPORT: story.trained}[stage]()
        planned = story.look([child_job(stage, age=1)], [pod] if pod else [])
        assert planned.status.phase is phase
        assert planned.create == ()

    def test_what_the_stages_report_is_in_the_status(self) -> None:
        story = Story()
        story.look()
        prepared = report(PREPARE, resolved=Resolved(total_steps=40, learning_rate="2e-4", weight_bytes=10**9))
        story.look([complete(PREPARE)], [ended_pod(PREPARE, report=prepared)])
        loss = Measurement(loss="0.5", perplexity="1.649", tokens=10)
        trained = report(
            TRAIN,
            progress=progress(100),
            resolved=Resolved(precision="BF16"),
            evaluation=EvaluationResult(tuned=loss),
            checkpoint=CheckpointResult(step=100, uri="s3://w/c", time=format_time(NOW)),
            resumed_from_step=0,
        )
        story.look([complete(TRAIN)], [ended_pod(TRAIN, report=trained)])
        exported = report(
            EXPORT,
            artifacts=[ArtifactResult(name="Merged", uri="s3://models/tuned")],
            verification=Verification(mean_kl="1e-8", max_kl="1e-7", positions=128),
        )
        status = story.look([complete(EXPORT)], [ended_pod(EXPORT, report=exported)]).status
        reported = Resolved(total_steps=40, learning_rate="2e-4", weight_bytes=10**9, precision="BF16").to_json_dict()
        assert status.resolved is not None
        assert reported.items() <= status.resolved.to_json_dict().items(), "later stages add, and take nothing away"
        assert status.evaluation == EvaluationResult(tuned=loss)
        assert status.progress is not None
        assert status.progress.percent == "100%"
        assert status.artifacts[0].uri == "s3://models/tuned"
        assert status.verification is not None
        assert status.checkpoint == trained.checkpoint
        assert story.condition("Checkpointed") == ("True", "CheckpointSaved")

    def test_a_job_whose_pods_are_long_gone_still_comes_to_its_end(self) -> None:
        """Classification and progress from Job conditions alone: no pod, no report, at any stage."""
        story = Story()
        story.look()
        story.look([complete(PREPARE)])
        story.look([complete(PREPARE), complete(TRAIN)])
        story.look([complete(PREPARE), complete(TRAIN), complete(EXPORT)])
        assert story.condition("Complete") == ("True", "TrainingComplete")

    def test_an_operator_that_was_away_all_the_time_goes_on_from_the_children_it_finds(self) -> None:
        """The operator died after it had created the Job and before it could write the status."""
        story = Story()
        planned = story.look([child_job(PREPARE)], [running_pod(PREPARE)])
        assert planned.create == ()
        assert planned.status.attempt is not None
        assert planned.status.attempt.job_name == "bot-prepare-1"

    def test_the_same_observation_gives_the_same_plan(self) -> None:
        story = Story()
        story.prepared()
        jobs, pods = [complete(PREPARE), child_job(TRAIN)], [running_pod(TRAIN)]
        first = story.look(jobs, pods, live=report(TRAIN, progress=progress(3)))
        second = story.look(jobs, pods, live=report(TRAIN, progress=progress(3)))
        assert first.status == second.status
        assert second.notes == ()

    def test_a_result_that_is_published_already_needs_no_training(self) -> None:
        story = Story()
        story.look()
        found = report(PREPARE, already_published=True, artifacts=[ArtifactResult(name="Merged", uri="s3://m/t")])
        planned = story.look([complete(PREPARE)], [ended_pod(PREPARE, report=found)])
        assert planned.create == ()
        assert planned.status.phase is Phase.SUCCEEDED
        assert story.condition("Complete") == ("True", "AlreadyPublished")
        assert planned.status.artifacts[0].name == "Merged"


class TestTheEnd:
    @pytest.mark.parametrize("end", ["Complete", "Failed"])
    def test_nothing_changes_any_more(self, end: str) -> None:
        status = {
            "conditions": [
                {
                    "type": end,
                    "status": "True",
                    "reason": "Done",
                    "message": "",
                    "observedGeneration": 3,
                    "lastTransitionTime": format_time(NOW),
                }
            ],
            "phase": "Succeeded" if end == "Complete" else "Failed",
        }
        job = FineTuneJob.parse(job_body(status))
        for jobs in ([], [child_job(TRAIN)], [failed(TRAIN, 1, FailureClass.UNKNOWN)]):
            planned = plan(job, observe(jobs), SETTINGS, NOW + timedelta(days=1))
            assert planned.create == ()
            assert planned.notes == ()
            assert planned.status.conditions == job.status.conditions
            assert planned.look_again is None

    def test_a_job_that_is_being_deleted_gets_no_children(self) -> None:
        planned = plan(FineTuneJob.parse(job_body(deleting=True)), observe(), SETTINGS, NOW)
        assert planned.create == ()


class TestFailures:
    @pytest.mark.parametrize("failure_class", [name for name, rule in RULES.items() if rule.exit_code is not None])
    @pytest.mark.parametrize("stage", list(Stage))
    def test_each_class_has_its_consequence_from_the_exit_code_alone(
        self, stage: Stage, failure_class: FailureClass
    ) -> None:
        story = Story()
        {PREPARE: story.look, TRAIN: story.prepared, EXPORT: story.trained}[stage]()
        planned = story.look([failed(stage, 1, failure_class)])
        failure = planned.status.failure
        assert failure is not None
        assert (failure.failure_class, failure.stage, failure.attempt) == (failure_class, stage, 1)
        assert failure.exit_code == RULES[failure_class].exit_code
        assert failure.pod == f"bot-{stage}-1-0-x7k2p"
        assert failure.message.startswith(RULES[failure_class].sentence)
        if disposition_of(failure_class) is Disposition.FAIL:
            assert failure.disposition == "Terminal"
            assert planned.status.phase is Phase.FAILED
            assert story.condition("Failed") == ("True", failure_class)
        else:
            assert failure.disposition == "WillRestart"
            assert planned.status.phase is Phase.RESTARTING
            assert planned.status.restarts is not None
            assert planned.status.restarts.charged == 1
        assert planned.create == ()

    def test_the_report_says_it_better_than_the_class(self) -> None:
        story = Story()
        story.look()
        said = failure_report(PREPARE, 1, FailureClass.DATA_ERROR, "train.jsonl row 7: not JSON.", log_uri="s3://w/log")
        story.look([failed(PREPARE, 1, FailureClass.DATA_ERROR)], [ended_pod(PREPARE, 1, 65, said)])
        failure = story.body["status"]["failure"]
        assert failure["message"] == "train.jsonl row 7: not JSON."
        assert failure["logTail"] == "last words"
        assert failure["logURI"] == "s3://w/log"
        assert failure["node"] == "node1"
        assert failure["rank"] == 0

    def test_a_report_never_changes_what_happens(self) -> None:
        """A pod that claims to be preempted while its exit code says bad data fails all the same."""
        story = Story()
        story.look()
        lie = failure_report(PREPARE, 1, FailureClass.PREEMPTED, "I was preempted.")
        story.look([failed(PREPARE, 1, FailureClass.DATA_ERROR)], [ended_pod(PREPARE, 1, 65, lie)])
        assert story.condition("Failed") == ("True", "DataError")

    def test_a_disruption_is_free_and_starts_again_at_once(self) -> None:
        story = Story()
        story.prepared()
        story.look([complete(PREPARE), child_job(TRAIN)], [running_pod(TRAIN)], live=saved(TRAIN, 1, 0, 40))
        planned = story.look([complete(PREPARE), disrupted(TRAIN, 1)])
        assert created(planned) == ["ConfigMap/bot-train-2", "Job/bot-train-2"]
        assert planned.status.restarts is not None
        assert (planned.status.restarts.charged, planned.status.restarts.preemptions) == (0, 1)
        assert document(planned)["earlierAttempts"] == [1]

    def test_a_disruption_before_anything_was_saved_is_free_but_not_at_once(self) -> None:
        """A pod that is evicted for the disk that it fills would be evicted again and again."""
        story = Story(failurePolicy={"backoffSeconds": 10})
        story.prepared()
        live = saved(TRAIN, 1, 0, 40)
        story.look([complete(PREPARE), child_job(TRAIN)], [running_pod(TRAIN)], live=live)
        story.look([complete(PREPARE), disrupted(TRAIN, 1)])
        for attempt, pause in ((2, 20), (3, 40)):
            resumed = report(TRAIN, attempt, resumed_from_step=40)
            jobs = [complete(PREPARE), child_job(TRAIN, attempt)]
            story.look(jobs, [running_pod(TRAIN, attempt)], live=resumed)
            planned = story.look([complete(PREPARE), disrupted(TRAIN, attempt)])
            assert planned.create == ()
            assert planned.look_again == pytest.approx(pause, rel=0.2)
            planned = story.look([complete(PREPARE), disrupted(TRAIN, attempt)], after=planned.look_again)
            assert created(planned)[1] == f"Job/bot-train-{attempt + 1}"
        assert story.body["status"]["restarts"] == {"charged": 0, "preemptions": 3, "outOfMemory": 0}

    def test_a_hundred_disruptions_are_free(self) -> None:
        story = Story()
        story.prepared()
        for attempt in range(1, 101):
            live = saved(TRAIN, attempt, 10 * (attempt - 1), 10 * attempt)
            story.look([complete(PREPARE), child_job(TRAIN, attempt)], [running_pod(TRAIN, attempt)], live=live)
            story.look([complete(PREPARE), disrupted(TRAIN, attempt)])
        assert story.condition("Failed") is None
        assert story.body["status"]["restarts"] == {"charged": 0, "preemptions": 100, "outOfMemory": 0}
        assert story.body["status"]["attempt"]["number"] == 101

    def test_a_pod_that_was_deleted_before_it_ran_is_charged(self) -> None:
        story = Story()
        story.prepared()
        story.look([complete(PREPARE), deleted_while_pending(TRAIN, 1)])
        assert story.body["status"]["failure"]["class"] == "Terminated"
        assert story.body["status"]["restarts"]["charged"] == 1

    def test_a_job_that_somebody_deleted_is_charged_and_started_again_when_its_pods_are_gone(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 0})
        story.prepared()
        planned = story.look([complete(PREPARE), child_job(TRAIN, deleting=True)], [running_pod(TRAIN)])
        assert planned.create == ()
        planned = story.look([complete(PREPARE)], [running_pod(TRAIN)])
        assert planned.create == (), "its pod still runs"
        planned = story.look([complete(PREPARE)])
        assert created(planned) == ["ConfigMap/bot-train-2", "Job/bot-train-2"]
        assert story.body["status"]["restarts"]["charged"] == 1

    def test_the_pause_doubles_and_the_next_attempt_waits_for_it(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 10, "maxRestarts": 3})
        story.prepared()
        for attempt, pause in ((1, 10), (2, 20), (3, 40)):
            jobs = [complete(PREPARE), exited(TRAIN, attempt, 69)]
            planned = story.look(jobs)
            assert planned.create == ()
            assert planned.look_again == pytest.approx(pause, rel=0.2)
            assert story.look(jobs, after=planned.look_again - 1).create == ()
            planned = story.look(jobs, after=1)
            assert created(planned)[1] == f"Job/bot-train-{attempt + 1}"
        planned = story.look([complete(PREPARE), exited(TRAIN, 4, 69)])
        assert story.condition("Failed") == ("True", "StorageUnavailable")
        assert "tried 4 times (failurePolicy.maxRestarts: 3)" in story.body["status"]["failure"]["message"]

    @pytest.mark.parametrize("ended", [disrupted(TRAIN, 1), exited(TRAIN, 1, 70), complete(TRAIN)])
    def test_what_a_look_decides_is_in_the_status_before_the_next_attempt_or_stage_exists(
        self, ended: dict[str, Any]
    ) -> None:
        """An operator that dies between the two would otherwise not have counted a restart."""
        story = Story(failurePolicy={"backoffSeconds": 0})
        story.prepared()
        decided = plan(story.job, observe([complete(PREPARE), ended]), SETTINGS, story.now)
        assert decided.create == ()
        assert decided.look_again == 0.0
        assert story.look([complete(PREPARE), ended]).create != ()

    def test_a_failure_is_counted_once_however_often_it_is_seen(self) -> None:
        story = Story()
        story.prepared()
        for _ in range(5):
            story.look([complete(PREPARE), exited(TRAIN, 1, 70)])
        assert story.body["status"]["restarts"]["charged"] == 1

    def test_restarts_of_all_stages_are_counted_together(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 0, "maxRestarts": 1})
        story.look()
        story.look([exited(PREPARE, 1, 69)])
        story.look([complete(PREPARE, 2)])
        story.look([complete(PREPARE, 2), exited(TRAIN, 1, 69)])
        assert story.condition("Failed") == ("True", "StorageUnavailable")

    def test_the_next_attempt_waits_until_the_pods_of_the_last_one_are_gone(self) -> None:
        """FailureTarget decides, Failed means that the pods are gone: never two train Jobs at once."""
        story = Story(failurePolicy={"backoffSeconds": 0})
        story.prepared()
        planned = story.look([complete(PREPARE), disrupted(TRAIN, 1, gone=False)])
        assert story.body["status"]["failure"]["class"] == "Preempted"
        assert planned.create == ()
        planned = story.look([complete(PREPARE), disrupted(TRAIN, 1)])
        assert created(planned)[1] == "Job/bot-train-2"

    def test_out_of_memory_is_told_from_other_kills_when_the_pod_is_there(self) -> None:
        story = Story()
        story.prepared()
        story.look([exited(TRAIN, 1, 137)], [ended_pod(TRAIN, 1, 137, reason="OOMKilled")])
        assert story.body["status"]["failure"]["class"] == "OutOfMemoryHost"
        assert disposition_of(FailureClass.OUT_OF_MEMORY_HOST) is disposition_of(FailureClass.KILLED)

    def test_how_a_pod_ended_is_known_when_it_is_gone(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 0})
        story.prepared()
        story.look([exited(TRAIN, 1, 137)], [ended_pod(TRAIN, 1, 137, reason="OOMKilled")])
        story.look([exited(TRAIN, 1, 137), child_job(TRAIN, 2)], after=3600)
        failure, last = story.body["status"]["failure"], story.body["status"]["history"][-1]
        for said in (failure, last):
            assert (said["class"], said["exitCode"], said["node"]) == ("OutOfMemoryHost", 137, "node1")

    def test_a_job_whose_pods_die_one_after_the_other_does_not_run(self) -> None:
        """It runs while a pod does, and not because its Job is there."""
        story = Story(failurePolicy={"backoffSeconds": 60})
        story.prepared()
        for attempt in (1, 2):
            child = child_job(TRAIN, attempt)
            story.look([child], [child_pod(TRAIN, attempt)])
            assert story.condition("Running") == ("False", "WaitingForPod")
            story.look([child], [running_pod(TRAIN, attempt)])
            assert story.condition("Running") == ("True", "Training")
            story.look([exited(TRAIN, attempt, 137)], [ended_pod(TRAIN, attempt, 137)])
            assert story.condition("Running") == ("False", "Restarting")
            story.look([exited(TRAIN, attempt, 137)], after=3600)
            assert story.condition("Running") == ("False", "WaitingForPod")

    def test_the_attempt_after_a_failure_succeeds_and_the_failure_is_forgotten(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 0})
        story.prepared()
        story.look([exited(TRAIN, 1, 137)])
        story.look([child_job(TRAIN, 2)], [running_pod(TRAIN, 2)])
        assert story.condition("Failed") is None, "a failure that is mended is never a condition"
        story.look([complete(TRAIN, 2)])
        planned = story.look([complete(EXPORT)])
        assert planned.status.failure is None
        assert planned.status.restarts is not None
        assert planned.status.restarts.charged == 1

    def test_a_failed_export_never_trains_again(self) -> None:
        story = Story(failurePolicy={"backoffSeconds": 0})
        story.trained()
        planned = story.look([complete(TRAIN), exited(EXPORT, 1, 69)])
        assert created(planned) == ["ConfigMap/bot-export-2", "Job/bot-export-2"]
        assert document(planned)["earlierAttempts"] == [1], "the attempt that was trained"


class TestProgress:
    def test_it_is_written_at_most_every_ten_seconds(self) -> None:
        story = Story()
        story.prepared()
        seen = [child_job(TRAIN)], [running_pod(TRAIN)]
        story.look(*seen, live=report(TRAIN, progress=progress(1)))
        story.look(*seen, live=report(TRAIN, progress=progress(2)), after=5)
        assert story.body["status"]["progress"]["currentStep"] == 1
        story.look(*seen, live=report(TRAIN, progress=progress(3)), after=5)
        assert story.body["status"]["progress"]["currentStep"] == 3

    def test_the_eta_comes_from_the_speed_of_this_attempt(self) -> None:
        story = Story()
        story.prepared()
        live = report(TRAIN, progress=progress(40, loss=1.23456, learning_rate=2e-4), resumed_from_step=39)
        status = story.look([child_job(TRAIN)], [running_pod(TRAIN)], live=live).status
        assert status.progress is not None
        assert status.progress.percent == "40%"
        assert status.progress.eta == "2m"
        assert status.progress.estimated_remaining_seconds == 120
        assert status.progress.loss == "1.2346"
        assert status.attempt is not None
        assert status.attempt.resumed_from_step == 39

    def test_training_that_was_stopped_is_not_done(self) -> None:
        story = Story()
        story.prepared()
        stopped = report(TRAIN, outcome=Outcome.FAILED, progress=progress(40))
        story.look([exited(TRAIN, 1, 75)], [ended_pod(TRAIN, 1, 75, stopped)])
        assert story.body["status"]["progress"]["percent"] == "40%"

    def test_words_of_another_attempt_or_job_do_not_count(self) -> None:
        story = Story()
        story.prepared()
        for live in (
            report(TRAIN, attempt=2, progress=progress(9)),
            report(TRAIN, progress=progress(9)).model_copy(update={"job_uid": "another"}),
            report(PREPARE, progress=progress(9)),
        ):
            story.look([child_job(TRAIN)], [running_pod(TRAIN)], live=live)
            assert "progress" not in story.body["status"]

    def test_a_pod_that_cannot_be_reached_is_no_failure(self) -> None:
        story = Story()
        story.prepared()
        seen = [child_job(TRAIN)], [running_pod(TRAIN)]
        for _ in range(100):
            planned = story.look(*seen, after=60, unreachable="TimeoutError", silent_seconds=60)
        assert story.condition("ProgressAvailable") == ("False", "Unreachable")
        assert planned.notes == (), "said once"
        assert story.condition("Running") == ("True", "Training")
        story.look(*seen, live=report(TRAIN, progress=progress(1)))
        assert story.condition("ProgressAvailable") == ("True", "ProgressReceived")
        story.look(*seen, after=3600, unreachable="TimeoutError", silent_seconds=5)
        assert story.condition("ProgressAvailable") == ("True", "ProgressReceived"), "once is no trouble"
        planned = story.look(*seen, after=30, unreachable="TimeoutError", silent_seconds=35)
        assert [(note.reason, note.warning) for note in planned.notes] == [("Unreachable", True)]

    def test_nothing_that_a_running_pod_says_is_written_more_often(self) -> None:
        """Each write is an event, which makes the operator look again."""
        story = Story()
        story.prepared()
        writes = set()
        for second in range(60):
            live = report(
                TRAIN,
                phase=("Training", "Saving")[second % 2],
                progress=progress(second // 2 + 1),
                checkpoint=CheckpointResult(step=second + 1, uri=f"s3://w/{second}"),
                checkpoint_failures=second,
                resumed_from_step=0,
            )
            story.look([child_job(TRAIN)], [running_pod(TRAIN)], after=1, live=live)
            writes.add(json.dumps(story.body["status"], sort_keys=True))
        assert len(writes) <= 7
        assert story.body["status"]["checkpoint"]["step"] > 50

    def test_it_does_not_go_back_within_an_attempt(self) -> None:
        """Last words may be older than those that were heard before."""
        story = Story()
        story.prepared()
        story.look([child_job(TRAIN)], [running_pod(TRAIN)], live=report(TRAIN, progress=progress(95)))
        story.look([child_job(TRAIN)], [running_pod(TRAIN)], after=60, live=report(TRAIN, progress=progress(90)))
        assert story.body["status"]["progress"]["currentStep"] == 95
        last = report(TRAIN, progress=progress(80), resumed_from_step=10)
        story.look([exited(TRAIN, 1, 137)], [ended_pod(TRAIN, 1, 137, last)])
        assert story.body["status"]["progress"]["currentStep"] == 95
        assert story.body["status"]["history"][-1]["toStep"] == 95
        story.look([exited(TRAIN, 1, 137)], after=600)
        jobs = [exited(TRAIN, 1, 137), child_job(TRAIN, 2)]
        story.look(jobs, [running_pod(TRAIN, 2)], live=report(TRAIN, 2, progress=progress(80)))
        assert (story.body["status"]["progress"]["currentStep"], story.body["status"]["progress"]["attempt"]) == (80, 2)

    def test_checkpoints_that_cannot_be_stored_are_told(self) -> None:
        story = Story()
        story.prepared()
        seen = [child_job(TRAIN)], [running_pod(TRAIN)]
        story.look(*seen, live=report(TRAIN, progress=progress(1)))
        planned = story.look(*seen, after=10, live=report(TRAIN, progress=progress(20), checkpoint_failures=2))
        (note,) = planned.notes
        assert (note.reason, note.warning) == ("CheckpointFailed", True)
        assert "A checkpoint of train attempt 1 could not be stored" in note.message
        assert story.body["status"]["attempt"]["checkpointFailures"] == 2
        planned = story.look(*seen, after=10, live=report(TRAIN, progress=progress(30), checkpoint_failures=3))
        assert planned.notes == ()
        assert story.body["status"]["attempt"]["checkpointFailures"] == 3

    def test_checkpoints_that_take_longer_than_a_stopped_pod_has(self) -> None:
        story = Story(checkpoint={"gracePeriodSeconds": 60})
        story.prepared()
        seen = [child_job(TRAIN)], [running_pod(TRAIN)]
        told = []
        for step, seconds in ((10, "59.9"), (20, "61.0"), (30, "59.0"), (40, "61.0"), (50, "5.0")):
            saved = CheckpointResult(step=step, uri="s3://w", save_seconds=seconds)
            planned = story.look(*seen, after=10, live=report(TRAIN, progress=progress(step), checkpoint=saved))
            told += [(note.reason, note.warning) for note in planned.notes if note.reason.startswith("Checkpoint")]
        assert told == [("CheckpointSaved", False), ("CheckpointSlow", True), ("CheckpointSaved", False)]

    def test_the_first_step_is_an_event_once(self) -> None:
        story = Story()
        story.prepared()
        seen = [child_job(TRAIN)], [running_pod(TRAIN)]
        story.look(*seen, live=report(TRAIN, progress=progress(0)))
        reasons = []
        for step in (1, 2, 3):
            planned = story.look(*seen, live=report(TRAIN, progress=progress(step)), after=10)
            reasons += [note.reason for note in planned.notes]
        assert reasons == ["FirstStep"]


class TestWaiting:
    @pytest.mark.parametrize(
        ("pod", "reason", "words"),
        [
            (
                child_pod(
                    TRAIN,
                    state={"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s3" not found'}},
                ),
                "ContainerConfigError",
                'secret "s3" not found',
            ),
            (
                child_pod(
                    TRAIN, state={"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
                ),
                "ImagePullFailed",
                "pull secrets",
            ),
            (
                child_pod(
                    TRAIN,
                    conditions=[
                        {
                            "type": "PodScheduled",
                            "status": "False",
                            "reason": "Unschedulable",
                            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
                        }
                    ],
                ),
                "Unschedulable",
                "Insufficient nvidia.com/gpu",
            ),
            (
                child_pod(
                    TRAIN,
                    conditions=[
                        {
                            "type": "PodScheduled",
                            "status": "False",
                            "reason": "Unschedulable",
                            "message": '0/3 nodes are available: persistentvolumeclaim "models" not found.',
                        }
                    ],
                ),
                "VolumeNotReady",
                "Create what is missing",
            ),
            (
                child_pod(TRAIN, state={"waiting": {"reason": "ContainerCreating"}}),
                "WaitingForPod",
                "ContainerCreating",
            ),
        ],
    )
    def test_why_a_pod_does_not_start_is_said(self, pod: dict[str, Any], reason: str, words: str) -> None:
        story = Story()
        story.prepared()
        planned = story.look([child_job(TRAIN)], [pod])
        assert story.condition("Running") == ("False", reason)
        (running,) = [c for c in planned.status.conditions if c.type == "Running"]
        assert words in running.message
        assert planned.look_again is not None

    def test_a_job_that_gets_no_pods_is_asked_why(self) -> None:
        story = Story()
        story.prepared()
        planned = story.look([child_job(TRAIN, age=3)])
        assert (planned.needs_events_of, planned.look_again) == (None, 7)
        assert story.look([child_job(TRAIN, age=11)]).needs_events_of == ("Job", "bot-train-1")
        planned = story.look([child_job(TRAIN, age=11)], warnings=(Waiting("FailedCreate", "exceeded quota: gpus"),))
        assert story.condition("Running") == ("False", "PodsRefused")
        assert "exceeded quota: gpus" in planned.status.conditions[1].message

    def test_a_pod_that_waits_for_its_volumes_is_asked_why(self) -> None:
        story = Story()
        story.prepared()
        pods = [child_pod(TRAIN, state={"waiting": {"reason": "ContainerCreating"}})]
        planned = story.look([child_job(TRAIN)], pods)
        assert planned.needs_events_of == ("Pod", pods[0]["metadata"]["name"])
        assert story.condition("Running") == ("False", "WaitingForPod")
        said = 'MountVolume.SetUp failed for volume "rules" : configmap "rules" not found'
        planned = story.look([child_job(TRAIN)], pods, warnings=(Waiting("FailedMount", said),))
        assert story.condition("Running") == ("False", "VolumeNotReady")
        (running,) = [c for c in planned.status.conditions if c.type == "Running"]
        assert said in running.message

    def test_a_pod_without_a_sandbox_says_so(self) -> None:
        story = Story()
        story.prepared()
        pods = [child_pod(TRAIN, state={"waiting": {"reason": "ContainerCreating"}})]
        planned = story.look([child_job(TRAIN)], pods, warnings=(Waiting("FailedCreatePodSandBox", "no more IPs"),))
        assert story.condition("Running") == ("False", "WaitingForPod")
        assert "no more IPs" in planned.status.conditions[1].message

    def test_children_of_an_earlier_job_of_the_name_are_waited_for(self) -> None:
        story = Story()
        planned = story.look(conflict=Conflict("Job", "bot-prepare-1", stale=True, owner="FineTuneJob bot"))
        assert story.condition("Validated") == ("False", "WaitingForCleanup")
        assert planned.create == ()
        assert planned.look_again == 2.0

    def test_somebody_elses_object_is_never_touched(self) -> None:
        story = Story()
        planned = story.look(conflict=Conflict("Job", "bot-prepare-1", stale=False, owner="CronJob nightly"))
        assert story.condition("Validated") == ("False", "NameConflict")
        assert "CronJob nightly" in planned.status.conditions[0].message
        assert planned.create == ()

    def test_a_refused_job_says_why(self) -> None:
        story = Story()
        story.look(create_error='jobs.batch "bot-prepare-1" is forbidden: exceeded quota')
        assert story.condition("Validated") == ("False", "PodsRefused")

    def test_what_needs_somebody_is_an_event_too_and_only_one(self) -> None:
        story = Story()
        conditions = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}]
        story.look()
        for expected in (["Unschedulable"], [], []):
            planned = story.look([child_job(PREPARE)], [child_pod(PREPARE, conditions=conditions)])
            assert [note.reason for note in planned.notes] == expected
            assert all(note.warning for note in planned.notes)
        (message,) = [c["message"] for c in story.body["status"]["conditions"] if c["type"] == "Validated"]
        assert "Lower spec.stages.prepare, or add nodes" in message


class TestSpecsThatCannotWork:
    def test_a_child_that_the_api_server_finds_invalid_fails_the_job(self) -> None:
        """Waiting would not help: the spec cannot be changed."""
        story = Story()
        story.prepared()
        story.body["status"].pop("attempt")
        planned = story.look([complete(PREPARE)], create_error='Job "bot-train-1" is invalid: bad', create_invalid=True)
        assert planned.create == ()
        assert story.condition("Failed") == ("True", "UserError")
        assert 'Job "bot-train-1" is invalid: bad' in story.body["status"]["failure"]["message"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"model": {"uri": "file:///models/base"}},
            {"output": {"uri": "file:///models/tuned"}},
            {"storage": {"workURI": "file:///work"}},
        ],
        ids=str,
    )
    def test_local_files_are_refused_in_a_cluster_and_allowed_in_local_mode(self, changes: dict[str, Any]) -> None:
        story = Story(**changes)
        planned = story.look()
        assert planned.create == ()
        assert story.condition("Failed") == ("True", "UserError")
        assert "upload it to S3" in story.body["status"]["failure"]["message"]
        assert Story(**changes).look(settings=Settings(allow_files=True)).create != ()

    def test_a_job_that_runs_is_not_refused_by_another_setting(self) -> None:
        story = Story(model={"uri": "file:///models/base"})
        story.look(settings=Settings(allow_files=True))
        story.look([child_job(PREPARE)], [running_pod(PREPARE)])
        assert story.body["status"]["phase"] == "Preparing"

    def test_a_spec_that_the_schema_let_through_and_the_models_do_not_fails_with_the_field(self) -> None:
        story = Story(hyperparameters={"batchSize": -1})
        story.look()
        assert story.condition("Failed") == ("True", "UserError")
        assert "batchSize" in story.body["status"]["failure"]["message"]


class TestTimesAndConditions:
    def test_the_transition_time_changes_only_with_the_status(self) -> None:
        story = Story()
        story.prepared()
        story.look([child_job(TRAIN)], [running_pod(TRAIN)], live=report(TRAIN, phase="Loading"))
        first = next(c for c in story.body["status"]["conditions"] if c["type"] == "Running")
        story.look([child_job(TRAIN)], [running_pod(TRAIN)], live=report(TRAIN, phase="Training"), after=30)
        second = next(c for c in story.body["status"]["conditions"] if c["type"] == "Running")
        assert first["message"] != second["message"]
        assert first["lastTransitionTime"] == second["lastTransitionTime"]

    def test_every_condition_names_the_generation_it_speaks_of(self) -> None:
        story = Story()
        story.trained()
        assert {c["observedGeneration"] for c in story.body["status"]["conditions"]} == {3}

    def test_conditions_speak_of_a_changed_spec_too(self) -> None:
        """Also after the end, when a time to live may still be changed."""
        story = Story()
        story.trained()
        story.look([complete(EXPORT)])
        story.body["metadata"]["generation"] = 4
        story.look()
        assert {c["observedGeneration"] for c in story.body["status"]["conditions"]} == {4}

    def test_start_times_belong_to_their_attempt(self) -> None:
        story = Story()
        story.look()
        story.look([child_job(PREPARE)], [running_pod(PREPARE)])
        started = format_time(NOW - timedelta(seconds=20))
        assert story.body["status"]["attempt"]["startTime"] == started
        assert story.body["status"]["startTime"] == started
        story.look([complete(PREPARE)], [ended_pod(PREPARE)])
        assert "startTime" not in story.body["status"]["attempt"], "a new attempt has not started yet"


class TestOtherVersions:
    """What another version of the operator wrote is kept, and is no reason to end a job."""

    def test_a_field_of_a_newer_api_is_ignored(self) -> None:
        planned = Story(priority=3, model={"uri": "s3://models/base", "mirror": True}).look()
        assert created(planned) == ["ConfigMap/bot-prepare-1", "Job/bot-prepare-1"]
        assert "mirror" not in document(planned)["spec"]["model"]

    def test_a_status_field_of_a_newer_api_changes_nothing(self) -> None:
        story = Story()
        story.prepared()
        story.body["status"]["budget"] = {"position": 3}
        planned = story.look([complete(PREPARE), complete(TRAIN)])
        assert created(planned) == ["ConfigMap/bot-export-1", "Job/bot-export-1"]

    def test_a_status_that_cannot_be_read_is_left_alone(self) -> None:
        story = Story()
        story.prepared()
        story.body["status"]["attempt"]["stage"] = "distil"
        assert "status.attempt.stage" in story.job.status_problem
        planned = plan(story.job, observe([complete(PREPARE)]), SETTINGS, NOW)
        assert (planned.create, planned.look_again, planned.notes) == ((), None, ())
        assert planned.status == story.job.status

    def test_a_running_job_that_cannot_be_read_is_left_alone(self) -> None:
        story = Story()
        story.prepared()
        story.body["spec"]["method"] = {"type": "Unheard"}
        planned = plan(story.job, observe([complete(PREPARE)]), SETTINGS, NOW)
        assert (planned.create, planned.status) == ((), story.job.status)
        fresh = Story(method={"type": "Unheard"})
        fresh.look()
        assert fresh.condition("Failed") == ("True", "UserError")


class TestReasons:
    """Why a job is in its phase, as `kubectl get` shows it."""

    def test_of_a_job_that_goes_well(self) -> None:
        story = Story()
        seen: list[tuple[str, str]] = []

        def look(*arguments: Any, **fields: Any) -> None:
            story.look(*arguments, **fields)
            seen.append((story.body["status"]["phase"], story.body["status"]["reason"]))

        look()
        look([child_job(PREPARE)], [running_pod(PREPARE)])
        look([complete(PREPARE)], [ended_pod(PREPARE)])
        done = [complete(PREPARE)]
        look([*done, child_job(TRAIN)], [child_pod(TRAIN, state={"waiting": {"reason": "ErrImagePull"}})])
        look([*done, child_job(TRAIN)], [running_pod(TRAIN)], live=report(TRAIN, progress=progress(1)))
        look([*done, disrupted(TRAIN, 1)])
        look([*done, child_job(TRAIN, 2)], [running_pod(TRAIN, 2)])
        done.append(complete(TRAIN, 2))
        look(done)
        look([*done, child_job(EXPORT)], [running_pod(EXPORT)])
        look([*done, complete(EXPORT)])
        assert seen == [
            ("Pending", "WaitingForPod"),
            ("Preparing", "Preparing"),
            ("Starting", "WaitingForPod"),
            ("Starting", "ImagePullFailed"),
            ("Running", "Training"),
            ("Restarting", "Preempted"),
            ("Running", "Training"),
            ("Exporting", "WaitingForPod"),
            ("Exporting", "Exporting"),
            ("Succeeded", "TrainingComplete"),
        ]

    def test_of_one_that_does_not(self) -> None:
        story = Story()
        story.look([failed(PREPARE, 1, FailureClass.NOT_FOUND)])
        assert (story.body["status"]["phase"], story.body["status"]["reason"]) == ("Failed", "NotFound")

    def test_of_one_that_is_suspended(self) -> None:
        story = Story(suspend=True)
        story.look()
        assert (story.body["status"]["phase"], story.body["status"]["reason"]) == ("Suspended", "SuspendedByUser")


def test_every_transition_is_an_event() -> None:
    story = Story()
    told: list[str] = []

    def look(*arguments: Any, **fields: Any) -> None:
        told.extend(note.reason for note in story.look(*arguments, **fields).notes)

    prepared, trained = complete(PREPARE), complete(TRAIN)
    saved = CheckpointResult(step=10, uri="s3://w/10")
    look()
    look([child_job(PREPARE)], [running_pod(PREPARE)])
    look([prepared], [ended_pod(PREPARE)])
    for step in (10, 20):
        live = report(TRAIN, progress=progress(step), checkpoint=saved.model_copy(update={"step": step}))
        look([prepared, child_job(TRAIN)], [running_pod(TRAIN)], live=live, after=10)
    look([prepared, trained])
    look([prepared, trained, child_job(EXPORT)], [running_pod(EXPORT)])
    look([prepared, trained, complete(EXPORT)])
    assert told == [
        *("StageStarted", "Preparing", "Validated"),
        *("StageStarted", "CheckpointSaved", "Training", "FirstStep", "Finished"),
        *("StageStarted", "Exporting", "TrainingComplete"),
    ]


def test_only_what_keeps_containers_from_starting_is_an_obstacle() -> None:
    """A scheduler has found a node since it complained, and an image is pulled for as long as it takes."""

    def event(reason: str, message: str, **fields: Any) -> dict[str, Any]:
        return {"type": "Warning", "reason": reason, "message": message, **fields}

    earlier, now, later = (format_time(NOW + timedelta(minutes=minutes)) for minutes in (-5, 0, 5))
    events = [
        event("FailedScheduling", "0/3 nodes are available", lastTimestamp=later),
        event("FailedMount", "first", lastTimestamp=earlier),
        event("FailedMount", "newest", eventTime=earlier, series={"lastObservedTime": later}),
        event("FailedMount", "second", eventTime=now, lastTimestamp=None),
        {**event("FailedMount", "normal", lastTimestamp=later), "type": "Normal"},
    ]
    assert [warning.message for warning in read_warnings(events)] == ["newest", "second", "first"]
