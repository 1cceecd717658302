"""The pods of one attempt watch each other: each tells the first one that it lives, and learns that the first one does.

The collectives of torch notice a process that ends, not one whose node is gone or cut off: they would wait for it as
long as they may, which is a day, because others wait in them while one saves. So the agents, who always answer, say
every two seconds that they are there, which pod they are, and whether they are ready to train.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from finetune_api.document import JobDocument
from finetune_api.names import AGENT_PORT

PATH = "/heartbeat"
BEAT_SECONDS = 2.0
TIMEOUT_SECONDS = 2.0
SILENCE_SECONDS = 60.0
"""A pod that was there and has not been heard of for so long is lost."""
SILENCE_SECONDS_AT_THE_END = 10.0
"""The same, once this pod was told to stop: what time is left is for saving, or for nothing."""


@dataclass(frozen=True)
class _Heard:
    pod: str
    ready: bool
    at: float


class Peers:
    """Whom this pod has heard of, and when. The first pod hears of all others, they of the first one.

    A queue lets the Job replace a single pod, so that pods of two lives can find each other. They are told apart by
    their names.
    """

    def __init__(self, document: JobDocument, node: int, pod: str, main_address: str) -> None:
        self._attempt = {"uid": document.job.uid, "attempt": str(document.attempt)}
        self._node = node
        self._pod = pod
        self._main_address = main_address
        self._watched: Collection[int] = range(1, document.nodes) if node == 0 else [0]
        self._heard: dict[int, _Heard] = {}
        self._known: dict[int, str] | None = None
        """The pods that this one trains with, and speaks to; None while it speaks to any."""
        self._replaced: set[int] = set()
        self._ready = False

    def start(self) -> None:
        if self._node > 0:
            threading.Thread(target=self._beat, daemon=True).start()

    def hear(self, words: str) -> str:
        """Take note of what a pod says of itself, in a beat or in the answer to one.

        Returns:
            The answer; empty for a pod that is none of ours.
        """
        said = dict(parse_qsl(words))
        number, pod, meant = said.pop("node", ""), said.pop("pod", ""), said.pop("to", self._pod)
        ready = said.pop("ready", "") == "yes"
        if said != self._attempt or not pod or not number.isdecimal() or int(number) not in self._watched:
            return ""
        node = int(number)
        if self._known is not None and self._known.get(node) != pod:
            if node in self._known:
                self._replaced.add(node)
            return ""
        if meant == self._pod:
            # One that means the pod before this one belongs to that one's life. The answer tells it.
            self._heard[node] = _Heard(pod, ready, time.monotonic())
        return self._words(node)

    def ready(self) -> None:
        """This pod can begin to train. The first one says so when all can, so that all begin together."""
        self._ready = True

    def settle(self) -> None:
        """These pods train together from here on, and no other one takes the place of one of them."""
        self._known = {node: self._heard[node].pod for node in self._watched}

    def close(self) -> None:
        """This pod is about to end: none that it does not know already shall count on it."""
        if self._known is None:
            self._known = {}
            self._ready = False

    @property
    def missing(self) -> list[int]:
        """Pods that were never heard of."""
        return [node for node in self._watched if node not in self._heard]

    @property
    def awaited(self) -> list[int]:
        """Pods that cannot begin to train yet."""
        return [node for node in self._watched if node not in self._heard or not self._heard[node].ready]

    @property
    def replaced(self) -> list[int]:
        """Pods that were known, and in whose place there is another one now."""
        return sorted(self._replaced)

    def silent(self, seconds: float) -> list[int]:
        """Pods that were heard of, and not for so long."""
        now = time.monotonic()
        return [node for node in self._watched if node in self._heard and now - self._heard[node].at > seconds]

    def _words(self, to: int) -> str:
        """What this pod says of itself, and which pod it takes the other one for."""
        ready = self._ready and (self._node > 0 or not self.awaited)
        known = {"to": self._known[to]} if self._known else {}
        own = {"node": self._node, "pod": self._pod, "ready": "yes" if ready else "no"}
        return urlencode(self._attempt | own | known)

    def _beat(self) -> None:
        address = self._main_address
        while True:
            # The one that answered last comes first: a name service may be away for longer than a silence may last.
            address = self._ask(address) or self._ask(self._main_address) or address
            time.sleep(BEAT_SECONDS)

    def _ask(self, host: str) -> str:
        """Tell the first pod that this one is there; the address at which it answered, or nothing."""
        # Its host name is there when it is, and may be unknown for a while after.
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(host, AGENT_PORT, timeout=TIMEOUT_SECONDS)
            try:
                connection.connect()
                address: str = connection.sock.getpeername()[0]
                connection.request("GET", f"{PATH}?{self._words(0)}")
                answer = connection.getresponse()
                if answer.status == http.HTTPStatus.OK and self.hear(answer.read(4096).decode(errors="replace")):
                    return address
            finally:
                connection.close()
        return ""
