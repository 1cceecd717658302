"""Thousands of lives of a job with random faults. `make simulate` plays more of them, from another seed each time."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from math import ceil

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.stateful import run_state_machine_as_test
from machine import Life
from planted import BUGS

RUNS = int(os.environ.get("SIMULATION_RUNS", "2000"))
SEED = int(os.environ.get("SIMULATION_SEED", "1"))
LIVES = min(RUNS, 2000)
"""Lives of one seed: that many are played again in a minute or two."""
SEEDS = range(SEED, SEED + ceil(RUNS / LIVES))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("finetune_operator")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.fixture(autouse=True)
def reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis also draws constants of all local modules that are loaded, so that the same seed would give other
    lives after other tests, and in every commit."""
    monkeypatch.setattr(HypothesisProvider, "_maybe_draw_constant", lambda *_, **__: None)


def profile(runs: int, **changes: object) -> settings:
    return settings(
        max_examples=runs,
        stateful_step_count=30,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        **changes,  # type: ignore[arg-type]
    )


@pytest.mark.timeout(0)
@pytest.mark.parametrize("number", SEEDS)
def test_no_fault_breaks_an_invariant(number: int) -> None:
    run_state_machine_as_test(seed(number)(Life), settings=profile(LIVES))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(bug: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: an invariant that cannot fail would prove nothing."""
    bug(monkeypatch)
    quick = profile(LIVES, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(seed(SEED)(Life), settings=quick)


def test_a_seed_gives_the_same_lives_again() -> None:
    def lives() -> list[list[str]]:
        seen: list[list[str]] = []

        class Recorded(Life):
            def teardown(self) -> None:
                super().teardown()
                seen.append(self.world.writes)

        run_state_machine_as_test(seed(7)(Recorded), settings=profile(20))
        return seen

    first = lives()
    assert any(len(writes) > 10 for writes in first)
    assert lives() == first
