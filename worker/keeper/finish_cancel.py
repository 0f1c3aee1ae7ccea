"""Finishes the cancellation of batches that are too large for one request, or whose API process died half-way."""

import time

from sqlalchemy import select

from shared import lifecycle
from shared.database import transaction
from shared.models import Batch
from shared.services import Services

#: how long the other chores may wait for this one in a round
_ROUND_SECONDS = 2.0


def run(services: Services) -> int:
    """Move chunk after chunk of the batches that are being canceled, for a moment; the next round goes on."""
    deadline = time.monotonic() + _ROUND_SECONDS
    with transaction(services.engine) as connection:
        statement = select(Batch.id).where(Batch.finished_at.is_(None), Batch.cancel_requested_at.is_not(None))
        batch_ids = list(connection.execute(statement.limit(100)).scalars())
    total = 0
    for batch_id in batch_ids:
        moved = lifecycle.CHUNK
        while moved == lifecycle.CHUNK and time.monotonic() < deadline:
            with transaction(services.engine) as connection:
                moved = lifecycle.cancel(connection, batch_id)
            total += moved
    return total
