"""How often jobs are looked at, so that all of them together leave the API server and each other in peace. Pure.

What happens comes as events and is looked at in any case. Only what no event tells waits for these times: progress,
and why a pod does not run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from finetune_api.status import Phase
from finetune_operator.config import Settings

RUNNING = frozenset({Phase.PREPARING, Phase.RUNNING, Phase.EXPORTING})
WAITING = frozenset({Phase.PENDING, Phase.STARTING, Phase.RESTARTING, Phase.QUEUED})

WAITING_SECONDS = 10.0
"""How often a pod that does not start is looked at."""
REQUESTS = 4
"""Of a look: the job, its Jobs and its pods, and often events, or one write."""
LOOKS_SHARE = 0.25
"""Of the requests that are allowed those for looks at jobs that run; as many for those that wait."""
PROGRESS_SHARE = 0.05
"""Those that write nothing but progress. The API server keeps every version of a status for a while, and each write is
an event, which makes the operator look once more."""


@dataclass(frozen=True)
class Pace:
    """Seconds at least between two."""

    poll: float
    """Looks at a job whose pod runs."""
    waiting: float
    """Looks at a job whose pod does not run."""
    progress: float
    """Writes of one job's progress alone."""


def pace_of(settings: Settings, phases: Collection[Phase | None] = ()) -> Pace:
    """The pace while all jobs together are in these phases."""
    running, waiting = (sum(phase in kind for phase in phases) for kind in (RUNNING, WAITING))
    of_looks = REQUESTS / (LOOKS_SHARE * settings.kube_qps)
    return Pace(
        poll=max(settings.poll_seconds, running * of_looks),
        waiting=max(WAITING_SECONDS, waiting * of_looks),
        progress=max(settings.progress_seconds, running / (PROGRESS_SHARE * settings.kube_qps)),
    )
