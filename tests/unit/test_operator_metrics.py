"""What the operator counts and measures: changes of jobs' statuses, and the exposition that follows from them."""

from __future__ import annotations

import shutil
import subprocess
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from builders import (
    NOW,
    Story,
    child_job,
    complete,
    deleted_while_pending,
    disrupted,
    exited,
    report,
    running_pod,
)
from prometheus_client.parser import text_string_to_metric_families
from test_plan import progress, saved

from finetune_api.failures import FailureClass, exit_code_of
from finetune_api.names import Stage
from finetune_api.report import Report
from finetune_api.status import MAX_HISTORY, FineTuneJobStatus
from finetune_operator.metrics import Metrics
from finetune_operator.observe import Workload
from finetune_operator.resource import FineTuneJob, format_time

PROMTOOL = Path(__file__).parents[2] / ".tools" / "bin" / "promtool"
PREPARE, TRAIN, EXPORT = Stage.PREPARE, Stage.TRAIN, Stage.EXPORT
NO_PAUSE: dict[str, Any] = {"failurePolicy": {"backoffSeconds": 0}}
QUEUED: dict[str, Any] = {"scheduling": {"queueName": "team-a"}}
DAY = 86_400


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


class Watched(Story):
    """A job whose changes are taken note of, and who is looked at by the time of the story."""

    def __init__(self, **spec_changes: Any) -> None:
        super().__init__(**spec_changes)
        self.metrics = Metrics()

    def written(self, job: FineTuneJob, status: FineTuneJobStatus) -> None:
        self.metrics.observe(job, status)

    def see(self, moment: float, *jobs: dict[str, Any], pods: tuple[dict[str, Any], ...] = (), **fields: Any) -> None:
        self.now = at(moment)
        self.look(list(jobs), list(pods), **fields)

    def suspend(self, value: bool = True) -> None:
        self.body["spec"]["suspend"] = value

    def train(self, since: float) -> None:
        """Until train attempt 1 runs; what was counted until then is forgotten."""
        self.prepared()
        self.metrics = Metrics()
        self.runs(since + 5, TRAIN, 1, since)

    def runs(self, moment: float, stage: Stage, attempt: int, since: float, **fields: Any) -> None:
        queue = "team-a" if "scheduling" in self.body["spec"] else ""
        pods = (running_pod(stage, attempt, since=at(since)),)
        self.see(moment, child_job(stage, attempt, queue=queue), pods=pods, **fields)


def ended(child: dict[str, Any], moment: float) -> dict[str, Any]:
    """The Job with another time of its end."""
    for condition in child["status"]["conditions"]:
        condition["lastTransitionTime"] = format_time(at(moment))
    return child


def samples(metrics: Metrics) -> dict[str, float]:
    """As they are written, without those that say when a series began."""
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def counted(metrics: Metrics) -> dict[str, float]:
    """All that has been counted of jobs, and of histograms count and sum."""
    return {
        name.removeprefix("finetune_"): value
        for name, value in samples(metrics).items()
        if value
        and "_bucket" not in name
        and "_operator_" not in name
        # What is of one job is shown from its status.
        and not ("name=" in name or name.startswith("finetune_jobs{"))
    }


def test_a_whole_life() -> None:
    story = Watched()
    story.see(5)
    story.runs(30, PREPARE, 1, 20)
    story.see(70, ended(complete(PREPARE), 50))
    story.runs(130, TRAIN, 1, 110)
    story.see(730, ended(complete(TRAIN), 710))
    story.runs(760, EXPORT, 1, 750)
    story.see(820, ended(complete(EXPORT), 800))
    assert counted(story.metrics) == {
        "jobs_created_total": 1,
        "job_queue_wait_seconds_count{stage=prepare}": 1,
        "job_queue_wait_seconds_sum{stage=prepare}": 20,
        "job_stage_duration_seconds_count{stage=prepare}": 1,
        "job_stage_duration_seconds_sum{stage=prepare}": 30,
        "job_queue_wait_seconds_count{stage=train}": 1,
        "job_queue_wait_seconds_sum{stage=train}": 60,
        "job_stage_duration_seconds_count{stage=train}": 1,
        "job_stage_duration_seconds_sum{stage=train}": 600,
        "job_queue_wait_seconds_count{stage=export}": 1,
        "job_queue_wait_seconds_sum{stage=export}": 40,
        "job_stage_duration_seconds_count{stage=export}": 1,
        "job_stage_duration_seconds_sum{stage=export}": 50,
        "jobs_finished_total{reason=,result=succeeded}": 1,
        "job_duration_seconds_count{result=succeeded}": 1,
        "job_duration_seconds_sum{result=succeeded}": 800,
    }


