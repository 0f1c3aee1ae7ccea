"""The reckoning finds what is wrong: each invariant is broken on purpose and must be named."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import Connection, delete, insert, select, text, update

from shared import lifecycle
from shared.database import transaction
from shared.ids import batch_id
from shared.lifecycle import Failure
from shared.models import Attempt, Batch, BatchCounter, IdempotencyKey, Job
from shared.plan import plan
from shared.services import Services
from shared.states import Outcome
from shared.submit import submit
from shared.tenants import TenantIdentity
from tests.api_calls import claim, render
from tests.chaos.load import Answer
from tests.chaos.reconcile import Findings, reconcile
from worker.keeper import fold

Accepted = dict[str, int]


@pytest.fixture
def accepted(services: Services, tenant: TenantIdentity) -> Accepted:
    """A batch of three jobs that were rendered, and what its tenant was told."""
    planned = plan(services.catalogue["fake"], {}, prompts=["a", "b", "c"], max_jobs=3)
    name = batch_id(submit(services, tenant, planned).public_id)
    for number in range(3):
        render(services, data=b"picture %d" % number)
    fold.run(services)
    return {name: 3}


def a_job(services: Services) -> Job:
    with services.engine.connect() as connection:
        return connection.execute(select(Job.__table__).order_by(Job.id).limit(1)).one()  # type: ignore[return-value]


def key_of(services: Services) -> str:
    return str(a_job(services).result_key)


def test_what_agrees_is_clean(services: Services, accepted: Accepted) -> None:
    found = reconcile(services, accepted, [Answer("GET /batches", 200, "application/json", 0.01)])
    assert found.differences == []
    assert found.clean
    assert found.line(7) == "reconciled: 3 jobs, 7 faults, 0 lost, 0 doubled, 0 missing, 0 orphans"


def _without_a_job(services: Services) -> None:
    with transaction(services.engine) as connection:
        connection.execute(delete(Job).where(Job.id == a_job(services).id))


def _without_the_batch(services: Services) -> None:
    with transaction(services.engine) as connection:
        connection.execute(delete(IdempotencyKey))
        connection.execute(delete(Batch))


def _still_open(services: Services) -> None:
    with transaction(services.engine) as connection:
        connection.execute(
            update(Job)
            .where(Job.id == a_job(services).id)
            .values(state="queued", result_key=None, result_sha256=None, finished_at=None)
        )


def _recorded_twice(services: Services) -> None:
    with transaction(services.engine) as connection:
        _second_success(connection, a_job(services).id)


def _second_success(connection: Connection, job: int) -> None:
    row = {"job_id": job, "lease_token": uuid.uuid4(), "attempt": 2, "worker_id": "w2", "outcome": Outcome.SUCCEEDED}
    connection.execute(insert(Attempt).values(**row, started_at=text("clock_timestamp()")))


def _second_image(services: Services) -> None:
    stem, _, end = key_of(services).rpartition("-")
    services.storage.put(f"{stem}-{'0' * 64}.{end.rpartition('.')[2]}", b"another", content_type="image/png")


def _without_success(services: Services) -> None:
    with transaction(services.engine) as connection:
        connection.execute(delete(Attempt).where(Attempt.job_id == a_job(services).id))


def _without_object(services: Services) -> None:
    services.storage.delete([key_of(services)])


def _other_bytes(services: Services) -> None:
    services.storage.put(key_of(services), b"something else", content_type="image/png")


def _object_of_nobody(services: Services) -> None:
    services.storage.put(f"t/1/999999/0/0-{'0' * 64}.png", b"x", content_type="image/png")


def _object_of_another_kind(services: Services) -> None:
    services.storage.put("t/what-is-this", b"x", content_type="image/png")


def _wrong_counter(services: Services) -> None:
    with transaction(services.engine) as connection:
        connection.execute(update(BatchCounter).values(failed=BatchCounter.failed + 1))


def _not_closed(services: Services) -> None:
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).values(finished_at=None))


@pytest.mark.parametrize(
    ("breaks", "named", "text"),
    [
        (_without_a_job, "lost", "2 of 3 jobs"),
        (_without_the_batch, "lost", "0 of 3 jobs"),
        (_still_open, "lost", "is still queued"),
        (_recorded_twice, "doubled", "recorded 2 times"),
        (_second_image, "doubled", "a second image of a job"),
        (_without_success, "missing", "succeeded in no attempt"),
        (_without_object, "missing", "no such object"),
        (_other_bytes, "missing", "other bytes than were recorded"),
        (_object_of_nobody, "orphans", "t/1/999999"),
        (_object_of_another_kind, "orphans", "what-is-this"),
        (_wrong_counter, "other", "counts 1 failed, has 0"),
        (_not_closed, "other", "is not closed"),
    ],
)
def test_what_is_broken_is_found(
    services: Services, accepted: Accepted, breaks: Callable[[Services], None], named: str, text: str
) -> None:
    breaks(services)
    found = reconcile(services, accepted)
    assert not found.clean
    assert any(text in difference for difference in getattr(found, named)), found.differences
    if named != "other":
        assert f"1 {named}" in found.line(0)


def test_a_batch_that_nobody_was_told_of_is_doubled(services: Services, accepted: Accepted) -> None:
    assert "nobody was told of" in reconcile(services, {}).doubled[0]


def test_a_lease_that_ran_out_long_ago_is_found(services: Services, accepted: Accepted, tenant: TenantIdentity) -> None:
    planned = plan(services.catalogue["fake"], {}, prompts=["d"], max_jobs=1)
    accepted[batch_id(submit(services, tenant, planned).public_id)] = 1
    claim(services)
    with transaction(services.engine) as connection:
        long_ago = text("clock_timestamp() - interval '10 minutes'")
        connection.execute(update(Job).where(Job.state == "rendering").values(lease_expires_at=long_ago))
    assert any("its lease ran out" in difference for difference in reconcile(services, accepted).other)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (Answer("POST /batches", 500, "application/problem+json", 0.1), "500"),
        (Answer("POST /batches", 503, "text/html", 0.1), "text/html"),
        (Answer("POST /batches", 202, "application/json", 5.1), "after 5.1 s"),
        (Answer("POST /batches", 0, "", 15.0), "0 after 15.0 s"),
    ],
)
def test_an_answer_that_is_none_is_found(services: Services, accepted: Accepted, answer: Answer, text: str) -> None:
    assert text in reconcile(services, accepted, [answer]).other[0]


def failed(services: Services, tenant: TenantIdentity, accepted: Accepted, fault: str, error_class: str) -> Findings:
    planned = plan(services.catalogue["fake"], {"fault": fault}, prompts=["d"], max_jobs=1)
    accepted[batch_id(submit(services, tenant, planned).public_id)] = 1
    token, [job] = claim(services)
    with transaction(services.engine) as connection:
        lifecycle.fail(connection, token, [Failure(job.id, Outcome.PERMANENT, error_class, "")])
    fold.run(services)
    return reconcile(services, accepted)


def test_a_failure_that_was_asked_for_is_none(services: Services, tenant: TenantIdentity, accepted: Accepted) -> None:
    assert failed(services, tenant, accepted, "permanent", "asked_for").differences == []


def test_a_failure_that_nobody_asked_for_is_found(
    services: Services, tenant: TenantIdentity, accepted: Accepted
) -> None:
    assert "failed: internal_error" in failed(services, tenant, accepted, "none", "internal_error").other[0]


def test_the_object_of_a_given_up_job_is_no_orphan_while_it_is_young(
    services: Services, tenant: TenantIdentity, accepted: Accepted
) -> None:
    failed(services, tenant, accepted, "permanent", "asked_for")
    with services.engine.connect() as connection:
        job = connection.execute(select(Job.__table__).where(Job.state == "failed")).one()
    key = f"t/{job.tenant_id}/{job.batch_id}/0/{job.idx}-{'0' * 64}.png"
    services.storage.put(key, b"x", content_type="image/png")
    young = reconcile(services, accepted)
    assert (young.leftovers, young.differences) == (1, [])
    assert reconcile(services, accepted, grace=timedelta(seconds=-1)).orphans == [key]
