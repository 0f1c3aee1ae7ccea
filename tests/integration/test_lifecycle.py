"""The verbs of the lifecycle on a real PostgreSQL: guards, fences, counters, claims."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable

import pytest
from sqlalchemy import Connection, func, select, text, update
from sqlalchemy.exc import IntegrityError

from shared import lifecycle
from shared.database import transaction
from shared.lifecycle import Failure, Lease, Result
from shared.models import Attempt, Batch, BatchCounter, Job, Tenant, WebhookOutbox
from shared.plan import plan
from shared.services import Services
from shared.states import MOVES, POISON, Outcome, State
from shared.submit import submit
from shared.tenants import TenantIdentity
from tests.farm import wait_for

TOKEN = uuid.UUID(int=7)


def submit_jobs(services: Services, tenant: TenantIdentity, count: int = 1, **parameters: object) -> int:
    """A batch of `count` fake jobs; returns its row id."""
    planned = plan(services.catalogue["fake"], parameters, prompts=["x"] * count, max_jobs=10_000)
    public_id = submit(services, tenant, planned).public_id
    with transaction(services.engine) as connection:
        return connection.execute(select(Batch.id).where(Batch.public_id == public_id)).scalar_one()


def claim(connection: Connection, limit: int = 1, token: uuid.UUID = TOKEN) -> list[lifecycle.ClaimedJob]:
    return lifecycle.claim(connection, "fake", worker="w1", token=token, lease_seconds=30, limit=limit)


def result(job_id: int) -> Result:
    return Result(job_id, "key.png", b"\1" * 32, 0.5, {"width": 64})


def put_into(connection: Connection, batch_id: int, state: State) -> int:
    """Bring the only job of a batch into `state` by verbs alone; returns its id."""
    job_id = connection.execute(select(Job.id).where(Job.batch_id == batch_id)).scalar_one()
    failure = Failure(job_id, Outcome.TRANSIENT, "x", "y")
    if state in {State.SCHEDULED, State.RENDERING, State.SUCCEEDED, State.FAILED}:
        assert claim(connection)
    match state:
        case State.SCHEDULED:
            assert lifecycle.retry(connection, TOKEN, [failure], [0.0])
        case State.SUCCEEDED:
            assert lifecycle.succeed(connection, TOKEN, [result(job_id)])
        case State.FAILED:
            assert lifecycle.fail(connection, TOKEN, [failure])
        case State.CANCELED:
            assert lifecycle.cancel(connection, batch_id)
        case State.HELD:
            assert lifecycle.hold(connection, batch_id)
    return job_id


def state_of(connection: Connection, job_id: int) -> State:
    return State(connection.execute(select(Job.state).where(Job.id == job_id)).scalar_one())


def assert_counters_match(connection: Connection) -> None:
    """I5: the counters of every batch equal a count of its rows."""
    rows = connection.execute(select(Job.batch_id, Job.state, func.count()).group_by(Job.batch_id, Job.state))
    counted = {(batch_id, state): number for batch_id, state, number in rows}
    sums = [func.sum(getattr(BatchCounter, state)) for state in State]
    for batch_id, *numbers in connection.execute(select(BatchCounter.batch_id, *sums).group_by(BatchCounter.batch_id)):
        for state, number in zip(State, numbers, strict=True):
            assert number == counted.get((batch_id, str(state)), 0), (batch_id, state)


VERBS: dict[str, Callable[[Connection, int, int], object]] = {
    "claim": lambda c, batch, job: claim(c, token=uuid.UUID(int=8)),
    "succeed": lambda c, batch, job: lifecycle.succeed(c, TOKEN, [result(job)]),
    "fail": lambda c, batch, job: lifecycle.fail(c, TOKEN, [Failure(job, Outcome.PERMANENT, "x", "y")]),
    "retry": lambda c, batch, job: lifecycle.retry(c, TOKEN, [Failure(job, Outcome.TRANSIENT, "x", "y")], [60.0]),
    "release": lambda c, batch, job: lifecycle.release(c, TOKEN, [job]),
    "drop": lambda c, batch, job: lifecycle.drop(c, TOKEN, [job]),
    "rescue": lambda c, batch, job: lifecycle.rescue(c, workers=["w1"]),
    "promote": lambda c, batch, job: lifecycle.promote(c),
    "hold": lambda c, batch, job: lifecycle.hold(c, batch),
    "resume": lambda c, batch, job: lifecycle.resume(c, batch),
    "admit": lambda c, batch, job: lifecycle.admit(c, 1, "fake"),
    "cancel": lambda c, batch, job: lifecycle.cancel(c, batch),
    "resubmit": lambda c, batch, job: lifecycle.resubmit(c, batch),
}


def test_every_verb_is_tested() -> None:
    assert set(VERBS) == set(MOVES)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("state", State)
def test_a_verb_leaves_only_the_states_it_names(
    services: Services, tenant: TenantIdentity, state: State, verb: str
) -> None:
    batch_id = submit_jobs(services, tenant)
    with transaction(services.engine) as connection:
        job_id = put_into(connection, batch_id, state)
        if verb == "admit":
            connection.execute(update(Tenant).values(max_in_flight=1))
        answer = VERBS[verb](connection, batch_id, job_id)
        after = state_of(connection, job_id)
        assert_counters_match(connection)
    if state in MOVES[verb].leaves:
        assert answer
        assert after in MOVES[verb].enters
    elif verb == "succeed" and state is State.SUCCEEDED:
        assert answer == {job_id}  # our own commit, found again
    else:
        assert not answer
        assert after is state


@pytest.mark.parametrize("verb", [name for name, move in MOVES.items() if move.fenced])
def test_a_worker_that_was_given_up_changes_nothing(services: Services, tenant: TenantIdentity, verb: str) -> None:
    batch_id = submit_jobs(services, tenant)
    with transaction(services.engine) as connection:
        job_id = claim(connection)[0].id
        lifecycle.rescue(connection, workers=["w1"])
        assert claim(connection, token=uuid.UUID(int=9))  # somebody else has it now
        assert not VERBS[verb](connection, batch_id, job_id)
        assert state_of(connection, job_id) is State.RENDERING
        assert lifecycle.succeed(connection, uuid.UUID(int=9), [result(job_id)]) == {job_id}


def test_concurrent_claimers_never_share_a_job(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant, 600)
    got: list[int] = []
    lock = threading.Lock()

    def work() -> None:
        while True:
            with transaction(services.engine) as connection:
                jobs = claim(connection, limit=7, token=uuid.uuid4())
            if not jobs:
                return
            with lock:
                got.extend(job.id for job in jobs)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with transaction(services.engine) as connection:
        left = connection.execute(select(func.count()).where(Job.state == State.QUEUED)).scalar_one()
    # a claimer may leave early while others hold the locks of the last rows; nothing may be claimed twice
    assert max(Counter(got).values()) == 1
    assert len(got) + left == 600


def test_a_claim_takes_the_head_and_only_mates_of_its_batch_key(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant, 2, width=32)
    submit_jobs(services, tenant, 3, width=64)
    submit_jobs(services, tenant, 2, width=32)
    with transaction(services.engine) as connection:
        first = claim(connection, limit=10, token=uuid.uuid4())
        second = claim(connection, limit=10, token=uuid.uuid4())
    assert [job.batch_id for job in first] == [1, 1, 3, 3]
    assert [job.batch_id for job in second] == [2, 2, 2]


def test_priority_goes_before_virtual_time(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant, 1)
    submit_jobs(services, tenant, 1)
    with transaction(services.engine) as connection:
        connection.execute(update(Job).where(Job.batch_id == 2).values(priority=0))
        assert claim(connection)[0].batch_id == 2


def test_a_small_tenant_does_not_wait_behind_a_large_batch(services: Services, tenant: TenantIdentity) -> None:
    with transaction(services.engine) as connection:
        connection.execute(text("INSERT INTO tenant (name) VALUES ('small')"))
    small = TenantIdentity(2, "small", 1.0)
    submit_jobs(services, tenant, 500)
    with transaction(services.engine) as connection:
        for number in range(100):
            claim(connection, token=uuid.UUID(int=100 + number))
    submit_jobs(services, small, 10)
    with transaction(services.engine) as connection:
        owners = [claim(connection, token=uuid.uuid4())[0].tenant_id for _ in range(20)]
    assert owners.count(2) == 10


def test_three_losses_make_a_job_poison_and_it_is_rendered_alone(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant, 2)
    with transaction(services.engine) as connection:
        assert len(claim(connection, limit=2)) == 2
        lifecycle.rescue(connection, workers=["w1"])
        for loss in (1, 2):
            jobs = claim(connection, limit=2, token=uuid.UUID(int=20 + loss))
            assert [(job.idx, job.lost_count) for job in jobs] == [(0, loss)], "alone, and the same one again"
            lifecycle.rescue(connection, workers=["w1"])
        row = connection.execute(select(Job.state, Job.error_class).where(Job.idx == 0)).one()
        attempts = connection.execute(select(Attempt.outcome).where(Attempt.job_id == 1)).scalars().all()
    assert row == (State.FAILED, POISON)
    assert attempts == [Outcome.WORKER_LOST] * 3


def test_only_expired_leases_are_rescued(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant, 2)
    with transaction(services.engine) as connection:
        lifecycle.claim(connection, "fake", worker="w1", token=TOKEN, lease_seconds=-1, limit=1)
        claim(connection, token=uuid.UUID(int=9))
        assert lifecycle.rescue(connection) == [("fake", State.QUEUED)]


def test_a_heartbeat_renews_what_is_ours_and_names_what_is_not(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant, 2)
    with transaction(services.engine) as connection:
        mine, other = claim(connection)[0].id, claim(connection, token=uuid.UUID(int=9))[0].id
        asked = {Lease(mine, TOKEN), Lease(other, TOKEN), Lease(mine, uuid.UUID(int=9))}
        assert lifecycle.extend(connection, asked, lease_seconds=500) == {Lease(mine, TOKEN)}
        seconds = func.extract("epoch", Job.lease_expires_at - func.clock_timestamp())
        assert connection.execute(select(seconds).where(Job.id == mine)).scalar_one() > 400
        assert connection.execute(select(seconds).where(Job.id == other)).scalar_one() < 100


def test_a_release_does_not_count_the_attempt(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant)
    with transaction(services.engine) as connection:
        job = claim(connection)[0]
        lifecycle.release(connection, TOKEN, [job.id])
        assert claim(connection, token=uuid.UUID(int=9))[0].attempt == job.attempt == 1


def test_a_canceled_job_does_not_succeed(services: Services, tenant: TenantIdentity) -> None:
    batch_id = submit_jobs(services, tenant)
    with transaction(services.engine) as connection:
        job_id = claim(connection)[0].id
        assert lifecycle.cancel(connection, batch_id) == 0
        assert lifecycle.unwanted(connection, [job_id]) == {job_id}
        assert lifecycle.succeed(connection, TOKEN, [result(job_id)]) == set()
        assert lifecycle.drop(connection, TOKEN, [job_id]) == {job_id}
        assert_counters_match(connection)


@pytest.mark.parametrize("verb", ["retry", "release", "rescue"])
def test_a_canceled_job_does_not_wait_again(services: Services, tenant: TenantIdentity, verb: str) -> None:
    batch_id = submit_jobs(services, tenant)
    with transaction(services.engine) as connection:
        job_id = claim(connection)[0].id
        lifecycle.cancel(connection, batch_id, 0)
        assert VERBS[verb](connection, batch_id, job_id)
        assert state_of(connection, job_id) is State.CANCELED
        assert_counters_match(connection)


def test_a_cancel_that_meets_a_release_is_not_lost(services: Services, tenant: TenantIdentity) -> None:
    batch_id = submit_jobs(services, tenant)
    with transaction(services.engine) as connection:
        job_id = claim(connection)[0].id

    def cancel() -> None:
        with transaction(services.engine) as connection:
            lifecycle.cancel(connection, batch_id, 0)

    canceling = threading.Thread(target=cancel)
    waits = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    with transaction(services.engine) as connection:
        lifecycle.release(connection, TOKEN, [job_id])
        canceling.start()
        with services.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as looking:
            wait_for(lambda: looking.execute(waits).scalar_one(), what="the cancel to wait for the release")
    canceling.join()
    with transaction(services.engine) as connection:
        assert state_of(connection, job_id) is State.CANCELED


def test_a_lost_claim_answer_is_found_by_its_token(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant, 3)
    with transaction(services.engine) as connection:
        jobs = claim(connection, limit=3)
        assert lifecycle.claimed(connection, TOKEN) == jobs
        assert lifecycle.claimed(connection, uuid.UUID(int=9)) == []


def test_mass_moves_come_in_chunks(services: Services, tenant: TenantIdentity) -> None:
    batch_id = submit_jobs(services, tenant, 25)
    with transaction(services.engine) as connection:
        moved = [lifecycle.cancel(connection, batch_id, limit=10) for _ in range(4)]
        assert_counters_match(connection)
    assert moved == [10, 10, 5, 0]


def test_an_event_is_written_for_batches_that_asked_for_it(services: Services, tenant: TenantIdentity) -> None:
    submit_jobs(services, tenant, 2)
    submit_jobs(services, tenant, 1)
    with transaction(services.engine) as connection:
        connection.execute(update(Batch).where(Batch.id == 1).values(webhook_url="https://example.org/hook"))
        for number in (1, 2, 3):
            token = uuid.UUID(int=number)
            lifecycle.succeed(connection, token, [result(job.id) for job in claim(connection, token=token)])
        events = connection.execute(select(WebhookOutbox.event, WebhookOutbox.job_id)).all()
    assert sorted(events) == [("job.succeeded", 1), ("job.succeeded", 2)]


@pytest.mark.parametrize(
    "assignment",
    [
        "state = 'rendering'",
        "state = 'succeeded', finished_at = now()",
        "state = 'failed', finished_at = now()",
        "state = 'scheduled'",
        "state = 'canceled'",
        "state = 'lost'",
        f"lease_token = '{TOKEN}'",
        "tenant_id = tenant_id + 1",
    ],
)
def test_constraints_refuse_what_no_verb_would_do(services: Services, tenant: TenantIdentity, assignment: str) -> None:
    submit_jobs(services, tenant)
    with pytest.raises(IntegrityError), transaction(services.engine) as connection:
        connection.execute(text(f"UPDATE job SET {assignment}"))


@pytest.mark.parametrize(
    ("outcome", "attempt", "expected"),
    [
        (Outcome.TRANSIENT, 1, (0.2, 2.0)),
        (Outcome.TRANSIENT, 7, (12.8, 128.0)),
        (Outcome.TRANSIENT, 8, None),
        (Outcome.RESOURCE, 1, (3.0, 30.0)),
        (Outcome.RESOURCE, 3, None),
        (Outcome.PERMANENT, 1, None),
        (Outcome.BUDGET, 1, None),
    ],
)
def test_backoff_follows_the_policy(outcome: Outcome, attempt: int, expected: tuple[float, float] | None) -> None:
    for _ in range(50):
        delay = lifecycle.backoff(outcome, attempt)
        if expected is None:
            assert delay is None
        else:
            assert delay is not None
            assert expected[0] <= delay <= expected[1]
    if expected is not None:
        later = lifecycle.backoff(outcome, attempt, retry_after=1000)
        assert later is not None
        assert later >= 1000, "never earlier than the other side asked"
