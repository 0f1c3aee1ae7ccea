"""What this worker holds, and the thread that keeps it: heartbeats, cancel requests, the watch over a hung device."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Any

from sqlalchemy import func, update
from sqlalchemy.dialects.postgresql import insert

from shared import lifecycle
from shared.database import transaction
from shared.errors import Unavailable
from shared.models import Worker
from shared.services import Services
from worker.device import describe

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
        self._held: dict[int, uuid.UUID] = {}
        self._unwanted: set[int] = set()
        self._lost: set[int] = set()
        self._busy_since: float | None = None
        self._resident: Callable[[], list[str]] = list
        self._images = 0
        self._last_error: str | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    # -- what rendering and delivery tell us

    def start(self, resident: Callable[[], list[str]]) -> None:
        """Register the worker and begin to send heartbeats. `resident` names the models in memory."""
        self._resident = resident
        self._thread.start()

    def hold(self, token: uuid.UUID, job_ids: Iterable[int]) -> None:
        """These jobs are ours from now on."""
        with self._lock:
            self._held.update(dict.fromkeys(job_ids, token))

    def let_go(self, job_ids: Iterable[int]) -> None:
        """We are done with these jobs, one way or another."""
        with self._lock:
            for job_id in job_ids:
                self._held.pop(job_id, None)
                self._unwanted.discard(job_id)
                self._lost.discard(job_id)

    def is_wanted(self, job_id: int) -> bool:
        """Whether anybody still waits for this job's image: not canceled, and the lease still ours."""
        with self._lock:
            return job_id not in self._unwanted and job_id not in self._lost

    def progress(self) -> None:
        """The device has just shown that it is alive (a step, a finished load)."""
        self._busy_since = time.monotonic()

    def idle(self) -> None:
        """The device has nothing to do, so silence is no stall."""
        self._busy_since = None

    def count(self, images: int) -> None:
        with self._lock:
            self._images += images

    def serve(self, models: Iterable[str]) -> None:
        """The models that we serve from now on."""
        self._models = list(models)

    def report_error(self, message: str) -> None:
        """What operators see beside this worker."""
        self._last_error = message[:500]

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
        with self._lock:
            held = dict(self._held)
            images, self._images = self._images, 0
        try:
            with transaction(self._services.engine) as connection:
                if held:
                    kept = lifecycle.extend(
                        connection,
                        list(held),
                        sorted(set(held.values())),
                        lease_seconds=self._services.settings.lease_seconds,
                    )
                    self._mark(lost=set(held) - kept)
                self._say_hello(connection, images)
        except BaseException:
            self.count(images)
            raise

    def _look_for_cancels(self) -> None:
        with self._lock:
            held = list(self._held)
        if held:
            with transaction(self._services.engine) as connection:
                self._mark(unwanted=lifecycle.unwanted(connection, held))

    def _mark(self, *, lost: AbstractSet[int] = frozenset(), unwanted: AbstractSet[int] = frozenset()) -> None:
        with self._lock:
            # a job that was let go meanwhile is nobody's business any more
            self._lost |= lost & self._held.keys()
            self._unwanted |= unwanted & self._held.keys()
        if lost:
            logger.warning("lost the lease of %d job(s)", len(lost))

    def _say_hello(self, connection: Any, images: int) -> None:
        changing = {
            "models": self._models,
            "resident": self._resident(),
            "device": describe(),
            "last_error": self._last_error,
            "heartbeat_at": func.clock_timestamp(),
            "stopped_at": None,
        }
        connection.execute(
            insert(Worker)
            .values(
                id=self.worker_id,
                host=socket.gethostname(),
                pid=os.getpid(),
                images=images,
                **changing,
            )
            .on_conflict_do_update(index_elements=[Worker.id], set_={**changing, "images": Worker.images + images})
        )

    def _exit_if_stalled(self) -> None:
        since = self._busy_since
        limit = self._services.settings.stall_seconds
        if since is not None and time.monotonic() - since > limit:
            logger.critical("no denoising step for %.0f s: the device hangs; this worker process ends now", limit)
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
