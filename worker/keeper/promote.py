"""Queues scheduled retries when their time has come."""

from shared import lifecycle
from shared.database import transaction
from shared.services import Services


def run(services: Services) -> int:
    """Queue what is due, and ring for it."""
    with transaction(services.engine) as connection:
        models = lifecycle.promote(connection)
    services.bell.ring(set(models))
    return len(models)
