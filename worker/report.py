"""How a worker speaks to the database about its jobs: fenced, repeated while the database is away, then let go.

An image that cost GPU time is not thrown away because PostgreSQL restarts: each report is repeated until it is
answered. Repeating is safe, since every verb is guarded by the lease token.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import tenacity
from sqlalchemy import Connection

from shared import failpoints, lifecycle
from shared.database import storable, transaction
from shared.errors import FarmError, Permanent, RenderError, StorageError, Unavailable
from shared.lifecycle import Failure, Result
from shared.services import Services
from shared.states import Outcome
from worker.leases import Leases

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE_SECONDS = 600.0
_PATIENCE_WHEN_STOPPING_SECONDS = 5.0


class Reporter:
    """Reports of one worker. Every method ends our hold on the jobs that it names, even where the report fails."""

    def __init__(self, services: Services, leases: Leases, stopping: threading.Event) -> None:
        self._services = services
        self._leases = leases
        self._stopping = stopping

    def succeed(self, token: uuid.UUID, results: Sequence[Result]) -> None:
        """Record stored images. What the fence refuses is canceled, if somebody asked, or somebody else's."""
        ids = [result.job_id for result in results]
        with self._ending(token, ids):
            accepted = self._persist(lambda connection: lifecycle.succeed(connection, token, results))
            failpoints.hit("after_result")
            self._leases.count(len(accepted or ()))
            if accepted is not None and (refused := set(ids) - accepted):
                dropped = self._persist(lambda connection: lifecycle.drop(connection, token, sorted(refused))) or set()
                if late := refused - dropped:
                    logger.warning("%d result(s) came too late and were refused", len(late))

    def give_up(self, token: uuid.UUID, failures: Sequence[tuple[Failure, int, float | None]]) -> None:
        """End these attempts as the policy of their outcome says.

        Each failure comes with the number of its attempt and the seconds that the other side asked us to wait.
        """
        again: list[Failure] = []
        delays: list[float] = []
        over: list[Failure] = []
        for failure, attempt, retry_after in failures:
            delay = lifecycle.backoff(failure.outcome, attempt, retry_after)
            if delay is None:
                over.append(failure)
            else:
                again.append(failure)
                delays.append(delay)
            logger.warning("job %d, attempt %d: %s: %s", failure.job_id, attempt, failure.error_class, failure.detail)
        with self._ending(token, [failure.job_id for failure, _, _ in failures]):
            if again:
                self._persist(lambda connection: lifecycle.retry(connection, token, again, delays))
            if over:
                self._persist(lambda connection: lifecycle.fail(connection, token, over))

    def release(self, token: uuid.UUID, ids: Sequence[int], reason: str) -> None:
        """Put jobs back uncounted: we stop, cannot serve this model, or they are paused."""
        with self._ending(token, ids):
            if ids:
                self._persist(lambda connection: lifecycle.release(connection, token, ids, reason))

    def admit(self, queues: Collection[tuple[int, str]]) -> None:
        """Let the next jobs of tenants with a cap in, now that some have ended. The keeper does so too, but later."""
        for tenant_id, model in queues:
            self._persist(partial(lifecycle.admit, tenant_id=tenant_id, model=model))

    def drop(self, token: uuid.UUID, ids: Sequence[int]) -> None:
        """End jobs as canceled. Jobs whose lease is lost are not touched by this."""
        with self._ending(token, ids):
            if ids:
                self._persist(lambda connection: lifecycle.drop(connection, token, ids))

    @contextmanager
    def _ending(self, token: uuid.UUID, ids: Sequence[int]) -> Iterator[None]:
        """Whatever becomes of the report, no heartbeat keeps these leases any longer: a job without one is rescued."""
        try:
            yield
        finally:
            self._leases.let_go(token, ids)

    def _persist(self, work: Callable[[Connection], T]) -> T | None:
        """Run `work` in a transaction of its own until the database answers; None where it never did."""

        def attempt() -> T:
            with transaction(self._services.engine) as connection:
                return work(connection)

        try:
            return tenacity.Retrying(
                retry=tenacity.retry_if_exception_type(Unavailable),
                wait=tenacity.wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.1),
                stop=self._out_of_patience,
                reraise=True,
            )(attempt)
        except Unavailable:
            logger.error("the database stayed away; the leases of these jobs run out and others will render them")
            return None

    def _out_of_patience(self, state: tenacity.RetryCallState) -> bool:
        limit = _PATIENCE_WHEN_STOPPING_SECONDS if self._stopping.is_set() else _PATIENCE_SECONDS
        return (state.seconds_since_start or 0.0) > limit


def failure_of(job_id: int, error: BaseException) -> tuple[Failure, float | None]:
    """What an exception means for a job: its outcome, its class, and how long the other side asked us to wait."""
    detail = storable(str(error))[:2000] or type(error).__name__
    if isinstance(error, RenderError):
        error_class = error.reason if isinstance(error, Permanent) else error.code
        return Failure(job_id, error.outcome, error_class, detail), getattr(error, "retry_after", None)
    if isinstance(error, StorageError):
        return Failure(job_id, Outcome.TRANSIENT, error.code, detail), None
    if isinstance(error, FarmError):
        return Failure(job_id, Outcome.TRANSIENT, error.code, detail), None
    # not an error that an engine may raise: a bug or a broken machine; another try elsewhere may do
    return Failure(job_id, Outcome.TRANSIENT, "internal_error", f"{type(error).__name__}: {detail}"), None
