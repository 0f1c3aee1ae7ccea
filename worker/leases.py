"""What this worker holds, and the thread that keeps it: heartbeats, cancel requests, the watch over a hung device."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, func, update
from sqlalchemy.dialects.postgresql import insert

from shared import lifecycle
from shared.database import storable, transaction
from shared.errors import Unavailable
from shared.lifecycle import Lease
from shared.models import Worker
from shared.services import Services
from worker.device import describe
from worker.rates import Rates

logger = logging.getLogger(__name__)

#: exit status of a worker whose device has stopped making progress
EXIT_STALLED = 71


class Leases:
    """The leases of one worker, renewed by a thread of its own.

    Rendering and delivery read `is_wanted`; the thread alone talks to the database about leases. All methods may be
    called from any thread.
    """

    def __init__(self, services: Services, models: Iterable[str]) -> None:
        self.worker_id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._services = services
        self._models = list(models)
        self._lock = threading.Lock()
        # by lease and not by job: a job whose lease we lost may come back to us under a new one
        self._held: set[Lease] = set()
        self._unwanted: set[Lease] = set()
        self._silent_since: float | None = None
        self._may_be_silent = 0.0
        self._resident: Callable[[], list[str]] = list
        self._images = 0
        self._last_error: str | None = None
        self._rates = Rates()
        self._resting: Callable[[], dict[str, Any]] = dict
        #: an operator asked us to claim nothing more
        self.draining = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    # -- what rendering and delivery tell us

    def start(
        self,
        resident: Callable[[], list[str]],
        rates: Rates | None = None,
        resting: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Register the worker and begin to send heartbeats.

        They tell the models in memory (`resident`), how fast each is (`rates`), and which are left alone (`resting`).
        """
        self._resident, self._rates, self._resting = resident, rates or self._rates, resting
        self._thread.start()

    def hold(self, token: uuid.UUID, job_ids: Iterable[int]) -> None:
        """These jobs are ours from now on."""
        with self._lock:
            self._held.update(Lease(job_id, token) for job_id in job_ids)

    def let_go(self, token: uuid.UUID, job_ids: Iterable[int]) -> None:
        """We are done with these jobs, one way or another."""
        leases = {Lease(job_id, token) for job_id in job_ids}
        with self._lock:
            self._held -= leases
            self._unwanted -= leases

    def is_wanted(self, token: uuid.UUID, job_id: int) -> bool:
        """Whether anybody still waits for this job's image from us: not canceled, and the lease still ours."""
        with self._lock:
            return Lease(job_id, token) not in self._unwanted

    @contextmanager
    def watched(self, seconds: float) -> Iterator[None]:
        """The device works inside this block; if it is silent for `seconds`, this process ends itself.

        Whatever else a worker waits for (storage, database) is outside: that is no hung device.
        """
        self._may_be_silent = seconds
        self._silent_since = time.monotonic()
        try:
            yield
        finally:
            self._silent_since = None

    def progress(self) -> None:
        """The device has just shown that it is alive."""
        self._silent_since = time.monotonic()

    def count(self, images: int) -> None:
        with self._lock:
            self._images += images

    def serve(self, models: Iterable[str]) -> None:
        """The models that we serve from now on."""
        self._models = list(models)

    def report_error(self, message: str) -> None:
        """What operators see beside this worker."""
        self._last_error = storable(message)[:500]

    # -- the thread

    def _run(self) -> None:
        settings = self._services.settings
        next_heartbeat = 0.0
        while True:
            self._exit_if_stalled()
            try:
                if time.monotonic() >= next_heartbeat:
                    next_heartbeat = time.monotonic() + settings.heartbeat_seconds
                    self._heartbeat()
                self._look_for_cancels()
            except Unavailable as error:
                next_heartbeat = 0.0
                logger.warning("no heartbeat: %s", error)
            except Exception:
                logger.exception("heartbeat failed")
            if self._ended.wait(settings.cancel_poll_seconds):
                return

    def _heartbeat(self) -> None:
        # two transactions: nothing that could be wrong with our own row may cost us the leases
        self._renew()
        self._say_hello()

    def _renew(self) -> None:
        held = self._held_now()
        if not held:
            return
        with transaction(self._services.engine) as connection:
            kept = lifecycle.extend(connection, held, lease_seconds=self._services.settings.lease_seconds)
        if lost := self._mark(held - kept):
            logger.warning("lost the lease of %d job(s)", len(lost))

    def _look_for_cancels(self) -> None:
        held = self._held_now()
        if not held:
            return
        with transaction(self._services.engine) as connection:
            canceled = lifecycle.unwanted(connection, [lease.job_id for lease in held])
        self._mark({lease for lease in held if lease.job_id in canceled})

    def _held_now(self) -> set[Lease]:
        with self._lock:
            return set(self._held)

    def _mark(self, unwanted: set[Lease]) -> set[Lease]:
        """Note that nobody waits for these images; what was let go meanwhile is left alone. Returns the new ones."""
        with self._lock:
            new = (unwanted & self._held) - self._unwanted
            self._unwanted |= new
            return new

    def _say_hello(self) -> None:
        with self._lock:
            images, self._images = self._images, 0
        try:
            with transaction(self._services.engine) as connection:
                self._write_row(connection, images)
        except BaseException:
            self.count(images)
            raise

    def _write_row(self, connection: Connection, images: int) -> None:
        changing = {
            "models": self._models,
            "resident": self._resident(),
            "rates": self._rates.view(),
            "claimed": self._rates.since_claims(),
            "resting": self._resting(),
            "device": describe(),
            "last_error": self._last_error,
            "heartbeat_at": func.clock_timestamp(),
            "stopped_at": None,
        }
        row = {"id": self.worker_id, "host": socket.gethostname(), "pid": os.getpid(), "images": images, **changing}
        statement = insert(Worker).values(**row)
        kept = {**changing, "images": Worker.images + images}
        draining_at = connection.execute(
            statement.on_conflict_do_update(index_elements=[Worker.id], set_=kept).returning(Worker.draining_at)
        ).scalar_one()
        self.draining = draining_at is not None

    def _exit_if_stalled(self) -> None:
        since, limit = self._silent_since, self._may_be_silent
        if since is not None and time.monotonic() - since > limit:
            logger.critical("no sign of progress for %.0f s: the device hangs; this worker process ends now", limit)
            # a hung kernel cannot be interrupted; without heartbeats the jobs go to others
            os._exit(EXIT_STALLED)

    def stop(self) -> None:
        """Stop the thread and say goodbye; the leases must have been given back before."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        try:
            with transaction(self._services.engine) as connection:
                connection.execute(
                    update(Worker)
                    .where(Worker.id == self.worker_id)
                    .values(stopped_at=func.clock_timestamp(), images=Worker.images + self._images, resident=[])
                )
        except Exception as error:
            logger.warning("left without goodbye: %s", error)
