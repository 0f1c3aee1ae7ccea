"""Moves the waiting jobs of large batches into their new priority class, where a request was too short for it."""

import time

from sqlalchemy import select

from shared import control
from shared.database import transaction
from shared.models import Batch
from shared.services import Services

#: how long the other chores may wait for this one in a round
_ROUND_SECONDS = 2.0


def run(services: Services) -> int:
    """Move chunk after chunk, for a moment; the next round goes on."""
    deadline = time.monotonic() + _ROUND_SECONDS
    with transaction(services.engine) as connection:
        statement = select(Batch.id).where(Batch.finished_at.is_(None), Batch.reordering).order_by(Batch.id).limit(100)
        batch_ids = list(connection.execute(statement).scalars())
    total = 0
    for batch_id in batch_ids:
        moved = 1
        while moved and time.monotonic() < deadline:
            with transaction(services.engine) as connection:
                moved = control.reorder_chunk(connection, batch_id)
            total += moved
    return total
