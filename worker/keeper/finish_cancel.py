"""Finishes the cancelation of batches whose API process died half-way through the chunks."""

from sqlalchemy import select

from shared import lifecycle
from shared.database import transaction
from shared.models import Batch
from shared.services import Services


def run(services: Services) -> int:
    """Move one chunk of each batch that is being canceled; the next round takes the next."""
    with transaction(services.engine) as connection:
        statement = select(Batch.id).where(Batch.finished_at.is_(None), Batch.cancel_requested_at.is_not(None))
        batch_ids = list(connection.execute(statement.limit(100)).scalars())
    moved = 0
    for batch_id in batch_ids:
        with transaction(services.engine) as connection:
            moved += lifecycle.cancel(connection, batch_id)
    return moved
