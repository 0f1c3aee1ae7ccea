"""Where in a queue a claim begins to look.

PostgreSQL cannot remove the index entries of claimed jobs while any transaction is older than the claims: a dump, a
forgotten session. They stand before the head of the queue, and each claim walks over all of them. Claims that have
become slow therefore begin where the last one found its job. Jobs that come to stand before that place (urgent ones,
those of a lost worker) are found a few seconds later, or at once when nothing else is left.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable

from sqlalchemy import Connection

from shared import lifecycle
from shared.lifecycle import ClaimedJob, Position

#: a claim from the beginning of its queue that took longer sets a floor
SLOW_SECONDS = 0.01
#: how long claims begin at the floor before one looks from the beginning again
RESET_SECONDS = 5.0


class Floors:
    """The floors of one worker, by model. Not for several threads. `clock` tells seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._floors: dict[str, tuple[Position, float]] = {}

    def claim(
        self, connection: Connection, model: str, *, worker: str, token: uuid.UUID, lease_seconds: float, limit: int
    ) -> list[ClaimedJob]:
        """`lifecycle.claim`, from the floor where there is one."""

        def look(floor: Position | None) -> list[ClaimedJob]:
            return lifecycle.claim(
                connection, model, worker=worker, token=token, lease_seconds=lease_seconds, limit=limit, floor=floor
            )

        began = self._clock()
        floor, until = self._floors.get(model, (None, 0.0))
        if floor is not None and began < until and (jobs := look(floor)):
            self._floors[model] = jobs[0].position, until
            return jobs
        self._floors.pop(model, None)
        began = self._clock()
        jobs = look(None)
        now = self._clock()
        if jobs and now - began > SLOW_SECONDS:
            self._floors[model] = jobs[0].position, now + RESET_SECONDS
        return jobs
