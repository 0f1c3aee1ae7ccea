"""Keeps tenants with a cap at it: lets held jobs in where there is room, and sets aside what is too much."""

from sqlalchemy import select

from shared import control, lifecycle
from shared.database import transaction
from shared.models import Tenant
from shared.services import Services

#: the last ones are found by sorting all, so it is better to take many at once
_AT_A_TIME = 4 * lifecycle.CHUNK


def run(services: Services) -> int:
    """One look at each model of each tenant with a cap."""
    with transaction(services.engine) as connection:
        capped = list(connection.execute(select(Tenant.id).where(Tenant.max_in_flight.is_not(None))).scalars())
    total = 0
    for tenant_id in capped:
        for model in control.open_models(services, tenant_id):
            with transaction(services.engine) as connection:
                held = lifecycle.hold_excess(connection, tenant_id, model, limit=_AT_A_TIME)
                admitted = 0 if held else lifecycle.admit(connection, tenant_id, model)
            if admitted:
                services.bell.ring([model])
            total += held + admitted
    return total
