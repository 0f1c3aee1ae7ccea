"""The parent's eye on the process that renders: when it dies, its leases end at once instead of running out.

The child tells its worker id through memory that both share. Whoever dies by SIGKILL, an out-of-memory kill or a
segmentation fault says nothing; the parent sees the process vanish.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from multiprocessing.sharedctypes import RawArray

import psutil
from sqlalchemy import func, update

from shared import lifecycle
from shared.database import open_engine, transaction
from shared.errors import FarmError
from shared.models import Worker
from shared.queue import Bell
from shared.settings import Settings
from shared.states import State

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.25
_LONGEST_ID = 256


class ChildWatch:
    """Made before the fork. The child calls `here` and `gone`, the parent `start`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._memory = RawArray("c", _LONGEST_ID)

    def here(self, worker_id: str) -> None:
        """This process renders under that id from now on."""
        self._memory.value = f"{os.getpid()} {worker_id}".encode()[: _LONGEST_ID - 1]

    def gone(self) -> None:
        """This process has given everything back and may end."""
        self._memory.value = b""

    def start(self) -> None:
        """Begin to watch, in a thread of the parent."""
        threading.Thread(target=self._watch, name="child-watch", daemon=True).start()

    def _watch(self) -> None:
        dead: list[str] = []
        while True:
            time.sleep(_LOOK_SECONDS)
            told = self._memory.value
            pid, _, worker_id = told.decode(errors="replace").partition(" ")
            if worker_id and not _lives(int(pid)):
                # the next child writes here too
                if self._memory.value == told:
                    self._memory.value = b""
                dead.append(worker_id)
            # while the database is away they stay on the list; the leases may run out before
            dead = [one for one in dead if not self._try_to_bury(one)]

    def _try_to_bury(self, worker_id: str) -> bool:
        try:
            self._bury(worker_id)
        except FarmError as error:
            logger.warning("the leases of %s cannot be ended yet: %s", worker_id, error)
            return False
        except Exception:
            logger.exception("the leases of %s could not be ended, they run out", worker_id)
        return True

    def _bury(self, worker_id: str) -> None:
        """End the leases of a dead child and ring for its jobs."""
        engine = open_engine(self._settings, "imagefarm worker parent", pool_size=1)
        try:
            with transaction(engine) as connection:
                rescued = lifecycle.rescue(connection, workers=[worker_id])
                connection.execute(
                    update(Worker)
                    .where(Worker.id == worker_id)
                    .values(stopped_at=func.clock_timestamp(), last_error="its process died", resident=[])
                )
        finally:
            # nothing stays open: the next child must not inherit a connection
            engine.dispose()
        logger.error("the rendering process of %s died; took back %d job(s)", worker_id, len(rescued))
        models = {model for model, state in rescued if state is State.QUEUED}
        if models:
            Bell(self._settings).ring(models)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
