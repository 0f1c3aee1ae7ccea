"""Takes back the jobs of workers that fell silent."""

import logging

from shared import lifecycle
from shared.database import transaction
from shared.services import Services

logger = logging.getLogger(__name__)


def run(services: Services) -> int:
    """Queue again what an expired lease holds, and ring for it."""
    with transaction(services.engine) as connection:
        rescued = lifecycle.rescue(connection)
    if rescued:
        logger.warning("took back %d job(s) of silent workers", len(rescued))
        services.bell.ring({model for model, _ in rescued})
    return len(rescued)
