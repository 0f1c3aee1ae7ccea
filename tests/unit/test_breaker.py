"""The circuit breaker of a worker: when it rests a model, for how long, and what ends that."""

from __future__ import annotations

import pytest

from shared.settings import load_settings
from shared.states import Outcome
from tests.farm import wait_for
from worker.breaker import Breaker

URLS = {"database_url": "postgresql:///x", "redis_url": "redis://x", "storage_url": "file:///x"}


def breaker(seconds: float = 60.0) -> Breaker:
    return Breaker(load_settings(**URLS, breaker_failures=3, breaker_seconds=seconds))


def test_equal_failures_in_a_row_begin_a_rest() -> None:
    found = breaker()
    for _ in range(2):
        found.failed("m", Outcome.TRANSIENT, "vendor_down")
        assert not found.rests("m")
    found.failed("m", Outcome.TRANSIENT, "vendor_down")
    assert found.rests("m")
    assert not found.rests("other")
    assert found.view()["m"]["error_class"] == "vendor_down"
    assert found.view()["m"]["failures"] == 3


def test_other_failures_and_successes_between_begin_anew() -> None:
    found = breaker()
    for error_class in ("a", "a", "b", "a", "a"):
        found.failed("m", Outcome.TRANSIENT, error_class)
    found.succeeded("m")
    for _ in range(2):
        found.failed("m", Outcome.TRANSIENT, "a")
    assert not found.rests("m")
    assert found.view() == {}


@pytest.mark.parametrize("outcome", [Outcome.PERMANENT, Outcome.RESOURCE, Outcome.BUDGET, Outcome.CANCELED])
def test_what_is_the_jobs_own_fault_says_nothing_of_the_model(outcome: Outcome) -> None:
    found = breaker()
    for _ in range(10):
        found.failed("m", outcome, "content_policy")
    assert not found.rests("m")


def test_after_a_rest_one_failure_suffices_and_one_success_ends_it() -> None:
    found = breaker(seconds=0.05)
    for _ in range(3):
        found.failed("m", Outcome.TRANSIENT, "x")
    wait_for(lambda: not found.rests("m"), seconds=5)
    assert found.tries("m"), "carefully, one job at a time"
    found.failed("m", Outcome.TRANSIENT, "x")
    assert found.rests("m")
    found.succeeded("m")
    assert not found.rests("m")
    assert not found.tries("m")
