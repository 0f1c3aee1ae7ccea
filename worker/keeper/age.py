"""Raises what waits long into the next class, so that a low priority is late and never starves."""

from sqlalchemy import text, update

from shared import lifecycle
from shared.database import transaction
from shared.models import Batch
from shared.services import Services
from shared.states import Priority

_WAITING_LONG = text("""
SELECT id, rank FROM (
    SELECT id, COALESCE(aged_to, priority) AS now,
           GREATEST(priority - floor(extract(epoch FROM clock_timestamp() - created_at) / :step), 0)::int AS rank
    FROM batch WHERE finished_at IS NULL AND priority > 0) AS waiting
WHERE rank < now ORDER BY id LIMIT 100
""")


def run(services: Services) -> int:
    """One class for each `ageing_seconds` since the batch was submitted. A setting of 0 switches this off."""
    step = services.settings.ageing_seconds
    if not step:
        return 0
    with transaction(services.engine) as connection:
        waiting = connection.execute(_WAITING_LONG, {"step": step}).all()
    total = 0
    for batch_id, rank in waiting:
        moved = 1
        while moved:
            with transaction(services.engine) as connection:
                moved = lifecycle.reprioritize(connection, batch_id, Priority.of_rank(rank), raise_only=True)
                if not moved:
                    connection.execute(update(Batch).where(Batch.id == batch_id).values(aged_to=rank))
            total += moved
    return total
