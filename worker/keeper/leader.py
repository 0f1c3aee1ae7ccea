"""Which of several keepers works: the one that holds an advisory lock of the database."""

from __future__ import annotations

from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from shared.database import is_outage

#: any constant will do
LEADER_LOCK = 7_236_512_002


class Leader:
    """The lock belongs to one connection; when the process or the connection dies, another keeper gets it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._connection: Connection | None = None

    def leads(self) -> bool:
        """Whether we hold the lock, trying to take it where we do not."""
        try:
            if self._connection is not None:
                self._connection.execute(text("SELECT 1"))
                return True
            connection = self._engine.connect()
            if connection.execute(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": LEADER_LOCK}).scalar_one():
                self._connection = connection
                return True
            connection.close()
        except DBAPIError as error:
            self.resign()
            if not is_outage(error):
                raise
        return False

    def resign(self) -> None:
        """Give the lock away by ending its connection."""
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None
