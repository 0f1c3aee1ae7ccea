"""Storing a plan: whole or not at all, once for each idempotency key, and never held up by Redis."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import replace

import pytest
import redis
from sqlalchemy import func, select, text

from shared.database import transaction
from shared.errors import InvalidInput, Unavailable
from shared.models import Batch, BatchCounter, Job
from shared.plan import Plan, plan
from shared.queue import MAX_BELLS, Bell, queue_name
from shared.services import Services
from shared.states import Priority
from shared.submit import Idempotency, submit
from shared.tenants import TenantIdentity

NASTY = ["tab\there", "line\nbreak\r", "back\\slash \\N \\t", "quote ' \" ;--", "\u202eRTL", "emoji 🎨", "\\."]


def make_plan(services: Services, prompts: list[str], **parameters: object) -> Plan:
    return plan(services.catalogue["fake"], parameters, prompts=prompts, max_jobs=100_000)


def count(services: Services, what: type[Batch | Job]) -> int:
    with transaction(services.engine) as connection:
        return connection.execute(select(func.count()).select_from(what)).scalar_one()


def test_texts_arrive_as_they_were_sent(services: Services, tenant: TenantIdentity) -> None:
    submit(services, tenant, make_plan(services, NASTY))
    with transaction(services.engine) as connection:
        stored = connection.execute(select(Job.prompt).order_by(Job.idx)).scalars().all()
    assert list(stored) == NASTY


def test_overrides_arrive_as_json(services: Services, tenant: TenantIdentity) -> None:
    planned = plan(services.catalogue["fake"], {}, jobs=[{"prompt": "a"}, {"prompt": "b", "width": 8}], max_jobs=10)
    submit(services, tenant, planned)
    with transaction(services.engine) as connection:
        assert list(connection.execute(select(Job.overrides).order_by(Job.idx)).scalars()) == [None, {"width": 8}]


def test_counters_begin_with_everything_queued(services: Services, tenant: TenantIdentity) -> None:
    submit(services, tenant, make_plan(services, ["x"] * 7), priority=Priority.HIGH, name="seven")
    with transaction(services.engine) as connection:
        assert connection.execute(select(BatchCounter.queued)).scalar_one() == 7
        assert connection.execute(select(Batch.name, Batch.priority, Batch.job_count)).one() == ("seven", 0, 7)


def test_the_bell_rings_after_the_commit(services: Services, tenant: TenantIdentity, bells: redis.Redis) -> None:
    submit(services, tenant, make_plan(services, ["x"]))
    assert bells.llen(queue_name("fake")) == 1
    submit(services, tenant, make_plan(services, ["x"] * 100))
    assert bells.llen(queue_name("fake")) == MAX_BELLS


def test_a_dead_redis_fails_no_submit(services: Services, tenant: TenantIdentity) -> None:
    settings = services.settings.model_copy(
        update={"redis_url": services.settings.redis_url.__class__("redis://127.0.0.1:1")}
    )
    broken = replace(services, bell=Bell(settings))
    submit(broken, tenant, make_plan(services, ["x"]))
    assert count(services, Job) == 1


def test_a_silent_redis_holds_up_one_submit_for_a_moment_and_the_next_not_at_all(
    services: Services, tenant: TenantIdentity
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        url = services.settings.redis_url.__class__(f"redis://127.0.0.1:{silent.getsockname()[1]}")
        bell = Bell(services.settings.model_copy(update={"redis_url": url}))
        started = time.monotonic()
        assert not bell.ring(["fake"])
        first = time.monotonic() - started
        started = time.monotonic()
        assert not any(bell.ring(["fake"]) for _ in range(100))
        assert time.monotonic() - started < first < 5.0


def test_the_same_key_and_body_find_the_first_batch(services: Services, tenant: TenantIdentity) -> None:
    key = Idempotency("k1", b"\1" * 32)
    first = submit(services, tenant, make_plan(services, ["x"]), idempotency=key)
    again = submit(services, tenant, make_plan(services, ["x"]), idempotency=key)
    assert (first.replayed, again.replayed) == (False, True)
    assert first.public_id == again.public_id
    assert count(services, Batch) == 1


def test_the_same_key_with_another_body_is_refused(services: Services, tenant: TenantIdentity) -> None:
    submit(services, tenant, make_plan(services, ["x"]), idempotency=Idempotency("k1", b"\1" * 32))
    with pytest.raises(InvalidInput, match="another request"):
        submit(services, tenant, make_plan(services, ["y"]), idempotency=Idempotency("k1", b"\2" * 32))
    assert count(services, Batch) == 1


def test_two_calls_at_once_with_one_key_make_one_batch(services: Services, tenant: TenantIdentity) -> None:
    answers = []

    def call() -> None:
        answers.append(
            submit(services, tenant, make_plan(services, ["x"] * 2000), idempotency=Idempotency("k", b"1" * 32))
        )

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer.public_id for answer in answers}) == 1
    assert sum(not answer.replayed for answer in answers) == 1
    assert count(services, Job) == 2000


def test_a_connection_that_breaks_in_the_copy_leaves_nothing(services: Services, tenant: TenantIdentity) -> None:
    planned = make_plan(services, ["x" * 1000] * 60_000)
    stop = threading.Event()

    def cut() -> None:
        with services.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not stop.wait(0.01):
                connection.execute(
                    text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'COPY job%'")
                )

    saboteur = threading.Thread(target=cut)
    saboteur.start()
    try:
        with pytest.raises(Unavailable):
            submit(services, tenant, planned)
    finally:
        stop.set()
        saboteur.join()
    assert count(services, Batch) == count(services, Job) == 0


def test_a_database_that_is_away_is_said_so(services: Services, tenant: TenantIdentity) -> None:
    url = services.settings.database_url.__class__("postgresql://127.0.0.1:1/nothing")
    from shared.database import open_engine

    away = replace(services, engine=open_engine(services.settings.model_copy(update={"database_url": url}), "t"))
    with pytest.raises(Unavailable):
        submit(away, tenant, make_plan(services, ["x"]))
