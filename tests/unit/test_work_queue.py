from __future__ import annotations

import asyncio

import pytest

from finetune_operator.work_queue import STALE_TIMES, WorkQueue


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def drain(queue: WorkQueue[str], done: list[str], count: int, workers: int = 2) -> None:
    async def work(key: str) -> None:
        done.append(key)

    task = asyncio.create_task(queue.run(work, workers))
    async with asyncio.timeout(5):
        while len(done) < count:
            await asyncio.sleep(0)
    task.cancel()


async def test_a_key_added_twice_before_its_turn_is_worked_on_once() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    queue.add("a")
    queue.add("b")
    done: list[str] = []
    await drain(queue, done, 2)
    assert sorted(done) == ["a", "b"]
    assert len(queue) == 0


async def test_an_earlier_time_wins_over_a_later_one() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("a", delay=100)
    queue.add("a", delay=0)
    queue.add("a", delay=50)
    done: list[str] = []
    await drain(queue, done, 1)
    assert done == ["a"]
    assert len(queue) == 0, "the later times are forgotten"


async def test_times_that_do_not_count_any_more_take_no_memory() -> None:
    """A job that is over and has a week to live is looked at each minute."""
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    done: list[str] = []

    async def work(key: str) -> None:
        done.append(key)
        queue.add(key, 604_800 - clock.now)

    task = asyncio.create_task(queue.run(work, workers=1))
    async with asyncio.timeout(30):
        for look in range(1000):
            clock.now += 60.1
            queue.add("a")
            while len(done) == look:
                await asyncio.sleep(0)
    task.cancel()
    assert len(queue._heap) <= STALE_TIMES + 2


async def test_it_is_said_how_late_a_key_is() -> None:
    clock = Clock()
    late: list[float] = []
    queue: WorkQueue[str] = WorkQueue(clock, late.append)
    queue.add("a", delay=5)
    queue.add("b", delay=9)
    clock.now = 10
    done: list[str] = []
    await drain(queue, done, 2, workers=1)
    assert (done, late) == (["a", "b"], [5, 1])


async def test_a_key_that_becomes_dirty_while_it_is_worked_on_is_worked_on_again_but_never_twice_at_once() -> None:
    queue: WorkQueue[str] = WorkQueue()
    active = highest = runs = 0
    finished = asyncio.Event()

    async def work(key: str) -> None:
        nonlocal active, highest, runs
        active += 1
        highest = max(highest, active)
        runs += 1
        if runs == 1:
            queue.add(key)
        await asyncio.sleep(0.01)
        active -= 1
        if runs == 2:
            finished.set()

    queue.add("a")
    task = asyncio.create_task(queue.run(work, workers=4))
    await asyncio.wait_for(finished.wait(), 5)
    task.cancel()
    assert highest == 1


async def test_a_busy_key_does_not_hold_up_the_others() -> None:
    queue: WorkQueue[str] = WorkQueue()
    release = asyncio.Event()
    done = asyncio.Event()

    async def work(key: str) -> None:
        if key == "slow":
            await release.wait()
        else:
            done.set()

    task = asyncio.create_task(queue.run(work, workers=2))
    queue.add("slow")
    await asyncio.sleep(0)
    queue.add("slow")
    queue.add("fast")
    await asyncio.wait_for(done.wait(), 5)
    release.set()
    task.cancel()


async def test_a_worker_that_raises_is_not_swallowed() -> None:
    queue: WorkQueue[str] = WorkQueue()

    async def work(key: str) -> None:
        raise RuntimeError("a bug")

    queue.add("a")
    with pytest.RaisesGroup(RuntimeError):
        await asyncio.wait_for(queue.run(work, workers=1), 5)


async def test_a_closed_queue_finishes_what_is_in_hand_and_starts_nothing() -> None:
    queue: WorkQueue[str] = WorkQueue()
    begun: list[str] = []
    done: list[str] = []
    goes_on = asyncio.Event()

    async def work(key: str) -> None:
        begun.append(key)
        await goes_on.wait()
        done.append(key)

    for key in ("a", "b", "c"):
        queue.add(key)
    task = asyncio.create_task(queue.run(work, workers=2))
    while len(begun) < 2:
        await asyncio.sleep(0)
    queue.close()
    queue.add("d")
    goes_on.set()
    async with asyncio.timeout(5):
        await task
    assert done == begun == ["a", "b"]


async def test_workers_that_wait_end_when_the_queue_is_closed() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("later", delay=3600)
    task = asyncio.create_task(queue.run(None, workers=3))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    queue.close()
    async with asyncio.timeout(5):
        await task
