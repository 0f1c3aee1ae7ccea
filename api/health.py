"""Whether this process lives, and whether it can do its work."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal

import redis
from flask import Flask, Response

from api.answers import Answer
from api.context import context
from shared import schema
from shared.errors import FarmError, Unavailable
from shared.queue import redis_client

logger = logging.getLogger(__name__)

Condition = Literal["ok", "degraded"]

#: seconds that an answer waits for a look at Redis and the storage, and how long a look stays fresh
_PATIENCE, _FRESH = 0.5, 5.0


class Health(Answer):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Readiness(Answer):
    """The process can take requests. Without Redis or storage it still takes jobs, but idle workers or images wait."""

    status: Literal["ready"] = "ready"
    database: Literal["ok"] = "ok"
    redis: Condition
    storage: Condition


class _Watch:
    """Looks at something beside the requests, so that a black hole there never delays an answer for long."""

    def __init__(self, name: str, look: Callable[[], object]) -> None:
        self._name, self._look = name, look
        self._lock = threading.Lock()
        self._seen = threading.Event()
        self._looked_at = float("-inf")
        self._condition: Condition = "degraded"

    def condition(self) -> Condition:
        with self._lock:
            if time.monotonic() - self._looked_at > _FRESH:
                self._looked_at = float("inf")  # one look at a time
                self._seen.clear()
                threading.Thread(target=self._run, name=f"watch-{self._name}", daemon=True).start()
        return self._condition if self._seen.wait(_PATIENCE) else "degraded"

    def _run(self) -> None:
        try:
            self._look()
            self._condition = "ok"
        except (redis.RedisError, FarmError) as error:
            self._condition = "degraded"
            logger.warning("%s: %s", self._name, error)
        finally:
            self._looked_at = time.monotonic()
            self._seen.set()


def install(app: Flask) -> None:
    """Add `/healthz` and `/readyz`, which need no key."""
    with app.app_context():
        services = context().services
    bells = redis_client(services.settings)
    watches = {
        "redis": _Watch("redis", bells.ping),
        # any key will do: what counts is that there is an answer
        "storage": _Watch("storage", lambda: services.storage.head("_ready")),
    }
    head = schema.head_revision()

    def readyz() -> Response:
        if schema.current_revision(services.engine) != head:
            raise Unavailable("the database has another schema than this version needs: run the migrations")
        return Readiness(**{name: watch.condition() for name, watch in watches.items()}).response()

    app.add_url_rule("/healthz", "healthz", lambda: Health().response())
    app.add_url_rule("/readyz", "readyz", readyz)
