"""A farm whose API, keeper and workers are on machines of their own; one machine's link is cut and heals."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import func, select, text

from imagefarm import Farm
from shared import schema, tenants
from shared.database import transaction
from shared.models import Attempt, Job, Worker
from shared.services import Services, open_services
from shared.states import Outcome, State
from tests.acceptance.test_workers import assert_every_image_once, children_of
from tests.conftest import missing, settings_for
from tests.fakes.s3_server import BUCKET, moto_server
from tests.farm import Process, api_server, celery_worker, keeper, wait_for
from tests.network import Machine, Network, postgres_on, redis_on

#: passes of four images, so that a batch is many passes
CATALOGUE = '[models.fake]\nbackend = "fake"\nmax_batch = 4\n'
#: a pass takes two seconds, as long as a lease: whoever is cut off in it comes late
PASS = {"num_inference_steps": 8, "step_seconds": 0.25}


@dataclass(frozen=True)
class RemoteWorker:
    """A worker and the machine it is on."""

    machine: Machine
    process: Process
    services: Services

    @property
    def id(self) -> str:
        """Its name in the database, once it has said hello."""
        pids = [int(pid) for pid in children_of(self.process.pid)]
        with transaction(self.services.engine) as connection:
            found = connection.execute(select(Worker.id).where(Worker.pid.in_(pids))).scalars().all()
        return found[0] if found else ""

    def attempts(self, outcome: Outcome) -> list[int]:
        """The jobs whose attempt here ended so."""
        query = select(Attempt.job_id).where(Attempt.worker_id == self.id, Attempt.outcome == outcome)
        with transaction(self.services.engine) as connection:
            return list(connection.execute(query).scalars())

    def has_just_claimed(self) -> bool:
        fresh = Job.claimed_at > func.clock_timestamp() - text("interval '0.4 s'")
        query = select(Job.id).where(Job.state == State.RENDERING, Job.claimed_by == self.id, fresh).limit(1)
        with transaction(self.services.engine) as connection:
            return connection.execute(query).first() is not None


@dataclass(frozen=True)
class RemoteFarm:
    """A farm of four machines, and a client on a fifth: the one that runs the tests."""

    client: Farm
    services: Services
    one: RemoteWorker
    two: RemoteWorker


@pytest.fixture
def network() -> Iterator[Network]:
    """An empty network. Skips, in CI fails, where there can be none."""
    if shutil.which("ip") is None:
        missing("`ip` is not installed (iproute2); machines are network namespaces here")
    if os.geteuid() != 0:
        missing("only root may make network namespaces")
    with ExitStack() as stack:
        try:
            made = stack.enter_context(Network())
            made.machine(0)
        except subprocess.CalledProcessError as error:
            missing(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield made


@pytest.fixture
def farm(network: Network, tmp_path: Path) -> Iterator[RemoteFarm]:
    """Everything is reached by URL: no socket file, no folder, no loopback is shared."""
    (tmp_path / "catalogue.toml").write_text(CATALOGUE)
    with ExitStack() as stack:
        # not below pytest's own folder, which is closed to the user that PostgreSQL runs as
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imagefarm-network-")))
        objects = stack.enter_context(moto_server(network.address))
        serving, keeping, first, second = (network.machine(number) for number in range(1, 5))
        settings = settings_for(
            stack.enter_context(postgres_on(network.address, folder / "postgres")),
            stack.enter_context(redis_on(network.address, tmp_path)),
            f"s3://{BUCKET}",
            s3_endpoint_url=objects.endpoint,
            s3_access_key=objects.access_key,
            s3_secret_key=objects.secret_key,
            catalogue=tmp_path / "catalogue.toml",
            listen=f"{serving.address}:8000",
            lease_seconds=2.0,
            heartbeat_seconds=0.4,
        )
        services = open_services("tests", settings)
        stack.callback(services.engine.dispose)
        schema.upgrade(services.engine)
        with transaction(services.engine) as connection:
            key = tenants.create_key(connection, tenants.ensure_tenant(connection, "remote"), "tests")
        stack.enter_context(api_server(settings, tmp_path / "api.log", serving.within))
        stack.enter_context(keeper(settings, tmp_path / "keeper.log", keeping.within))
        one, two = (
            RemoteWorker(
                machine,
                stack.enter_context(celery_worker(settings, tmp_path / f"{name}.log", "fake", within=machine.within)),
                services,
            )
            for name, machine in (("one", first), ("two", second))
        )
        client = stack.enter_context(Farm(f"http://{settings.listen}", key))
        wait_for(lambda: is_up(client), what="the API")
        wait_for(lambda: one.id and two.id, what="both workers' hello")
        yield RemoteFarm(client, services, one, two)


def is_up(client: Farm) -> bool:
    try:
        return bool(client.models())
    except Exception:
        return False


def test_a_worker_that_was_cut_off_comes_back_without_harm(farm: RemoteFarm) -> None:
    one, two = farm.one, farm.two
    batch = farm.client.submit(["x"] * 48, model="fake", parameters=PASS)
    wait_for(lambda: one.attempts(Outcome.SUCCEEDED) and two.attempts(Outcome.SUCCEEDED), what="both to render")

    wait_for(one.has_just_claimed, what="a pass to cut off")
    one.machine.cut()
    wait_for(
        lambda: set(one.attempts(Outcome.WORKER_LOST)) & set(two.attempts(Outcome.SUCCEEDED)),
        what="the other worker to render what was lost",
    )
    one.machine.heal()
    wait_for(lambda: "came too late and were refused" in one.process.text(), 45, "late results")

    done = batch.wait(timeout=60)
    assert (done.succeeded, done.failed) == (48, 0)
    assert_every_image_once(farm.services)
    before = len(one.attempts(Outcome.SUCCEEDED))
    assert before + len(two.attempts(Outcome.SUCCEEDED)) == 48

    two.process.popen.terminate()
    assert two.process.popen.wait(30) == 0
    again = farm.client.submit(["y"] * 8, model="fake")
    assert again.wait(timeout=60).succeeded == 8
    assert len(one.attempts(Outcome.SUCCEEDED)) == before + 8, "the worker that was cut off renders again"
    assert_every_image_once(farm.services)
