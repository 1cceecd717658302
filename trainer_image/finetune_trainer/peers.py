"""The pods of one attempt watch each other: each tells the first one that it lives, and learns that the first one does.

The collectives of torch notice a process that ends, not one whose node is gone or cut off: they would wait for it as
long as they may, which is a day, because others wait in them while one saves. So the agents, who always answer, say
every two seconds that they are there.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Collection
from urllib.parse import parse_qs, urlencode

from finetune_api.document import JobDocument
from finetune_api.names import AGENT_PORT

PATH = "/heartbeat"
BEAT_SECONDS = 2.0
TIMEOUT_SECONDS = 2.0
SILENCE_SECONDS = 60.0
"""A pod that was there and has not been heard of for so long is lost."""
SILENCE_SECONDS_AT_THE_END = 10.0
"""The same, once this pod was told to stop: what time is left is for saving, or for nothing."""


class Peers:
    """Whom this pod has heard of, and when. The first pod hears of all others, they of the first one."""

    def __init__(self, document: JobDocument, node: int, main_address: str) -> None:
        self._attempt = {"uid": document.job.uid, "attempt": str(document.attempt)}
        self._node = node
        self._main_address = main_address
        self._watched: Collection[int] = range(1, document.nodes) if node == 0 else [0]
        self._heard: dict[int, float] = {}

    def start(self) -> None:
        if self._node > 0:
            threading.Thread(target=self._beat, daemon=True).start()

    def hear(self, query: str) -> bool:
        """Take note of a pod that says that it is there; whether it is one of ours."""
        said = {name: values[0] for name, values in parse_qs(query).items()}
        node = said.pop("node", "")
        if said != self._attempt or not node.isdecimal() or int(node) not in self._watched:
            return False
        self._heard[int(node)] = time.monotonic()
        return True

    @property
    def missing(self) -> list[int]:
        """Pods that were never heard of."""
        return [node for node in self._watched if node not in self._heard]

    def silent(self, seconds: float) -> list[int]:
        """Pods that were heard of, and not for so long."""
        now = time.monotonic()
        return [node for node, heard in self._heard.items() if now - heard > seconds]

    def _beat(self) -> None:
        path = f"{PATH}?{urlencode({**self._attempt, 'node': self._node})}"
        while True:
            # Its host name is there when it is, and may be unknown for a while after.
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection(self._main_address, AGENT_PORT, timeout=TIMEOUT_SECONDS)
                try:
                    connection.request("GET", path)
                    if connection.getresponse().status == http.HTTPStatus.OK:
                        self._heard[0] = time.monotonic()
                finally:
                    connection.close()
            time.sleep(BEAT_SECONDS)
