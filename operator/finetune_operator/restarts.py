"""What follows from a failure: another attempt or the end. Pure.

It is decided from what outlives the pod, the Job's condition and the job's own status, so that an operator that was
down decides the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from finetune_api.document import micro_batch_size
from finetune_api.failures import Disposition, FailureClass, disposition_of
from finetune_api.names import Stage
from finetune_api.spec import FailureAction, FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus, Restarts
from finetune_operator.classify import Cause

MAX_BACKOFF_SECONDS = 600
MAX_OUT_OF_MEMORY = 2
"""How often the micro-batch is halved."""


@dataclass(frozen=True)
class Decision:
    disposition: Disposition
    restarts: Restarts
    """The counts with this restart in them."""
    micro_batch_limit: int | None
    pause: int = 0
    """Seconds before the next attempt."""
    because: str = ""
    """A sentence to add to the failure's message."""


def decide(spec: FineTuneJobSpec, status: FineTuneJobStatus, uid: str, cause: Cause, gpus: int) -> Decision:
    """`status` is as before this failure; its attempt is the one that failed, and held so many GPUs."""
    attempt = status.attempt
    assert attempt is not None
    restarts = status.restarts or Restarts()
    limit = status.micro_batch_limit
    ruled = _ruled(spec, cause.failure_class)
    disposition = disposition_of(cause.failure_class)
    if ruled is not None:
        disposition = Disposition.FAIL if ruled is FailureAction.FAIL else Disposition.RESTART
    if disposition is Disposition.FAIL:
        return Decision(disposition, restarts, limit)

    if disposition is Disposition.RESTART_FREE:
        restarts = restarts.model_copy(update={"preemptions": restarts.preemptions + 1})
        # An eviction that comes before anything is saved may come again and again, for a full disk, say.
        pause = 0 if saved_in_this_attempt(status) else _backoff(spec, restarts.preemptions, uid, attempt.number)
        return Decision(disposition, restarts, limit, pause)

    def fail(because: str) -> Decision:
        return Decision(Disposition.FAIL, restarts, limit, because=because)

    allowed = spec.failure_policy.max_restarts
    if restarts.charged >= allowed:
        return fail(f"It was tried {allowed + 1} times (failurePolicy.maxRestarts: {allowed}).")
    because = ""
    memory_restarts = restarts.out_of_memory
    if cause.failure_class is FailureClass.OUT_OF_MEMORY_GPU and attempt.stage is Stage.TRAIN:
        before = micro_batch_size(spec, max(1, gpus), limit)
        if before == 1:
            return fail("One row at a time does not fit either.")
        if memory_restarts >= MAX_OUT_OF_MEMORY:
            return fail(f"The micro-batch was halved {MAX_OUT_OF_MEMORY} times, down to {before}.")
        limit = micro_batch_size(spec, max(1, gpus), before // 2)
        memory_restarts += 1
        because = f"It goes on with a micro-batch of {limit} instead of {before}; batchSize stays the same."
    if cause.failure_class is FailureClass.UNKNOWN and ruled is None and _happened_before(status, cause):
        return fail("It happened before in the same way, so it is not tried again.")
    charged = restarts.charged + 1
    restarts = restarts.model_copy(update={"charged": charged, "out_of_memory": memory_restarts})
    return Decision(disposition, restarts, limit, _backoff(spec, charged, uid, attempt.number), because)


def _ruled(spec: FineTuneJobSpec, failure_class: FailureClass) -> FailureAction | None:
    """What a rule of the job says of a class. That a killed container was out of memory is only known while its pod is
    there, so that a kill is ruled by both names, and the stricter one counts."""
    names = [failure_class]
    if failure_class is FailureClass.KILLED:
        names.append(FailureClass.OUT_OF_MEMORY_HOST)
    actions = [rule.action for rule in spec.failure_policy.rules if rule.failure_class in names]
    return FailureAction.FAIL if FailureAction.FAIL in actions else next(iter(actions), None)


def saved_in_this_attempt(status: FineTuneJobStatus) -> bool:
    """Whether the present attempt has stored a checkpoint of its own."""
    attempt, checkpoint = status.attempt, status.checkpoint
    if attempt is None or attempt.resumed_from_step is None or checkpoint is None:
        return False
    return checkpoint.step > attempt.resumed_from_step


def _happened_before(status: FineTuneJobStatus, cause: Cause) -> bool:
    """The exit code is all that is sure to be known of a failure without a class."""
    assert status.attempt is not None
    return any(
        (past.stage, past.failure_class, past.exit_code) == (status.attempt.stage, cause.failure_class, cause.exit_code)
        for past in status.history
    )


def _backoff(spec: FineTuneJobSpec, count: int, uid: str, attempt: int) -> int:
    """Seconds before the restart after the `count`-th failure, give or take a fifth: jobs that one cause has ended
    together do not come back together. The same for whoever asks again."""
    base = min(spec.failure_policy.backoff_seconds << min(count - 1, 10), MAX_BACKOFF_SECONDS)
    drawn = int.from_bytes(hashlib.sha256(f"{uid}/{attempt}/{count}".encode()).digest()[:4]) / 2**32
    return round(base * (0.8 + 0.4 * drawn))
