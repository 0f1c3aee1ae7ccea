"""Deletes batches whose retention is over: the rows, then the images."""

import logging

from sqlalchemy import text

from shared.database import transaction
from shared.keys import batch_prefix
from shared.services import Services

logger = logging.getLogger(__name__)

# one statement: a batch is there or not, and one that is opened again at this moment stays
_PRUNE = text("""
WITH expired AS MATERIALIZED (
    SELECT id FROM batch
    WHERE retention_seconds IS NOT NULL AND finished_at + make_interval(secs => retention_seconds) < clock_timestamp()
    ORDER BY finished_at LIMIT :limit FOR UPDATE SKIP LOCKED)
DELETE FROM batch USING expired WHERE batch.id = expired.id RETURNING batch.id, batch.tenant_id
""")
_AT_A_TIME = 5


def run(services: Services) -> int:
    """Delete a few batches. What a crash leaves of their images is swept later."""
    with transaction(services.engine) as connection:
        connection.execute(text("SET LOCAL statement_timeout = '10min'"))
        pruned = connection.execute(_PRUNE, {"limit": _AT_A_TIME}).all()
    for batch_id, tenant_id in pruned:
        services.storage.delete(info.key for info in services.storage.list(batch_prefix(tenant_id, batch_id)))
    if pruned:
        logger.info("pruned %d expired batch(es)", len(pruned))
    return len(pruned)
