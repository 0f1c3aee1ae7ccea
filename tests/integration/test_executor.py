"""The executor in this process, with the fake engine, on a real database and real file storage."""

from __future__ import annotations

import io
import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image
from sqlalchemy import Connection, func, select, update
from sqlalchemy.exc import DataError

from shared import control, lifecycle, progress
from shared.catalogue import Catalogue
from shared.database import transaction
from shared.errors import Permanent
from shared.models import Attempt, Batch, Job
from shared.plan import plan
from shared.services import Services
from shared.states import Outcome, State
from shared.submit import submit
from shared.tenants import TenantIdentity
from tests.farm import wait_for
from tests.integration.test_lifecycle import assert_counters_match
from worker.backends.fake import draw
from worker.executor import Executor
from worker.leases import Leases
from worker.report import Reporter, failure_of


@contextmanager
def executing(services: Services, *models: str, **settings: object) -> Iterator[Executor]:
    """An executor that lingers for a moment only, closed at the end."""
    changed = services.settings.model_copy(update={"linger_seconds": 0.3, **settings})
    built = Executor(replace(services, settings=changed), models or ["fake"])
    built.start()
    try:
        yield built
    finally:
        built.close()


@pytest.fixture
def executor(services: Services) -> Iterator[Executor]:
    """An executor that serves the fake model."""
    with executing(services) as built:
        yield built


def draining(executor: Executor) -> threading.Thread:
    """A drain beside the test, as the Celery child runs it."""
    thread = threading.Thread(target=executor.drain, args=("fake",), daemon=True)
    thread.start()
    return thread


def submit_fake(
    services: Services, tenant: TenantIdentity, jobs: list[dict[str, object]], **shared: object
) -> uuid.UUID:
    planned = plan(services.catalogue["fake"], shared, jobs=jobs, max_jobs=10_000)
    return submit(services, tenant, planned).public_id


def jobs_of(services: Services, tenant: TenantIdentity, batch: uuid.UUID) -> list[progress.JobView]:
    with services.engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        assert_counters_match(connection)
        return list(progress.jobs(connection, tenant.id, batch, cursor=None, limit=1000).items)


def test_every_job_gets_its_own_picture(services: Services, tenant: TenantIdentity, executor: Executor) -> None:
    batch = submit_fake(services, tenant, [{"prompt": f"p{i}", "seed": i} for i in range(70)], width=32, height=16)
    executor.drain("fake")
    for job in jobs_of(services, tenant, batch):
        assert job.state is State.SUCCEEDED
        assert job.result_key is not None
        picture = Image.open(io.BytesIO(services.storage.get(job.result_key)))
        assert picture.tobytes() == draw(job.seed, 32, 16).tobytes()
        assert json.loads(picture.text["imagefarm"])["prompt"] == job.prompt
    with transaction(services.engine) as connection:
        assert connection.execute(select(func.count()).select_from(Attempt)).scalar_one() == 70


def test_one_bad_job_does_not_take_its_mates_along(
    services: Services, tenant: TenantIdentity, executor: Executor
) -> None:
    jobs: list[dict[str, object]] = [{"prompt": str(i)} for i in range(9)]
    jobs[4]["fault"] = "permanent"
    jobs[7]["fault"] = "transient"
    batch = submit_fake(services, tenant, jobs)
    executor.drain("fake")
    seen = jobs_of(services, tenant, batch)
    assert [job.state for job in seen if job.idx not in (4, 7)] == [State.SUCCEEDED] * 7
    assert (seen[4].state, seen[4].error_class) == (State.FAILED, "asked_for")
    assert (seen[7].state, seen[7].attempt) == (State.SCHEDULED, 1)
    with transaction(services.engine) as connection:
        outcomes = connection.execute(select(Attempt.outcome, func.count()).group_by(Attempt.outcome)).all()
    assert dict(outcomes) == {Outcome.SUCCEEDED: 7, Outcome.PERMANENT: 1, Outcome.TRANSIENT: 1}


def test_out_of_memory_is_tried_smaller_and_then_later(
    services: Services, tenant: TenantIdentity, executor: Executor
) -> None:
    jobs: list[dict[str, object]] = [{"prompt": str(i)} for i in range(4)]
    jobs[0]["fault"] = "out_of_memory"
    batch = submit_fake(services, tenant, jobs)
    executor.drain("fake")
    seen = jobs_of(services, tenant, batch)
    assert [job.state for job in seen] == [State.SCHEDULED, *[State.SUCCEEDED] * 3]
    assert all((job.result or {})["batch_size"] < 4 for job in seen[1:])


def test_losses_do_not_use_up_the_tries_of_other_failures(
    services: Services, tenant: TenantIdentity, executor: Executor
) -> None:
    batch = submit_fake(services, tenant, [{"prompt": "x", "fault": "out_of_memory"}])
    with transaction(services.engine) as connection:
        connection.execute(update(Job).values(attempt=2, lost_count=2))
    executor.drain("fake")
    assert jobs_of(services, tenant, batch)[0].state is State.SCHEDULED


