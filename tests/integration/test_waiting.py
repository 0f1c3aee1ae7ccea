"""Why a job waits, its place in the queue, and how many workers the waiting work calls for."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import func, insert, update

from shared import lifecycle, progress, waiting
from shared.database import transaction
from shared.lifecycle import Failure
from shared.models import Batch, ModelRate, Tenant, Worker
from shared.plan import plan
from shared.services import Services
from shared.states import Outcome, State
from shared.submit import submit
from shared.tenants import TenantIdentity
from tests.integration.test_lifecycle import claim
from worker.keeper import hold, rates


def submit_fake(services: Services, tenant: TenantIdentity, count: int, **parameters: object) -> uuid.UUID:
    planned = plan(services.catalogue["fake"], parameters, prompts=["x"] * count, max_jobs=100_000)
    return submit(services, tenant, planned).public_id


def say_hello(services: Services, name: str = "w", **columns: object) -> None:
    row = {"id": name, "host": "h", "pid": 1, "models": ["fake"], "device": {}, **columns}
    with transaction(services.engine) as connection:
        connection.execute(insert(Worker).values(**row))


def of_job(services: Services, tenant: TenantIdentity, batch: uuid.UUID, idx: int = 0) -> waiting.Waiting:
    with transaction(services.engine) as connection:
        job = progress.job(connection, tenant.id, batch, idx)
        return waiting.of_job(connection, job, lease_seconds=30)


def of_batch(services: Services, tenant: TenantIdentity, batch: uuid.UUID) -> str | None:
    with transaction(services.engine) as connection:
        return waiting.of_batch(connection, progress.batch(connection, tenant.id, batch), lease_seconds=30)


def queue(services: Services) -> waiting.QueueView:
    with transaction(services.engine) as connection:
        return waiting.queues(connection, ["fake"], lease_seconds=30, scale_seconds=300)[0]


def test_without_a_worker_that_is_the_reason(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 2)
    assert of_job(services, tenant, batch, 1) == waiting.Waiting("no live worker serves fake", 1, None)
    assert of_batch(services, tenant, batch) == "no live worker serves fake"
    say_hello(services, "drained", draining_at=func.now())
    say_hello(services, "silent", heartbeat_at=func.now() - func.make_interval(0, 0, 0, 1))
    say_hello(services, "gone", stopped_at=func.now())
    say_hello(services, "elsewhere", models=["demo-gan"])
    assert of_job(services, tenant, batch).reason == "no live worker serves fake"


def test_the_place_in_the_queue_and_the_time_left(services: Services, tenant: TenantIdentity) -> None:
    say_hello(services, "one", rates={"fake": {"images_per_second": 3.0, "seconds_per_work": 0.5}})
    say_hello(services, "two", rates={"fake": {"images_per_second": 1.0, "seconds_per_work": 0.7}})
    first = submit_fake(services, tenant, 7)
    assert of_job(services, tenant, first) == waiting.Waiting("next in line", 0, 0.25)
    assert of_job(services, tenant, first, 6) == waiting.Waiting("behind 6 jobs", 6, 1.75)


def test_every_other_reason(services: Services, tenant: TenantIdentity) -> None:
    say_hello(services, resting={"fake": {"error_class": "x"}})
    batch = submit_fake(services, tenant, 3)
    assert of_job(services, tenant, batch).reason == "every worker of fake rests after failures"
    with transaction(services.engine) as connection:
        [job] = claim(connection)
        lifecycle.retry(connection, uuid.UUID(int=7), [Failure(job.id, Outcome.TRANSIENT, "x", "")], [60.0])
    assert (of_job(services, tenant, batch, 0).reason or "").startswith("tried again at 20")
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).values(paused_at=func.now()))
    hold.run(services)
    assert of_batch(services, tenant, batch) == "its batch is paused"
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).values(paused_at=None))
        connection.execute(update(Tenant).values(max_in_flight=1))
    assert of_job(services, tenant, batch, 2).reason == "its tenant may have 1 jobs in flight"


def test_the_place_of_a_job_that_a_cap_keeps_out(services: Services, tenant: TenantIdentity) -> None:
    say_hello(services, rates={"fake": {"images_per_second": 2.0, "seconds_per_work": 0.5}})
    with transaction(services.engine) as connection:
        connection.execute(update(Tenant).values(max_in_flight=4))
    first, second = submit_fake(services, tenant, 10), submit_fake(services, tenant, 10)
    assert of_job(services, tenant, first, 9) == waiting.Waiting("its tenant may have 4 jobs in flight", 9, 5.0)
    assert of_job(services, tenant, second, 0).ahead == 10


def test_wanted_workers_follow_the_waiting_work(services: Services, tenant: TenantIdentity) -> None:
    empty = queue(services)
    assert (empty.queued, empty.wanted_workers, empty.live_workers, empty.oldest_wait_seconds) == (0, 0, 0, None)
    submit_fake(services, tenant, 1000, step_seconds=1.0)
    assert queue(services).wanted_workers == 1, "nobody has measured yet"
    say_hello(services, rates={"fake": {"images_per_second": 0.5, "seconds_per_work": 2.0}})
    assert rates.run(services) == 1
    assert rates.run(services) == 0
    found = queue(services)
    assert found.pending_seconds == pytest.approx(2000)
    assert (found.live_workers, found.wanted_workers, found.queued) == (1, 7, 1000)
    with transaction(services.engine) as connection:
        connection.execute(update(ModelRate).values(seconds_per_work=1e6))
    assert queue(services).wanted_workers == 1000, "never more than jobs"


def test_a_rendering_job_waits_for_nothing(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 1)
    with transaction(services.engine) as connection:
        claim(connection)
    assert of_job(services, tenant, batch) == waiting.Waiting(None)
    assert of_batch(services, tenant, batch) is None
    with transaction(services.engine) as connection:
        assert progress.job(connection, tenant.id, batch, 0).state is State.RENDERING
