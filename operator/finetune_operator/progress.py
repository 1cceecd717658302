"""Reading the progress of running pods from their agents."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp

from finetune_api.names import AGENT_PORT
from finetune_api.report import Report, decode

TIMEOUT_SECONDS = 2.0
MAX_BYTES = 64 * 1024
MAX_AT_ONCE = 50


class ProgressReader:
    """Asks agents at their pod address. Silence is an answer too: it never means failure."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)

    async def read(self, address: str) -> tuple[Report | None, str]:
        """The report of the pod at an address, or None and why not. Whose report it is, the caller checks."""
        host = f"[{address}]" if ":" in address else address
        async with self._slots:
            if self._session is None:
                # No proxy from the environment: pods are asked directly. No redirects: a pod is not a guide.
                self._session = aiohttp.ClientSession(
                    timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS), trust_env=False
                )
            try:
                url = f"http://{host}:{AGENT_PORT}/progress"
                async with self._session.get(url, allow_redirects=False) as response:
                    body = await _read(response.content)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                return None, type(error).__name__
        report = decode(body)
        return (report, "") if report is not None else (None, "no report in the answer")

    async def read_all(self, addresses: Sequence[str]) -> Sequence[tuple[Report | None, str]]:
        """The reports of several pods, asked at the same time."""
        return await asyncio.gather(*(self.read(address) for address in addresses))

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


async def _read(stream: aiohttp.StreamReader) -> bytes:
    """All that comes, up to the limit; a stream's `read` returns what has come so far."""
    body = b""
    while len(body) < MAX_BYTES and (piece := await stream.read(MAX_BYTES - len(body))):
        body += piece
    return body
