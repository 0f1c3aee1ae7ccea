"""Migrations: up from nothing, down to nothing, equal to the models, and one process at a time."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, inspect, make_url, text

from shared import schema
from shared.database import open_engine
from shared.errors import FarmError, Unavailable
from shared.models import Base
from tests.conftest import server_command, settings_for


@pytest.fixture
def empty_engine(postgres_url: str, redis_url: str) -> Iterator[Engine]:
    """A database of its own without tables."""
    name = f"imagefarm_schema_{uuid.uuid4().hex[:12]}"
    server_command(postgres_url, f"CREATE DATABASE {name}")
    url = make_url(postgres_url).set(database=name).render_as_string(hide_password=False)
    engine = open_engine(settings_for(url, redis_url, "file:///nowhere"), "tests")
    yield engine
    engine.dispose()
    server_command(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


def test_up_from_nothing_and_down_to_nothing(empty_engine: Engine) -> None:
    assert schema.current_revision(empty_engine) is None
    assert schema.upgrade(empty_engine) == schema.head_revision()
    assert {"tenant", "batch", "job", "attempt", "worker"} <= set(inspect(empty_engine).get_table_names())
    assert schema.upgrade(empty_engine) == schema.head_revision(), "a second time changes nothing"
    assert schema.downgrade(empty_engine, "base") is None
    assert set(inspect(empty_engine).get_table_names()) <= {"alembic_version"}


def test_a_revision_that_there_is_not_is_told(empty_engine: Engine) -> None:
    with pytest.raises(FarmError, match="nope"):
        schema.upgrade(empty_engine, "nope")


def test_the_migrations_make_what_the_models_say(empty_engine: Engine) -> None:
    schema.upgrade(empty_engine)
    with empty_engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_checks_and_partial_indexes_equal_the_models_too(empty_engine: Engine) -> None:
    """Alembic does not compare these, so the definitions of both ways are read back from PostgreSQL."""
    look = text(
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'public'::regnamespace AND conrelid::regclass::text <> 'alembic_version'"
        " UNION ALL SELECT tablename, indexname, indexdef FROM pg_indexes"
        " WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
        " UNION ALL SELECT relname, 'options', reloptions::text FROM pg_class WHERE reloptions IS NOT NULL"
    )
    schema.upgrade(empty_engine)
    with empty_engine.connect() as connection:
        migrated = {tuple(row) for row in connection.execute(look)}
    schema.downgrade(empty_engine, "base")
    with empty_engine.begin() as connection:
        Base.metadata.create_all(connection)
        modelled = {tuple(row) for row in connection.execute(look)}
    assert migrated == modelled


def test_processes_that_migrate_at_once_take_turns(empty_engine: Engine) -> None:
    reached: list[str | None] = []
    threads = [threading.Thread(target=lambda: reached.append(schema.upgrade(empty_engine))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reached == [schema.head_revision()] * 4


def test_a_database_that_is_away_is_said_so(redis_url: str) -> None:
    engine = open_engine(settings_for("postgresql://127.0.0.1:1/x", redis_url, "file:///nowhere"), "tests")
    with pytest.raises(Unavailable):
        schema.upgrade(engine)


def test_old_processes_live_on_the_new_schema(empty_engine: Engine) -> None:
    """A rolling upgrade migrates first: what older versions read is still there, what they do not write is optional."""

    def columns() -> dict[tuple[str, str], bool]:
        """Whether a row can do without it, by table and column."""
        look = text(
            "SELECT table_name, column_name, is_nullable = 'YES' OR column_default IS NOT NULL OR is_identity = 'YES'"
            " FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'alembic_version'"
        )
        with empty_engine.connect() as connection:
            return {(table, column): optional for table, column, optional in connection.execute(look)}

    revisions = [script.revision for script in schema.revisions()]
    schema.upgrade(empty_engine, revisions[0])
    for revision in revisions[1:]:
        before = columns()
        schema.upgrade(empty_engine, revision)
        after = columns()
        assert before.keys() <= after.keys(), f"{revision} takes away what older processes use"
        tables = {table for table, _ in before}
        added = {key: optional for key, optional in after.items() if key not in before and key[0] in tables}
        assert all(added.values()), f"{revision} asks older processes for what they do not know"
