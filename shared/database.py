"""The connection to PostgreSQL: one engine a process, with limits on everything that could hold others up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from shared.errors import Unavailable
from shared.settings import Settings

# milliseconds; a session idle in a transaction holds back vacuum and with it every claim
_SESSION_LIMITS = "-c statement_timeout=10000 -c lock_timeout=2000 -c idle_in_transaction_session_timeout=15000"

#: deadlock and serialization failure: the same transaction may simply run again
_RETRY_STATES = {"40P01", "40001"}


def open_engine(settings: Settings, application_name: str, pool_size: int = 5) -> Engine:
    """An engine with bounded waits. Nothing is connected yet."""
    url = make_url(settings.database_url.get_secret_value()).set(drivername="postgresql+psycopg")
    return create_engine(
        url,
        pool_size=pool_size,
        max_overflow=5,
        pool_timeout=5,
        pool_pre_ping=True,
        pool_recycle=1800,
        hide_parameters=True,
        connect_args={
            "application_name": application_name,
            "connect_timeout": 3,
            "keepalives_idle": 30,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
            "options": _SESSION_LIMITS,
        },
    )


def is_outage(error: BaseException) -> bool:
    """Whether the database is out of reach (restarting, full, gone) rather than the statement being wrong."""
    # psycopg's own error comes from a COPY, which runs below SQLAlchemy
    return isinstance(error, PoolTimeout | OperationalError | psycopg.OperationalError) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    )


def may_rerun(error: BaseException) -> bool:
    """Whether running the same transaction again is the cure: an outage, a deadlock, a serialization failure."""
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    return state in _RETRY_STATES or is_outage(error)


def storable(text: str) -> str:
    """What PostgreSQL can keep of a text that others wrote: it takes neither NUL nor lone surrogates."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction, committed at the end of the block. Raises `Unavailable` where the database is out of reach."""
    try:
        with engine.begin() as connection:
            yield connection
    except (DBAPIError, PoolTimeout, psycopg.Error) as error:
        if may_rerun(error):
            raise Unavailable("the database is out of reach or busy; try again in a moment") from error
        raise
