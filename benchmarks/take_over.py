"""How long a FineTuneJob waits when the leader goes: `python benchmarks/take_over.py [ROUNDS]`.

Runs two operators with the default lease against an embedded API server. Each round ends the leader, creates a
FineTuneJob at the same moment, and measures until its first child Job is there, which the other operator has made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

from finetune_api import API_VERSION, KIND
from finetune_operator.config import Settings
from finetune_operator.kube import FINETUNE_JOBS, JOBS, Kube, load_client_of_user
from finetune_operator.local.cluster import LocalCluster

NAMESPACE = "default"


class Operator:
    def __init__(self, folder: Path, name: str, port: int, kubeconfig: Path) -> None:
        self.port = port
        self._log = folder / f"{name}.log"
        self._environment = os.environ | {
            "KUBECONFIG": str(kubeconfig),
            "FINETUNE_LEASE_NAME": "take-over",
            "FINETUNE_LEASE_NAMESPACE": NAMESPACE,
            "FINETUNE_HTTP_HOST": "127.0.0.1",
            "FINETUNE_HTTP_PORT": str(port),
        }
        self._process: asyncio.subprocess.Process

    async def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "finetune_operator.main", env=self._environment, stdout=output, stderr=output
            )
        while await self.ask("/readyz") != "ok\n":
            await asyncio.sleep(0.1)

    async def leads(self) -> bool:
        return "finetune_operator_is_leader 1.0" in await self.ask("/metrics")

    async def ask(self, path: str) -> str:
        def get() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
                return str(response.read().decode())

        with contextlib.suppress(OSError):
            return await asyncio.to_thread(get)
        return ""

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def wait(self) -> None:
        await self._process.wait()


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as exits:
        sockets = [exits.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [item.getsockname()[1] for item in sockets]


@contextlib.asynccontextmanager
async def two_operators(kubeconfig: Path) -> AsyncIterator[list[Operator]]:
    with tempfile.TemporaryDirectory() as folder:
        both = [Operator(Path(folder), name, port, kubeconfig) for name, port in zip("ab", free_ports(2), strict=True)]
        for operator in both:
            await operator.start()
        try:
            yield both
        finally:
            for operator in both:
                operator.send(signal.SIGKILL)
                await operator.wait()


async def take_over(kube: Kube, both: list[Operator], number: signal.Signals, name: str) -> float:
    """Seconds from the signal to the child Job of a FineTuneJob."""
    (leader,) = [operator for operator in both if await operator.leads()]
    manifest = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "s3://models/base"},
            "dataset": {"train": [{"uri": "s3://datasets/train.jsonl"}]},
            "output": {"uri": f"s3://models/{name}"},
        },
    }
    leader.send(number)
    started = time.monotonic()
    if number is signal.SIGTERM:
        await leader.wait()  # else it would still take the job itself
    await kube.create(FINETUNE_JOBS, NAMESPACE, manifest)
    while await kube.get(JOBS, NAMESPACE, f"{name}-prepare-1") is None:
        await asyncio.sleep(0.01)
    seconds = time.monotonic() - started
    await leader.wait()
    await leader.start()
    return seconds


async def main(rounds: int) -> None:
    async with LocalCluster(runner=False) as cluster, two_operators(cluster.kubeconfig) as both:
        api, _ = await load_client_of_user(str(cluster.kubeconfig), None)
        kube = Kube(api)
        sys.stdout.write(f"lease of {Settings().lease_seconds} s, {rounds} rounds each, seconds to the child Job\n")
        for number in (signal.SIGTERM, signal.SIGKILL):
            found = []
            for count in range(rounds):
                # Not always at the same moment between two renewals.
                await asyncio.sleep(0.4 * count)
                found.append(await take_over(kube, both, number, f"{number.name.lower()}-{count}"))
            low, middle, high = min(found), statistics.median(found), max(found)
            sys.stdout.write(f"{number.name}: median {middle:.1f}, from {low:.1f} to {high:.1f}\n")
            sys.stdout.flush()
        await api.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