@pytest.mark.parametrize(
    ("child", "counter", "kind"),
    [
        (exited(TRAIN, 1, exit_code_of(FailureClass.NO_PROGRESS)), "restarted_total{reason=NoProgress}", "charged"),
        (disrupted(TRAIN, 1), "preempted_total{reason=Preempted}", "preemption"),
    ],
    ids=["failure", "preemption"],
)
def test_a_restart(child: dict[str, Any], counter: str, kind: str) -> None:
    story = Watched(**NO_PAUSE)
    story.train(since=100)
    before = counted(story.metrics)
    story.see(207, ended(child, 200))
    story.runs(250, TRAIN, 2, 245)
    story.runs(255, TRAIN, 2, 245)
    assert counted(story.metrics) == before | {
        f"jobs_{counter}": 1,
        "fault_detection_seconds_count": 1,
        "fault_detection_seconds_sum": 7,
        f"restart_latency_seconds_count{{kind={kind}}}": 1,
        f"restart_latency_seconds_sum{{kind={kind}}}": 45,
    }


def test_the_pause_before_a_restart_is_part_of_it() -> None:
    story = Watched(failurePolicy={"backoffSeconds": 100})
    story.train(since=0)
    story.see(50, ended(exited(TRAIN, 1, exit_code_of(FailureClass.NO_PROGRESS)), 50))
    story.see(200)
    story.runs(210, TRAIN, 2, 205)
    assert counted(story.metrics)["restart_latency_seconds_sum{kind=charged}"] == 155


def test_a_failure_that_ends_the_job_is_detected_and_starts_nothing() -> None:
    story = Watched()
    story.train(since=0)
    before = counted(story.metrics)
    story.see(63, ended(exited(TRAIN, 1, exit_code_of(FailureClass.LOSS_DIVERGED)), 60))
    after = counted(story.metrics)
    assert {name: value for name, value in after.items() if name not in before} == {
        "fault_detection_seconds_count": 1,
        "fault_detection_seconds_sum": 3,
        "jobs_finished_total{reason=LossDiverged,result=failed}": 1,
        "job_duration_seconds_count{result=failed}": 1,
        "job_duration_seconds_sum{result=failed}": 83,  # the prepare pod had run since 20 s before
    }


def test_a_limit_that_is_reached_is_no_fault() -> None:
    story = Watched(activeDeadlineSeconds=500)
    story.train(since=0)
    story.runs(600, TRAIN, 1, 0)
    assert story.condition("Failed") == ("True", "DeadlineExceeded")
    assert "fault_detection_seconds_count" not in counted(story.metrics)
    assert counted(story.metrics)["jobs_finished_total{reason=DeadlineExceeded,result=failed}"] == 1


def test_a_pod_that_never_ran_has_nothing_to_detect() -> None:
    story = Watched(**NO_PAUSE)
    story.prepared()
    story.see(500, ended(deleted_while_pending(TRAIN, 1), 400))
    story.runs(520, TRAIN, 2, 510)
    found = counted(story.metrics)
    assert found["jobs_restarted_total{reason=Terminated}"] == 1
    assert found["restart_latency_seconds_sum{kind=charged}"] == 110
    assert "fault_detection_seconds_count" not in found
    assert "job_queue_wait_seconds_count{stage=train}" not in found


def test_an_attempt_that_nobody_saw_run_is_measured_when_its_end_is_seen() -> None:
    story = Watched()
    story.see(0)
    pod = running_pod(PREPARE, since=at(10))
    state = pod["status"]["containerStatuses"][0]["state"]
    state["terminated"] = state.pop("running") | {"exitCode": 0, "finishedAt": format_time(at(40))}
    pod["status"]["phase"] = "Succeeded"
    story.see(60, ended(complete(PREPARE), 41), pods=(pod,))
    found = counted(story.metrics)
    assert found["job_queue_wait_seconds_count{stage=prepare}"] == 1
    assert found["job_queue_wait_seconds_sum{stage=prepare}"] == 10
    assert found["job_stage_duration_seconds_sum{stage=prepare}"] == 30


