"""Deletes stored images that no row knows: a worker died between upload and record, or lost its lease.

The storage is walked a little in each round, once in `sweep_seconds`. Only what is older than `orphan_grace_seconds` is
touched: a worker may still hold on to a finished image while the database is away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice
from typing import Any

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, BIGINT, INTEGER

from shared.database import transaction
from shared.keys import ROOT, place_of, thumbnail_key
from shared.services import Services
from shared.storage import ObjectInfo, Storage

logger = logging.getLogger(__name__)

#: objects that are looked at in one round
_AT_A_TIME = 1_000

_RESULTS = text("""
SELECT j.result_key FROM unnest(:batches, :indexes) AS place (batch_id, idx)
JOIN job j ON j.batch_id = place.batch_id AND j.idx = place.idx WHERE j.result_key IS NOT NULL
""").bindparams(bindparam("batches", type_=ARRAY(BIGINT)), bindparam("indexes", type_=ARRAY(INTEGER)))


class _Walk:
    """Where the walk through a storage stands. It begins anew when the keeper does."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._objects: Iterator[ObjectInfo] | None = None
        self._next_at = 0.0

    def step(self, pause_seconds: float) -> list[ObjectInfo]:
        """The next objects to look at; none while it is not yet time for another walk."""
        if self._objects is None:
            if time.monotonic() < self._next_at:
                return []
            self._objects = self._storage.list(ROOT)
        try:
            found = list(islice(self._objects, _AT_A_TIME))
        except Exception:
            self._objects = None
            raise
        if len(found) < _AT_A_TIME:
            self._objects, self._next_at = None, time.monotonic() + pause_seconds
        return found


@lru_cache(maxsize=8)
def _walk_of(storage: Any) -> _Walk:
    return _Walk(storage)


def run(services: Services) -> int:
    """Look at some objects and delete the orphans among them."""
    oldest = datetime.now(UTC) - timedelta(seconds=services.settings.orphan_grace_seconds)
    storage: Any = services.storage
    objects = _walk_of(storage).step(services.settings.sweep_seconds)
    old = [info.key for info in objects if info.modified_at < oldest]
    places = {place for key in old if (place := place_of(key))}
    if not places:
        return 0
    values = {"batches": [batch for batch, _ in places], "indexes": [idx for _, idx in places]}
    with transaction(services.engine) as connection:
        results = list(connection.execute(_RESULTS, values).scalars())
    known = {*results, *map(thumbnail_key, results)}
    orphans = [key for key in old if place_of(key) and key not in known]
    services.storage.delete(orphans)
    if orphans:
        logger.warning("deleted %d orphan object(s), such as %s", len(orphans), orphans[0])
    return len(orphans)
