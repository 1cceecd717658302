"""A job's life with everything that can go wrong in it, as a hypothesis state machine; its invariants are DESIGN's."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from world import FAULTS, GRACE, Fault, Object, Storage, World, index_of, is_open, owner_of, position, runs, transitions

from finetune_api.failures import RULES, FailureClass, exit_code_of
from finetune_api.names import Stage
from finetune_api.status import MAX_HISTORY
from finetune_operator.observe import Observation, read_jobs, read_pods
from finetune_operator.plan import NODE_LOST_SECONDS, plan
from finetune_operator.resource import FineTuneJob, parse_time

_CODES = sorted({rule.exit_code for rule in RULES.values() if rule.exit_code is not None} | {1, 137, 139, 143})
# Most codes end the job, and there is more to see in jobs that go on.
EXIT_CODES = _CODES + 3 * [69, 75, 80, 81, 83, 137, 139]
MAX_RESTARTS = 2
MAX_SKEW = 45.0
SLOW_EVENTS = 12
"""Rounds of ten seconds after which an event that could not be recorded was, though the clock had been wrong."""
LATE_SECONDS = 15.0
"""How late an attentive operator may be."""

faults = st.builds(
    Fault, st.one_of(st.integers(1, 8), st.sampled_from(["jobs", "status", "events"])), st.sampled_from(FAULTS)
)
index = st.integers(0, 3)


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.applied = 0
        self.attentive = False
        """The operator looks after everything that happens, nothing of what it does fails, and its clock is right: then
        what it says must be exact."""
        self.skewed = False
        self.expiring = False
        """The job may be deleted for its time to live."""
        self.terminal: dict[str, str] = {}
        """The terminal condition of every uid that had one."""
        self.made_at_the_end: dict[str, dict[Stage, int]] = {}
        self.generation: dict[str, int] = {}
        self.suspensions: dict[str, int] = {}
        self.suspended_at: dict[str, int] = {}
        """Active seconds when the job was seen suspended."""
        self.steps: dict[tuple[str, int, int], int] = {}
        """The last step of each attempt that was written, by the uid and the preemptions so far."""
        self.starts: dict[str, set[tuple[Stage, int]]] = {}

    @initialize(
        gpus=st.sampled_from([0, 4]),
        nodes=st.sampled_from([1, 2]),
        backoff=st.sampled_from([0, 30]),
        deadline=st.sampled_from([None, 600]),
        waiting=st.sampled_from([None, 900]),
        ttl=st.sampled_from([None, 100]),
        attentive=st.booleans(),
        queued=st.booleans(),
        begun=st.sampled_from([0, 1, 2, 3, 3, 4, 4, 4, 6]),
        rules=st.lists(
            st.fixed_dictionaries(
                {
                    "class": st.sampled_from([FailureClass.UNKNOWN, FailureClass.PREEMPTED, FailureClass.NOT_FOUND]),
                    "action": st.sampled_from(["Fail", "Restart"]),
                }
            ),
            max_size=1,
        ),
    )
    def apply(
        self,
        gpus: int,
        nodes: int,
        backoff: int,
        deadline: int | None,
        waiting: int | None,
        ttl: int | None,
        attentive: bool,
        queued: bool,
        begun: int,
        rules: Any,
    ) -> None:
        limits = {
            "activeDeadlineSeconds": deadline,
            "preRunningDeadlineSeconds": waiting,
            "ttlSecondsAfterFinished": ttl,
        }
        self.spec: Object = {
            "resources": {"gpusPerNode": gpus, "nodes": nodes},
            "scheduling": {"queueName": "q", "cpuQueueName": "q"} if queued else {},
            "failurePolicy": {"maxRestarts": MAX_RESTARTS, "backoffSeconds": backoff, "rules": rules},
            **{key: value for key, value in limits.items() if value is not None},
        }
        self.world.apply(self.spec)
        self.attentive = attentive
        self.everybody_works(succeed=True, rounds=begun)

    # What happens

    @rule()
    def operator_looks(self) -> None:
        self._operate()

    @precondition(lambda self: not self.attentive)
    @rule(fault=faults)
    def operator_looks_and_something_fails(self, fault: Fault) -> None:
        self._operate(fault)

    @precondition(lambda self: not self.attentive)
    @rule()
    def operator_looks_and_cannot_reach_the_pod(self) -> None:
        self._operate(unreachable=True)

    @precondition(lambda self: not self.attentive)
    @rule(seconds=st.sampled_from([-MAX_SKEW, 0, MAX_SKEW]))
    def operators_clock_goes_wrong(self, seconds: float) -> None:
        self.skewed = True
        self.world.skew = seconds

    @rule(succeed=st.booleans(), rounds=st.integers(1, 4), fault=st.one_of(st.none(), faults))
    def everybody_works(self, succeed: bool, rounds: int, fault: Fault | None = None) -> None:
        """What usually happens between two faults."""
        for _ in range(rounds):
            self._operate(None if self.attentive else fault)
            self.world.admit()
            self._cluster_works(succeed=succeed, steps=4)
            self._sleep(5)
            self.world.control()
            self._operate()

    @rule()
    def job_controller_works(self) -> None:
        self.world.control()

    @rule()
    def garbage_is_collected(self) -> None:
        self.world.collect()

    @rule(saves=st.booleans())
    def kubelet_ends_stopped_pods(self, saves: bool) -> None:
        self.world.kubelet(saves=saves)

    @rule()
    def ended_pods_go(self) -> None:
        self.world.drop_finished_pods()

    @rule(index=index)
    def pod_starts(self, index: int) -> None:
        if pod := self._pick(index, "Pending"):
            self._start(pod)

    @rule(index=index, steps=st.integers(1, 4))
    def pod_trains(self, index: int, steps: int) -> None:
        if pod := self._pick(index, "Running"):
            self.world.train(pod, steps)
            self._sleep(2.0 * steps)

    @rule(index=index)
    def pod_succeeds(self, index: int) -> None:
        if pod := self._pick(index, "Running"):
            self.world.succeed(pod)

    @rule(index=index, code=st.sampled_from(EXIT_CODES))
    def pod_fails(self, index: int, code: int) -> None:
        if pod := self._pick(index, "Running"):
            self.world.fail(pod, code, "OOMKilled" if code == 137 else "Error")

    @rule(index=index)
    def pod_loses_another_one(self, index: int) -> None:
        if (pod := self._pick(index, "Running")) and not self.world.all_run(pod):
            self.world.fail(pod, exit_code_of(FailureClass.COMMUNICATION))

    @rule(index=index, disrupted=st.booleans())
    def pod_is_deleted(self, index: int, disrupted: bool) -> None:
        """By a person, or by a preemption."""
        if pod := self._pick(index, "Pending", "Running"):
            self.world.stop(pod, disrupted=disrupted)

    @rule(index=index, silence=st.sampled_from([0, GRACE + 10]))
    def node_is_lost(self, index: int, silence: float) -> None:
        if pod := self._pick(index, "Running"):
            self.world.lose_node(pod)
            self._sleep(silence)

    @rule()
    def nodes_come_back(self) -> None:
        self.world.nodes_come_back()

    @rule(index=index)
    def somebody_deletes_a_child(self, index: int) -> None:
        if children := self.world.children():
            child = children[index % len(children)]
            if is_open(child):
                del self.world.objects["jobs", child["metadata"]["name"]]

    @rule(index=index, suspended=st.booleans())
    def queue_flips_a_child(self, index: int, suspended: bool) -> None:
        open_children = [child for child in self.world.children() if is_open(child)]
        if open_children:
            child = open_children[index % len(open_children)]
            child["spec"]["suspend"] = suspended
            self.world.touch(child)
            for pod in self.world.pods():
                # One that is failing at this moment gets the benefit of the doubt.
                if suspended and owner_of(pod) == child["metadata"]["uid"]:
                    self.world.take(pod)

    @rule(value=st.booleans())
    def user_sets_suspend(self, value: bool) -> None:
        job = self.world.job
        if job is not None and value and not job["spec"].get("suspend"):
            uid = job["metadata"]["uid"]
            self.suspensions[uid] = self.suspensions.get(uid, 0) + 1
        self.world.edit(suspend=value)

    @rule(value=st.sampled_from([None, 300, 3000]))
    def user_edits_the_deadline(self, value: int | None) -> None:
        self.world.edit(activeDeadlineSeconds=value)

    @rule(gpus=st.sampled_from([0, 2, 4]), nodes=st.sampled_from([1, 2]))
    def user_edits_the_resources(self, gpus: int, nodes: int) -> None:
        if self.world.job is not None and self.world.job["spec"].get("suspend"):
            self.world.edit(resources={"gpusPerNode": gpus, "nodes": nodes})

    @rule(refuses=st.booleans())
    def webhook_changes_its_mind(self, refuses: bool) -> None:
        self.world.webhook_refuses = refuses

    @rule(quota=st.booleans())
    def quota_changes(self, quota: bool) -> None:
        self.world.quota = quota

    @precondition(lambda self: self.applied < 2)
    @rule()
    def user_deletes_and_applies_again(self) -> None:
        self.applied += 1
        self.world.delete_job()
        self.world.apply(self.spec)

    @rule(seconds=st.sampled_from([1, 10, GRACE, GRACE + NODE_LOST_SECONDS + 1, 3600]))
    def time_passes(self, seconds: float) -> None:
        self._sleep(seconds)

    # What must hold

    @invariant()
    def at_most_one_attempt_is_open(self) -> None:
        """An attempt is open while its Job may have pods, and while a pod of it may run."""
        by_owner: dict[str, set[tuple[Stage, int]]] = {}
        for child in self.world.children():
            if is_open(child):
                by_owner.setdefault(owner_of(child), set()).add(position(child))
        for pod in self.world.live_pods():
            if not self.world.is_lost(pod):
                by_owner.setdefault(pod["trainer"]["uid"], set()).add(position(pod))
        for attempts in by_owner.values():
            assert len(attempts) <= 1, f"{attempts} at once"

    @invariant()
    def the_end_is_final(self) -> None:
        for uid, status in self._status():
            kinds = [c["type"] for c in status.get("conditions", []) if c["status"] == "True"]
            ends = [kind for kind in kinds if kind in ("Complete", "Failed")]
            assert len(ends) <= 1, "Complete and Failed"
            before = self.terminal.get(uid)
            assert before is None or ends == [before], f"{before} became {ends}"
            if ends:
                self.terminal[uid] = ends[0]
                made = self._attempts(uid)
                assert self.made_at_the_end.setdefault(uid, made) == made, "an attempt after the end"

    @invariant()
    def the_generation_never_goes_back(self) -> None:
        for uid, status in self._status():
            seen = status.get("observedGeneration", 0)
            assert seen >= self.generation.get(uid, 0)
            self.generation[uid] = seen

    @invariant()
    def restarts_are_bounded_and_none_is_lost(self) -> None:
        for uid, status in self._status():
            restarts = status.get("restarts") or {}
            charged, free = restarts.get("charged", 0), restarts.get("preemptions", 0)
            assert charged <= MAX_RESTARTS
            taken = len(self.world.taken.get(uid, ()))
            assert free <= taken, f"{free} preemptions, and {taken} pods were ever taken away"
            history = status.get("history", [])
            if len(history) < MAX_HISTORY:
                outcomes = [entry["outcome"] for entry in history]
                final = status.get("phase") == "Failed" and status["failure"]["attempt"] > 0
                assert outcomes.count("Preempted") == free
                assert charged <= outcomes.count("Failed") <= charged + final
            allowed = charged + free + self.suspensions.get(uid, 0)
            made = sum(number - 1 for number in self._attempts(uid).values())
            # The restart of an attempt that was created is in the status before it is created.
            assert made <= allowed, f"{made} restarts, {allowed} accounted for"

    @invariant()
    def suspended_means_no_pods_and_clocks_stop(self) -> None:
        for uid, status in self._status():
            suspended = any(c["type"] == "Suspended" and c["status"] == "True" for c in status.get("conditions", []))
            job = self.world.job
            if not suspended or job is None or not job["spec"].get("suspend"):
                self.suspended_at.pop(uid, None)
                continue
            pods = [pod for pod in self.world.live_pods() if pod["trainer"]["uid"] == uid]
            left = [pod for pod in pods if not self.world.is_lost(pod)]
            assert not left, "suspended, and a pod is left"
            active = (status.get("usage") or {}).get("activeSeconds", 0)
            assert self.suspended_at.setdefault(uid, active) == active, "the clock runs while the job is suspended"

    @invariant()
    def complete_means_published(self) -> None:
        for uid, status in self._status():
            if status.get("phase") == "Succeeded":
                assert self._storage(uid).published == status["trainedAttempt"]

    @invariant()
    def accounts_are_not_more_than_the_truth(self) -> None:
        for uid, status in self._status():
            usage = status.get("usage") or {}
            assert usage.get("wastedGPUSeconds", 0) <= usage.get("gpuSeconds", 0)
            most = self.world.ran.get(uid, 0.0)
            if self.skewed:
                most += 2 * MAX_SKEW * (len(status.get("history", [])) + 1)
            assert usage.get("activeSeconds", 0) <= most, "time that no pod ran"

    @invariant()
    def accounts_are_not_less_than_what_was_seen(self) -> None:
        for uid, status in self._status():
            overdue = str((status.get("failure") or {}).get("class")).endswith("DeadlineExceeded")
            if not self.attentive or overdue:
                continue  # what a pod does after a deadline is not counted
            attempt, active = status.get("attempt") or {}, (status.get("usage") or {}).get("activeSeconds", 0)
            if attempt.get("startTime") and not attempt.get("endTime"):
                active += (self.world.now - parse_time(attempt["startTime"])).total_seconds()
            ran = self.world.surely_ran.get(uid, 0.0)
            missed = LATE_SECONDS * (len(status.get("history", [])) + 1)
            assert active >= ran - missed, f"{ran} s ran, {active} are known"

    @invariant()
    def limits_are_kept(self) -> None:
        for _, status in self._status():
            job = self.world.job
            assert job is not None
            limit = job["spec"].get("activeDeadlineSeconds")
            if not self.attentive or limit is None or status.get("completionTime") or status["phase"] == "Suspended":
                continue
            attempt, active = status.get("attempt") or {}, (status.get("usage") or {}).get("activeSeconds", 0)
            if attempt.get("startTime") and not attempt.get("endTime"):
                active += (self.world.now - parse_time(attempt["startTime"])).total_seconds()
            stopping = any("deletionTimestamp" in pod["metadata"] for pod in self.world.pods())
            decided = any(
                is_open(job) and job["status"]["conditions"] for job in self.world.children() if "status" in job
            )
            jobs = {job["metadata"]["uid"] for job in self.world.children()}
            orphaned = any(owner_of(pod) not in jobs for pod in self.world.pods())  # until they are collected
            assert active <= limit + LATE_SECONDS or stopping or decided or orphaned, f"{active} of {limit} s"

    @invariant()
    def a_job_lives_as_long_as_it_was_to(self) -> None:
        if self.world.job is None:
            assert self.expiring, "a job was deleted before its time"
            return
        over = self._over()
        self.expiring = self._may_expire()
        assert not self.attentive or over is None or over < LATE_SECONDS, "a job outlives its time"

    def _over(self) -> float | None:
        """Seconds since the job's time to live was over; None when it has none, or has not ended."""
        job = self.world.job
        ended = ((job or {}).get("status") or {}).get("completionTime")
        ttl = (job or {}).get("spec", {}).get("ttlSecondsAfterFinished")
        if ended is None or ttl is None:
            return None
        return (self.world.now - parse_time(ended)).total_seconds() - ttl

    def _may_expire(self) -> bool:
        over = self._over()
        return over is not None and (self.skewed or over > -LATE_SECONDS)

    @invariant()
    def what_the_pod_says_is_known(self) -> None:
        for _, status in self._status():
            attempt = status.get("attempt") or {}
            for pod in self.world.pods():
                if not self.attentive or pod["status"]["phase"] != "Running" or status.get("completionTime"):
                    continue
                if pod["spec"]["nodeName"] in self.world.lost_nodes or not attempt.get("startTime"):
                    continue
                stage, number = position(pod)
                if index_of(pod) > 0:
                    continue  # the first one speaks
                said = pod["trainer"]["report"].checkpoint
                if (stage, number) == (attempt["stage"], attempt["number"]) and said and not attempt.get("endTime"):
                    known = (status.get("checkpoint") or {}).get("step")
                    age = (self.world.now - parse_time(said.time)).total_seconds()
                    assert known == said.step or age < LATE_SECONDS

    @invariant()
    def progress_never_goes_back_within_an_attempt(self) -> None:
        for uid, status in self._status():
            progress, restarts = status.get("progress"), status.get("restarts") or {}
            if progress is None or "attempt" not in progress:
                continue
            # A queue that took the pod away lets the same attempt begin again.
            life = (uid, progress["attempt"], restarts.get("preemptions", 0))
            assert progress["currentStep"] >= self.steps.get(life, 0), "steps that were made are gone"
            self.steps[life] = progress["currentStep"]

    @invariant()
    def pods_of_an_attempt_that_has_ended_are_told(self) -> None:
        for uid, status in self._status():
            attempt = status.get("attempt") or {}
            if not self.attentive or not attempt.get("endTime"):
                continue
            own = {job["metadata"]["uid"]: job for job in self.world.children() if owner_of(job) == uid}
            for pod in self.world.live_pods():
                job = own.get(owner_of(pod))
                told = job is None or "deletionTimestamp" in pod["metadata"] or job["status"]["conditions"]
                assert told or position(pod) != (attempt["stage"], attempt["number"]), "nobody tells a pod to stop"

    @invariant()
    def the_same_picture_gives_the_same_plan(self) -> None:
        body = self.world.job
        if body is None:
            return
        uid = body["metadata"]["uid"]
        own = [job for job in self.world.children() if owner_of(job) == uid]
        pods = [pod for pod in self.world.pods() if pod["trainer"]["uid"] == uid]
        seen = Observation(read_jobs(own), read_pods(pods))
        job = FineTuneJob.parse(body)
        settings = self.world.settings
        assert plan(job, seen, settings, self.world.now) == plan(job, seen, settings, self.world.now)

    def check_invariants(self, *arguments: Any) -> None:
        if self.attentive:
            self._look()
        super().check_invariants(*arguments)  # type: ignore[no-untyped-call]

    def _operate(self, fault: Fault | None = None, *, unreachable: bool = False) -> None:
        self.expiring = self.expiring or self._may_expire()
        self.world.operate(fault, unreachable=unreachable)

    def _look(self) -> None:
        """Until nothing is to be done at once."""
        for _ in range(20):
            self._operate()
            if self.world.due is None or self.world.due > self.world.now:
                return
        raise AssertionError("the operator never rests")

    def _sleep(self, seconds: float) -> None:
        until = self.world.now + timedelta(seconds=seconds)
        while self.attentive and self.world.now < until:
            # The resync looks once a minute when nothing else makes it look.
            due = min(until, self.world.due or until, self.world.now + timedelta(seconds=60))
            self.world.sleep(max(0.1, (due - self.world.now).total_seconds()))
            self._look()
        if self.world.now < until:
            self.world.sleep((until - self.world.now).total_seconds())

    # The end: without faults every job comes to one

    def teardown(self) -> None:
        if self.world.job is None:
            return
        self.world.quota = True
        self.world.webhook_refuses = False
        self.world.skew = 0.0
        self.world.nodes_come_back()
        self.world.edit(suspend=False)
        for _ in range(400):
            if self._is_over():
                break
            self._settle()
        for _ in range(4):
            # Nobody who is told to stop is left, whether or not it would end by itself.
            self._settle(succeed=False)
        for _ in range(SLOW_EVENTS):
            if self._untold():
                self.world.edit(ttlSecondsAfterFinished=None)
                self._settle(succeed=False)
        job = self.world.job
        if job is not None:
            conditions = {c["type"]: c["status"] for c in job["status"]["conditions"]}
            assert "True" in (conditions.get("Complete"), conditions.get("Failed")), self.world.writes[-30:]
            assert not self.world.live_pods(), "the job is over, and a pod runs"
            assert not any(is_open(child) for child in self.world.children()), "the job is over, and a child is open"
            assert not self._untold()
        self.world.delete_job()
        for _ in range(3):
            self.world.collect()
            self.world.kubelet()
            self.world.control()
        assert not self.world.children("jobs") + self.world.pods(), "something outlives its owner"

    def _untold(self) -> list[str]:
        """Transitions of the job of which no event tells."""
        job = self.world.job
        if job is None:
            return []
        events = [e for e in self.world.children("events") if e["involvedObject"]["uid"] == job["metadata"]["uid"]]
        messages = [event["message"] for event in events]
        untold = []
        for what, beginning in transitions(job).items():
            told = [message for message in messages if message.startswith(beginning)]
            assert len(told) <= 1, f"{what}: {messages}"
            if not told and what not in self.world.untold:
                untold.append(what)
        return untold

    def _is_over(self) -> bool:
        job = self.world.job
        if job is None:
            return True
        conditions = job.get("status", {}).get("conditions", [])
        return any(c["status"] == "True" and c["type"] in ("Complete", "Failed") for c in conditions)

    def _settle(self, *, succeed: bool = True) -> None:
        self.world.admit()
        self.world.operate()
        self._cluster_works(succeed=succeed)
        self.world.control()
        self._check()
        self.world.sleep(10)

    def _check(self) -> None:
        self.at_most_one_attempt_is_open()
        self.the_end_is_final()
        self.restarts_are_bounded_and_none_is_lost()
        self.complete_means_published()
        self.accounts_are_not_more_than_the_truth()

    # Helpers

    def _cluster_works(self, *, succeed: bool, steps: int = 0) -> None:
        """Controllers and kubelets do what is due; pods that wait start, those that run succeed after some steps."""
        self.world.control()
        self.world.collect()
        self.world.kubelet()
        for pod in self.world.live_pods():
            if pod["status"]["phase"] == "Pending":
                self._start(pod)
            elif "deletionTimestamp" not in pod["metadata"]:
                if steps:
                    self.world.train(pod, steps)
                if succeed:
                    self.world.succeed(pod)

    def _start(self, pod: Object) -> None:
        """No attempt begins to read what an older one still writes."""
        uid, (stage, attempt) = pod["trainer"]["uid"], position(pod)
        for other in self.world.live_pods():
            if owner_of(other) != owner_of(pod) and other["trainer"]["uid"] == uid and runs(other):
                assert self.world.is_lost(other), f"{stage} {attempt} starts while {position(other)} runs"
        for number in pod["trainer"]["document"].earlier_attempts:
            assert number < attempt or stage is Stage.EXPORT
        self.world.start(pod)

    def _pick(self, index: int, *phases: str) -> Object | None:
        """A pod that its kubelet can still speak of."""
        pods = [
            pod
            for pod in self.world.pods()
            if pod["status"]["phase"] in phases and pod["spec"]["nodeName"] not in self.world.lost_nodes
        ]
        return pods[index % len(pods)] if pods else None

    def _status(self) -> list[tuple[str, Object]]:
        job = self.world.job
        return [(job["metadata"]["uid"], job["status"])] if job is not None and job.get("status") else []

    def _storage(self, uid: str) -> Storage:
        return self.world.storage[uid]

    def _attempts(self, uid: str) -> dict[Stage, int]:
        """The highest attempt of each stage that was ever created."""
        seen = self.starts.setdefault(uid, set())
        for child in self.world.children():
            if owner_of(child) == uid:
                seen.add(position(child))
        highest: dict[Stage, int] = {}
        for stage, number in seen:
            highest[stage] = max(number, highest.get(stage, 0))
        return highest
