"""At most one replica leads, whatever happens to it, to the network and to the API server; and somebody does.

Time is virtual: hours of it pass in a second.
"""

from __future__ import annotations

import asyncio
import copy
import random
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from finetune_operator.election import RENEW_SHARE, Election
from finetune_operator.kube import ApiError

SECONDS = 15


class _Skip(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    """Waits by moving the clock of its loop."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everybody waits for everybody"
        self.now += timeout
        return super().select(0)


def in_virtual_time(work: Coroutine[Any, Any, None]) -> None:
    selector = _Skip()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    try:
        loop.run_until_complete(work)
    finally:
        loop.close()


class Lost(Exception):
    """Where the real thing ends the process."""


def lost(reason: str) -> None:
    raise Lost(reason)


class Server:
    """Keeps one Lease, as an API server does. `fault` is awaited before and after each request is carried out."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.fault: Callable[[str], Awaitable[None]] = self._none

    async def _none(self, moment: str) -> None:
        return

    async def get(self, *_: Any) -> dict[str, Any] | None:
        await self.fault("before get")
        found = copy.deepcopy(self.lease)
        await self.fault("after get")
        return found

    async def create(self, kind: Any, namespace: str, body: dict[str, Any]) -> None:
        await self.fault("before write")
        if self.lease is not None:
            raise ApiError(409, "already exists")
        self._store(body)
        await self.fault("after write")

    async def replace(self, kind: Any, namespace: str, name: str, body: dict[str, Any]) -> None:
        await self.fault("before write")
        assert self.lease is not None
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ApiError(409, "the object has been modified")
        self._store(body)
        await self.fault("after write")

    def _store(self, body: dict[str, Any]) -> None:
        self.version += 1
        self.lease = copy.deepcopy(body)
        self.lease["metadata"]["resourceVersion"] = str(self.version)

    @property
    def spec(self) -> dict[str, Any]:
        assert self.lease is not None
        spec: dict[str, Any] = self.lease["spec"]
        return spec


def candidate(server: Server, identity: str, clock: Callable[[], float] | None = None) -> Election:
    loop = asyncio.get_running_loop()
    return Election(server, "ns", "lease", identity, SECONDS, lost, clock or loop.time)  # type: ignore[arg-type]


def time() -> float:
    return asyncio.get_running_loop().time()


class Fault:
    """Does something at one moment, as often as told."""

    def __init__(self, moment: str, what: Callable[[], Awaitable[None]], times: int = 1) -> None:
        self._moment, self._what, self._times = moment, what, times

    async def __call__(self, moment: str) -> None:
        if moment == self._moment and self._times:
            self._times -= 1
            await self._what()


async def refuse() -> None:
    raise ApiError(500, "etcdserver: leader changed")


async def cut() -> None:
    raise ConnectionResetError


async def hang() -> None:
    await asyncio.sleep(3600)


def test_the_first_one_leads_and_says_so_in_the_lease() -> None:
    async def scene() -> None:
        server = Server()
        await candidate(server, "a").win()
        assert server.spec["holderIdentity"] == "a"
        assert server.spec["leaseDurationSeconds"] == SECONDS
        assert server.spec["leaseTransitions"] == 0
        assert server.spec["acquireTime"].endswith("Z")
        assert time() == 0

    in_virtual_time(scene())


def test_a_leader_that_renews_is_not_replaced() -> None:
    async def scene() -> None:
        server = Server()
        a = candidate(server, "a")
        await a.win()
        keep = asyncio.create_task(a.keep())
        waiting = asyncio.create_task(candidate(server, "b").win())
        await asyncio.sleep(3600)
        a.check()
        assert not keep.done()
        assert not waiting.done()
        assert server.spec["leaseTransitions"] == 0

    in_virtual_time(scene())


def test_a_dead_leader_is_replaced_after_the_duration_of_its_lease() -> None:
    async def scene() -> None:
        server = Server()
        await candidate(server, "a").win()
        await candidate(server, "b").win()
        assert SECONDS <= time() <= SECONDS + 2
        assert server.spec["holderIdentity"] == "b"
        assert server.spec["leaseTransitions"] == 1

    in_virtual_time(scene())


def test_the_duration_in_the_lease_counts_not_ones_own() -> None:
    async def scene() -> None:
        server = Server()
        await candidate(server, "a").win()
        server.spec["leaseDurationSeconds"] = 60
        await candidate(server, "b").win()
        assert time() >= 60

    in_virtual_time(scene())


def test_a_released_lease_is_taken_at_the_next_look() -> None:
    async def scene() -> None:
        server = Server()
        a = candidate(server, "a")
        await a.win()
        waiting = asyncio.create_task(candidate(server, "b").win())
        await asyncio.sleep(5)
        await a.release()
        with pytest.raises(Lost):
            a.check()
        await waiting
        assert time() <= 5 + 2
        assert server.spec["holderIdentity"] == "b"

    in_virtual_time(scene())


def test_a_standby_that_goes_releases_nothing() -> None:
    async def scene() -> None:
        server = Server()
        await candidate(server, "a").win()
        b = candidate(server, "b")
        waiting = asyncio.create_task(b.win())
        await asyncio.sleep(1)
        waiting.cancel()
        await b.release()
        assert server.spec["holderIdentity"] == "a"

    in_virtual_time(scene())


def test_a_standby_that_is_told_to_go_while_it_takes_the_lease_gives_it_back() -> None:
    async def scene() -> None:
        server = Server()
        server.fault = Fault("after write", hang)
        a = candidate(server, "a")
        waiting = asyncio.create_task(a.win())
        await asyncio.sleep(1)
        assert server.spec["holderIdentity"] == "a"
        waiting.cancel()
        await a.release()
        assert server.spec["holderIdentity"] == ""

    in_virtual_time(scene())


@pytest.mark.parametrize("what", [refuse, cut, hang])
@pytest.mark.parametrize("moment", ["before get", "after get", "before write", "after write"])
def test_one_failed_renewal_ends_nothing(moment: str, what: Callable[[], Awaitable[None]]) -> None:
    async def scene() -> None:
        server = Server()
        a = candidate(server, "a")
        await a.win()
        server.fault = Fault(moment, what)
        keep = asyncio.create_task(a.keep())
        await asyncio.sleep(60)
        a.check()
        assert not keep.done()
        assert server.spec["holderIdentity"] == "a"

    in_virtual_time(scene())


@pytest.mark.parametrize("what", [refuse, cut, hang])
@pytest.mark.parametrize("moment", ["before get", "before write", "after write"])
def test_a_leader_that_cannot_renew_goes_before_its_lease_expires(
    moment: str, what: Callable[[], Awaitable[None]]
) -> None:
    async def scene() -> None:
        server = Server()
        a = candidate(server, "a")
        await a.win()
        server.fault = Fault(moment, what, times=1000)
        with pytest.raises(Lost, match="not renewed in time"):
            await a.keep()
        assert SECONDS * RENEW_SHARE <= time() < SECONDS

    in_virtual_time(scene())


def test_a_slow_answer_does_not_prolong_the_lease() -> None:
    async def scene() -> None:
        server = Server()
        server.fault = Fault("after write", lambda: asyncio.sleep(4))
        a = candidate(server, "a")
        await a.win()
        assert time() == 4
        a.check()
        await asyncio.sleep(SECONDS * RENEW_SHARE - 4)
        with pytest.raises(Lost):
            a.check()

    in_virtual_time(scene())


@pytest.mark.parametrize("what", [cut, hang])
def test_a_lost_answer_to_taking_the_lease_is_no_other_leader(what: Callable[[], Awaitable[None]]) -> None:
    async def scene() -> None:
        server = Server()
        server.fault = Fault("after write", what)
        await candidate(server, "a").win()
        assert time() < SECONDS
        assert server.spec["holderIdentity"] == "a"

    in_virtual_time(scene())


def test_a_leader_that_sees_another_one_goes_at_once() -> None:
    async def scene() -> None:
        server = Server()
        a = candidate(server, "a")
        await a.win()
        server.spec["holderIdentity"] = "b"
        with pytest.raises(Lost, match="b leads"):
            await a.keep()
        assert time() <= 2

    in_virtual_time(scene())


def test_a_process_that_slept_through_its_lease_may_not_write() -> None:
    async def scene() -> None:
        skipped = 0.0
        a = candidate(Server(), "a", lambda: time() + skipped)
        await a.win()
        a.check()
        skipped = SECONDS * RENEW_SHARE
        with pytest.raises(Lost):
            a.check()

    in_virtual_time(scene())


def test_a_standby_is_ready_when_it_can_read_the_lease() -> None:
    async def scene() -> None:
        server = Server()
        await candidate(server, "a").win()
        b = candidate(server, "b")
        assert "no answer yet" in b.problem()
        waiting = asyncio.create_task(b.win())
        await asyncio.sleep(1)
        assert b.problem() == ""
        server.fault = Fault("before get", refuse, times=1000)
        await asyncio.sleep(2 * SECONDS)
        assert "leader changed" in b.problem()
        waiting.cancel()

    in_virtual_time(scene())


@pytest.mark.parametrize("seed", range(10))
def test_who_has_been_followed_never_writes_again(seed: int) -> None:
    """Three replicas with clocks of their own for half an hour of slow, refused, cut and hanging requests and frozen
    processes. Each says when it writes; the writes of one process are never after those of a later one."""
    dice = random.Random(seed)
    writes: list[str] = []
    trouble = True

    async def scene() -> None:
        nonlocal trouble
        server = Server()

        async def fault(_: str) -> None:
            await asyncio.sleep(dice.uniform(0, 0.5))
            kind = dice.random() if trouble else 1.0
            if kind < 0.05:
                await refuse()
            elif kind < 0.10:
                await cut()
            elif kind < 0.13:
                await asyncio.sleep(dice.uniform(0, 40))

        server.fault = fault

        async def replica(letter: str) -> None:
            offset, rate = dice.uniform(-1e6, 1e6), dice.uniform(0.85, 1.15)
            for life in range(10_000):
                identity = f"{letter}{life}"
                one = candidate(server, identity, lambda o=offset, r=rate: o + r * time())
                await one.win()
                keep = asyncio.create_task(one.keep())
                try:
                    while not keep.done():
                        one.check()
                        writes.append(identity)
                        # A frozen process neither renews nor writes.
                        frozen = trouble and dice.random() < 0.02
                        if frozen:
                            keep.cancel()
                        await asyncio.sleep(dice.uniform(0, 60) if frozen else 0.5)
                        if frozen:
                            keep = asyncio.create_task(one.keep())
                    await keep
                except Lost:
                    keep.cancel()

        replicas = [asyncio.create_task(replica(letter)) for letter in "abc"]
        await asyncio.sleep(1800)
        trouble, before = False, len(writes)
        await asyncio.sleep(120)
        assert len(writes) > before + 60, "somebody leads again soon"
        for task in replicas:
            task.cancel()

    in_virtual_time(scene())
    order = list(dict.fromkeys(writes))
    assert writes == sorted(writes, key=order.index)
    assert len(order) > 3, "the lease has changed hands"