def test_a_node_whose_clock_is_behind_takes_nothing_back() -> None:
    story = Watched()
    story.see(0)
    story.runs(10, PREPARE, 1, -5)
    found = samples(story.metrics)
    assert found["finetune_job_queue_wait_seconds_count{stage=prepare}"] == 1
    assert found["finetune_job_queue_wait_seconds_sum{stage=prepare}"] == 0


class TestSuspension:
    def test_time_in_which_a_job_was_suspended_is_no_waiting(self) -> None:
        story = Watched()
        story.train(since=10)
        before = counted(story.metrics)
        story.suspend()
        story.runs(100, TRAIN, 1, 10)
        story.see(110)
        assert story.condition("Suspended") == ("True", "SuspendedByUser")
        story.suspend(False)
        story.see(DAY)
        story.runs(DAY + 40, TRAIN, 2, DAY + 30)
        assert counted(story.metrics) == before | {
            "job_queue_wait_seconds_count{stage=train}": 2,
            "job_queue_wait_seconds_sum{stage=train}": before["job_queue_wait_seconds_sum{stage=train}"] + 30,
        }

    def test_a_stop_is_no_fault(self) -> None:
        """The status still has the failure of the attempt before."""
        story = Watched(**NO_PAUSE)
        story.train(since=0)
        story.see(50, ended(exited(TRAIN, 1, exit_code_of(FailureClass.NO_PROGRESS)), 50))
        story.runs(90, TRAIN, 2, 80)
        story.suspend()
        story.runs(100, TRAIN, 2, 80)
        story.see(110)
        assert story.condition("Suspended") == ("True", "SuspendedByUser")
        assert counted(story.metrics)["fault_detection_seconds_count"] == 1

    def test_a_pod_that_begins_after_it_was_told_to_stop_has_waited_all_the_time(self) -> None:
        story = Watched()
        story.prepared()
        story.suspend()
        story.see(100, child_job(TRAIN))
        story.see(130, pods=(running_pod(TRAIN, since=at(120)),))
        assert counted(story.metrics)["job_queue_wait_seconds_sum{stage=train}"] == 120

    def test_nor_is_it_when_it_was_created_so(self) -> None:
        story = Watched(suspend=True)
        story.see(0)
        story.suspend(False)
        story.see(DAY)
        story.runs(DAY + 20, PREPARE, 1, DAY + 15)
        assert counted(story.metrics)["job_queue_wait_seconds_sum{stage=prepare}"] == 15

    def test_nor_is_a_restart_late_for_it(self) -> None:
        """It was suspended in the pause after a failure."""
        story = Watched(failurePolicy={"backoffSeconds": 100})
        story.train(since=0)
        story.see(50, ended(exited(TRAIN, 1, exit_code_of(FailureClass.NO_PROGRESS)), 50))
        story.suspend()
        story.see(60)
        story.suspend(False)
        story.see(DAY)
        story.runs(DAY + 20, TRAIN, 2, DAY + 10)
        found = counted(story.metrics)
        assert found["jobs_restarted_total{reason=NoProgress}"] == 1
        assert "restart_latency_seconds_count{kind=charged}" not in found
        assert found["job_queue_wait_seconds_count{stage=train}"] == 2

    def test_a_restart_long_after_it_is_measured_as_ever(self) -> None:
        story = Watched(suspend=True, **NO_PAUSE)
        story.see(0)
        story.suspend(False)
        story.see(100)
        story.runs(120, PREPARE, 1, 110)
        story.see(205, ended(disrupted(PREPARE, 1), 200))
        story.runs(250, PREPARE, 2, 230)
        assert counted(story.metrics)["restart_latency_seconds_sum{kind=preemption}"] == 30


