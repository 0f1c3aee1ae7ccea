"""The keeper's services one by one, and the election of the keeper that runs them."""

from __future__ import annotations

import threading
import uuid
from dataclasses import replace

import redis
from sqlalchemy import func, insert, select, text, update

from shared import lifecycle
from shared.database import transaction
from shared.keys import image_key, place_of, thumbnail_key
from shared.lifecycle import Failure, Result
from shared.models import Batch, BatchCounter, Job, WebhookOutbox, Worker
from shared.queue import MAX_BELLS, queue_name
from shared.services import Services
from shared.states import Outcome, Priority, State
from shared.tenants import TenantIdentity
from tests.farm import wait_for
from tests.integration.test_lifecycle import assert_counters_match, claim, result, submit_jobs
from worker.keeper import age, finish_cancel, fold, keeper_services, promote, prune, rescue, ring, sweep
from worker.keeper.leader import Leader


def states(services: Services) -> list[str]:
    with transaction(services.engine) as connection:
        assert_counters_match(connection)
        return list(connection.execute(select(Job.state).order_by(Job.id)).scalars())


def test_all_services_are_found_in_the_folder() -> None:
    assert set(keeper_services()) == {
        "admit", "age", "finish_cancel", "fold", "hold", "promote", "prune", "rates", "reorder", "rescue", "ring",
        "sweep",
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


def test_a_half_done_cancellation_is_finished(services: Services, tenant: TenantIdentity) -> None:
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
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            )
        )
    wait_for(second.leads, what="the lock to be free")
    assert not first.leads()
    second.resign()
    assert first.leads()
    first.resign()


def starve(services: Services, batch_id: int, claimed: dict[str, float]) -> None:
    """Let a batch have waited for an hour, with a worker that has claimed of these classes, so many seconds ago."""
    row = {
        "id": uuid.uuid4().hex,
        "host": "h",
        "pid": 1,
        "models": ["fake"],
        "device": {},
        "claimed": {"fake": claimed},
    }
    with transaction(services.engine) as connection:
        an_hour_ago = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 1)
        connection.execute(update(Batch).where(Batch.id == batch_id).values(created_at=an_hour_ago))
        connection.execute(insert(Worker).values(**row))


def test_a_starving_class_gets_its_turn_and_no_more(services: Services, tenant: TenantIdentity) -> None:
    low = submit_jobs(services, tenant, 100)
    with transaction(services.engine) as connection:
        lifecycle.reprioritize(connection, low, Priority.LOW)
    submit_jobs(services, tenant, 100)
    assert age.run(services) == 0, "it has not waited for long"
    starve(services, low, {})
    assert age.run(services) == 0, "nobody renders this model at all"
    starve(services, low, {"1": 3.0})
    assert age.run(services) == 16
    assert age.run(services) == 0, "one turn at a time"
    with transaction(services.engine) as connection:
        assert [claim(connection, token=uuid.uuid4())[0].batch_id for _ in range(20)] == [low] * 16 + [2] * 4


def test_a_class_that_is_served_does_not_rise(services: Services, tenant: TenantIdentity) -> None:
    whale = submit_jobs(services, tenant, 100)
    starve(services, whale, {"1": 60.0})
    assert age.run(services) == 0


def test_a_batch_that_is_opened_again_is_not_closed(services: Services, tenant: TenantIdentity) -> None:
    """The keeper finds the batch ended, and before it has the batch's lock a job is queued again."""
    batch_id = submit_jobs(services, tenant)
    with transaction(services.engine) as connection:
        [job] = claim(connection)
        lifecycle.fail(connection, uuid.UUID(int=7), [Failure(job.id, Outcome.PERMANENT, "x", "y")])
    closing = threading.Thread(target=fold.run, args=(services,))
    waits = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    with transaction(services.engine) as connection:
        connection.execute(text("LOCK TABLE batch IN ACCESS EXCLUSIVE MODE"))
        closing.start()
        with services.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as looking:
            wait_for(lambda: looking.execute(waits).scalar_one(), what="the keeper to wait")
        assert lifecycle.resubmit(connection, batch_id) == 1
    closing.join()
    with transaction(services.engine) as connection:
        assert connection.execute(select(Batch.finished_at)).scalar_one() is None


def test_expired_batches_are_pruned_with_their_images(services: Services, tenant: TenantIdentity) -> None:
    kept, expiring = submit_jobs(services, tenant), submit_jobs(services, tenant)
    for batch_id in (kept, expiring):
        with transaction(services.engine) as connection:
            [job] = claim(connection)
            key = image_key(tenant.id, batch_id, 0, "0" * 64, "png")
            lifecycle.succeed(connection, uuid.UUID(int=7), [Result(job.id, key, b"\0" * 32, 0.1, {})])
        services.storage.put(key, b"picture", content_type="image/png")
    fold.run(services)
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).values(retention_seconds=3600))
    assert prune.run(services) == 0, "not yet"
    with transaction(services.engine) as connection:
        long_ago = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 2)
        connection.execute(update(Batch).where(Batch.id == expiring).values(finished_at=long_ago))
    assert prune.run(services) == 1
    with transaction(services.engine) as connection:
        assert connection.execute(select(Job.batch_id)).scalars().all() == [kept]
    assert [place_of(info.key) for info in services.storage.list("t/")] == [(kept, 0)]


def test_images_without_a_row_are_swept_after_their_grace(services: Services, tenant: TenantIdentity) -> None:
    batch_id = submit_jobs(services, tenant, 2)
    key = image_key(tenant.id, batch_id, 0, "0" * 64, "png")
    with transaction(services.engine) as connection:
        [job] = claim(connection)
        lifecycle.succeed(connection, uuid.UUID(int=7), [Result(job.id, key, b"\0" * 32, 0.1, {})])
    late = image_key(tenant.id, batch_id, 0, "1" * 64, "png")
    unrecorded = image_key(tenant.id, batch_id, 1, "2" * 64, "png")
    nobodys = image_key(tenant.id, 99, 0, "3" * 64, "png")
    known = {key, thumbnail_key(key), "t/not/of/ours.txt"}
    for name in (*known, late, thumbnail_key(late), unrecorded, nobodys):
        services.storage.put(name, b"picture", content_type="image/png")

    def swept(grace: float) -> int:
        settings = services.settings.model_copy(update={"orphan_grace_seconds": grace, "sweep_seconds": 0.0})
        return sweep.run(replace(services, settings=settings))

    assert swept(3600) == 0
    assert swept(0.0) == 4
    assert {info.key for info in services.storage.list("t/")} == known
