"""A model of everything around the operator: API server, Job controller, garbage collector, kubelet, trainer, storage.

It behaves as the real ones were seen to, in what matters for losing or doubling work: writes check resourceVersions and
preconditions, a Job's condition is written after its pod has ended, a stopped pod's object goes with its report, the
pod of a lost node stays, and nothing happens before somebody makes it happen. The operator in it is the real one, from
`Reconciler` down; only its client and its clock are the model's.
"""

from __future__ import annotations

import json
import marshal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api import API_VERSION, KIND
from finetune_api.document import JobDocument
from finetune_api.failures import RULES, STOPPED_CODES, Disposition, FailureClass, exit_code_of
from finetune_api.names import COMPLETION_INDEX, CONTAINER, DOCUMENT_FILE, LABEL_ATTEMPT, LABEL_STAGE, Stage
from finetune_api.report import Outcome, Report, StepProgress
from finetune_api.status import CheckpointResult
from finetune_operator.config import Settings
from finetune_operator.kube import ApiError, Kind
from finetune_operator.metrics import Metrics
from finetune_operator.plan import NODE_LOST_SECONDS
from finetune_operator.reconcile import Key, Reconciler
from finetune_operator.resource import format_time, parse_time

Object = dict[str, Any]
NAMESPACE, NAME = "team", "bot"
KEY = Key(NAMESPACE, NAME)
START = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
STEPS = 10
STEP_SECONDS = 2.0
GRACE = 60
FREE_CODES = {*STOPPED_CODES} | {r.exit_code for r in RULES.values() if r.disposition is Disposition.RESTART_FREE}


class Crash(BaseException):
    """The operator dies at this point."""


@dataclass
class Fault:
    """What befalls one request of one look of the operator."""

    request: int | str
    """The n-th, or the first that writes this."""
    kind: str
    """error, throttled, reset, lost, crash or crash-after."""

    def before(self) -> None:
        if self.kind == "crash":
            raise Crash
        if self.kind == "reset":
            raise OSError("connection reset")
        if self.kind in ("error", "throttled"):
            raise ApiError(500 if self.kind == "error" else 429, "injected")

    def after(self) -> None:
        if self.kind == "crash-after":
            raise Crash
        if self.kind == "lost":
            raise OSError("the answer was lost")


FAULTS = ("error", "throttled", "reset", "lost", "crash", "crash-after")


@dataclass
class Storage:
    """What the trainer has stored under one job's uid."""

    checkpoints: dict[int, int] = field(default_factory=dict)
    """Step of the newest checkpoint by attempt."""
    finals: set[int] = field(default_factory=set)
    prepared: bool = False
    published: int | None = None
    """The attempt whose model was exported."""


