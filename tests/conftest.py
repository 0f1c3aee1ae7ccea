"""Real parts for the tests: services from `DATABASE_URL` and `REDIS_URL`, or embedded ones where these are not set.

One database for each test worker is cloned from a migrated template and emptied after each test that used it, because
`SKIP LOCKED` needs real commits. In CI a missing part is a failure; on a laptop it is a skip with its reason.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import redis
from sqlalchemy import Table, create_engine, make_url, text

from imagefarm.embedded import EmbeddedPostgres, EmbeddedRedis
from shared import schema, tenants
from shared.database import open_engine, transaction
from shared.models import Base
from shared.queue import redis_client
from shared.services import Services, open_services
from shared.settings import Settings, load_settings
from shared.tenants import TenantIdentity

IN_CI = os.environ.get("CI") == "true"


def missing(reason: str) -> NoReturn:
    """A real part is not here: skip on a laptop, fail in CI."""
    if IN_CI:
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def _own_environment() -> Iterator[None]:
    """Settings come from fixtures, never from the shell that runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("IMAGEFARM_") or name in {"DATABASE_URL", "REDIS_URL", "STORAGE_URL"}:
                patch.setenv(f"OUTER_{name}", os.environ[name])
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def postgres_url(_own_environment: None) -> Iterator[str]:
    """A PostgreSQL server where databases may be made."""
    if given := os.environ.get("OUTER_DATABASE_URL"):
        yield given
        return
    # not in pytest's folder: pytest closes that to others, while the server runs as a user of its own where we are root
    with (
        tempfile.TemporaryDirectory(prefix="imagefarm-tests-") as folder,
        EmbeddedPostgres(Path(folder) / "data") as server,
    ):
        yield server.url


@pytest.fixture(scope="session")
def redis_url(_own_environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of our own; a server given by URL is used through its highest databases, by test worker."""
    if given := os.environ.get("OUTER_REDIS_URL"):
        worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
        yield f"{given.rstrip('/').rsplit('/', 1)[0] if given.count('/') > 2 else given.rstrip('/')}/{15 - int(worker)}"
        return
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


def server_command(postgres_url: str, *commands: str) -> None:
    """Run commands that PostgreSQL allows outside a transaction only, such as CREATE DATABASE."""
    url = make_url(postgres_url).set(drivername="postgresql+psycopg")
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            for command in commands:
                connection.execute(text(command))
    finally:
        engine.dispose()


@pytest.fixture(scope="session")
def empty_database_url(postgres_url: str) -> Iterator[str]:
    """A database without tables, dropped at the end."""
    name = f"imagefarm_test_{uuid.uuid4().hex[:12]}"
    server_command(postgres_url, f"CREATE DATABASE {name}")
    yield make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    server_command(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def migrated_database_url(empty_database_url: str, redis_url: str) -> str:
    """This test worker's database, at the head revision."""
    engine = open_engine(settings_for(empty_database_url, redis_url, "file:///nowhere"), "tests")
    schema.upgrade(engine)
    engine.dispose()
    return empty_database_url


def settings_for(database_url: str, redis_url: str, storage_url: str, **overrides: object) -> Settings:
    """Settings for tests: as in production, with short waits."""
    return load_settings(
        **{
            "database_url": database_url,
            "redis_url": redis_url,
            "storage_url": storage_url,
            "linger_poll_seconds": 0.05,
            "cancel_poll_seconds": 0.1,
            "keeper_seconds": 0.5,
            **overrides,
        }
    )


def _empty(database_url: str) -> None:
    """Remove every row and begin ids at 1 again. Of small tables, DELETE is ten times faster than TRUNCATE."""
    tables = list(reversed(Base.metadata.sorted_tables))
    commands = [f"DELETE FROM {table.name}" for table in tables]
    commands += [f"ALTER TABLE {table.name} ALTER COLUMN id RESTART" for table in tables if _numbered(table)]
    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.execute(text("; ".join(commands)))
    engine.dispose()


def _numbered(table: Table) -> bool:
    return "id" in table.columns and table.columns["id"].identity is not None


@pytest.fixture
def settings(migrated_database_url: str, redis_url: str, tmp_path: Path) -> Iterator[Settings]:
    """Settings whose database and Redis are empty when the test begins."""
    yield settings_for(migrated_database_url, redis_url, f"file://{tmp_path / 'objects'}")
    _empty(migrated_database_url)
    client = redis.Redis.from_url(redis_url)
    client.flushdb()
    client.close()


@pytest.fixture
def services(settings: Settings) -> Iterator[Services]:
    """The parts of a farm process over the test's own database, Redis and storage folder."""
    opened = open_services("tests", settings)
    yield opened
    opened.engine.dispose()


@pytest.fixture
def tenant(services: Services) -> TenantIdentity:
    """A tenant with weight 1."""
    with transaction(services.engine) as connection:
        return TenantIdentity(tenants.ensure_tenant(connection, "local"), "local", 1.0)


@pytest.fixture
def api_key(services: Services, tenant: TenantIdentity) -> str:
    """A key of the tenant, in clear."""
    with transaction(services.engine) as connection:
        return tenants.create_key(connection, tenant.id, "tests")


@pytest.fixture
def bells(settings: Settings) -> Iterator[redis.Redis]:
    """The Redis that carries the bells, to look at or to break."""
    client = redis_client(settings, timeout_seconds=5)
    yield client
    client.close()
