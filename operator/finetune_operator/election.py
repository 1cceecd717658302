"""Who leads: the replica that holds a Lease works, the others stand by.

The leader stops when it has not renewed the lease for two thirds of its duration; a standby takes a lease that it has
not seen change for the whole of it. Each measures with its own steady clock, from what it saw itself, so that wall
clocks may differ: the times in the Lease are for people. docs/design/0010-leader-election.md has the cases.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp

from finetune_operator.kube import LEASES, ApiError, Kube

log = logging.getLogger(__name__)

RENEW_SHARE = 2 / 3
"""The leader stops after this share of the duration; the rest is for clocks that run at different speeds."""
RETRY_SHARE = 2 / 15
"""Pause between two attempts to take or renew the lease."""

# It goes on while the machine sleeps, where there is such a clock.
_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    return time.clock_gettime(_CLOCK)


def leave(reason: str) -> None:
    """End the process, now: whatever it still does may already be another's to do."""
    log.critical("no longer leading: %s", reason)
    os._exit(1)


class Election:
    """One candidate for a Lease. `identity` is of this process alone, so that a lease in this name is ours for sure."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        name: str,
        identity: str,
        seconds: int,
        lost: Callable[[str], None] = leave,
        clock: Callable[[], float] = now,
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._seconds = seconds
        self._lost = lost
        self._clock = clock
        self._deadline: float | None = None
        """Until when this process leads; None as long as it never did."""
        self._seen = ("", 0.0)
        """The newest version of the lease, and when it was first seen."""
        self._leader = ""
        self._answered = float("-inf")
        self._problem = ""

    async def win(self) -> None:
        """Return when this process leads."""
        while not await self._try():
            await asyncio.sleep(self._seconds * RETRY_SHARE)
        log.info("leading as %s", self._identity)

    async def keep(self) -> None:
        """Renew until cancelled."""
        while True:
            await asyncio.sleep(min(self._seconds * RETRY_SHARE, self._left()))
            await self._try()
            self.check()

    def check(self) -> None:
        """End the process when the lease may be another's. To be called before each write."""
        if self._deadline is not None and self._left() <= 0:
            self._lost(f"the lease was not renewed in time. {self._problem}")

    async def release(self) -> None:
        """Let the next one lead at once, if the lease is ours. This process may write nothing from here on."""
        self._deadline = float("-inf")
        try:
            async with asyncio.timeout(self._seconds * RETRY_SHARE):
                lease = await self._kube.get(LEASES, self._namespace, self._name)
                if lease is not None and _holder(lease) == self._identity:
                    spec = {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _timestamp()}
                    await self._kube.replace(LEASES, self._namespace, self._name, {**lease, "spec": spec})
                    log.info("no longer leading: the lease is released")
        except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as error:
            log.warning("the lease was not released, and will expire: %r", error)

    def problem(self) -> str:
        """Why this standby could not take over; empty when it could."""
        if self._clock() - self._answered > self._seconds:
            return f"the lease cannot be read: {self._problem or 'no answer yet'}\n"
        return ""

    def _left(self) -> float:
        return float("-inf") if self._deadline is None else self._deadline - self._clock()

    async def _try(self) -> bool:
        """Take or renew the lease; whether this process has it now. Without an answer, nothing is known to be so."""
        asked = self._clock()
        renew = self._seconds * RENEW_SHARE
        # One request that hangs leaves time for another.
        patience = renew / 2 if self._deadline is None else min(renew / 2, self._left())
        try:
            async with asyncio.timeout(patience):
                mine = await self._take()
        except (ApiError, aiohttp.ClientError, OSError, TimeoutError) as error:
            if isinstance(error, ApiError) and error.status == 409:
                # Somebody was faster, or an earlier request of ours arrived after all: the next attempt will see.
                self._answered = self._clock()
                return False
            if self._problem != repr(error):
                log.warning("the lease cannot be read or written: %r", error)
            self._problem = repr(error)
            return False
        self._answered, self._problem = self._clock(), ""
        if mine:
            # From before the request: it may have been carried out at any time since.
            self._deadline = asked + renew
        return mine

    async def _take(self) -> bool:
        lease = await self._kube.get(LEASES, self._namespace, self._name)
        if lease is None:
            body = self._renewed({"metadata": {"name": self._name}})
            await self._kube.create(LEASES, self._namespace, body)
            return True
        holder = _holder(lease)
        if holder not in (self._identity, ""):
            if self._deadline is not None:
                self._lost(f"{holder} leads")
                return False
            if not self._expired(lease):
                if holder != self._leader:
                    log.info("standing by: %s leads", holder)
                self._leader = holder
                return False
        # It carries the version that was read: of several who try, one succeeds.
        await self._kube.replace(LEASES, self._namespace, self._name, self._renewed(lease))
        return True

    def _expired(self, lease: dict[str, Any]) -> bool:
        version = lease["metadata"]["resourceVersion"]
        if version != self._seen[0]:
            self._seen = (version, self._clock())
        # As long as its holder was told, which may have other settings.
        duration = lease["spec"].get("leaseDurationSeconds") or self._seconds
        return self._clock() - self._seen[1] >= duration

    def _renewed(self, lease: dict[str, Any]) -> dict[str, Any]:
        spec = lease.get("spec") or {}
        if spec.get("holderIdentity") != self._identity:
            transitions = spec.get("leaseTransitions", -1) + 1
            spec = {**spec, "holderIdentity": self._identity, "leaseTransitions": transitions}
            spec["acquireTime"] = _timestamp()
        spec = {**spec, "leaseDurationSeconds": self._seconds, "renewTime": _timestamp()}
        return {**lease, "spec": spec}


def _holder(lease: dict[str, Any]) -> str:
    """Empty when it was released."""
    return (lease.get("spec") or {}).get("holderIdentity") or ""


def _timestamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