class TestQueue:
    def test_a_pod_that_a_queue_takes_away_and_gives_back(self) -> None:
        story = Watched(**QUEUED)
        story.prepared()
        story.metrics = Metrics()
        held = child_job(TRAIN, suspended=True, queue="team-a")
        story.see(600, held, workload=Workload("job-bot", message="no quota"))
        story.runs(700, TRAIN, 1, 690, live=saved(TRAIN, 1, 0, 40))
        story.runs(800, TRAIN, 1, 690, live=saved(TRAIN, 1, 0, 40))
        story.see(900, held)
        story.runs(5000, TRAIN, 1, 4900)
        assert counted(story.metrics) == {
            "job_queue_wait_seconds_count{stage=train}": 1,
            "job_queue_wait_seconds_sum{stage=train}": 690,
            "jobs_preempted_total{reason=Preempted}": 1,
            "restart_latency_seconds_count{kind=preemption}": 1,
            # It was last heard of at 800 s.
            "restart_latency_seconds_sum{kind=preemption}": 4100,
        }

    def test_both_between_two_looks(self) -> None:
        story = Watched(**QUEUED)
        story.train(since=10)
        story.runs(7200, TRAIN, 1, 3600)
        story.runs(7200, TRAIN, 1, 3600)
        found = counted(story.metrics)
        assert found["jobs_preempted_total{reason=Preempted}"] == 1
        assert found["restart_latency_seconds_count{kind=preemption}"] == 1
        assert found["job_queue_wait_seconds_count{stage=train}"] == 1


class TestOperatorsThatStart:
    def test_what_happened_before_is_not_counted_again(self) -> None:
        """A job in the middle of its life, and one that has ended."""
        story = Watched(**NO_PAUSE)
        story.train(since=0)
        story.see(207, ended(disrupted(TRAIN, 1), 200))
        story.runs(250, TRAIN, 2, 245)
        story.metrics = Metrics()
        story.runs(251, TRAIN, 2, 245)
        assert counted(story.metrics) == {}
        story.see(300, ended(exited(TRAIN, 2, exit_code_of(FailureClass.LOSS_DIVERGED)), 290))
        assert counted(story.metrics)["jobs_finished_total{reason=LossDiverged,result=failed}"] == 1
        story.metrics = Metrics()
        story.see(400)
        assert counted(story.metrics) == {}
        assert samples(story.metrics)["finetune_jobs{namespace=team,phase=Failed}"] == 1

    def test_what_happened_while_there_was_none_is_counted(self) -> None:
        """The queue took the pod away, gave it back, and it ended."""
        story = Watched(**QUEUED)
        story.train(since=10)
        story.metrics = Metrics()
        story.see(9000, ended(complete(TRAIN), 8000), pods=(running_pod(TRAIN, since=at(3600)),))
        found = counted(story.metrics)
        assert found["job_stage_duration_seconds_count{stage=train}"] == 1
        assert "jobs_created_total" not in found

    def test_nothing_is_lost_where_the_history_is_full(self) -> None:
        story = Watched(**NO_PAUSE)
        story.train(since=0)
        attempts = MAX_HISTORY + 3
        for attempt in range(1, attempts + 1):
            start = attempt * 1000
            live = report(TRAIN, attempt, resumed_from_step=attempt, checkpoint=saved(TRAIN, 1, 0, 99).checkpoint)
            story.see(start + 500, ended(disrupted(TRAIN, attempt), start + 495), live=live)
            story.runs(start + 995, TRAIN, attempt + 1, start + 990)
        found = counted(story.metrics)
        assert len(story.job.status.history) == MAX_HISTORY
        assert found["jobs_preempted_total{reason=Preempted}"] == attempts
        assert found["restart_latency_seconds_count{kind=preemption}"] == attempts
        assert found["fault_detection_seconds_sum"] == 5 * attempts


