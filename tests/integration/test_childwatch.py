"""The parent's watch over its rendering process: no death is missed, however soon the next child is there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import uuid

from sqlalchemy import select

from shared import lifecycle
from shared.database import transaction
from shared.models import Job
from shared.services import Services
from shared.states import State
from shared.tenants import TenantIdentity
from tests.farm import wait_for
from tests.integration.test_lifecycle import submit_jobs
from worker.childwatch import ChildWatch

_spawn = multiprocessing.get_context("spawn")


def renders_until_killed(watch: ChildWatch, worker_id: str) -> None:
    watch.here(worker_id)
    signal.pause()


def leases(services: Services) -> dict[str | None, str]:
    with transaction(services.engine) as connection:
        return {row.claimed_by: row.state for row in connection.execute(select(Job.claimed_by, Job.state))}


def test_children_that_are_replaced_at_once_are_all_buried(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant, 3)
    watch = ChildWatch(services.settings)
    alive = None
    for worker_id in ("first", "second", "third"):
        with transaction(services.engine) as connection:
            token = uuid.uuid4()
            assert lifecycle.claim(connection, "fake", worker=worker_id, token=token, lease_seconds=600, limit=1)
        alive = _spawn.Process(target=renders_until_killed, args=(watch, worker_id))
        alive.start()
        wait_for(lambda name=worker_id: watch.told(name), what="the child's word")  # type: ignore[misc]
        if worker_id != "third":
            os.kill(alive.pid or 0, signal.SIGKILL)
            alive.join()
    try:
        watch.start()
        wait_for(
            lambda: [*leases(services).values()].count(State.QUEUED) == 2, seconds=10, what="the end of two leases"
        )
        assert leases(services)["third"] == State.RENDERING
    finally:
        assert alive is not None
        alive.kill()
        alive.join()
    wait_for(lambda: State.RENDERING not in leases(services).values(), seconds=10, what="the end of the last lease")


def test_who_has_left_properly_is_not_buried(services: Services, tenant: TenantIdentity) -> None:
    watch = ChildWatch(services.settings)
    watch.here("me")
    assert watch.told("me")
    watch.gone()
    assert not watch.told("me")
