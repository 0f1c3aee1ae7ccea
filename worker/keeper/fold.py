"""Closes batches whose last job has ended: folds their counters into one row and writes the event."""

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, BIGINT

from shared import failpoints
from shared.database import transaction
from shared.services import Services
from shared.states import OPEN, State

_OPEN_JOBS = " + ".join(f"sum(c.{state})" for state in sorted(OPEN))
_COLUMNS = ", ".join(State)
_SUMS = ", ".join(f"sum({state})" for state in State)

_ENDED = f"finished_at IS NULL AND (SELECT {_OPEN_JOBS} FROM batch_counter c WHERE c.batch_id = batch.id) = 0"

_LOCK = text(f"""
SELECT id FROM batch WHERE {_ENDED} ORDER BY id LIMIT 100 FOR UPDATE SKIP LOCKED
""")

# A statement of its own, which sees what was committed before the lock was ours. From then on a batch without open
# jobs stays so: only `resubmit` could open it again, and that waits for this lock.
_CLOSE = text(f"""
WITH closed AS (
    UPDATE batch SET finished_at = clock_timestamp() WHERE id = ANY(:ids) AND {_ENDED} RETURNING id, webhook_url),
  outbox AS (
    INSERT INTO webhook_outbox (event, batch_id, payload)
    SELECT 'batch.finished', id, '{{}}' FROM closed WHERE webhook_url IS NOT NULL
    ON CONFLICT DO NOTHING)
SELECT id FROM closed
""").bindparams(bindparam("ids", type_=ARRAY(BIGINT)))

_FOLD = text(f"""
WITH old AS (DELETE FROM batch_counter WHERE batch_id = ANY(:ids) RETURNING *)
INSERT INTO batch_counter (batch_id, shard, {_COLUMNS})
SELECT batch_id, 0, {_SUMS} FROM old GROUP BY batch_id
""")


def run(services: Services) -> int:
    """Close what is done."""
    with transaction(services.engine) as connection:
        ended = list(connection.execute(_LOCK).scalars())
        closed = list(connection.execute(_CLOSE, {"ids": ended}).scalars()) if ended else []
    if closed:
        failpoints.hit("mid_fold")
        with transaction(services.engine) as connection:
            connection.execute(_FOLD, {"ids": closed})
    return len(closed)
