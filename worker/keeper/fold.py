"""Closes batches whose last job has ended: folds their counters into one row and writes the event."""

from sqlalchemy import text

from shared import failpoints
from shared.database import transaction
from shared.services import Services
from shared.states import OPEN, State

_OPEN_JOBS = " + ".join(f"sum(c.{state})" for state in sorted(OPEN))
_COLUMNS = ", ".join(State)
_SUMS = ", ".join(f"sum({state})" for state in State)

# a batch without open jobs can only change by `resubmit`, which locks the batch row too
_CLOSE = text(f"""
WITH done AS MATERIALIZED (
    SELECT b.id FROM batch b
    WHERE b.finished_at IS NULL
      AND (SELECT {_OPEN_JOBS} FROM batch_counter c WHERE c.batch_id = b.id) = 0
    ORDER BY b.id LIMIT 100 FOR UPDATE SKIP LOCKED),
  closed AS (UPDATE batch SET finished_at = clock_timestamp() FROM done WHERE batch.id = done.id RETURNING batch.id),
  outbox AS (
    INSERT INTO webhook_outbox (event, batch_id, payload)
    SELECT 'batch.finished', b.id, '{{}}' FROM batch b JOIN done ON done.id = b.id WHERE b.webhook_url IS NOT NULL
    ON CONFLICT DO NOTHING)
SELECT id FROM closed
""")

_FOLD = text(f"""
WITH old AS (DELETE FROM batch_counter WHERE batch_id = ANY(:ids) RETURNING *)
INSERT INTO batch_counter (batch_id, shard, {_COLUMNS})
SELECT batch_id, 0, {_SUMS} FROM old GROUP BY batch_id
""")


def run(services: Services) -> int:
    """Close what is done."""
    with transaction(services.engine) as connection:
        closed = list(connection.execute(_CLOSE).scalars())
    if closed:
        failpoints.hit("mid_fold")
        with transaction(services.engine) as connection:
            connection.execute(_FOLD, {"ids": closed})
    return len(closed)