class World:
    def __init__(self) -> None:
        self.now = START
        self.objects: dict[tuple[str, str], Object] = {}
        """By plural and name; there is one namespace."""
        self.storage: dict[str, Storage] = {}
        self.quota = True
        self.webhook_refuses = False
        self.skew = 0.0
        """Seconds by which the operator's clock is ahead of the cluster's."""
        self.lost_nodes: dict[str, datetime] = {}
        """And since when."""
        self.given_up: set[str] = set()
        """Pods of nodes that came back when the operator might have given them up: they end a little later."""
        self.ran: dict[str, float] = {}
        """Seconds that pods ran as far as their Jobs can tell, by the uid of the FineTuneJob."""
        self.taken: dict[str, set[str]] = {}
        """Pods that were told to stop or stopped as if they were, by the same."""
        self.surely_ran: dict[str, float] = {}
        """Seconds that containers ran on nodes that are there, by the same."""
        self.writes: list[str] = []
        """What the operator wrote, for people."""
        self.fault: Fault | None = None
        self.due: datetime | None = None
        """When the operator wants to look again."""
        self.untold: set[str] = set()
        """What an operator that died may have had no time to tell."""
        self._counter = 0
        self._requests = 0
        self._unreachable = False
        self.settings = Settings(trainer_image="trainer:test")
        self._restart_operator()

    # The operator

    def _restart_operator(self) -> None:
        self.reconciler = Reconciler(
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            self.settings,
            Metrics(),
            self._again,
            clock=lambda: self.now + timedelta(seconds=self.skew),
        )

    def _again(self, key: Key, delay: float) -> None:
        self.due = self.now + timedelta(seconds=delay)

    def operate(self, fault: Fault | None = None, unreachable: bool = False) -> None:
        """One look of the operator; nothing in it waits, so that it is over when this returns."""
        self.fault, self._requests, self._unreachable, self.due = fault, 0, unreachable, None
        try:
            self.reconciler(KEY).send(None)
        except StopIteration:
            pass
        except Crash:
            self.untold |= set(transitions(self.job))
            self._restart_operator()
            self.due = self.now
        finally:
            self.fault = None

    def _request(self, write: str = "") -> Iterator[None]:
        """A request of the operator, with what befalls it before and after it is served."""
        self._requests += 1
        fault = self.fault if self.fault is not None and self.fault.request in (self._requests, write) else None
        if fault:
            self.fault = None
            fault.before()
        yield
        if fault:
            fault.after()

    # The API server, as `Kube` shows it

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        for _ in self._request():
            found = self.objects.get((kind.plural, name))
            shown = _shown(found) if found is not None else None
        return shown

    async def list(self, kind: Kind, namespace: str | None, **query: str) -> list[Object]:
        for _ in self._request():
            items = [item for (plural, _), item in self.objects.items() if plural == kind.plural]
            if selector := query.get("labelSelector"):
                label, _, value = selector.partition("=")
                items = [item for item in items if item["metadata"].get("labels", {}).get(label) == value]
            if selector := query.get("fieldSelector"):
                name = selector.rpartition("=")[2]
                items = [item for item in items if item["involvedObject"]["name"] == name]
            items = [_shown(item) for item in items]
        return items

    async def create(self, kind: Kind, namespace: str, body: Object, **query: str) -> Object:
        name = body["metadata"]["name"]
        for _ in self._request(kind.plural):
            if self.webhook_refuses and kind.plural == "jobs":
                raise ApiError(403, "admission webhook denied the request")
            if (kind.plural, name) in self.objects:
                raise ApiError(409, f"{kind.plural} {name} already exists")
            self.add(kind.plural, body)
            self.writes.append(f"create {kind.plural}/{name}")
        return body

    async def delete(
        self, kind: Kind, namespace: str, name: str, uid: str | None = None, version: str | None = None
    ) -> None:
        for _ in self._request():
            found = self.objects.get((kind.plural, name))
            if found is None:
                continue
            metadata = found["metadata"]
            if (uid, version) != (metadata["uid"], metadata["resourceVersion"]):
                raise ApiError(409, "precondition failed")
            del self.objects[kind.plural, name]
            self.writes.append(f"delete {kind.plural}/{name}")

    async def patch_status(self, kind: Kind, namespace: str, name: str, body: Object) -> Object:
        for _ in self._request("status"):
            found = self.objects.get((kind.plural, name))
            if found is None:
                raise ApiError(404, "not found")
            asked = body["metadata"]
            if any(found["metadata"][key] != asked[key] for key in ("uid", "resourceVersion")):
                raise ApiError(409, "the object has been modified")
            found["status"] = _merged(found.get("status") or {}, _received(body["status"]))
            self.touch(found)
            self.writes.append(f"status {found['status'].get('phase')}")
        return found

    def add(self, plural: str, body: Object) -> Object:
        found = _received(body)
        self._counter += 1
        found["metadata"] |= {"uid": f"uid-{self._counter}", "creationTimestamp": format_time(self.now)}
        self.objects[plural, found["metadata"]["name"]] = found
        self.touch(found)
        return found

    def touch(self, item: Object) -> None:
        self._counter += 1
        item["metadata"]["resourceVersion"] = str(self._counter)

    # The progress of a running pod, as `ProgressReader` shows it

    async def read_all(self, addresses: Sequence[str]) -> list[tuple[Report | None, str]]:
        return [self._read(address) for address in addresses]

    def _read(self, address: str) -> tuple[Report | None, str]:
        pod = next((pod for pod in self.pods() if pod["status"].get("podIP") == address), None)
        if pod is None or self._unreachable or pod["spec"]["nodeName"] in self.lost_nodes:
            return None, "TimeoutError"
        return pod["trainer"]["report"], ""

    # Looking

    @property
    def job(self) -> Object | None:
        return self.objects.get(("finetunejobs", NAME))

    def children(self, plural: str = "jobs") -> list[Object]:
        return [item for (kind, _), item in self.objects.items() if kind == plural]

    def pods(self) -> list[Object]:
        return self.children("pods")

    def live_pods(self) -> list[Object]:
        """Pods whose container may run."""
        return [pod for pod in self.pods() if pod["status"]["phase"] in ("Pending", "Running")]

    def is_lost(self, pod: Object) -> bool:
        """Its node is lost for so long that the operator may know it."""
        if pod["metadata"]["name"] in self.given_up:
            return True
        until = pod["metadata"].get("deletionTimestamp")
        since = self.lost_nodes.get(pod["spec"]["nodeName"])
        if until is None or since is None:
            return False
        return (self.now - max(since, parse_time(until))).total_seconds() > NODE_LOST_SECONDS

    # Time

    def sleep(self, seconds: float) -> None:
        for owner in {owner_of(pod) for pod in self.pods()}:
            pods = [pod for pod in self.pods() if owner_of(pod) == owner]
            uid = pods[0]["trainer"]["uid"]
            # Until the Job controller has seen that a pod has ended, it ran for all that the cluster will remember.
            if any(runs(pod) or ("containerStatuses" in pod["status"] and not self._ended(pod)) for pod in pods):
                self.ran[uid] = self.ran.get(uid, 0.0) + seconds
            if self.all_run(pods[0]) and not any(pod["spec"]["nodeName"] in self.lost_nodes for pod in pods):
                self.surely_ran[uid] = self.surely_ran.get(uid, 0.0) + seconds
        self.now += timedelta(seconds=seconds)

    # People

    def apply(self, spec: Object) -> None:
        job = self.add(
            "finetunejobs",
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "metadata": {"name": NAME, "namespace": NAMESPACE, "generation": 1},
                "spec": {
                    "model": {"uri": "s3://models/base"},
                    "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
                    "output": {"uri": "s3://models/tuned"},
                    **spec,
                },
            },
        )
        self.storage[job["metadata"]["uid"]] = Storage()
        self.untold = set()

    def edit(self, **changes: Any) -> None:
        job = self.job
        if job is not None and any(job["spec"].get(key) != value for key, value in changes.items()):
            job["spec"] |= changes
            job["metadata"]["generation"] += 1
            self.touch(job)

    def delete_job(self) -> None:
        self.objects.pop(("finetunejobs", NAME), None)

    # Kueue

    def admit(self) -> None:
        """The queue lets everybody in."""
        for job in self.children():
            if job["spec"].get("suspend"):
                job["spec"]["suspend"] = False
                self.touch(job)

    # The Job controller

    def control(self) -> None:
        """The Job controller brings every Job forward by one step."""
        for job in self.children():
            pods = [pod for pod in self.pods() if owner_of(pod) == job["metadata"]["uid"]]
            status = job.setdefault("status", {})
            conditions = {condition["type"]: condition for condition in status.setdefault("conditions", [])}
            if "Failed" in conditions or "Complete" in conditions:
                continue
            if decided := conditions.get("FailureTarget") or conditions.get("SuccessCriteriaMet"):
                for pod in pods:
                    if pod["status"]["phase"] in ("Pending", "Running"):
                        self.stop(pod)
                if not any(pod["status"]["phase"] in ("Pending", "Running") for pod in pods):
                    kind = "Failed" if decided["type"] == "FailureTarget" else "Complete"
                    self._decide(job, kind, decided["reason"], decided["message"])
                continue
            failed = [pod for pod in pods if pod["status"]["phase"] == "Failed" and not pod["trainer"]["ignored"]]
            indexes = range(job["spec"]["completions"])
            succeeded = {index_of(pod) for pod in pods if pod["status"]["phase"] == "Succeeded"}
            there = succeeded | {index_of(pod) for pod in pods if pod["status"]["phase"] in ("Pending", "Running")}
            if failed:
                self._judge(job, failed[0])
            elif len(succeeded) == len(indexes):
                self._decide(
                    job, "SuccessCriteriaMet", "CompletionsReached", "Reached expected number of succeeded pods"
                )
            elif job["spec"].get("suspend"):
                for pod in pods:
                    self.stop(pod)
            elif self.quota:
                status.setdefault("startTime", format_time(self.now))
                for index in indexes:
                    if index not in there:
                        self._make_pod(job, index)
        for pod in self.pods():
            owner = owner_of(pod)
            finished = pod["status"]["phase"] in ("Succeeded", "Failed")
            known = any(job["metadata"]["uid"] == owner for job in self.children())
            if finished and "deletionTimestamp" in pod["metadata"] and (not known or self._is_counted(owner)):
                del self.objects["pods", pod["metadata"]["name"]]

    def _is_counted(self, owner: str) -> bool:
        job = next(job for job in self.children() if job["metadata"]["uid"] == owner)
        return bool(job.get("status", {}).get("conditions"))

    def _judge(self, job: Object, pod: Object) -> None:
        name = f"{NAMESPACE}/{pod['metadata']['name']}"
        ended = (pod["status"].get("containerStatuses") or [{}])[0].get("state", {}).get("terminated")
        disrupted = any(condition["type"] == "DisruptionTarget" for condition in pod["status"].get("conditions", []))
        if disrupted:
            text = f"Pod {name} has condition DisruptionTarget matching FailJob rule at index 0"
            self._decide(job, "FailureTarget", "PodFailurePolicy", text)
        elif ended is not None and self._ignores(job, ended["exitCode"]):
            # The pod does not count; unless the Job is suspended, there will be another one.
            pod["trainer"]["ignored"] = True
            if "deletionTimestamp" in pod["metadata"]:
                del self.objects["pods", pod["metadata"]["name"]]
        elif ended is not None:
            text = (
                f"Container {CONTAINER} for pod {name} failed with exit code {ended['exitCode']} matching FailJob "
                "rule at index 1"
            )
            self._decide(job, "FailureTarget", "PodFailurePolicy", text)
        else:
            self._decide(job, "FailureTarget", "BackoffLimitExceeded", "Job has reached the specified backoff limit")

    def _ignores(self, job: Object, code: int) -> bool:
        rules = job["spec"]["podFailurePolicy"]["rules"]
        return any(rule["action"] == "Ignore" and code in rule["onExitCodes"]["values"] for rule in rules)

    def _decide(self, job: Object, kind: str, reason: str, message: str) -> None:
        when = format_time(self.now)
        condition = {"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": when}
        job["status"]["conditions"].append(condition)
        self.touch(job)

    def _make_pod(self, job: Object, index: int) -> None:
        self._counter += 1
        name = f"{job['metadata']['name']}-{index}-{self._counter}"
        (volume,) = [v for v in job["spec"]["template"]["spec"]["volumes"] if v["name"] == "document"]
        config_map = self.objects["configmaps", volume["configMap"]["name"]]
        document = JobDocument.model_validate(json.loads(config_map["data"][DOCUMENT_FILE]))
        limits = job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        if document.stage is Stage.TRAIN:
            assert document.processes == max(1, int(limits.get("nvidia.com/gpu", 0))), "a document of another Job"
            assert document.nodes == job["spec"]["completions"], "a document of another Job"
        pod = self.add(
            "pods",
            {
                "metadata": {
                    "name": name,
                    "labels": job["spec"]["template"]["metadata"]["labels"],
                    "annotations": {COMPLETION_INDEX: str(index)},
                    "ownerReferences": [
                        {"kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
                    ],
                },
                "spec": {"nodeName": f"node-{self._counter}"},
                "status": {"phase": "Pending", "podIP": f"10.0.0.{self._counter}"},
            },
        )
        pod["trainer"] = {
            "uid": document.job.uid,
            "document": document,
            "ignored": False,
            "report": Report(job_uid=document.job.uid, stage=document.stage, attempt=document.attempt),
        }

    # The garbage collector

    def collect(self) -> None:
        """What has lost its owner goes: Jobs at once, pods with their grace."""
        uids = {item["metadata"]["uid"] for item in self.objects.values()}
        for (plural, name), item in [*self.objects.items()]:
            owners = item["metadata"].get("ownerReferences") or []
            if owners and all(owner["uid"] not in uids for owner in owners):
                if plural == "pods":
                    self.stop(item)
                else:
                    del self.objects[plural, name]

    # The kubelet, and the trainer in its pod

    def start(self, pod: Object) -> None:
        pod["status"]["phase"] = "Running"
        pod["status"]["containerStatuses"] = [
            {"name": CONTAINER, "state": {"running": {"startedAt": format_time(self.now)}}}
        ]
        trainer = pod["trainer"]
        if trainer["document"].stage is Stage.TRAIN and index_of(pod) == 0:
            storage = self.storage[trainer["uid"]]
            document = trainer["document"]
            numbers = [document.attempt, *document.earlier_attempts]
            stored = [storage.checkpoints.get(number, 0) for number in numbers]
            trainer["report"] = trainer["report"].model_copy(update={"resumed_from_step": max(stored, default=0)})
            self._progress(trainer, max(stored, default=0))

    def train(self, pod: Object, steps: int) -> None:
        """Some steps, and a checkpoint after them."""
        trainer = pod["trainer"]
        if trainer["document"].stage is not Stage.TRAIN or index_of(pod) > 0 or not self.all_run(pod):
            return
        step = min(STEPS - 1, trainer["report"].progress.step + steps)
        self.storage[trainer["uid"]].checkpoints[trainer["document"].attempt] = step
        checkpoint = CheckpointResult(step=step, uri=f"s3://w/{step}", time=format_time(self.now))
        trainer["report"] = trainer["report"].model_copy(update={"checkpoint": checkpoint})
        self._progress(trainer, step)

    def _progress(self, trainer: dict[str, Any], step: int) -> None:
        progress = StepProgress(step=step, total_steps=STEPS, step_seconds=STEP_SECONDS)
        trainer["report"] = trainer["report"].model_copy(update={"progress": progress})

    def all_run(self, pod: Object) -> bool:
        """All pods of its Job train together."""
        running = {index_of(other) for other in self.pods() if owner_of(other) == owner_of(pod) and runs(other)}
        document = pod["trainer"]["document"]
        return len(running) == (document.nodes if document.stage is Stage.TRAIN else 1)

    def succeed(self, pod: Object) -> None:
        """Pods that train together end together."""
        if not self.all_run(pod):
            return
        for other in self.pods():
            if owner_of(other) == owner_of(pod) and runs(other):
                self._succeed(other)

    def _succeed(self, pod: Object) -> None:
        if index_of(pod) > 0:
            self._end(pod, 0)
            return
        trainer = pod["trainer"]
        document, storage = trainer["document"], self.storage[trainer["uid"]]
        if document.stage is Stage.PREPARE:
            storage.prepared = True
        elif document.stage is Stage.TRAIN:
            assert storage.prepared, "nothing was prepared"
            storage.finals.add(document.attempt)
            self._progress(trainer, STEPS)
        else:
            (trained,) = document.earlier_attempts
            assert trained in storage.finals, f"attempt {trained} has not trained to its end"
            storage.published = trained
        trainer["report"] = trainer["report"].model_copy(update={"outcome": Outcome.SUCCEEDED})
        self._end(pod, 0)

    def fail(self, pod: Object, code: int, reason: str = "Error") -> None:
        self._end(pod, code, reason)

    def _end(self, pod: Object, code: int, reason: str = "Completed") -> None:
        if code in FREE_CODES:
            self.take(pod)
        started = pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
        pod["status"]["phase"] = "Failed" if code else "Succeeded"
        pod["status"]["containerStatuses"][0]["state"] = {
            "terminated": {
                "exitCode": code,
                "reason": reason,
                "startedAt": started,
                "finishedAt": format_time(self.now),
                "message": pod["trainer"]["report"].encode().decode(),
            }
        }

    def stop(self, pod: Object, *, disrupted: bool = False) -> None:
        """Somebody deletes a pod: it has its grace to end."""
        self.take(pod)
        if disrupted:
            pod["status"].setdefault("conditions", []).append({"type": "DisruptionTarget", "status": "True"})
        if "deletionTimestamp" not in pod["metadata"]:
            pod["metadata"]["deletionTimestamp"] = format_time(self.now + timedelta(seconds=GRACE))
        if pod["status"]["phase"] == "Pending":
            owned = any(job["metadata"]["uid"] == owner_of(pod) for job in self.children())
            if owned and not self._is_suspended(pod):
                pod["status"]["phase"] = "Failed"
            else:
                self.objects.pop(("pods", pod["metadata"]["name"]), None)

    def take(self, pod: Object) -> None:
        self.taken.setdefault(pod["trainer"]["uid"], set()).add(pod["metadata"]["name"])

    def _is_suspended(self, pod: Object) -> bool:
        owner = owner_of(pod)
        return any(job["metadata"]["uid"] == owner and job["spec"].get("suspend") for job in self.children())

    def kubelet(self, *, saves: bool = True) -> None:
        """Pods that were told to stop end: by themselves after saving, or killed."""
        for pod in self.pods():
            if "deletionTimestamp" not in pod["metadata"] or pod["status"]["phase"] != "Running":
                continue
            if pod["spec"]["nodeName"] in self.lost_nodes:
                continue
            if saves:
                self.train(pod, 1)
            self.fail(pod, exit_code_of(FailureClass.TERMINATED) if saves else 137)

    def lose_node(self, pod: Object) -> None:
        """The machine is gone, and after a while the cluster gives its pods up."""
        self.lost_nodes.setdefault(pod["spec"]["nodeName"], self.now)
        self.stop(pod, disrupted=True)

    def nodes_come_back(self) -> None:
        self.given_up |= {pod["metadata"]["name"] for pod in self.pods() if self.is_lost(pod)}
        self.lost_nodes.clear()

    def drop_finished_pods(self) -> None:
        """Pod objects of ended Jobs go, and their reports with them."""
        for pod in self.pods():
            if pod["status"]["phase"] in ("Succeeded", "Failed") and self._ended(pod):
                del self.objects["pods", pod["metadata"]["name"]]

    def _ended(self, pod: Object) -> bool:
        owner = owner_of(pod)
        job = next((job for job in self.children() if job["metadata"]["uid"] == owner), None)
        return job is None or bool((job.get("status") or {}).get("conditions"))


def _shown(item: Object) -> Object:
    """A copy of what the API server knows of an object."""
    # copy.deepcopy would take a third of a life's time.
    shown: Object = marshal.loads(marshal.dumps({key: value for key, value in item.items() if key != "trainer"}))
    return shown


def _received(body: Object) -> Object:
    """What comes out of the wire: plain values."""
    received: Object = json.loads(json.dumps(body))
    return received


def transitions(job: Object | None) -> dict[str, str]:
    """What a job's status says that happened, and how the message of its event begins."""
    status = (job or {}).get("status") or {}
    found = {}
    for entry in [*status.get("history", []), *filter(None, [status.get("attempt")])]:
        stage, number = entry["stage"], entry["number"]
        found[f"{stage} {number}"] = f"Started {stage} attempt {number} "
    for condition in status.get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            found["end"] = condition["message"]
    return found


def owner_of(item: Object) -> str:
    uid: str = item["metadata"]["ownerReferences"][0]["uid"]
    return uid


def index_of(pod: Object) -> int:
    return int(pod["metadata"]["annotations"][COMPLETION_INDEX])


def runs(pod: Object) -> bool:
    return bool(pod["status"]["phase"] == "Running")


def position(item: Object) -> tuple[Stage, int]:
    labels = item["metadata"]["labels"]
    return Stage(labels[LABEL_STAGE]), int(labels[LABEL_ATTEMPT])


def is_open(job: Object) -> bool:
    """A Job that has pods, or may have."""
    conditions = {condition["type"] for condition in (job.get("status") or {}).get("conditions", [])}
    return not conditions & {"Failed", "Complete"}


def _merged(value: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    result = dict(value) if isinstance(value, dict) else {}
    for key, part in patch.items():
        if part is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), part)
    return result
