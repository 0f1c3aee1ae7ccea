"""The keeper's services one by one, and the election of the keeper that runs them."""

from __future__ import annotations

import uuid

import redis
from sqlalchemy import func, select, text, update

from shared import lifecycle
from shared.database import transaction
from shared.lifecycle import Failure
from shared.models import Batch, BatchCounter, Job, WebhookOutbox
from shared.queue import MAX_BELLS, queue_name
from shared.services import Services
from shared.states import Outcome, State
from shared.tenants import TenantIdentity
from tests.integration.test_lifecycle import assert_counters_match, claim, result, submit_jobs
from worker.keeper import finish_cancel, fold, keeper_services, promote, rescue, ring
from worker.keeper.leader import Leader


def states(services: Services) -> list[str]:
    with transaction(services.engine) as connection:
        assert_counters_match(connection)
        return list(connection.execute(select(Job.state).order_by(Job.id)).scalars())


def test_all_services_are_found_in_the_folder() -> None:
    assert set(keeper_services()) == {
        "admit", "age", "finish_cancel", "fold", "hold", "promote", "prune", "rates", "rescue", "ring", "sweep",
    }  # fmt: skip


def test_every_service_is_harmless_when_there_is_nothing_to_do(services: Services) -> None:
    assert {run(services) for run in keeper_services().values()} == {0}


def test_rescue_queues_expired_jobs_and_rings(services: Services, tenant: TenantIdentity, bells: redis.Redis) -> None:
    submit_jobs(services, tenant, 2)
    bells.flushdb()
    with transaction(services.engine) as connection:
        lifecycle.claim(connection, "fake", worker="w", token=uuid.uuid4(), lease_seconds=-1, limit=1)
        claim(connection)
    assert rescue.run(services) == 1
    assert states(services) == [State.QUEUED, State.RENDERING]
    assert bells.llen(queue_name("fake")) > 0
    assert rescue.run(services) == 0


def test_promote_queues_what_is_due_and_nothing_else(
    services: Services, tenant: TenantIdentity, bells: redis.Redis
) -> None:
    submit_jobs(services, tenant, 2)
    with transaction(services.engine) as connection:
        jobs = claim(connection, limit=2)
        failures = [Failure(job.id, Outcome.TRANSIENT, "x", "y") for job in jobs]
        lifecycle.retry(connection, uuid.UUID(int=7), failures, [0.0, 60.0])
    bells.flushdb()
    assert promote.run(services) == 1
    assert states(services) == [State.QUEUED, State.SCHEDULED]
    assert bells.llen(queue_name("fake")) > 0


def test_ring_replaces_lost_bells_and_never_heaps_them(
    services: Services, tenant: TenantIdentity, bells: redis.Redis
) -> None:
    submit_jobs(services, tenant, 5)
    bells.flushdb()  # what a Redis restart does
    for _ in range(3):
        assert ring.run(services) == 1
    assert bells.llen(queue_name("fake")) == MAX_BELLS


def test_fold_closes_a_batch_once_and_keeps_its_counts(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant, 6)
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).values(webhook_url="https://example.org/"))
        for number in range(5):
            token = uuid.UUID(int=number)
            lifecycle.succeed(connection, token, [result(job.id) for job in claim(connection, token=token)])
    assert fold.run(services) == 0, "one job is still open"
    with transaction(services.engine) as connection:
        token = uuid.UUID(int=9)
        lifecycle.succeed(connection, token, [result(job.id) for job in claim(connection, token=token)])
        # several shards, and shard 0 among them
        assert connection.execute(select(func.count()).select_from(BatchCounter)).scalar_one() > 1
    assert (fold.run(services), fold.run(services)) == (1, 0)
    with transaction(services.engine) as connection:
        assert connection.execute(select(BatchCounter.shard, BatchCounter.succeeded)).all() == [(0, 6)]
        assert connection.execute(select(Batch.finished_at)).scalar_one() is not None
        events = connection.execute(select(WebhookOutbox.event, func.count()).group_by(WebhookOutbox.event)).all()
    assert dict(events) == {"job.succeeded": 6, "batch.finished": 1}


def test_a_closed_batch_opens_again_when_its_jobs_are_resubmitted(services: Services, tenant: TenantIdentity) -> None:
    batch_id = submit_jobs(services, tenant, 2)
    with transaction(services.engine) as connection:
        lifecycle.cancel(connection, batch_id)
    assert fold.run(services) == 1
    with transaction(services.engine) as connection:
        assert lifecycle.resubmit(connection, batch_id) == 2
        assert connection.execute(select(Batch.finished_at)).scalar_one() is None
        assert_counters_match(connection)
    assert fold.run(services) == 0


def test_a_half_done_cancelation_is_finished(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant, 4)
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).values(cancel_requested_at=func.clock_timestamp()))
    assert finish_cancel.run(services) == 4
    assert states(services) == [State.CANCELED] * 4


def test_one_keeper_leads_and_another_takes_over(services: Services) -> None:
    first, second = Leader(services.engine), Leader(services.engine)
    assert (first.leads(), second.leads(), first.leads()) == (True, False, True)
    with transaction(services.engine) as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND pid <> pg_backend_pid()"
            )
        )
    assert second.leads()
    assert not first.leads()
    second.resign()
    assert first.leads()
    first.resign()
