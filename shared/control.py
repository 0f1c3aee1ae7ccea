"""What a tenant may do to its batches and jobs after submitting: cancel, in chunks that hold nobody up."""

from __future__ import annotations

import time
import uuid

from sqlalchemy import func, update

from shared import lifecycle, progress
from shared.database import transaction
from shared.models import Batch
from shared.services import Services

#: how long a caller is kept waiting while the jobs of a batch are called off
_CANCEL_SECONDS = 3.0


def cancel_batch(services: Services, tenant_id: int, public_id: uuid.UUID) -> None:
    """Call a batch off. The flag alone suffices: from now on workers drop what they claim of it.

    The waiting jobs are then moved in chunks, for a few seconds; of a huge batch the keeper moves the rest.
    Idempotent. Raises `NotFound`.
    """
    with transaction(services.engine) as connection:
        batch_id = progress.internal_batch_id(connection, tenant_id, public_id)
        connection.execute(
            update(Batch)
            .where(Batch.id == batch_id, Batch.finished_at.is_(None))
            .values(cancel_requested_at=func.coalesce(Batch.cancel_requested_at, func.clock_timestamp()))
        )
    moved, deadline = lifecycle.CHUNK, time.monotonic() + _CANCEL_SECONDS
    while moved and time.monotonic() < deadline:
        with transaction(services.engine) as connection:
            moved = lifecycle.cancel(connection, batch_id)


def cancel_job(services: Services, tenant_id: int, public_id: uuid.UUID, idx: int) -> None:
    """Call one job off: at once where it waits, within a moment where it renders. Idempotent. Raises `NotFound`."""
    with transaction(services.engine) as connection:
        found = progress.job(connection, tenant_id, public_id, idx)
        lifecycle.cancel(connection, found.batch_id, found.idx)
