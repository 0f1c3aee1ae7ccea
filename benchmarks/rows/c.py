"""c: submit 100,000 prompts over HTTP, durable, against raw COPY of the same rows and Celery `.delay()` per prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import text

from benchmarks.farm import RunningFarm, running_farm
from benchmarks.measure import Row, interleave, median, resident_megabytes
from benchmarks.noop_task import KEY_PREFIX, app, noop
from shared.queue import broker_url, redis_client

COUNT = 100_000
DELAYED = 5_000
REPEATS = 5
PROMPTS = [f"a large red circle on a blue background, variation {index}" for index in range(COUNT)]
_COLUMNS = "batch_id, idx, tenant_id, model, priority, vt, batch_key, prompt, seed, overrides"


def measure() -> Row:
    """Prompts per second; ratio = farm ÷ COPY, `vs_delay` = farm ÷ `.delay()`."""
    with running_farm() as farm:
        farm.client.submit(PROMPTS[:1000], model="fake")  # warm up
        app.conf.broker_url = broker_url(farm.services.settings)
        noop.delay("warm up")
        megabytes: list[float] = []

        def over_http() -> float:
            started = time.perf_counter()
            farm.client.submit(PROMPTS, model="fake")
            seconds = time.perf_counter() - started
            megabytes.append(resident_megabytes(farm.api))
            return COUNT / seconds

        def by_delay() -> float:
            started = time.perf_counter()
            for prompt in PROMPTS[:DELAYED]:
                noop.delay(prompt)
            return DELAYED / (time.perf_counter() - started)

        sides = {"farm": over_http, "copy": lambda: _copy(farm), "delay": by_delay}
        samples = interleave(sides, REPEATS)
        redis_client(farm.services.settings, timeout_seconds=10).delete(f"{KEY_PREFIX}celery")
    farm_rate, copy_rate, delay_rate = (median(samples[name]) for name in sides)
    return Row(
        id="c",
        title=f"submit {COUNT:,} prompts over HTTP",
        value=farm_rate,
        unit="prompts/s",
        baseline=copy_rate,
        ratio=farm_rate / copy_rate,
        samples=samples,
        extra={
            "seconds": COUNT / farm_rate,
            "vs_delay": farm_rate / delay_rate,
            "delay_per_second": delay_rate,
            "api_rss_mb": max(megabytes),
        },
    )


def _copy(farm: RunningFarm) -> float:
    """Rows per second of a bare COPY of the last batch's rows into the same table, read into memory beforehand."""
    with farm.services.engine.begin() as connection:
        connection.execute(text("SET LOCAL statement_timeout = '10min'"))
        source = connection.execute(text("SELECT max(id) FROM batch")).scalar_one()
        target = connection.execute(
            text(
                "INSERT INTO batch (public_id, tenant_id, model, priority, parameters, job_count)"
                " SELECT gen_random_uuid(), tenant_id, model, priority, parameters, job_count FROM batch"
                " WHERE id = :source RETURNING id"
            ),
            {"source": source},
        ).scalar_one()
        columns = _COLUMNS.replace("batch_id", str(target), 1)
        blocks = list(_read(connection, f"COPY (SELECT {columns} FROM job WHERE batch_id = {source}) TO STDOUT"))
    with farm.services.engine.connect() as connection:
        started = time.perf_counter()
        connection.execute(text("SET statement_timeout = '10min'"))
        driver: Any = connection.connection.driver_connection
        with driver.cursor() as cursor, cursor.copy(f"COPY job ({_COLUMNS}) FROM STDIN") as copy:
            for block in blocks:
                copy.write(block)
        connection.commit()
        return COUNT / (time.perf_counter() - started)


def _read(connection: Any, statement: str) -> Iterator[bytes]:
    """The answer of a COPY TO in blocks of about 64 KiB."""
    driver: Any = connection.connection.driver_connection
    pending = bytearray()
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        for piece in copy:
            pending += piece
            if len(pending) > 65536:
                yield bytes(pending)
                pending.clear()
    yield bytes(pending)
