"""The parent's eye on the process that renders: when it dies, its leases end at once instead of running out.

A child tells its worker id through memory that it shares with the parent. Whoever dies by SIGKILL, an out-of-memory
kill or a segmentation fault says nothing; the parent sees the process vanish.
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
#: children that may be dead and not buried yet, while the next one lives already
_SLOTS = 16


class ChildWatch:
    """Made before the fork. The child calls `here` and `gone`, the parent `start`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # a slot for each child: the next one may be there before the parent has seen that the last one died
        self._slots = [RawArray("c", _LONGEST_ID) for _ in range(_SLOTS)]

    def here(self, worker_id: str) -> None:
        """This process renders under that id from now on."""
        free = next((slot for slot in self._slots if not slot.value), None)
        if free is None:
            logger.error("too many dead children wait to be buried; if this one dies too, its leases run out")
            return
        free.value = f"{os.getpid()} {worker_id}".encode()[: _LONGEST_ID - 1]

    def gone(self) -> None:
        """This process has given everything back and may end."""
        mine = f"{os.getpid()} ".encode()
        for slot in self._slots:
            if slot.value.startswith(mine):
                slot.value = b""

    def told(self, worker_id: str) -> bool:
        """Whether a child of this id has said that it is here, and neither left nor been buried."""
        return any(slot.value.partition(b" ")[2] == worker_id.encode() for slot in self._slots)

    def start(self) -> None:
        """Begin to watch, in a thread of the parent."""
        threading.Thread(target=self._watch, name="child-watch", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(_LOOK_SECONDS)
            for slot in self._slots:
                pid, _, worker_id = slot.value.decode(errors="replace").partition(" ")
                # while the database is away the dead keep their slots; their leases may run out before
                if worker_id and not _lives(int(pid)) and self._try_to_bury(worker_id):
                    slot.value = b""

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