def test_a_canceled_batch_leaves_the_running_pass_within_a_step(
    services: Services, tenant: TenantIdentity, executor: Executor
) -> None:
    batch = submit_fake(
        services, tenant, [{"prompt": "a"}, {"prompt": "b"}], num_inference_steps=1000, step_seconds=0.02
    )
    drain = draining(executor)
    wait_for(lambda: jobs_of(services, tenant, batch)[0].state is State.RENDERING, what="rendering")
    control.cancel_batch(services, tenant.id, batch)
    drain.join(timeout=10)
    assert not drain.is_alive()
    assert [job.state for job in jobs_of(services, tenant, batch)] == [State.CANCELED] * 2


def test_one_canceled_job_does_not_stop_its_mates(
    services: Services, tenant: TenantIdentity, executor: Executor
) -> None:
    batch = submit_fake(services, tenant, [{"prompt": "a"}, {"prompt": "b"}], num_inference_steps=30, step_seconds=0.03)
    drain = draining(executor)
    wait_for(lambda: jobs_of(services, tenant, batch)[0].state is State.RENDERING, what="rendering")
    control.cancel_job(services, tenant.id, batch, 0)
    drain.join(timeout=10)
    assert [job.state for job in jobs_of(services, tenant, batch)] == [State.CANCELED, State.SUCCEEDED]


def test_told_to_stop_it_releases_what_it_cannot_finish(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, [{"prompt": "a"}], num_inference_steps=1000, step_seconds=0.02)
    with executing(services, grace_seconds=0.1) as executor:
        drain = draining(executor)
        wait_for(lambda: jobs_of(services, tenant, batch)[0].state is State.RENDERING, what="rendering")
        executor.stop_soon()
        drain.join(timeout=10)
    job = jobs_of(services, tenant, batch)[0]
    assert (job.state, job.attempt) == (State.QUEUED, 0)
    assert _workers(services) == [], "it said goodbye"


def test_told_to_stop_while_the_storage_is_away_it_burns_no_attempt(services: Services, tenant: TenantIdentity) -> None:
    folder = Path(urlsplit(services.settings.storage_url).path)
    batch = submit_fake(services, tenant, [{"prompt": "x"}] * 2)
    with executing(services, heartbeat_seconds=0.1, cancel_poll_seconds=0.1) as executor:
        _ = services.storage
        folder.rename(folder.with_name("aside"))
        folder.write_text("in the way")
        drain = draining(executor)
        wait_for(lambda: ["storage" in str(w.last_error) for w in _workers(services)] == [True], what="a failed upload")
        executor.stop_soon()
        drain.join(20)
    jobs = jobs_of(services, tenant, batch)
    assert [(job.state, job.attempt) for job in jobs] == [(State.QUEUED, 0)] * 2


def test_a_lost_lease_stops_the_pass_and_its_result_is_not_recorded(services: Services, tenant: TenantIdentity) -> None:
    batch = submit_fake(services, tenant, [{"prompt": "a"}], num_inference_steps=1000, step_seconds=0.02)
    with executing(services, heartbeat_seconds=0.1) as executor:
        drain = draining(executor)
        wait_for(lambda: jobs_of(services, tenant, batch)[0].state is State.RENDERING, what="rendering")
        with transaction(services.engine) as connection:
            lifecycle.rescue(connection, workers=[worker.id for worker in _workers(services)])
            assert lifecycle.claim(connection, "fake", worker="other", token=uuid.uuid4(), lease_seconds=60, limit=1)
        drain.join(timeout=10)
        assert not drain.is_alive()
    job = jobs_of(services, tenant, batch)[0]
    assert (job.state, job.worker) == (State.RENDERING, "other")


def test_a_job_that_comes_back_is_held_under_its_new_lease(services: Services, tenant: TenantIdentity) -> None:
    submit_fake(services, tenant, [{"prompt": "a"}])
    first, second = uuid.uuid4(), uuid.uuid4()
    with leasing(services) as leases:
        with transaction(services.engine) as connection:
            lost = lifecycle.claim(connection, "fake", worker="we", token=first, lease_seconds=60, limit=1)[0].id
            leases.hold(first, [lost])
            lifecycle.rescue(connection, workers=["we"])
            lifecycle.claim(connection, "fake", worker="we", token=second, lease_seconds=60, limit=1)
        leases.hold(second, [lost])
        wait_for(lambda: not leases.is_wanted(first, lost), what="the loss to be noticed")
        assert leases.is_wanted(second, lost)
        leases.let_go(first, [lost])
        with transaction(services.engine) as connection:
            control.cancel_job(services, tenant.id, batch_of(connection, lost), 0)
        wait_for(lambda: not leases.is_wanted(second, lost), what="the cancel to be noticed")


