"""The operator's I/O against servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import kopf
import pytest
from builders import SETTINGS, UID, job_body, report

from finetune_api import GROUP, PLURAL, VERSION
from finetune_api.names import LABEL_JOB_UID, Stage
from finetune_operator import handlers, progress
from finetune_operator.cli import commands
from finetune_operator.handlers import Operator
from finetune_operator.kube import EVENTS, FINETUNE_JOBS, JOBS, ApiError, Kind
from finetune_operator.metrics import Metrics
from finetune_operator.progress import ProgressReader
from finetune_operator.reconcile import Key, Reconciler
from finetune_operator.watches import Watch
from finetune_operator.work_queue import WorkQueue


@contextlib.asynccontextmanager
async def agent(answer: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[int]:
    """A server that reads a request and answers as told; its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await answer(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


class TestProgress:
    async def ask(self, port: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
        monkeypatch.setattr(progress, "AGENT_PORT", port)
        reader = ProgressReader()
        try:
            return await reader.read("127.0.0.1")
        finally:
            await reader.close()

    async def test_an_answer_in_several_segments_is_read_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        body = report(Stage.TRAIN, 1).encode()

        async def answer(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
            for start in range(0, len(body), 20):
                await writer.drain()
                await asyncio.sleep(0.01)
                writer.write(body[start : start + 20])

        async with agent(answer) as port:
            found, problem = await self.ask(port, monkeypatch)
        assert problem == ""
        assert found.job_uid == UID

    async def test_an_endless_answer_is_not_read_to_its_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def answer(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while True:
                    writer.write(b"x" * 65536)
                    await writer.drain()

        async with agent(answer) as port:
            assert await self.ask(port, monkeypatch) == (None, "no report in the answer")

    async def test_silence_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(progress, "TIMEOUT_SECONDS", 0.2)

        async def answer(writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(1)

        async with agent(answer) as port:
            found, problem = await self.ask(port, monkeypatch)
        assert found is None
        assert "Timeout" in problem

    async def test_a_pod_sends_the_operator_nowhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a pod answers is up to its job, and the operator reaches what the job does not."""
        asked = 0

        async def secret(writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            asked += 1
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + report(Stage.TRAIN, 1).encode())

        async with agent(secret) as other:

            async def answer(writer: asyncio.StreamWriter) -> None:
                writer.write(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:%d/\r\n\r\n" % other)

            async with agent(answer) as port:
                assert await self.ask(port, monkeypatch) == (None, "no report in the answer")
        assert asked == 0

    async def test_pods_are_asked_directly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)

        async def answer(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + report(Stage.TRAIN, 1).encode())

        async with agent(answer) as port:
            found, problem = await self.ask(port, monkeypatch)
        assert (found.job_uid, problem) == (UID, "")

    async def test_no_more_than_fifty_are_asked_at_the_same_time(self) -> None:
        asked = highest = 0

        class Session:
            @contextlib.asynccontextmanager
            async def get(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
                nonlocal asked, highest
                asked += 1
                highest = max(highest, asked)
                await asyncio.sleep(0)
                asked -= 1
                yield SimpleNamespace(content=SimpleNamespace(read=lambda _: asyncio.sleep(0, b"")))

        reader = ProgressReader()
        reader._session = Session()  # type: ignore[assignment]
        assert len(await reader.read_all(["10.0.0.7"] * 200)) == 200
        assert highest == 50


class Cluster:
    """Answers `get` and `list` as told, one after the other; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def get(self, *_: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class TestFollowing:
    ENDED = job_body(
        {
            "conditions": [
                {
                    "type": "Complete",
                    "status": "True",
                    "reason": "TrainingComplete",
                    "message": "done",
                    "lastTransitionTime": "2026-01-01T00:00:00Z",
                }
            ]
        }
    )

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(commands, "POLL_SECONDS", 0.001)

    @pytest.mark.parametrize("error", [ApiError(500, "etcdserver: leader changed"), ApiError(429, ""), TimeoutError()])
    async def test_a_hiccup_of_the_cluster_is_no_end(self, error: Exception) -> None:
        cluster = Cluster(job_body(), error, error, self.ENDED)
        seen = [job async for job in commands.states(cluster, "team", "bot")]  # type: ignore[arg-type]
        assert len(seen) == 2

    async def test_a_cluster_that_stays_away_is(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(commands, "PATIENCE_SECONDS", 0.002)
        cluster = Cluster(*[ApiError(500, "gone")] * 10)
        with pytest.raises(ApiError):
            [job async for job in commands.states(cluster, "team", "bot")]  # type: ignore[arg-type]
        assert len(cluster.answers) > 5

    async def test_a_refusal_is_one_at_once(self) -> None:
        cluster = Cluster(ApiError(403, "forbidden"), self.ENDED)
        with pytest.raises(ApiError):
            [job async for job in commands.states(cluster, "team", "bot")]  # type: ignore[arg-type]


async def test_a_namespace_that_is_gone_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Namespaces:
        async def versions(self, kind: Any, namespace: str, **_: Any) -> dict[tuple[str, str], str]:
            if namespace == "gone":
                raise ApiError(403, "forbidden")
            return {(namespace, "bot"): "7"} if kind is FINETUNE_JOBS else {}

    operator = Operator(type(SETTINGS)(namespaces=("gone", "team"), resync_seconds=0.01))
    operator._resynced = 0.0
    task = asyncio.create_task(operator._resync(Namespaces()))  # type: ignore[arg-type]
    await asyncio.sleep(0.05)
    task.cancel()
    assert len(operator.queue) == 1
    assert operator._resynced > 0


class Silent:
    """An API server that never answers, and notes for which jobs it was asked."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[str] = asyncio.Queue()

    async def param_serialize(self, method: str, path: str, **_: Any) -> tuple[str, str]:
        return method, path

    async def call_api(self, method: str, path: str, **_: Any) -> None:
        if "/namespaces/team/finetunejobs/" in path:
            self.asked.put_nowait(path)
        await asyncio.sleep(3600)

    async def close(self) -> None:
        pass


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Silent:
    api = Silent()

    async def load_client() -> Silent:
        return api

    monkeypatch.setattr(handlers, "load_client", load_client)
    monkeypatch.setattr(handlers, "STOP_SECONDS", 0.01)
    return api


async def test_a_look_that_does_not_end_holds_up_a_stop_for_a_bounded_time(silent: Silent) -> None:
    operator = Operator(type(SETTINGS)(http_host="127.0.0.1", http_port=0))
    await operator.open()
    await operator.lead()
    await operator.start()
    operator.mark("team", "bot")
    await silent.asked.get()
    async with asyncio.timeout(30):
        await operator.stop()


async def test_so_many_jobs_are_looked_at_at_the_same_time_as_there_are_workers(silent: Silent) -> None:
    operator = Operator(type(SETTINGS)(http_host="127.0.0.1", http_port=0, workers=3))
    await operator.open()
    await operator.lead()
    await operator.start()
    for number in range(10):
        operator.mark("team", f"bot{number}")
    for _ in range(3):
        await silent.asked.get()
    for _ in range(100):
        await asyncio.sleep(0)
    assert silent.asked.empty()
    await operator.stop()


class TestWatch:
    def test_what_it_has_shown_is_not_missed(self) -> None:
        watch = Watch()
        watch.show(("team", "bot"), "1")
        for _ in range(3):
            watch.compare({("team", "bot"): "1"})
            assert not watch.silent

    def test_news_may_be_on_their_way_for_one_list(self) -> None:
        watch = Watch()
        watch.compare({("team", "bot"): "1"})
        assert not watch.silent
        watch.show(("team", "bot"), "1")
        watch.compare({("team", "bot"): "1"})
        assert not watch.silent

    def test_what_is_missing_twice_never_comes(self) -> None:
        watch = Watch()
        watch.show(("team", "bot"), "1")
        watch.compare({("team", "bot"): "2"})
        watch.compare({("team", "bot"): "2"})
        assert watch.silent

    def test_an_object_that_changes_all_the_time_says_nothing(self) -> None:
        watch = Watch()
        for version in "12345":
            watch.compare({("team", "bot"): version})
            assert not watch.silent

    def test_it_recovers(self) -> None:
        watch = Watch()
        for _ in range(2):
            watch.compare({("team", "bot"): "2"})
        watch.show(("team", "bot"), "2")
        watch.compare({("team", "bot"): "2"})
        assert not watch.silent

    def test_what_is_deleted_is_forgotten(self) -> None:
        watch = Watch()
        watch.compare({("team", "bot"): "1"})
        watch.compare({})
        watch.compare({("team", "bot"): "1"})
        assert not watch.silent

    @pytest.mark.parametrize("shown", [False, True])
    def test_what_is_deleted_is_named(self, shown: bool) -> None:
        watch = Watch()
        if shown:
            watch.show(("team", "bot"), "1")
        else:
            assert watch.compare({("team", "bot"): "1"}) == set()
        assert watch.compare({}) == {("team", "bot")}
        watch.compare({})
        assert watch.compare({}) == set(), "not for ever"

    def test_what_is_made_while_a_list_is_on_its_way_is_not_missed(self) -> None:
        watch = Watch()
        watch.show(("team", "bot"), "1")
        watch.compare({})
        for _ in range(3):
            watch.compare({("team", "bot"): "1"})
            assert not watch.silent


class Lists:
    """Of everything in a cluster: one job."""

    failing = False
    deleted = False

    async def versions(self, kind: Any, namespace: str | None, **_: Any) -> dict[tuple[str, str], str]:
        if self.failing:
            raise ApiError(500, "no")
        return {("team", "bot"): "7"} if kind is FINETUNE_JOBS and not self.deleted else {}


class TestProbes:
    async def resync(self, operator: Operator, times: int, lists: Lists) -> None:
        """So many resyncs, without their pauses."""
        pauses = 0

        async def pause(seconds: float) -> None:
            nonlocal pauses
            pauses += 1
            if pauses == times:
                raise asyncio.CancelledError

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(asyncio.CancelledError):
            patch.setattr(handlers.asyncio, "sleep", pause)
            await operator._resync(lists)  # type: ignore[arg-type]

    async def test_a_leader_is_ready_after_its_first_resync(self) -> None:
        operator = Operator(SETTINGS)
        assert operator.unready() == "starting\n"
        await operator.lead()
        assert operator.unready() == "no resync has succeeded yet\n"
        failing = Lists()
        failing.failing = True
        await self.resync(operator, 3, failing)
        assert operator.unready() == "no resync has succeeded yet\n"
        assert operator.unhealthy() == "", "a restart would not mend that, and it has had no time yet"
        await self.resync(operator, 1, Lists())
        assert operator.unready() == operator.unhealthy() == ""

    async def test_a_resync_that_is_overdue_is_unhealthy_for_a_leader_only(self) -> None:
        operator = Operator(SETTINGS)
        operator._resynced -= 3600
        assert operator.unhealthy() == ""
        await operator.lead()
        assert operator.unhealthy() == "", "its time counts from when it leads"
        operator._resynced -= 3600
        assert "last successful resync was 36" in operator.unhealthy()
        assert operator.unready() == operator.unhealthy()

    async def test_a_task_that_ended_is_unhealthy(self) -> None:
        operator = Operator(SETTINGS)
        await operator.lead()
        task = operator._run("resync", asyncio.sleep(0))
        await task
        assert operator.unhealthy() == "resync ended\n"

    async def test_a_job_whose_deletion_was_missed_is_looked_at_once_more(self) -> None:
        """Else its series would stay until the operator ends."""
        operator, lists = Operator(SETTINGS), Lists()
        await self.resync(operator, 1, lists)
        lists.deleted = True
        for expected in (1, 0):
            operator.queue = WorkQueue()
            await self.resync(operator, 1, lists)
            assert len(operator.queue) == expected

    async def test_a_silent_watch_is_unhealthy(self) -> None:
        operator = Operator(SETTINGS)
        await operator.lead()
        await self.resync(operator, 2, Lists())
        assert operator.unhealthy() == "the watch of finetunejobs in all namespaces shows no changes\n"
        operator.watched("finetunejobs", "team", "bot", "7")
        await self.resync(operator, 1, Lists())
        assert operator.unhealthy() == ""


async def test_jobs_are_spread_over_the_time_between_two_resyncs_but_for_the_first_one() -> None:
    delays: list[float] = []

    class Jobs(Lists):
        async def versions(self, kind: Any, namespace: str | None, **_: Any) -> dict[tuple[str, str], str]:
            return {("team", str(number)): "7" for number in range(100)} if kind is FINETUNE_JOBS else {}

    operator = Operator(SETTINGS)
    operator.queue = SimpleNamespace(add=lambda key, delay: delays.append(delay))  # type: ignore[assignment]
    await TestProbes().resync(operator, 2, Jobs())
    first, later = delays[:100], sorted(delays[100:])
    assert set(first) == {0.0}
    assert len(later) == 100
    assert later[0] < 0.25 * SETTINGS.resync_seconds < 0.75 * SETTINGS.resync_seconds < later[-1]
    assert later[-1] <= SETTINGS.resync_seconds


class TestKopf:
    """What kopf would do by itself: watch everything, write events, list CRDs, and touch what others have written."""

    @pytest.fixture
    def configured(self) -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        handlers.configure(settings, SETTINGS)
        return settings

    @pytest.mark.parametrize(("group", "plural"), [("batch", "jobs"), ("", "pods")])
    def test_only_children_are_streamed(self, configured: kopf.OperatorSettings, group: str, plural: str) -> None:
        resource = kopf.Resource(group, "v1", plural)
        assert list(configured.watching.label_selectors.collect(resource)) == [LABEL_JOB_UID]

    def test_all_jobs_are_streamed(self, configured: kopf.OperatorSettings) -> None:
        assert list(configured.watching.label_selectors.collect(kopf.Resource(GROUP, VERSION, PLURAL))) == []

    def test_it_writes_no_events_and_needs_no_more_rights_than_we_have(self, configured: kopf.OperatorSettings) -> None:
        assert (configured.posting.enabled, configured.scanning.disabled) == (False, True)
        assert configured.peering.standalone

    def test_what_other_operators_of_kopf_have_written_is_not_touched(self, configured: kopf.OperatorSettings) -> None:
        ours: Any = configured.persistence
        assert ours.finalizer.startswith(f"{GROUP}/")
        assert (ours.progress_storage.prefix, ours.diffbase_storage.prefix) == (GROUP, GROUP)

    def test_streams_that_went_silent_are_opened_anew(self, configured: kopf.OperatorSettings) -> None:
        assert 60 < (configured.watching.inactivity_timeout or 0) < 100
        assert 100 < (configured.watching.server_timeout or 0) < 600
        assert (configured.networking.request_timeout or 0) < 60

    async def test_they_are_set_when_kopf_starts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        operator, settings = Operator(SETTINGS), kopf.OperatorSettings()
        monkeypatch.setattr(operator, "start", lambda: asyncio.sleep(0))
        found = handlers.build_registry(operator)._activities.get_all_handlers()
        start: Any = next(handler.fn for handler in found if handler.fn.__name__ == "start")
        await start(settings=settings)
        assert settings.persistence.finalizer.startswith(f"{GROUP}/")

    @pytest.mark.parametrize("resource", [(GROUP, VERSION, PLURAL), ("batch", "v1", "jobs"), ("", "v1", "pods")])
    def test_everything_is_watched_and_nothing_is_written(self, resource: tuple[str, str, str]) -> None:
        registry, watched = handlers.build_registry(Operator(SETTINGS)), kopf.Resource(*resource)
        assert registry._watching.has_handlers(watched)
        # Those that put finalizers and annotations on objects.
        assert not registry._changing.has_handlers(watched)
        assert not registry._spawning.has_handlers(watched)


class TestTakenNames:
    """A child that is to be created is there already, and is the job's own."""

    async def look(self, **metadata: Any) -> str:
        """Why the job waits."""
        reasons: list[str] = []

        class Taken:
            async def get(self, kind: Kind, *_: Any) -> dict[str, Any]:
                if kind is FINETUNE_JOBS:
                    return job_body()
                return {"metadata": {"name": "bot-prepare-1", "ownerReferences": [{"uid": UID}], **metadata}}

            async def list(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
                return []

            async def create(self, kind: Kind, *_: Any) -> None:
                if kind is JOBS:
                    raise ApiError(409, "already exists")

            async def patch_status(self, kind: Kind, namespace: str, name: str, body: dict[str, Any]) -> None:
                reasons.extend(condition["reason"] for condition in body["status"]["conditions"])

        reconcile = Reconciler(Taken(), ProgressReader(), SETTINGS, Metrics(), lambda *_: None)  # type: ignore[arg-type]
        await reconcile(Key("team", "bot"))
        (reason,) = reasons
        return reason

    async def test_one_from_before_the_operator_died_is_taken(self) -> None:
        assert await self.look() == "WaitingForPod"

    async def test_one_that_somebody_deletes_is_waited_for(self) -> None:
        """Its pods may still run, and it would be gone a moment after it was taken."""
        assert await self.look(deletionTimestamp="2026-11-21T12:00:00Z") == "WaitingForCleanup"


class Won:
    """An election that is won, and notes when it is looked at."""

    looked = 0

    def __init__(self, *_: Any) -> None:
        Won.looked = 0

    async def win(self) -> None:
        return

    async def keep(self) -> None:
        await asyncio.sleep(3600)

    async def release(self) -> None:
        return

    def check(self) -> None:
        Won.looked += 1


class Answers:
    """An API server with one new job, which notes how often the lease was looked at before the first write."""

    def __init__(self) -> None:
        self.before_write = asyncio.Event()
        self.looked_before_write = 0

    async def param_serialize(self, method: str, path: str, **_: Any) -> tuple[str, str]:
        return method, path

    async def call_api(self, method: str, path: str, **_: Any) -> Any:
        if method != "GET":
            self.looked_before_write = Won.looked
            self.before_write.set()
            await asyncio.sleep(3600)
        body = job_body() if path.endswith("/finetunejobs/bot") else {"items": []}
        return SimpleNamespace(status=200, headers={}, read=lambda: asyncio.sleep(0, json.dumps(body).encode()))

    async def close(self) -> None:
        pass


async def test_the_lease_is_looked_at_before_each_write_and_after_each_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Answers()

    async def load_client() -> Answers:
        return api

    monkeypatch.setattr(handlers, "load_client", load_client)
    monkeypatch.setattr(handlers, "Election", Won)
    monkeypatch.setattr(handlers, "STOP_SECONDS", 0.01)
    settings = type(SETTINGS)(http_host="127.0.0.1", http_port=0, lease_name="lease", lease_namespace="team")
    operator = Operator(settings)
    await operator.open()
    await operator.lead()
    os.kill(os.getpid(), signal.SIGCONT)
    assert Won.looked == 1
    await operator.start()
    operator.mark("team", "bot")
    async with asyncio.timeout(30):
        await api.before_write.wait()
    assert api.looked_before_write == 2
    await operator.stop()
    os.kill(os.getpid(), signal.SIGCONT)
    assert Won.looked == 2, "a lease that was released is nobody's to look at"


class TestRefusals:
    """What stands in the way of a child is in the status of a job that has nothing else to say."""

    class Cluster:
        """Knows a new job, and refuses its children."""

        def __init__(self, error: ApiError) -> None:
            self.error = error
            self.status: dict[str, Any] = {}

        async def get(self, *_: Any) -> Any:
            return job_body(self.status)

        async def list(self, *_: Any, **__: Any) -> list[Any]:
            return []

        async def create(self, kind: Any, _: str, body: Any) -> Any:
            if kind is JOBS:
                raise self.error
            return body

        async def patch_status(self, *arguments: Any) -> None:
            self.status |= arguments[-1]["status"]

    async def look(self, error: ApiError) -> tuple[dict[str, Any], list[float]]:
        cluster, again = self.Cluster(error), []
        reconcile = Reconciler(cluster, ProgressReader(), SETTINGS, Metrics(), lambda _, delay: again.append(delay))  # type: ignore[arg-type]
        await reconcile(Key("team", "bot"))
        return cluster.status, again

    @pytest.mark.parametrize(
        "error",
        [
            ApiError(403, 'jobs.batch "bot-prepare-1" is forbidden: exceeded quota: jobs'),
            ApiError(500, 'failed calling webhook "mjob.kb.io": connection refused'),
            ApiError(422, 'admission webhook "images.example.org" denied the request: unsigned image'),
            ApiError(422, "jobs.batch is forbidden: ValidatingAdmissionPolicy 'images' denied request: unsigned image"),
        ],
        ids=str,
    )
    async def test_what_somebody_can_mend_is_waited_for(self, error: ApiError) -> None:
        status, again = await self.look(error)
        assert (status["phase"], status["reason"]) == ("Pending", "PodsRefused")
        assert error.message in status["conditions"][0]["message"]
        assert again == [30.0]

    async def test_what_can_never_be_created_is_not(self) -> None:
        status, _ = await self.look(ApiError(422, 'Job.batch "bot-prepare-1" is invalid: spec.template.spec: bad'))
        assert (status["phase"], status["reason"]) == ("Failed", "UserError")

    async def test_words_that_differ_each_time_make_no_writes(self) -> None:
        """Each write is an event, which makes the operator look again."""
        cluster = self.Cluster(ApiError(500, "failed calling webhook: read tcp 10.0.0.1:50000: reset"))
        reconcile = Reconciler(cluster, ProgressReader(), SETTINGS, Metrics(), lambda *_: None)  # type: ignore[arg-type]
        said = set()
        for port in range(50000, 50020):
            cluster.error = ApiError(500, f"failed calling webhook: read tcp 10.0.0.1:{port}: reset")
            await reconcile(Key("team", "bot"))
            said.add(cluster.status["conditions"][0]["message"])
        assert len(said) == 1

    async def test_a_job_that_was_mended_and_created_anew_is_not_refused_for_the_old_one(self) -> None:
        cluster = self.Cluster(ApiError(422, 'Job.batch "bot-prepare-1" is invalid: spec.template.spec: bad'))
        reconcile = Reconciler(cluster, ProgressReader(), SETTINGS, Metrics(), lambda *_: None)  # type: ignore[arg-type]
        await reconcile(Key("team", "bot"))
        assert cluster.status["phase"] == "Failed"
        body = job_body()
        body["metadata"]["uid"] = "another"

        async def get(*_: Any) -> Any:
            return body

        async def create(*arguments: Any) -> Any:
            return arguments[-1]

        cluster.status, cluster.get, cluster.create = {}, get, create  # type: ignore[method-assign]
        await reconcile(Key("team", "bot"))
        assert cluster.status["phase"] == "Pending"

    async def test_events_that_fail_are_not_tried_at_each_look(self) -> None:
        cluster = self.Cluster(ApiError(403, "exceeded quota"))
        tried = []

        async def create(kind: Any, _: str, body: Any) -> Any:
            if kind is EVENTS:
                tried.append(body)
                raise ApiError(503, "no room for events")
            raise cluster.error

        cluster.create = create  # type: ignore[method-assign]
        reconcile = Reconciler(cluster, ProgressReader(), SETTINGS, Metrics(), lambda *_: None)  # type: ignore[arg-type]
        for _ in range(10):
            await reconcile(Key("team", "bot"))
        assert len(tried) == 1

    async def test_events_are_recorded_at_once(self) -> None:
        cluster = self.Cluster(ApiError(403, "exceeded quota"))
        told = []

        async def create(kind: Any, _: str, body: Any) -> Any:
            if kind is JOBS:
                raise cluster.error
            told.append(body.get("reason"))

        cluster.create = create  # type: ignore[method-assign]
        reconcile = Reconciler(cluster, ProgressReader(), SETTINGS, Metrics(), lambda *_: None)  # type: ignore[arg-type]
        await reconcile(Key("team", "bot"))
        assert "PodsRefused" in told

    async def test_a_server_in_trouble_is_asked_again(self) -> None:
        status, again = await self.look(ApiError(500, "etcdserver: request timed out"))
        assert status == {}
        assert again[0] < 2
