"""A queue of dirty keys: each key is worked on by one worker at a time, and never forgotten.

A key that becomes dirty while it is worked on is worked on again. A key can be due later; an earlier time wins.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

STALE_TIMES = 100
"""Times of which an earlier one took the place are forgotten when there are so many more of them than of others."""


class WorkQueue(Generic[Key]):
    def __init__(
        self, clock: Callable[[], float] = time.monotonic, late: Callable[[float], object] = lambda seconds: None
    ) -> None:
        """`late` is told how long after its time each key is worked on."""
        self._clock = clock
        self._late = late
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._order = itertools.count()
        self._busy: set[Key] = set()
        self._changed = asyncio.Event()
        self._closed = False

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Make a key due after `delay` seconds, or earlier if it was due earlier."""
        at = self._clock() + delay
        if at < self._due.get(key, float("inf")):
            self._due[key] = at
            heapq.heappush(self._heap, (at, next(self._order), key))
            if len(self._heap) > 2 * len(self._due) + STALE_TIMES:
                # They may be a week away, and one more comes with each look.
                self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
                heapq.heapify(self._heap)
            self._changed.set()

    def __len__(self) -> int:
        """Keys that wait, due or not."""
        return len(self._due)

    def close(self) -> None:
        """Start nothing more: `run` ends with what is in hand."""
        self._closed = True
        self._changed.set()

    async def run(self, work: Callable[[Key], Awaitable[None]], workers: int) -> None:
        """Work until closed or cancelled. `work` handles its own errors."""
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(self._worker(work))

    async def _worker(self, work: Callable[[Key], Awaitable[None]]) -> None:
        while (key := await self._next()) is not None:
            try:
                await work(key)
            finally:
                self._busy.discard(key)
                self._changed.set()

    async def _next(self) -> Key | None:
        """The next key that is due, when it is; None when there is to be none."""
        while not self._closed:
            self._changed.clear()
            wait: float | None = None
            skipped: list[tuple[float, int, Key]] = []
            found: Key | None = None
            while self._heap:
                entry = heapq.heappop(self._heap)
                at, _, key = entry
                if self._due.get(key) != at:
                    continue  # an earlier time took its place
                if key in self._busy:
                    skipped.append(entry)
                    continue
                wait = at - self._clock()
                if wait > 0:
                    skipped.append(entry)
                    break
                del self._due[key]
                self._busy.add(key)
                self._late(-wait)
                found = key
                break
            for entry in skipped:
                heapq.heappush(self._heap, entry)
            if found is not None:
                return found
            try:
                await asyncio.wait_for(self._changed.wait(), timeout=wait)
            except TimeoutError:
                continue
        return None
