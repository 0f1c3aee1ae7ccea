"""Pausing, reordering, retrying, capping: what is set aside never blocks a queue, and the keeper finishes the rest."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import func, select, update

from shared import control, lifecycle, progress, tenants
from shared.database import transaction
from shared.errors import Conflict, NotFound
from shared.lifecycle import Failure
from shared.models import Attempt, Batch, Job, Tenant, TenantClock
from shared.plan import plan
from shared.services import Services
from shared.states import Outcome, Priority, State
from shared.submit import submit
from shared.tenants import TenantIdentity
from tests.integration.test_lifecycle import assert_counters_match, claim, result
from worker.keeper import admit, finish_cancel, hold, promote, reorder


def submit_fake(services: Services, tenant: TenantIdentity, count: int, **options: object) -> uuid.UUID:
    planned = plan(services.catalogue["fake"], {}, prompts=["x"] * count, max_jobs=100_000)
    return submit(services, tenant, planned, **options).public_id  # type: ignore[arg-type]


def states(services: Services, batch: uuid.UUID) -> dict[str, int]:
    with transaction(services.engine) as connection:
        assert_counters_match(connection)
        statement = select(Job.state, func.count()).join(Batch, Batch.id == Job.batch_id)
        found = connection.execute(statement.where(Batch.public_id == batch).group_by(Job.state))
        return {state: count for state, count in found}  # noqa: C416 - rows are not pairs to a type checker


def claimed(services: Services, token: uuid.UUID, limit: int = 1) -> list[lifecycle.ClaimedJob]:
    with transaction(services.engine) as connection:
        return claim(connection, limit, token)


def test_a_paused_batch_is_set_aside_and_goes_on(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 12_000)
    [rendering] = claimed(services, uuid.UUID(int=1))
    for _ in range(2):
        control.pause_batch(services, tenant.id, batch)
        assert states(services, batch) == {State.HELD: 11_999, State.RENDERING: 1}
    assert claimed(services, uuid.UUID(int=2)) == [], "nothing of it is at the head of the queue"
    with transaction(services.engine) as connection:
        assert lifecycle.succeed(connection, uuid.UUID(int=1), [result(rendering.id)]), "what renders is finished"
    for _ in range(2):
        control.resume_batch(services, tenant.id, batch)
        assert states(services, batch) == {State.QUEUED: 11_999, State.SUCCEEDED: 1}


def test_a_paused_tenant_and_model_hold_new_batches_too(services: Services, tenant: TenantIdentity) -> None:
    before = submit_fake(services, tenant, 3)
    control.set_tenant(services, tenant.name, paused=True)
    control.pause_model(services, "fake", True)
    after = submit_fake(services, tenant, 2)
    assert (states(services, before), states(services, after)) == ({State.HELD: 3}, {State.HELD: 2})
    control.set_tenant(services, tenant.name, paused=False)
    control.resume_batch(services, tenant.id, before)
    assert hold.run(services) == 0
    assert states(services, before) == {State.HELD: 3}, "the model is still paused"
    control.pause_model(services, "fake", False)
    assert (states(services, before), states(services, after)) == ({State.QUEUED: 3}, {State.QUEUED: 2})


def test_the_keeper_finishes_what_a_request_began(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 7)
    other = submit_fake(services, tenant, 1)
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).where(Batch.public_id == batch).values(paused_at=func.clock_timestamp()))
    assert hold.run(services) == 7
    assert (states(services, batch), states(services, other)) == ({State.HELD: 7}, {State.QUEUED: 1})
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).values(paused_at=None))
    assert hold.run(services) == 7
    assert hold.run(services) == 0
    assert states(services, batch) == {State.QUEUED: 7}


def test_what_is_claimed_of_a_paused_batch_is_set_aside_uncounted(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 1)
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).values(paused_at=func.clock_timestamp()))
        [job] = claim(connection)
        assert job.paused
        lifecycle.release(connection, uuid.UUID(int=7), [job.id], "its batch is paused")
        assert connection.execute(select(Job.attempt)).scalar_one() == 0
        assert connection.execute(select(Attempt.error_detail)).scalar_one() == "its batch is paused"
    assert states(services, batch) == {State.HELD: 1}


def test_priority_changes_for_what_waits(services: Services, tenant: TenantIdentity) -> None:
    submit_fake(services, tenant, 1)
    batch = submit_fake(services, tenant, 2)
    control.set_priority(services, tenant.id, batch, Priority.HIGH)
    assert claimed(services, uuid.UUID(int=1), 2)[0].batch_id == 2
    with transaction(services.engine) as connection:
        assert connection.execute(select(Batch.priority).where(Batch.public_id == batch)).scalar_one() == 0


def fail(services: Services, *classes: str) -> None:
    """Claim a job for each class and fail it so."""
    for error_class in classes:
        token = uuid.uuid4()
        [job] = claimed(services, token)
        with transaction(services.engine) as connection:
            lifecycle.fail(connection, token, [Failure(job.id, Outcome.PERMANENT, error_class, "")])


def test_failed_jobs_are_retried_by_class(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 4)
    fail(services, "bad", "bad", "worse")
    assert control.retry_batch(services, tenant.id, batch, error_classes=["worse"]) == 1
    assert states(services, batch) == {State.FAILED: 2, State.QUEUED: 2}
    assert control.retry_batch(services, tenant.id, batch) == 2
    assert control.retry_batch(services, tenant.id, batch) == 0
    control.cancel_batch(services, tenant.id, batch)
    assert states(services, batch) == {State.CANCELED: 4}
    assert control.retry_batch(services, tenant.id, batch, states=[State.CANCELED]) == 4
    assert states(services, batch) == {State.QUEUED: 4}
    assert not control.retry_job(services, tenant.id, batch, 0)
    control.cancel_job(services, tenant.id, batch, 0)
    assert control.retry_job(services, tenant.id, batch, 0)


def test_what_is_canceled_gives_its_share_of_the_queue_back(services: Services, tenant: TenantIdentity) -> None:
    def clock() -> float:
        with transaction(services.engine) as connection:
            return connection.execute(select(TenantClock.vt)).scalar_one()

    submit_fake(services, tenant, 5)
    start = clock()
    batch = submit_fake(services, tenant, 10)
    assert clock() == pytest.approx(3 * start)
    claimed(services, uuid.UUID(int=1), 5)
    control.cancel_job(services, tenant.id, batch, 0)
    control.cancel_batch(services, tenant.id, batch)
    control.cancel_batch(services, tenant.id, batch)
    assert clock() == pytest.approx(start)


def test_a_cap_lets_jobs_in_one_by_one(services: Services, tenant: TenantIdentity) -> None:
    control.set_tenant(services, tenant.name, max_in_flight=3)
    batch = submit_fake(services, tenant, 10)
    assert states(services, batch) == {State.QUEUED: 3, State.HELD: 7}
    jobs = claimed(services, uuid.UUID(int=1), 10)
    assert [job.capped for job in jobs] == [True] * 3
    assert admit.run(services) == 0
    with transaction(services.engine) as connection:
        lifecycle.succeed(connection, uuid.UUID(int=1), [result(job.id) for job in jobs[:2]])
        assert lifecycle.admit(connection, tenant.id, "fake") == 2
    assert states(services, batch) == {State.QUEUED: 2, State.RENDERING: 1, State.SUCCEEDED: 2, State.HELD: 5}
    control.set_tenant(services, tenant.name, uncap=True)
    assert states(services, batch)[State.QUEUED] == 7
    control.set_tenant(services, tenant.name, max_in_flight=2)
    assert states(services, batch) == {State.QUEUED: 1, State.RENDERING: 1, State.SUCCEEDED: 2, State.HELD: 6}
    with transaction(services.engine) as connection:
        first = connection.execute(select(Job.idx).where(Job.state == State.QUEUED)).scalar_one()
    assert first == 3, "the last ones are set aside"


def test_a_paused_batch_of_a_capped_tenant_takes_no_room(services: Services, tenant: TenantIdentity) -> None:
    with transaction(services.engine) as connection:
        connection.execute(update(Tenant).values(max_in_flight=2))
    first, second = submit_fake(services, tenant, 4), submit_fake(services, tenant, 4)
    control.pause_batch(services, tenant.id, first)
    assert admit.run(services) == 2
    assert (states(services, first), states(services, second)) == ({State.HELD: 4}, {State.QUEUED: 2, State.HELD: 2})
    control.resume_batch(services, tenant.id, first)
    assert states(services, first) == {State.HELD: 4}, "no room yet"


def test_another_tenants_batch_is_not_there(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 1)
    for act in (control.pause_batch, control.resume_batch, control.cancel_batch, control.retry_batch):
        with pytest.raises(NotFound):
            act(services, tenant.id + 1, batch)
    with pytest.raises(NotFound):
        control.set_tenant(services, "nobody", paused=True)
    with pytest.raises(NotFound):
        control.drain_worker(services, "nobody", True)


@pytest.fixture
def other(services: Services) -> TenantIdentity:
    """A second tenant of equal weight."""
    with transaction(services.engine) as connection:
        return TenantIdentity(tenants.ensure_tenant(connection, "other"), "other", 1.0)


def work_on(services: Services, tenant: TenantIdentity) -> None:
    """Let a tenant submit and get 2,000 images, so that its clock goes on; then it waits for five more."""
    for _ in range(20):
        submit_fake(services, tenant, 100)
        token = uuid.uuid4()
        with transaction(services.engine) as connection:
            while jobs := claim(connection, 100, token):
                lifecycle.succeed(connection, token, [result(job.id) for job in jobs])
    submit_fake(services, tenant, 5)


def claims_until(services: Services, tenant: TenantIdentity) -> int:
    for number in range(1, 600):
        if claimed(services, uuid.uuid4())[0].tenant_id == tenant.id:
            return number
    raise AssertionError


@pytest.mark.parametrize("how", ["paused", "failed"])
def test_what_comes_back_late_does_not_stand_before_all_that_came_meanwhile(
    services: Services, tenant: TenantIdentity, other: TenantIdentity, how: str
) -> None:
    batch = submit_fake(services, tenant, 300)
    if how == "paused":
        control.pause_batch(services, tenant.id, batch)
    else:
        fail(services, *["x"] * 300)
    work_on(services, other)
    if how == "paused":
        control.resume_batch(services, tenant.id, batch)
    else:
        control.retry_batch(services, tenant.id, batch)
    assert claims_until(services, other) < 20


def test_cancel_and_retry_give_no_free_share(services: Services, tenant: TenantIdentity, other: TenantIdentity) -> None:
    submit_fake(services, other, 100)
    batches = []
    for _ in range(5):
        batches.append(submit_fake(services, tenant, 100))
        control.cancel_batch(services, tenant.id, batches[-1])
    for batch in batches:
        control.retry_batch(services, tenant.id, batch, states=[State.CANCELED])
    first = [claimed(services, uuid.uuid4())[0].tenant_id for _ in range(100)]
    assert 45 <= first.count(tenant.id) <= 55


def test_pausing_and_going_on_costs_nothing(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 10)
    with transaction(services.engine) as connection:
        before = connection.execute(select(TenantClock.vt)).scalar_one()
    for _ in range(3):
        control.pause_batch(services, tenant.id, batch)
        control.resume_batch(services, tenant.id, batch)
    control.pause_batch(services, tenant.id, batch)
    control.cancel_batch(services, tenant.id, batch)
    with transaction(services.engine) as connection:
        assert connection.execute(select(TenantClock.vt)).scalar_one() == pytest.approx(0.0, abs=before / 100)


def test_a_retry_keeps_caps_and_pauses(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 20)
    fail(services, *["x"] * 20)
    control.pause_model(services, "fake", True)
    assert control.retry_batch(services, tenant.id, batch) == 20
    assert states(services, batch) == {State.HELD: 20}
    control.set_tenant(services, tenant.name, max_in_flight=4)
    control.pause_model(services, "fake", False)
    assert states(services, batch) == {State.QUEUED: 4, State.HELD: 16}


def test_no_retry_while_a_batch_is_being_canceled(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 3)
    fail(services, "x")
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).values(cancel_requested_at=func.clock_timestamp()))
    with pytest.raises(Conflict):
        control.retry_batch(services, tenant.id, batch)
    assert finish_cancel.run(services) == 2
    assert control.retry_batch(services, tenant.id, batch) == 1


def test_a_cap_is_for_each_model(services: Services, tenant: TenantIdentity) -> None:
    control.set_tenant(services, tenant.name, max_in_flight=2)
    unserved = plan(services.catalogue["demo-diffusion"], {}, prompts=["x"] * 5, max_jobs=10)
    submit(services, tenant, unserved)
    assert states(services, submit_fake(services, tenant, 5)) == {State.QUEUED: 2, State.HELD: 3}


def test_the_keeper_finishes_a_change_of_priority(services: Services, tenant: TenantIdentity) -> None:
    submit_fake(services, tenant, 6)
    [rendering] = claimed(services, uuid.UUID(int=7))
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).values(priority=Priority.HIGH.rank, reordering=True))
    assert reorder.run(services) == 5
    assert reorder.run(services) == 0
    with transaction(services.engine) as connection:
        lifecycle.release(connection, uuid.UUID(int=7), [rendering.id])
        assert set(connection.execute(select(Job.priority)).scalars()) == {0}, "also what was being rendered"


def test_a_backoff_outlasts_a_pause(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 1)
    [job] = claimed(services, uuid.UUID(int=7))
    with transaction(services.engine) as connection:
        lifecycle.retry(connection, uuid.UUID(int=7), [Failure(job.id, Outcome.TRANSIENT, "x", "")], [300.0])
    control.pause_batch(services, tenant.id, batch)
    assert states(services, batch) == {State.SCHEDULED: 1}
    with transaction(services.engine) as connection:
        connection.execute(update(Job).values(run_at=func.clock_timestamp()))
    assert promote.run(services) == 0
    assert states(services, batch) == {State.HELD: 1}, "due, and paused"


def test_a_late_cancel_does_not_rename_a_finished_batch(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, 1)
    [job] = claimed(services, uuid.UUID(int=7))
    with transaction(services.engine) as connection:
        lifecycle.succeed(connection, uuid.UUID(int=7), [result(job.id)])
    control.cancel_batch(services, tenant.id, batch)
    with transaction(services.engine) as connection:
        assert progress.batch(connection, tenant.id, batch).state is progress.BatchState.FINISHED
