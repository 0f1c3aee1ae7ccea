"""A whole farm on this machine: what `imagefarm up` runs.

The same processes as in production (API, keeper, workers) over an embedded PostgreSQL and Redis, or over those that
`DATABASE_URL` and `REDIS_URL` name. Everything it keeps lies in one folder; starting again goes on where it stopped.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import requests

from imagefarm.children import Child, Guardian, python_environment
from imagefarm.connection import Address, read_client_file
from imagefarm.embedded import EmbeddedError, EmbeddedPostgres, EmbeddedRedis
from imagefarm.farm_files import lock_folder, write_client_file, write_join_file
from imagefarm.serving import (
    api_command,
    child_environment,
    choose_models,
    gpu_count,
    keeper_command,
    worker_command,
    worker_environment,
)
from shared import schema, tenants
from shared.catalogue import load_catalogue
from shared.database import open_engine, transaction
from shared.errors import FarmError, SettingsError
from shared.settings import Settings, load_settings, variable
from shared.storage import open_storage

TENANT = "local"

_READY_SECONDS = 120.0
_TICK_SECONDS = 0.2
_RESTART_PAUSE = 2.0
#: seconds that a stage may take to end, beside the grace of the workers
_PATIENCE = 20.0
#: order of ending: running requests and passes end together, then the keeper, then what all of them need
_SERVING, _KEEPER, _REDIS, _POSTGRES = range(4)


@dataclass(frozen=True)
class Wanted:
    """What kind of farm to run."""

    data: Path
    #: HOST:PORT of the API; None: as the settings say
    listen: str | None = None
    workers: int = 1
    #: None of them: every model that this machine can render
    models: Sequence[str] = ()
    #: use services and storage of its own even where the environment names others
    self_contained: bool = False

    def given(self, name: str) -> bool:
        """Whether the environment names the service of this variable, and it is to be used."""
        return not self.self_contained and variable(name) is not None


class LocalFarm:
    """A farm, running while the block runs. Ready at its start, all of it ended at its end.

    `say` gets what a person should see. `stop` makes the start give up with `KeyboardInterrupt`; `hurry` makes the
    end kill at once what has not ended yet.
    """

    def __init__(
        self,
        wanted: Wanted,
        say: Callable[[str], None],
        stop: threading.Event | None = None,
        hurry: threading.Event | None = None,
    ) -> None:
        self._wanted = wanted
        self._say = say
        self._stop = stop or threading.Event()
        self._hurry = hurry or threading.Event()
        self._stack = ExitStack()
        self._children: list[Child] = []
        self._services: dict[str, _Service] = {}

    @property
    def url(self) -> str:
        """Address of the API."""
        host, port = self._settings.listen_address
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - where to reach it
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def models(self) -> list[str]:
        """The models that its workers serve."""
        return list(self._models)

    @property
    def open_to_network(self) -> bool:
        """Whether other machines can reach the API."""
        return self._settings.listen_address[0] not in {"127.0.0.1", "::1", "localhost"}

    def __enter__(self) -> LocalFarm:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def tend_until(self, stop: threading.Event) -> None:
        """Keep everything running, until `stop` is set: whatever dies is started again."""
        while not stop.wait(_TICK_SECONDS):
            self._guardian.check()
            for service in self._services.values():
                service.tend(self._guardian, self._say)
            for child in self._children:
                child.tend(self._guardian, self._say)

    def _start(self) -> None:
        lock = lock_folder(self._wanted.data, self._say, self._stop)
        self._stack.callback(os.close, lock)
        # all that a person may have got wrong is told before anything is started
        settings = self._load({"database_url": "postgresql:///embedded", "redis_url": "redis://embedded"})
        self._models = choose_models(
            load_catalogue(settings.catalogue), settings, self._wanted.models or settings.served_models
        )
        _check_address(*settings.listen_address)
        open_storage(settings).check()
        self._guardian = Guardian(lock, settings.grace_seconds + _PATIENCE)
        self._stack.callback(self._guardian.close)
        self._stack.callback(self._drop_services)  # runs when the services have ended
        self._settings = self._load(self._start_services())
        self._check_stop()
        self._write_files()
        self._check_stop()
        self._start_children()
        self._await_ready()

    def _load(self, services: Mapping[str, str]) -> Settings:
        """The settings, with the URLs of our own services where the environment names none."""
        found = {name: url for name, url in services.items() if not self._wanted.given(name.upper())}
        if not self._wanted.given("STORAGE_URL"):
            objects = self._wanted.data.resolve() / "objects"
            objects.mkdir(mode=0o700, exist_ok=True)
            found["storage_url"] = objects.as_uri()
        if self._wanted.listen:
            found["listen"] = self._wanted.listen
        return load_settings(**found)

    def _start_services(self) -> dict[str, str]:
        urls = {}
        folder = self._wanted.data
        if not self._wanted.given("DATABASE_URL"):
            postgres = self._stack.enter_context(EmbeddedPostgres(folder / "postgres"))
            # SIGINT is PostgreSQL's word for: end now, but properly
            self._add_service("PostgreSQL", postgres, _POSTGRES, signal.SIGINT)
            urls["database_url"] = postgres.url
            self._check_stop()
        if not self._wanted.given("REDIS_URL"):
            redis = self._stack.enter_context(EmbeddedRedis(folder / "redis"))
            self._add_service("Redis", redis, _REDIS, signal.SIGTERM)
            urls["redis_url"] = redis.url
        return urls

    def _add_service(
        self, name: str, server: EmbeddedPostgres | EmbeddedRedis, stage: int, ending: signal.Signals
    ) -> None:
        self._services[name] = _Service(name, server, stage, ending)
        self._services[name].introduce(self._guardian)

    def _write_files(self) -> None:
        """Migrate, make the tenant and its key once, and leave the files by which others find the farm."""
        data = self._wanted.data
        engine = open_engine(self._settings, "imagefarm up", pool_size=1)
        try:
            schema.upgrade(engine)
            known = _known_address(data)
            with transaction(engine) as connection:
                key = known.api_key if known else ""
                identity = tenants.authenticate(connection, key)
                if identity is None or not identity.operator:
                    tenant_id = tenants.ensure_tenant(connection, TENANT)
                    key = tenants.create_key(connection, tenant_id, "imagefarm up", operator=True)
        finally:
            engine.dispose()
        write_client_file(data, self.url, key)
        self._stack.callback(write_join_file(data, self._settings).unlink, missing_ok=True)

    def _start_children(self) -> None:
        logs = self._wanted.data / "logs"
        logs.mkdir(mode=0o700, exist_ok=True)
        plain = python_environment(child_environment(self._settings))

        def add(name: str, command: list[str], environment: dict[str, str], stage: int, patience: float) -> None:
            child = Child(name, command, environment, logs / f"{name}.log", stage, patience)
            self._children.append(child)
            child.start(self._guardian)

        add("api", api_command(), plain, _SERVING, _PATIENCE)
        add("keeper", keeper_command(), plain, _KEEPER, _PATIENCE)
        gpus = gpu_count()
        grace = self._settings.grace_seconds + _PATIENCE
        for number in range(self._wanted.workers):
            name = f"worker-{number + 1}"
            gpu = number % gpus if gpus > 1 and self._wanted.workers > 1 else None
            environment = python_environment(worker_environment(self._settings, self._models, gpu))
            add(name, worker_command(self._models, name), environment, _SERVING, grace)

    def _await_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        reason = "no answer"
        with requests.Session() as session:
            session.trust_env = False  # a proxy has no part in reaching this machine
            while time.monotonic() < deadline:
                self._check_stop()
                for child in self._children:
                    if not child.running:
                        raise FarmError(f"the {child.name} {child.obituary()}:\n{child.tail()}")
                try:
                    answer = session.get(f"{self.url}/readyz", timeout=5)
                    if answer.status_code == 200:
                        return
                    reason = answer.text[:500]
                except requests.RequestException:
                    pass
                self._stop.wait(0.05)
        raise FarmError(f"the API was not ready after {_READY_SECONDS:.0f} s: {reason}\n{self._children[0].tail()}")

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt

    def _end(self) -> None:
        """End everything in order, however far the start had come. What hangs is killed when its time is up."""
        for stage in sorted({child.stage for child in self._children}):
            ending = [child for child in self._children if child.stage == stage]
            for child in ending:
                child.ask_to_end()
            for child in ending:
                child.end(self._guardian, self._hurry.is_set)
        self._stack.close()

    def _drop_services(self) -> None:
        for service in self._services.values():
            service.leave(self._guardian)


class _Service:
    """An embedded server under supervision."""

    def __init__(self, name: str, server: EmbeddedPostgres | EmbeddedRedis, stage: int, ending: signal.Signals) -> None:
        self._name = name
        self._server = server
        self._stage = stage
        self._ending = ending
        self._pid = 0
        self._next_try = 0.0

    def introduce(self, guardian: Guardian) -> None:
        self._pid = self._server.pid
        guardian.add(self._pid, self._stage, self._ending)

    def leave(self, guardian: Guardian) -> None:
        guardian.drop(self._pid)

    def tend(self, guardian: Guardian, say: Callable[[str], None]) -> None:
        """Start it again if it has died. Until it answers, the farm's processes wait and try again."""
        if self._server.alive or time.monotonic() < self._next_try:
            return
        guardian.drop(self._pid)
        say(f"{self._name} has died; starting it again")
        try:
            self._server.start()
            self.introduce(guardian)
        except (EmbeddedError, OSError) as error:
            # right after a crash it may have to wait for its own old processes
            say(f"{self._name} does not start yet: {error}")
            self._next_try = time.monotonic() + _RESTART_PAUSE


def _known_address(data: Path) -> Address | None:
    """What an earlier start left; a file that is damaged is written anew."""
    try:
        return read_client_file(data)
    except SettingsError:
        return None


def _check_address(host: str, port: int) -> None:
    """Raise `FarmError` where the API could not listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FarmError(
                f"cannot listen on {host}:{port} ({error.strerror or error}): choose another address, "
                f"such as --listen 127.0.0.1:{port + 1 if 1024 <= port < 65535 else 8001}"
            ) from None
