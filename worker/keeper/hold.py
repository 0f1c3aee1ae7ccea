"""Makes what is paused wait and lets the rest go on, where a request was too short for it or died half-way."""

import time

from sqlalchemy import text

from shared import control, lifecycle
from shared.database import transaction
from shared.lifecycle.statements import PAUSED
from shared.services import Services

#: how long the other chores may wait for this one in a round
_ROUND_SECONDS = 2.0

# the counters tell whether there is anything to move without a look at a million jobs
_OF = """
SELECT b.id FROM batch b JOIN tenant t ON t.id = b.tenant_id LEFT JOIN model_control m ON m.model = b.model
WHERE b.finished_at IS NULL AND b.cancel_requested_at IS NULL"""

_TO_HOLD = text(f"""{_OF} AND {PAUSED}
  AND (SELECT sum(c.queued) FROM batch_counter c WHERE c.batch_id = b.id) > 0
ORDER BY b.id LIMIT 100
""")

_TO_RELEASE = text(f"""{_OF} AND NOT {PAUSED} AND t.max_in_flight IS NULL
  AND (SELECT sum(c.held) FROM batch_counter c WHERE c.batch_id = b.id) > 0
ORDER BY b.id LIMIT 100
""")


def run(services: Services) -> int:
    """Move chunk after chunk, for a moment; the next round goes on."""
    deadline = time.monotonic() + _ROUND_SECONDS
    total = 0
    for statement, move in ((_TO_HOLD, lifecycle.hold), (_TO_RELEASE, control.release_chunk)):
        with transaction(services.engine) as connection:
            batch_ids = list(connection.execute(statement).scalars())
        for batch_id in batch_ids:
            moved = lifecycle.CHUNK
            while moved == lifecycle.CHUNK and time.monotonic() < deadline:
                with transaction(services.engine) as connection:
                    moved = move(connection, batch_id)
                total += moved
    return total
