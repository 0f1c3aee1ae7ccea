"""Rings for queues that have work: bells get lost with Redis, or with an API process between commit and ring."""

from sqlalchemy import text

from shared.database import transaction
from shared.services import Services

# a loose index scan: the next model that has queued jobs, one index probe each
_MODELS_WITH_WORK = text("""
WITH RECURSIVE waiting AS (
    (SELECT model FROM job WHERE state = 'queued' ORDER BY model LIMIT 1)
    UNION ALL
    SELECT (SELECT model FROM job WHERE state = 'queued' AND model > waiting.model ORDER BY model LIMIT 1)
    FROM waiting WHERE waiting.model IS NOT NULL)
SELECT model FROM waiting WHERE model IS NOT NULL
""")


def run(services: Services) -> int:
    """Bring the bells of every model with queued jobs up to their number."""
    with transaction(services.engine) as connection:
        models = list(connection.execute(_MODELS_WITH_WORK).scalars())
    if models:
        services.bell.ring(models)
    return len(models)
