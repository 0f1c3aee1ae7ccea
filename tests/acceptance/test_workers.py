"""Real Celery workers and keepers over real services: bells, several hosts, kills, a dead Redis."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from sqlalchemy import func, select, update

from imagefarm.embedded import EmbeddedRedis
from shared import progress
from shared.database import transaction
from shared.models import Attempt, Job
from shared.plan import plan
from shared.progress import BatchView
from shared.queue import Bell, drain_message, queue_name, redis_client
from shared.services import Services, open_services
from shared.settings import Settings
from shared.states import Outcome, State
from shared.submit import submit
from shared.tenants import TenantIdentity
from tests.farm import Process, celery_worker, keeper, wait_for
from tests.integration.test_lifecycle import assert_counters_match


@pytest.fixture
def quick(settings: Settings) -> Settings:
    """Short leases, so that a lost worker is noticed within the test."""
    return settings.model_copy(update={"lease_seconds": 2.0, "heartbeat_seconds": 0.4, "linger_seconds": 5.0})


def submit_fake(services: Services, tenant: TenantIdentity, count: int, **parameters: object) -> uuid.UUID:
    planned = plan(services.catalogue["fake"], parameters, prompts=[f"p{i}" for i in range(count)], max_jobs=100_000)
    return submit(services, tenant, planned).public_id


def view(services: Services, tenant: TenantIdentity, batch: uuid.UUID) -> BatchView:
    with transaction(services.engine) as connection:
        return progress.batch(connection, tenant.id, batch)


def workers(services: Services) -> list[progress.WorkerView]:
    with transaction(services.engine) as connection:
        return progress.workers(connection, lease_seconds=60)


def finished(services: Services, tenant: TenantIdentity, batch: uuid.UUID, seconds: float = 45.0) -> BatchView:
    wait_for(lambda: view(services, tenant, batch).open == 0, seconds, "the end of the batch")
    return view(services, tenant, batch)


def succeeded(services: Services, tenant: TenantIdentity, batch: uuid.UUID) -> int:
    return view(services, tenant, batch).counts[State.SUCCEEDED]


def assert_every_image_once(services: Services) -> None:
    """Rows, attempts and objects agree: one success and one stored object for each job."""
    with transaction(services.engine) as connection:
        assert_counters_match(connection)
        keys = connection.execute(select(Job.result_key)).scalars().all()
        successes = connection.execute(
            select(func.count()).select_from(Attempt).where(Attempt.outcome == Outcome.SUCCEEDED)
        ).scalar_one()
    assert None not in keys
    assert successes == len(keys)
    assert Counter(keys) == Counter(info.key for info in services.storage.list("t/"))


def test_a_bell_wakes_a_worker_and_the_batch_is_rendered(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    with celery_worker(quick, tmp_path / "worker.log", "fake"):
        batch = submit_fake(services, tenant, 300)
        assert finished(services, tenant, batch).counts[State.SUCCEEDED] == 300
    assert_every_image_once(services)


def test_a_keeper_wakes_workers_when_the_bell_was_lost(
    services: Services, tenant: TenantIdentity, quick: Settings, bells: redis.Redis, tmp_path: Path
) -> None:
    batch = submit_fake(services, tenant, 5)
    bells.flushdb()
    with celery_worker(quick, tmp_path / "worker.log", "fake"), keeper(quick, tmp_path / "keeper.log"):
        assert finished(services, tenant, batch).counts[State.SUCCEEDED] == 5


@pytest.mark.parametrize("victim", ["child", "group"])
def test_a_killed_worker_loses_nothing(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path, victim: str
) -> None:
    batch = submit_fake(services, tenant, 100, step_seconds=0.1)
    with keeper(quick, tmp_path / "keeper.log"), celery_worker(quick, tmp_path / "one.log", "fake") as worker:
        wait_for(lambda: view(services, tenant, batch).counts[State.RENDERING], what="the first claim")
        if victim == "child":
            os.kill(int(children_of(worker.pid)[0]), signal.SIGKILL)
            assert finished(services, tenant, batch).counts[State.SUCCEEDED] == 100
        else:
            worker.kill_group()
            with celery_worker(quick, tmp_path / "two.log", "fake"):
                assert finished(services, tenant, batch).counts[State.SUCCEEDED] == 100
    assert_every_image_once(services)
    with transaction(services.engine) as connection:
        lost = connection.execute(
            select(func.count()).select_from(Attempt).where(Attempt.outcome == Outcome.WORKER_LOST)
        ).scalar_one()
    assert lost > 0, "the kill hit jobs in flight"


def children_of(pid: int) -> list[str]:
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True).stdout.split()


def test_a_terminated_worker_burns_no_attempt_and_exits_soon(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    gentle = quick.model_copy(update={"grace_seconds": 0.5})
    batch = submit_fake(services, tenant, 3, step_seconds=0.05, num_inference_steps=1000)
    with celery_worker(gentle, tmp_path / "one.log", "fake") as worker:
        wait_for(lambda: view(services, tenant, batch).counts[State.RENDERING], what="the first claim")
        worker.popen.terminate()
        worker.popen.wait(15)
    with transaction(services.engine) as connection:
        rows = connection.execute(select(Job.state, Job.attempt, Job.lost_count)).all()
    assert rows == [(State.QUEUED, 0, 0)] * 3


def test_a_worker_whose_child_was_killed_can_still_be_told_to_stop(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    with celery_worker(quick, tmp_path / "one.log", "fake") as worker:
        batch = submit_fake(services, tenant, 1)
        finished(services, tenant, batch)
        os.kill(int(children_of(worker.pid)[0]), signal.SIGKILL)
        batch = submit_fake(services, tenant, 3, step_seconds=0.05, num_inference_steps=1000)
        wait_for(lambda: view(services, tenant, batch).counts[State.RENDERING], what="the next child's claim")
        worker.popen.terminate()
        assert worker.popen.wait(quick.grace_seconds + 20) == 0


def test_waiting_for_the_storage_is_no_hung_device(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    impatient = quick.model_copy(update={"stall_seconds": 0.5})
    folder = Path(urlsplit(quick.storage_url).path)
    with celery_worker(impatient, tmp_path / "worker.log", "fake") as worker:
        finished(services, tenant, submit_fake(services, tenant, 1))
        aside = folder.rename(folder.with_name("aside"))
        folder.write_text("in the way")
        # more passes than may wait for their delivery
        batches = [submit_fake(services, tenant, 4, num_inference_steps=steps) for steps in range(1, 7)]
        wait_for(lambda: worker.text().count("upload failed") >= 6, what="uploads that fail again and again")
        folder.unlink()
        aside.rename(folder)
        for batch in batches:
            assert finished(services, tenant, batch).counts[State.SUCCEEDED] == 4
        assert "hangs" not in worker.text()
    with transaction(services.engine) as connection:
        assert connection.execute(select(func.max(Job.lost_count))).scalar_one() == 0


def test_a_worker_that_starts_before_its_storage_works_as_soon_as_it_is_there(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    folder = Path(urlsplit(quick.storage_url).path)
    folder.write_text("in the way")
    batch = submit_fake(services, tenant, 3)
    with keeper(quick, tmp_path / "keeper.log"), celery_worker(quick, tmp_path / "worker.log", "fake") as worker:
        wait_for(lambda: "cannot work yet" in worker.text(), what="the worker's complaint")
        folder.unlink()
        assert finished(services, tenant, batch).counts[State.SUCCEEDED] == 3


def test_the_parent_ends_the_leases_of_a_dead_child_at_once(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    # without a keeper and with a lease that outlasts the test, only the parent can have noticed
    patient = quick.model_copy(update={"lease_seconds": 600.0})
    with celery_worker(patient, tmp_path / "worker.log", "fake") as worker:
        batch = submit_fake(services, tenant, 20, step_seconds=0.1, num_inference_steps=5)
        wait_for(lambda: view(services, tenant, batch).counts[State.RENDERING], what="the first claim")
        [before] = workers(services)
        os.kill(int(children_of(worker.pid)[0]), signal.SIGKILL)
        assert finished(services, tenant, batch).counts[State.SUCCEEDED] == 20
        [after] = workers(services)
        assert after.id != before.id, "the dead one is not listed any more"
    assert_every_image_once(services)


def test_storage_trouble_burns_no_attempt_even_where_the_worker_must_stop(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    folder = Path(urlsplit(quick.storage_url).path)
    with celery_worker(quick, tmp_path / "worker.log", "fake") as worker:
        finished(services, tenant, submit_fake(services, tenant, 1))
        aside = folder.rename(folder.with_name("aside"))
        folder.write_text("in the way")
        batch = submit_fake(services, tenant, 5)
        wait_for(lambda: "upload failed" in worker.text(), what="an upload that fails")
        worker.popen.terminate()
        assert worker.popen.wait(30) == 0
    assert view(services, tenant, batch).counts[State.QUEUED] == 5
    with transaction(services.engine) as connection:
        assert connection.execute(select(func.max(Job.attempt)).where(Job.state == State.QUEUED)).scalar_one() == 0
    folder.unlink()
    aside.rename(folder)
    with celery_worker(quick, tmp_path / "other.log", "fake"), keeper(quick, tmp_path / "keeper.log"):
        assert finished(services, tenant, batch).counts[State.SUCCEEDED] == 5


def test_workers_on_two_hosts_share_a_batch_with_only_urls_in_common(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    homes = [tmp_path / "host-a", tmp_path / "host-b"]
    for home in homes:
        home.mkdir()
    with (
        celery_worker(quick, tmp_path / "a.log", "fake", cwd=homes[0], HOME=str(homes[0])),
        celery_worker(quick, tmp_path / "b.log", "fake", cwd=homes[1], HOME=str(homes[1])),
        keeper(quick, tmp_path / "keeper.log"),
    ):
        wait_for(lambda: len(workers(services)) == 2, what="both workers")
        batch = submit_fake(services, tenant, 400, step_seconds=0.3, width=16, height=16)
        assert finished(services, tenant, batch).counts[State.SUCCEEDED] == 400
    assert_every_image_once(services)
    with transaction(services.engine) as connection:
        by_worker = connection.execute(select(Attempt.worker_id, func.count()).group_by(Attempt.worker_id)).all()
    assert len(by_worker) == 2, by_worker


def test_a_dead_redis_does_not_stop_a_running_farm(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    with EmbeddedRedis(tmp_path / "redis") as broker:
        own = quick.model_copy(update={"redis_url": quick.redis_url.__class__(broker.url), "linger_seconds": 60.0})
        bell = Bell(own)
        with celery_worker(own, tmp_path / "worker.log", "fake"):
            first = submit_fake(services, tenant, 1000, step_seconds=0.1)
            bell.ring(["fake"])
            wait_for(lambda: succeeded(services, tenant, first), what="the first images")
            os.kill(broker.pid, signal.SIGKILL)
            second = submit_fake(services, tenant, 20)
            assert finished(services, tenant, second).counts[State.SUCCEEDED] == 20
            assert finished(services, tenant, first).counts[State.SUCCEEDED] == 1000
    assert_every_image_once(services)


def test_a_full_redis_ends_no_worker(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    with EmbeddedRedis(tmp_path / "redis") as broker:
        redis_url = quick.redis_url.__class__(broker.url)
        own = quick.model_copy(update={"redis_url": redis_url, "linger_seconds": 0.1})
        bell = Bell(own)
        with (
            celery_worker(own, tmp_path / "worker.log", "fake") as worker,
            redis_client(own, timeout_seconds=5) as client,
        ):
            first = submit_fake(services, tenant, 1)
            bell.ring(["fake"], wanted=1)
            finished(services, tenant, first)
            # a bell that the worker gets and cannot note as received
            with client.pipeline() as together:
                together.lpush(queue_name("fake"), drain_message("fake"))
                together.config_set("maxmemory", 1)
                together.execute()
            wait_for(lambda: "command not allowed" in worker.text(), what="the worker's complaint")
            client.config_set("maxmemory", 0)
            second = submit_fake(services, tenant, 5)
            wait_for(lambda: bell.ring(["fake"]), what="a Redis that takes bells")
            assert finished(services, tenant, second).counts[State.SUCCEEDED] == 5
            assert worker.popen.poll() is None


def test_two_keepers_at_once_are_harmless(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    batch = submit_fake(services, tenant, 50)
    with (
        keeper(quick, tmp_path / "one.log") as first,
        keeper(quick, tmp_path / "two.log"),
        celery_worker(quick, tmp_path / "worker.log", "fake"),
    ):
        wait_for(lambda: view(services, tenant, batch).finished_at, what="the batch to be closed")
        first.kill_group()
        again = submit_fake(services, tenant, 5)
        wait_for(lambda: view(services, tenant, again).finished_at, what="the other keeper to take over")
    assert_every_image_once(services)


def test_a_hung_device_ends_its_worker(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    impatient = quick.model_copy(update={"stall_seconds": 1.0})
    planned = plan(services.catalogue["fake"], {}, jobs=[{"prompt": "x", "fault": "hang"}], max_jobs=1)
    batch = submit(services, tenant, planned).public_id
    with celery_worker(impatient, tmp_path / "worker.log", "fake") as worker, keeper(impatient, tmp_path / "k.log"):
        done = finished(services, tenant, batch)
        assert done.counts[State.FAILED] == 1
        assert "the device hangs" in worker.text()
    with transaction(services.engine) as connection:
        assert connection.execute(select(Job.error_class, Job.lost_count)).one() == ("poison", 3)


def test_a_job_that_kills_workers_takes_no_rendered_image_along(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    # an image whose encoding takes longer than the claim and the crash of the job that follows it
    jobs = [{"prompt": "large", "width": 2048, "height": 2048}, {"prompt": "x", "fault": "crash"}]
    planned = plan(services.catalogue["fake"], {}, jobs=jobs, max_jobs=2)
    batch = submit(services, tenant, planned).public_id
    with transaction(services.engine) as connection:
        # both were lost before, as two mates of a pass that killed its worker are
        connection.execute(update(Job).values(lost_count=2, batch_key=None))
    with celery_worker(quick, tmp_path / "worker.log", "fake"), keeper(quick, tmp_path / "keeper.log"):
        done = finished(services, tenant, batch)
    assert (done.counts[State.SUCCEEDED], done.counts[State.FAILED]) == (1, 1)


def test_a_lost_device_ends_its_process_and_the_next_one_goes_on(
    services: Services, tenant: TenantIdentity, quick: Settings, tmp_path: Path
) -> None:
    jobs = [{"prompt": "x", "fault": "device_lost"}, *[{"prompt": "y"}] * 5]
    planned = plan(services.catalogue["fake"], {}, jobs=jobs, max_jobs=10)
    batch = submit(services, tenant, planned).public_id
    with celery_worker(quick, tmp_path / "worker.log", "fake") as worker, keeper(quick, tmp_path / "k.log"):
        done = finished(services, tenant, batch)
        assert "this job asks to lose the device; this worker process ends now" in worker.text()
    assert (done.counts[State.SUCCEEDED], done.counts[State.FAILED]) == (5, 1)
    with transaction(services.engine) as connection:
        assert connection.execute(select(Job.error_class).where(Job.state == State.FAILED)).scalar_one() == "poison"


def test_a_worker_without_its_settings_says_what_is_missing(tmp_path: Path, settings: Settings) -> None:
    broken = settings.model_copy(update={"storage_url": "ftp://x"})
    with Process([sys.executable, "-m", "celery", "-A", "worker.app", "worker"], broken, tmp_path / "w.log") as worker:
        assert worker.popen.wait(30) != 0
        assert "STORAGE_URL" in worker.text()


def test_a_worker_refuses_a_model_that_is_not_in_the_catalogue(tmp_path: Path, settings: Settings) -> None:
    with celery_worker(settings, tmp_path / "w.log", "fake", "demo-difusion") as worker:
        assert worker.popen.wait(30) != 0
        assert "IMAGEFARM_WORKER_MODELS: 'demo-difusion' is not in" in worker.text()


def test_services_open_without_connecting(settings: Settings) -> None:
    url = settings.database_url.__class__("postgresql://127.0.0.1:1/x")
    assert open_services("tests", settings.model_copy(update={"database_url": url})).catalogue
