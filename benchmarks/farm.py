"""A farm of real processes for the benchmark, on services given by URL or on embedded ones."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import create_engine, make_url, text

from imagefarm import Farm
from imagefarm.embedded import EmbeddedPostgres, EmbeddedRedis
from shared import schema, tenants
from shared.database import transaction
from shared.queue import queue_name
from shared.services import Services, open_services
from shared.settings import PROJECT_ROOT, Settings, environment_of, load_settings


@dataclass(frozen=True)
class RunningFarm:
    """Process ids and a client of a farm that is up."""

    client: Farm
    services: Services
    folder: Path
    api: int
    keeper: int
    worker: int | None

    @property
    def pids(self) -> list[int]:
        return [pid for pid in (self.api, self.keeper, self.worker) if pid is not None]

    def warm_up(self, *models: str) -> None:
        """Have eight images of each model rendered: what happens only once counts for nobody."""
        for model in models:
            if self.client.submit(["warm up"] * 8, model=model).wait(timeout=120).succeeded != 8:
                raise RuntimeError(f"the workers do not render {model}")


@contextmanager
def running_farm(
    *models: str,
    objects: Path | None = None,
    catalogue: str | None = None,
    redis: EmbeddedRedis | None = None,
    **changes: Any,
) -> Iterator[RunningFarm]:
    """API, keeper and one worker for `models` (none without), on an empty database; ended with the block.

    Images go to the folder `objects`, by default one on the machine's disk. `catalogue` is the text of another one,
    `redis` a server of the caller's, and `changes` are settings.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imagefarm-bench-")))
        settings = stack.enter_context(_settings(folder, objects or folder / "objects", redis))
        settings = settings.model_copy(update=changes)
        if catalogue:
            (folder / "catalogue.toml").write_text(catalogue)
            settings = settings.model_copy(update={"catalogue": folder / "catalogue.toml"})
        services = stack.enter_context(_migrated(settings))
        with transaction(services.engine) as connection:
            key = tenants.create_key(connection, tenants.ensure_tenant(connection, "benchmark"), "benchmark")
        api = stack.enter_context(_process(folder, settings, "-m", "api.serve"))
        keeper = stack.enter_context(_process(folder, settings, "-m", "worker.keeper"))
        worker = stack.enter_context(rendering_worker(folder, settings, *models)) if models else None
        client = stack.enter_context(Farm(f"http://{settings.listen}", key))
        _await(client)
        farm = RunningFarm(client, services, folder, api.pid, keeper.pid, worker)
        farm.warm_up(*models)
        yield farm


@contextmanager
def rendering_worker(folder: Path, settings: Settings, *models: str) -> Iterator[int]:
    """One more worker, for `models`; yields its process id."""
    celery = ["-m", "celery", "-A", "worker.app", "worker", "-l", "WARNING", "-n", f"{uuid.uuid4().hex[:8]}@%h"]
    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    queues = ["-Q", ",".join(queue_name(model) for model in models)]
    serving = settings.model_copy(update={"worker_models": ",".join(models)})
    with _process(folder, serving, *celery, *quiet, *queues) as process:
        yield process.pid


@contextmanager
def bare_services(pool_size: int = 5) -> Iterator[Services]:
    """Services over an empty, migrated database, without any process of a farm."""
    with tempfile.TemporaryDirectory(prefix="imagefarm-bench-") as name:
        folder = Path(name)
        with _settings(folder, folder / "objects") as settings, _migrated(settings, pool_size) as services:
            yield services


@contextmanager
def _migrated(settings: Settings, pool_size: int = 5) -> Iterator[Services]:
    services = open_services("benchmark", settings, pool_size)
    try:
        schema.upgrade(services.engine)
        yield services
    finally:
        services.engine.dispose()


@contextmanager
def _settings(folder: Path, objects: Path, redis: EmbeddedRedis | None = None) -> Iterator[Settings]:
    with ExitStack() as stack:
        if database_url := os.environ.get("DATABASE_URL"):
            database_url = stack.enter_context(_own_database(database_url))
        else:
            database_url = stack.enter_context(EmbeddedPostgres(folder / "postgres")).url
        redis_url = redis.url if redis else os.environ.get("REDIS_URL")
        redis_url = redis_url or stack.enter_context(EmbeddedRedis(folder / "redis")).url
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        yield load_settings(
            database_url=database_url,
            redis_url=redis_url,
            storage_url=f"file://{objects}",
            listen=f"127.0.0.1:{port}",
            log_level="WARNING",
        )


@contextmanager
def _own_database(server_url: str) -> Iterator[str]:
    name = f"imagefarm_bench_{uuid.uuid4().hex[:8]}"
    url = make_url(server_url).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        try:
            yield url.set(drivername="postgresql", database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@contextmanager
def _process(folder: Path, settings: Settings, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **environment_of(settings), "PYTHONPATH": str(PROJECT_ROOT)}
    environment |= {"C_FORCE_ROOT": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # as `imagefarm worker` sets it
    with (folder / "processes.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.returncode not in (0, -15):
            print((folder / "processes.log").read_text()[-3000:])


def _await(client: Farm) -> None:
    """Wait until the API answers."""
    deadline = time.monotonic() + 120
    while True:
        try:
            client.models()
            break
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def servers_cpu_seconds() -> float:
    """CPU time used so far by every PostgreSQL and Redis process of this machine."""
    total = 0.0
    for process in psutil.process_iter(["name", "cpu_times"]):
        if process.info["name"] in {"postgres", "redis-server", "valkey-server"} and process.info["cpu_times"]:
            total += process.info["cpu_times"].user + process.info["cpu_times"].system
    return total
