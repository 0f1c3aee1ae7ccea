"""Brings the database to the schema that this code needs, with Alembic, one process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import Script, ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from shared.database import is_outage, transaction
from shared.errors import FarmError, Unavailable
from shared.settings import PROJECT_ROOT

#: the advisory lock that lets one process migrate while others wait (any constant will do)
MIGRATION_LOCK = 7_236_512_001


def alembic_config(connection: Connection) -> Config:
    """Alembic configured in code; there is no ini file."""
    config = _config()
    config.attributes["connection"] = connection
    return config


def _config() -> Config:
    config = Config()
    # it is read as the text of an ini file, where a percent sign is doubled
    config.set_main_option("script_location", str(PROJECT_ROOT / "migrations").replace("%", "%%"))
    return config


def head_revision() -> str:
    """The revision that this code was written for."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return head


def revisions() -> list[Script]:
    """All revisions, the oldest first."""
    return list(reversed(list(ScriptDirectory.from_config(_config()).walk_revisions())))


def current_revision(engine: Engine) -> str | None:
    """The revision of the database, None where it is empty."""
    with transaction(engine) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def upgrade(engine: Engine, revision: str = "head") -> str | None:
    """Migrate to `revision` under the advisory lock; others wait their turn. Returns the revision reached.

    Raises `FarmError` where there is no such revision, and `Unavailable`.
    """
    with _exclusively(engine) as connection:
        command.upgrade(alembic_config(connection), revision)
    return current_revision(engine)


def downgrade(engine: Engine, revision: str) -> str | None:
    """Migrate back to `revision` (`base` drops everything) under the advisory lock."""
    with _exclusively(engine) as connection:
        command.downgrade(alembic_config(connection), revision)
    return current_revision(engine)


@contextmanager
def _exclusively(engine: Engine) -> Iterator[Connection]:
    try:
        with engine.begin() as connection:
            # a migration may take longer than a request; it still gives up soon where a table is locked
            connection.execute(text("SET LOCAL statement_timeout = '10min'"))
            connection.execute(text("SET LOCAL lock_timeout = '10min'"))
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            connection.execute(text("SET LOCAL lock_timeout = '4s'"))
            yield connection
    except DBAPIError as error:
        if is_outage(error):
            raise Unavailable(f"the database cannot be migrated now: {error.orig}") from error
        raise
    except CommandError as error:
        raise FarmError(f"the database cannot be migrated: {error}") from error
