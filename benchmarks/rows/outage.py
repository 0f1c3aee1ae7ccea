"""outage: the farm while Redis is frozen or dead: rendering rate against the normal one, submits, and waking up.

Rendering sleeps, as in `e`, so the rate tells whether workers wait for Redis and no processor's power. Windows with a
running and a frozen Redis take turns on one long batch. Submits are timed at the client, one after the other, while
Redis is frozen (connections hang) and while it is dead (connections are refused). For the time to wake up, a worker
that does not linger waits for a bell, Redis dies, a job is submitted, and Redis comes back, empty.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import text

from benchmarks.farm import RunningFarm, running_farm
from benchmarks.measure import Row, interleave, median, percentile
from imagefarm.embedded import EmbeddedRedis
from shared.database import transaction

REPEATS = 5
WINDOW_SECONDS = 8.0
SUBMITS = 100
#: one image takes as long as a few steps on a GPU would
PARAMETERS = {"width": 8, "height": 8, "num_inference_steps": 4, "step_image_seconds": 0.01}
WAKES = 3

_DONE = text("SELECT count(*) FROM attempt WHERE outcome = 'succeeded'")


def measure() -> Row:
    """Images per second with a frozen Redis; ratio = that ÷ the rate with a running one."""
    with tempfile.TemporaryDirectory(prefix="imagefarm-bench-") as folder, EmbeddedRedis(Path(folder)) as redis:
        with running_farm("fake", redis=redis) as farm:
            whole = farm.client.submit(["x"] * 100_000, model="fake", parameters=PARAMETERS, priority="low")
            _wait(lambda: farm.client.batch(whole.id).succeeded > 100)
            samples = interleave({"running": lambda: _rate(farm), "frozen": lambda: _frozen(farm, redis)}, REPEATS)
            samples["submit_ms_frozen"] = _while_frozen(redis, lambda: _submits(farm))
            os.kill(redis.pid, signal.SIGKILL)
            samples["submit_ms_dead"] = _submits(farm)
            redis.start()
            whole.cancel()
        samples["wake_seconds"] = [_wake() for _ in range(WAKES)]
    value, baseline = median(samples["frozen"]), median(samples["running"])
    return Row(
        id="outage",
        title="rendering while Redis is frozen",
        value=value,
        unit="images/s",
        baseline=baseline,
        ratio=value / baseline,
        samples=samples,
        extra={
            "submit_p99_ms_frozen": percentile(samples["submit_ms_frozen"], 99),
            "submit_p99_ms_dead": percentile(samples["submit_ms_dead"], 99),
            "longest_wake_seconds": max(samples["wake_seconds"]),
        },
    )


def _rate(farm: RunningFarm) -> float:
    """Images per second over one window."""

    def done() -> int:
        with transaction(farm.services.engine) as connection:
            return int(connection.execute(_DONE).scalar_one())

    before, began = done(), time.monotonic()
    time.sleep(WINDOW_SECONDS)
    return (done() - before) / (time.monotonic() - began)


def _frozen(farm: RunningFarm, redis: EmbeddedRedis) -> float:
    return _while_frozen(redis, lambda: [_rate(farm)])[0]


def _while_frozen(redis: EmbeddedRedis, work: Callable[[], list[float]]) -> list[float]:
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        return work()
    finally:
        os.kill(redis.pid, signal.SIGCONT)


def _submits(farm: RunningFarm) -> list[float]:
    """Milliseconds of each of some submits; every one must be accepted."""
    taken = []
    for _ in range(SUBMITS):
        began = time.perf_counter()
        farm.client.submit("x", model="fake", parameters=PARAMETERS, priority="low")
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def _wake() -> float:
    """Seconds from the return of Redis to the image of a job that was submitted without it."""
    with (
        tempfile.TemporaryDirectory(prefix="imagefarm-bench-") as folder,
        EmbeddedRedis(Path(folder)) as redis,
        running_farm("fake", redis=redis, linger_seconds=0.1) as farm,
    ):
        time.sleep(8.0)  # the bells of the warm-up have been answered
        os.kill(redis.pid, signal.SIGKILL)
        batch = farm.client.submit("x", model="fake")
        time.sleep(10.0)
        if farm.client.batch(batch.id).succeeded:
            raise RuntimeError("the worker did not wait for a bell")
        redis.start()
        began = time.monotonic()
        batch.wait(timeout=120)
        return time.monotonic() - began


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not until():
        if time.monotonic() > deadline:
            raise RuntimeError("the farm does not render")
        time.sleep(0.1)
