"""The heart of a worker: claim → group → render → deliver, again and again while there are rows.

Nothing here has a time budget: Redis only wakes idle workers, so a running farm does not notice when it is gone.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError
from sqlalchemy import bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY, TEXT

from shared import failpoints, lifecycle
from shared.database import transaction
from shared.errors import Canceled, DeviceLost, Interrupted, OutOfMemory, Permanent, Unavailable
from shared.lifecycle import ClaimedJob
from shared.models import Batch
from shared.services import Services
from worker.backends import Backend, Rendered
from worker.batching import PassSizes, Task, passes, spec_of
from worker.breaker import Breaker
from worker.delivery import Delivery, RenderedPass
from worker.floors import Floors
from worker.leases import Leases
from worker.rates import Rates
from worker.report import Reporter, failure_of
from worker.residency import Residency

logger = logging.getLogger(__name__)

#: exit status of a worker whose device must be given up by its process
EXIT_DEVICE_LOST = 70
#: batches whose shared parameters are remembered
_REMEMBERED_BATCHES = 1000

_WITH_WORK = text("""
SELECT served.model FROM unnest(:models) AS served (model)
WHERE EXISTS (SELECT FROM job WHERE job.state = 'queued' AND job.model = served.model)
""").bindparams(bindparam("models", type_=ARRAY(TEXT)))


@dataclass(frozen=True)
class _Claim:
    """What one look into the queue brought us."""

    token: uuid.UUID
    model: str
    jobs: Sequence[ClaimedJob]


class Executor:
    """Renders for one worker process. `models` are those it serves."""

    def __init__(self, services: Services, models: Sequence[str]) -> None:
        self._services = services
        self._models = list(models)
        self._stopping = threading.Event()
        self._interrupt_at = float("inf")
        self._leases = Leases(services, models)
        self._reporter = Reporter(services, self._leases, self._stopping)
        self._residency = Residency(services)
        self._breaker = Breaker(services.settings)
        self._rates = Rates()
        self._delivery = Delivery(services, self._leases, self._reporter, self._breaker, self._stopping)
        self._sizes = PassSizes()
        self._floors = Floors()
        self._shared: dict[int, dict[str, Any]] = {}
        self._current: str | None = None
        self._current_since = 0.0
        self._doubtful: tuple[str, uuid.UUID] | None = None

    @property
    def worker_id(self) -> str:
        """The id under which this worker claims."""
        return self._leases.worker_id

    def start(self) -> None:
        """Register this worker and begin its heartbeats."""
        self._leases.start(self._residency.names, self._rates, self._breaker.view)

    def stop_soon(self) -> None:
        """Claim nothing more. A pass that is still running after the grace period is interrupted and released."""
        if not self._stopping.is_set():
            self._interrupt_at = time.monotonic() + self._services.settings.grace_seconds
            self._stopping.set()

    def close(self) -> None:
        """Deliver what is rendered, give the memory back, say goodbye."""
        self.stop_soon()
        self._delivery.close()
        self._leases.stop()
        self._residency.clear()

    def drain(self, model: str) -> None:
        """Render for all served models, `model` first, until there was no work for a while or we are told to stop."""
        if self._current is None and model in self._models:
            self._stay_with(model)
        quiet_since: float | None = None
        passed_on = False
        while not self._stopping.is_set():
            if self._leases.draining:
                quiet_since = None
                self._stopping.wait(self._services.settings.linger_poll_seconds)
                continue
            try:
                claim = self._claim()
            except Unavailable as error:
                logger.warning("cannot claim: %s", error)
                self._stopping.wait(1.0)
                continue
            if claim is None:
                quiet_since = quiet_since or time.monotonic()
                if time.monotonic() - quiet_since >= self._services.settings.linger_seconds:
                    break
                passed_on = False
                self._stopping.wait(self._services.settings.linger_poll_seconds)
                continue
            quiet_since = None
            if not passed_on and len(claim.jobs) > 1:
                # there was more than one job: wake the next idle worker, who will do the same
                passed_on = self._services.bell.ring([claim.model])
            self._execute(claim)
        self._delivery.flush()

    # ------------------------------------------------------------------------------------------------------ claim

    def _claim(self) -> _Claim | None:
        """Jobs of the model at hand where it has any and its time is not over; else of the next model with work."""
        if self._doubtful is not None:
            return self._recover_claim(*self._doubtful)
        overdue = time.monotonic() - self._current_since > self._services.settings.affinity_seconds
        current = self._current
        if current in self._models and not overdue and not self._breaker.rests(str(current)):
            claim = self._claim_of(str(current))
            if claim is not None:
                return claim
        for model in self._models_with_work():
            if claim := self._claim_of(model):
                if model != self._current or overdue:
                    self._stay_with(model)
                return claim
        return None

    def _stay_with(self, model: str) -> None:
        self._current, self._current_since = model, time.monotonic()

    def _models_with_work(self) -> list[str]:
        """Served models that have queued jobs, beginning after the current one, so that each gets its turn."""
        with transaction(self._services.engine) as connection:
            found = set(connection.execute(_WITH_WORK, {"models": self._models}).scalars())
        start = self._models.index(self._current) + 1 if self._current in self._models else 0
        in_turn = self._models[start:] + self._models[:start]
        return [model for model in in_turn if model in found and not self._breaker.rests(model)]

    def _claim_of(self, model: str) -> _Claim | None:
        token = uuid.uuid4()
        try:
            with transaction(self._services.engine) as connection:
                jobs = self._floors.claim(
                    connection,
                    model,
                    worker=self._leases.worker_id,
                    token=token,
                    lease_seconds=self._services.settings.lease_seconds,
                    limit=1 if self._breaker.tries(model) else self._services.catalogue[model].max_batch,
                )
        except Unavailable:
            # the commit may have happened although its answer did not arrive
            self._doubtful = (model, token)
            raise
        failpoints.hit("after_claim")
        if jobs:
            self._rates.claimed(model, jobs[0].priority)
        return _Claim(token, model, jobs) if jobs else None

    def _recover_claim(self, model: str, token: uuid.UUID) -> _Claim | None:
        with transaction(self._services.engine) as connection:
            jobs = lifecycle.claimed(connection, token)
        self._doubtful = None
        return _Claim(token, model, jobs) if jobs else None

    # ----------------------------------------------------------------------------------------------------- render

    def _execute(self, claim: _Claim) -> None:
        """Render what was claimed, pass by pass. Each job leaves through delivery or through a report."""
        self._leases.hold(claim.token, [job.id for job in claim.jobs])
        unwanted = [job.id for job in claim.jobs if job.cancel_requested]
        paused = [job.id for job in claim.jobs if job.paused and not job.cancel_requested]
        waiting = {job.id: job for job in claim.jobs if not job.cancel_requested and not job.paused}
        try:
            self._reporter.drop(claim.token, unwanted)
            self._reporter.release(claim.token, paused, "its batch, tenant or model is paused")
            engine = self._engine(claim.model) if waiting else None
            tasks = self._tasks(claim, waiting)
            if engine is not None and tasks:
                size = self._pass_size(engine, tasks[0])
                for group in passes(tasks, size):
                    self._render(engine, claim, group, waiting)
        except Permanent as error:
            self._stop_serving(claim, error, list(waiting))
        except (Interrupted, Unavailable) as error:
            logger.warning("%d job(s) go back to the queue: %s", len(waiting), error)
            self._reporter.release(claim.token, list(waiting), str(error))
        except Exception as error:
            logger.exception("a claim failed")
            self._give_up(claim, list(waiting.values()), error)

    def _engine(self, model: str) -> Backend:
        with self._leases.watched(self._services.settings.load_seconds):
            return self._residency.engine(model)

    def _tasks(self, claim: _Claim, waiting: dict[int, ClaimedJob]) -> list[Task]:
        entry = self._services.catalogue[claim.model]
        shared = self._parameters({job.batch_id for job in waiting.values()})
        tasks = []
        for job in list(waiting.values()):
            try:
                tasks.append(Task(job, spec_of(entry, shared[job.batch_id], job)))
            except ValidationError as error:
                del waiting[job.id]
                reason = Permanent(f"this worker cannot read the job: {error}", code="unreadable_job")
                self._give_up(claim, [job], reason)
        return tasks

    def _parameters(self, batch_ids: set[int]) -> dict[int, dict[str, Any]]:
        """The shared parameters of batches. They never change, so they are read once."""
        missing = batch_ids - self._shared.keys()
        if missing:
            if len(self._shared) > _REMEMBERED_BATCHES:
                self._shared.clear()
                missing = batch_ids
            with transaction(self._services.engine) as connection:
                rows = connection.execute(select(Batch.id, Batch.parameters).where(Batch.id.in_(missing)))
                self._shared.update({row.id: row.parameters for row in rows})
        return self._shared

    def _pass_size(self, engine: Backend, task: Task) -> int:
        return self._sizes.limit(self._kind(task), engine.max_batch(task.spec))

    def _kind(self, task: Task) -> int:
        return task.spec.batch_key(task.job.model, "")

    def _render(self, engine: Backend, claim: _Claim, group: Sequence[Task], waiting: dict[int, ClaimedJob]) -> None:
        """One pass. A pass that fails is split, so that one bad job does not take its mates along."""
        tasks: list[Task] = []
        unwanted: list[Task] = []
        for task in group:
            (tasks if self._leases.is_wanted(claim.token, task.job.id) else unwanted).append(task)
        self._drop(claim, unwanted, waiting)
        if not tasks:
            return
        if any(task.job.lost_count for task in tasks):
            # it may take this process down, and shall not take images along that are rendered but not recorded yet
            self._delivery.flush()
        try:
            pictures, seconds = self._pass(engine, claim, tasks)
        except Interrupted:
            raise
        except DeviceLost as error:
            self._end_process(error)
        except Canceled:
            self._drop(claim, tasks, waiting)
        except Exception as error:
            if len(tasks) == 1:
                waiting.pop(tasks[0].job.id)
                self._give_up(claim, [tasks[0].job], error)
                return
            if isinstance(error, OutOfMemory):
                self._sizes.lower(self._kind(tasks[0]), len(tasks))
            half = (len(tasks) + 1) // 2
            logger.warning("a pass of %d failed and is split: %s", len(tasks), error)
            self._render(engine, claim, tasks[:half], waiting)
            self._render(engine, claim, tasks[half:], waiting)
        else:
            for task in tasks:
                waiting.pop(task.job.id)
            entry = self._services.catalogue[claim.model]
            self._delivery.send(RenderedPass(claim.token, entry, tasks, pictures, seconds))

    def _pass(self, engine: Backend, claim: _Claim, tasks: Sequence[Task]) -> tuple[list[Rendered], float]:
        def on_step(done: int, total: int) -> None:
            self._leases.progress()
            failpoints.hit("render_step")
            if time.monotonic() > self._interrupt_at:
                raise Interrupted
            if not any(self._leases.is_wanted(claim.token, task.job.id) for task in tasks):
                raise Canceled

        started = time.monotonic()
        with self._leases.watched(self._longest_silence(claim.model)):
            pictures = engine.render([task.spec for task in tasks], on_step)
        seconds = time.monotonic() - started
        self._rates.note(claim.model, len(tasks), sum(task.spec.work for task in tasks), seconds)
        return pictures, seconds

    def _end_process(self, error: DeviceLost) -> NoReturn:
        """A CUDA error of this kind stays for as long as the process lives; a fresh one can use the device again.

        The parent sees the end of this process, gives its jobs back as lost, and starts the next.
        """
        logger.critical("%s; this worker process ends now", error)
        self._delivery.flush()
        os._exit(EXIT_DEVICE_LOST)

    def _longest_silence(self, model: str) -> float:
        """Seconds between two steps after which the device counts as hung; a vendor may use its own time-out too."""
        hosted = self._services.catalogue[model].hosted
        return self._services.settings.stall_seconds + (hosted.timeout_seconds if hosted else 0.0)

    # ------------------------------------------------------------------------------------------ jobs without image

    def _drop(self, claim: _Claim, tasks: Sequence[Task], waiting: dict[int, ClaimedJob]) -> None:
        for task in tasks:
            waiting.pop(task.job.id, None)
        self._reporter.drop(claim.token, [task.job.id for task in tasks])

    def _give_up(self, claim: _Claim, jobs: Sequence[ClaimedJob], error: Exception) -> None:
        failures = []
        for job in jobs:
            failure, retry_after = failure_of(job.id, error)
            failures.append((failure, job.own_attempt, retry_after))
        if failures:
            self._leases.report_error(f"{claim.model}: {failures[0][0].error_class}: {failures[0][0].detail}")
            self._reporter.give_up(claim.token, failures)
        for failure, _, _ in failures:
            self._breaker.failed(claim.model, failure.outcome, failure.error_class)

    def _stop_serving(self, claim: _Claim, error: Permanent, job_ids: Sequence[int]) -> None:
        """The model cannot be loaded here: an operator's matter that burns no job. Other workers may have it."""
        logger.error("not serving %s any more: %s", claim.model, error)
        self._leases.report_error(f"not serving {claim.model}: {error}")
        self._models.remove(claim.model)
        self._leases.serve(self._models)
        self._reporter.release(claim.token, job_ids, f"this worker cannot serve the model: {error}")
