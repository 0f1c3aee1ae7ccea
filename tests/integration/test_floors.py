"""Where claims begin to look: behind what was claimed once they are slow, and never for long."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import select, text, update

from shared import lifecycle
from shared.database import transaction
from shared.lifecycle import Position, statements
from shared.models import Batch, Job
from shared.plan import plan
from shared.services import Services
from shared.states import Priority
from shared.submit import submit
from shared.tenants import TenantIdentity
from worker.floors import RESET_SECONDS, Floors


class Clock:
    """Stands still but for the `step` that every look at it costs."""

    def __init__(self, step: float) -> None:
        self.step = step
        self.now = 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def add(
    services: Services, tenant: TenantIdentity, count: int, priority: Priority = Priority.NORMAL, **p: object
) -> int:
    """A batch of fake jobs; returns its row id."""
    planned = plan(services.catalogue["fake"], p, prompts=["x"] * count, max_jobs=count)
    public_id = submit(services, tenant, planned, priority=priority).public_id
    with transaction(services.engine) as connection:
        return connection.execute(select(Batch.id).where(Batch.public_id == public_id)).scalar_one()


def claim(services: Services, floors: Floors) -> int | None:
    """Claims one job; returns its batch."""
    with transaction(services.engine) as connection:
        jobs = floors.claim(connection, "fake", worker="w", token=uuid.uuid4(), lease_seconds=60, limit=1)
    return jobs[0].batch_id if jobs else None


def test_a_claim_looks_at_nothing_before_its_floor(services: Services, tenant: TenantIdentity) -> None:
    add(services, tenant, 4)
    with transaction(services.engine) as connection:
        places = [Position(*row) for row in connection.execute(select(Job.priority, Job.vt, Job.id).order_by(Job.id))]
        jobs = lifecycle.claim(
            connection, "fake", worker="w", token=uuid.uuid4(), lease_seconds=60, limit=8, floor=places[1]
        )
    assert [job.position for job in jobs] == places[1:]


def test_slow_claims_find_what_came_before_their_floor_after_the_reset(
    services: Services, tenant: TenantIdentity
) -> None:
    clock = Clock(step=0.05)
    floors = Floors(clock)
    normal = add(services, tenant, 9)
    assert claim(services, floors) == normal
    urgent = add(services, tenant, 2, Priority.HIGH)
    assert claim(services, floors) == normal, "from the floor on"
    clock.now += RESET_SECONDS
    assert claim(services, floors) == urgent
    assert claim(services, floors) == urgent
    assert claim(services, floors) == normal


def test_what_came_before_the_floor_is_found_at_once_when_nothing_else_is_left(
    services: Services, tenant: TenantIdentity
) -> None:
    floors = Floors(Clock(step=0.05))
    normal = add(services, tenant, 2)
    assert claim(services, floors) == normal
    urgent = add(services, tenant, 1, Priority.HIGH)
    assert [claim(services, floors) for _ in range(3)] == [normal, urgent, None]


def test_quick_claims_always_begin_at_the_head(services: Services, tenant: TenantIdentity) -> None:
    floors = Floors(Clock(step=0.0))
    normal = add(services, tenant, 3)
    assert claim(services, floors) == normal
    urgent = add(services, tenant, 1, Priority.HIGH)
    assert [claim(services, floors) for _ in range(2)] == [urgent, normal]


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
def test_mates_are_looked_for_among_mates_alone(services: Services, tenant: TenantIdentity, mode: str) -> None:
    """A job whose parameters are rare must not make its claim walk over a long queue of others."""
    add(services, tenant, 20_000)
    rare = add(services, tenant, 1, width=128)
    values = {"model": "fake", "worker": "w", "token": uuid.uuid4(), "lease": 60.0, "mates": 7, "shard": 0}
    values |= {"floor_priority": -1, "floor_vt": -2.0, "floor_id": 0}
    with transaction(services.engine) as connection:
        connection.execute(update(Job).where(Job.batch_id == rare).values(vt=-1.0))
        connection.execute(text("ANALYZE job"))
        connection.execute(text(f"SET LOCAL plan_cache_mode = {mode}"))
        lines = (
            connection.execute(text(f"EXPLAIN (ANALYZE, COSTS OFF) {statements.CLAIM.text}"), values).scalars().all()
        )
    skipped = [int(line.rpartition(":")[2]) for line in lines if "Rows Removed by Filter" in line]
    assert sum(skipped) < 100, lines
