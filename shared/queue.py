"""The bell: a Celery message that says "there may be work for model M" and carries no job.

It may be lost, doubled or late without harm; the keeper rings again. It is pushed to Redis directly, in the format
that Celery workers read (message protocol 2 over kombu's Redis transport), because publishing through Celery blocks
for seconds on an unreachable broker, and a submit must never wait for a bell.
"""

from __future__ import annotations

import base64
import json
import logging
import time
import uuid
from collections.abc import Iterable
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.settings import Settings

logger = logging.getLogger(__name__)

#: the one Celery task of the farm
DRAIN_TASK = "imagefarm.drain"
#: bells that may wait for one model at a time; a worker that wakes to a full queue rings on, so few suffice for many
MAX_BELLS = 8

_TIMEOUT_SECONDS = 0.25
#: how long a failure keeps us from trying again, so that a dead Redis costs one time-out, not one a submit
_BREAKER_SECONDS = 5.0


def queue_name(model: str) -> str:
    """The Celery queue (a Redis list) of a model's bells."""
    return f"imagefarm.{model}"


def broker_url(settings: Settings) -> str:
    """`REDIS_URL` as Celery spells it (a unix socket is `redis+socket://` there)."""
    url = settings.redis_url.get_secret_value()
    if urlsplit(url).scheme == "unix":
        return "redis+socket" + url.removeprefix("unix")
    return url


def redis_client(settings: Settings, timeout_seconds: float = _TIMEOUT_SECONDS) -> redis.Redis:
    """A client that gives up soon and never retries by itself."""
    url = settings.redis_url.get_secret_value()
    if urlsplit(url).scheme == "redis+socket":
        url = "unix" + url.removeprefix("redis+socket")
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        retry=Retry(NoBackoff(), 0),
    )


def drain_message(model: str) -> bytes:
    """The message by which Celery calls `drain(model)`."""
    task_id, queue = str(uuid.uuid4()), queue_name(model)
    body = json.dumps([[model], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    envelope = {
        "body": base64.b64encode(body.encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py",
            "task": DRAIN_TASK,
            "id": task_id,
            "root_id": task_id,
            "parent_id": None,
            "group": None,
            "retries": 0,
            "eta": None,
            "expires": None,
            "timelimit": [None, None],
            "argsrepr": repr((model,)),
            "kwargsrepr": "{}",
            "origin": "imagefarm",
            "ignore_result": True,
        },
        "properties": {
            "correlation_id": task_id,
            "reply_to": "",
            "delivery_mode": 1,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }
    return json.dumps(envelope).encode()


class Bell:
    """Rings for models. Never raises, never blocks for more than a fraction of a second."""

    def __init__(self, settings: Settings) -> None:
        self._redis = redis_client(settings)
        self._silent_until = 0.0

    def ring(self, models: Iterable[str], wanted: int = MAX_BELLS) -> bool:
        """Bring the waiting bells of each model up to `wanted`. False where Redis could not be reached."""
        if time.monotonic() < self._silent_until:
            return False
        try:
            for model in models:
                waiting = int(self._redis.llen(queue_name(model)))
                missing = min(wanted, MAX_BELLS) - waiting
                if missing > 0:
                    self._redis.lpush(queue_name(model), *(drain_message(model) for _ in range(missing)))
        except redis.RedisError as error:
            self._silent_until = time.monotonic() + _BREAKER_SECONDS
            logger.warning("bell not rung (the keeper will): %s", error)
            return False
        return True