class TestSeriesOfAJob:
    def info(self, metrics: Metrics) -> list[str]:
        return [name for name, value in samples(metrics).items() if name.startswith("finetune_job_info{") and value]

    def test_what_it_is(self) -> None:
        method = {"adapter": {"type": "LoRA"}}
        story = Watched(**QUEUED, method=method)
        story.look()
        (before,) = self.info(story.metrics)
        uid = story.job.uid
        assert before == f"finetune_job_info{{method=LoRA,model=,name=bot,namespace=team,queue=team-a,uid={uid}}}"
        story.look([child_job(PREPARE)], [running_pod(PREPARE)], live=prepared("qwen3"))
        (after,) = self.info(story.metrics)
        assert after == before.replace("model=", "model=qwen3")

    def test_of_a_specification_that_cannot_be_read(self) -> None:
        story = Watched(model={"uri": 7})
        story.look()
        (info,) = self.info(story.metrics)
        assert "method=,model=,name=bot" in info
        assert counted(story.metrics)["jobs_finished_total{reason=UserError,result=failed}"] == 1

    def test_they_go_with_it(self) -> None:
        story = Watched(resources={"gpusPerNode": 2})
        story.train(since=0)
        story.runs(60, TRAIN, 1, 0, live=report(TRAIN, progress=progress(3, loss=1.5)))
        of_it = [name for name in samples(story.metrics) if "name=bot" in name]
        assert len(of_it) >= 8
        others = counted(story.metrics)
        story.metrics.forget("team", "bot")
        assert "bot" not in story.metrics.exposition().decode()
        assert counted(story.metrics) == others

    def test_a_new_job_of_the_same_name_has_its_own(self) -> None:
        """Nobody looked while there was none."""
        story = Watched(resources={"gpusPerNode": 2})
        story.train(since=0)
        story.runs(600, TRAIN, 1, 0, live=report(TRAIN, progress=progress(3)))
        seconds = "finetune_job_gpu_seconds_total{name=bot,namespace=team}"
        assert samples(story.metrics)[seconds] == 1200
        metrics, story = story.metrics, Watched()
        story.metrics = metrics
        story.body["metadata"]["uid"] = "another"
        story.look()
        assert samples(metrics)[seconds] == 0
        (info,) = self.info(metrics)
        assert "uid=another" in info
        assert counted(metrics)["jobs_created_total"] == 1


def prepared(model_type: str) -> Report:
    return report(PREPARE, resolved={"modelType": model_type})


class TestExposition:
    def test_what_can_be_counted_is_there_from_the_start(self) -> None:
        """A rate over a counter that appears with its first event does not see that event."""
        found = samples(Metrics())
        for reason in FailureClass:
            assert found[f"finetune_jobs_restarted_total{{reason={reason}}}"] == 0
            assert found[f"finetune_jobs_finished_total{{reason={reason},result=failed}}"] == 0
        assert found["finetune_jobs_finished_total{reason=,result=succeeded}"] == 0
        assert found["finetune_jobs_created_total"] == 0
        assert found["finetune_fault_detection_seconds_count"] == 0
        for reason in ("Preempted", "NodeLost"):
            assert found[f"finetune_jobs_preempted_total{{reason={reason}}}"] == 0
        for stage in Stage:
            assert found[f"finetune_job_queue_wait_seconds_count{{stage={stage}}}"] == 0
            assert found[f"finetune_job_stage_duration_seconds_count{{stage={stage}}}"] == 0

    def test_labels_are_bounded(self) -> None:
        """Of a life with everything in it: only gauges, and counters that go with their job, say whose they are."""
        story = busy()
        fresh = set(samples(Metrics()))
        for name in set(samples(story.metrics)) - fresh:
            assert name.startswith("finetune_jobs{") or "name=bot" in name, name
        for family in text_string_to_metric_families(story.metrics.exposition().decode()):
            labels = {label for sample in family.samples for label in sample.labels}
            assert family.type != "histogram" or not labels & {"name", "namespace", "uid"}, family.name

    def test_promtool_accepts_it(self) -> None:
        program = str(PROMTOOL) if PROMTOOL.exists() else shutil.which("promtool")
        if program is None:
            pytest.skip("no promtool: install Debian's prometheus, or put promtool into .tools/bin")
        done = subprocess.run(
            [program, "check", "metrics"],
            input=busy().metrics.exposition(),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def busy() -> Watched:
    """A job that was preempted, failed, and ended."""
    story = Watched(resources={"gpusPerNode": 2}, **NO_PAUSE)
    story.look()
    story.look([child_job(PREPARE)], [running_pod(PREPARE)], live=prepared("qwen3"))
    story.look([complete(PREPARE)])
    story.runs(100, TRAIN, 1, 50, live=report(TRAIN, progress=progress(3, loss=1.5)))
    story.see(150, ended(disrupted(TRAIN, 1), 140))
    story.runs(200, TRAIN, 2, 190)
    story.see(250, ended(exited(TRAIN, 2, exit_code_of(FailureClass.NO_PROGRESS)), 240))
    story.runs(300, TRAIN, 3, 290)
    story.see(350, ended(exited(TRAIN, 3, exit_code_of(FailureClass.LOSS_DIVERGED)), 340))
    assert len(counted(story.metrics)) > 10
    return story