def test_a_report_that_fails_keeps_no_lease_alive(services: Services, tenant: TenantIdentity) -> None:
    submit_fake(services, tenant, [{"prompt": "a"}])
    token = uuid.uuid4()
    with leasing(services, lease_seconds=0.5) as leases:
        with transaction(services.engine) as connection:
            job = lifecycle.claim(connection, "fake", worker="we", token=token, lease_seconds=0.5, limit=1)[0]
        leases.hold(token, [job.id])
        unwritable = lifecycle.Result(job.id, "key.png", b"\1" * 32, 0.5, {"note": "\x00"})
        with pytest.raises(DataError):
            Reporter(services, leases, threading.Event()).succeed(token, [unwritable])

        def rescued() -> object:
            with transaction(services.engine) as connection:
                return lifecycle.rescue(connection)

        assert wait_for(rescued, seconds=10, what="the lease to run out") == [("fake", State.QUEUED)]


def test_what_others_wrote_is_made_storable(services: Services, tenant: TenantIdentity) -> None:
    submit_fake(services, tenant, [{"prompt": "a"}])
    token = uuid.uuid4()
    with leasing(services) as leases:
        with transaction(services.engine) as connection:
            job = lifecycle.claim(connection, "fake", worker="we", token=token, lease_seconds=60, limit=1)[0]
        leases.hold(token, [job.id])
        failure, wait = failure_of(job.id, Permanent("bad\x00 \ud800 answer"))
        Reporter(services, leases, threading.Event()).give_up(token, [(failure, 1, wait)])
        leases.report_error("the vendor said \x00 \udfff")
        wait_for(lambda: _workers(services)[0].last_error == "the vendor said  ?", what="the worker's complaint")
    with transaction(services.engine) as connection:
        assert connection.execute(select(Job.error_detail)).scalar_one() == "bad ? answer"


def batch_of(connection: Connection, job_id: int) -> uuid.UUID:
    found = select(Batch.public_id).join(Job, Job.batch_id == Batch.id).where(Job.id == job_id)
    return connection.execute(found).scalar_one()


@contextmanager
def leasing(services: Services, **settings: object) -> Iterator[Leases]:
    """Leases with quick heartbeats, ended with the block."""
    quick = {"heartbeat_seconds": 0.1, "cancel_poll_seconds": 0.1, **settings}
    leases = Leases(replace(services, settings=services.settings.model_copy(update=quick)), ["fake"])
    leases.start(list)
    try:
        yield leases
    finally:
        leases.stop()


def test_a_model_that_cannot_be_loaded_burns_no_job(services: Services, tenant: TenantIdentity) -> None:
    gone = services.catalogue["demo-gan"].model_copy(update={"folder": Path("/nowhere")})
    broken = replace(services, catalogue=Catalogue({**services.catalogue, "demo-gan": gone}))
    planned = plan(gone, {"class_index": 1}, prompts=["x"], max_jobs=10)
    batch = submit(services, tenant, planned).public_id
    with executing(broken, "fake", "demo-gan", heartbeat_seconds=0.1) as executor:
        executor.drain("demo-gan")
        complaint = wait_for(lambda: _workers(services)[0].last_error, what="the worker's complaint")
        assert "config.json" in complaint
        assert _workers(services)[0].models == ["fake"]
    job = jobs_of(services, tenant, batch)[0]
    assert (job.state, job.attempt) == (State.QUEUED, 0)


def _workers(services: Services) -> list[progress.WorkerView]:
    with transaction(services.engine) as connection:
        return progress.workers(connection, lease_seconds=60)


def test_only_models_with_work_are_looked_at(services: Services, tenant: TenantIdentity) -> None:
    submit_fake(services, tenant, [{"prompt": "a"}])
    with executing(services, *services.catalogue) as executor:
        assert executor._models_with_work() == ["fake"]


def test_a_job_that_this_worker_cannot_read_fails_alone(
    services: Services, tenant: TenantIdentity, executor: Executor
) -> None:
    batch = submit_fake(services, tenant, [{"prompt": "a"}, {"prompt": "b"}])
    with transaction(services.engine) as connection:
        connection.execute(update(Job).where(Job.idx == 1).values(overrides={"from_the_future": 1}))
    executor.drain("fake")
    seen = jobs_of(services, tenant, batch)
    assert [job.state for job in seen] == [State.SUCCEEDED, State.FAILED]
    assert seen[1].error_class == "unreadable_job"


def test_the_first_claim_starts_the_clock_of_a_batch(
    services: Services, tenant: TenantIdentity, executor: Executor
) -> None:
    batch = submit_fake(services, tenant, [{"prompt": "a"}])
    executor.drain("fake")
    with transaction(services.engine) as connection:
        row = connection.execute(select(Batch.started_at, Batch.created_at).where(Batch.public_id == batch)).one()
    assert row.started_at >= row.created_at
