"""f: CPU time of our processes for one image of a zero-cost engine, against one no-op Celery task for each image.

The farm's figure holds everything from the POST to the recorded, stored PNG (API, keeper, worker, Celery included);
the baseline's holds `.delay()` and a Celery worker that does nothing. The baseline stores nothing, so the farm's images
go to a RAM disk; `on_disk_ms` is the farm's figure with the two fsyncs an image on this machine's disk. `servers_ms` is
what PostgreSQL and Redis used beside.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from benchmarks.farm import RunningFarm, running_farm, servers_cpu_seconds
from benchmarks.measure import Row, cpu_seconds, interleave, median
from benchmarks.noop_task import KEY_PREFIX, app, noop
from shared.queue import broker_url, redis_client
from shared.settings import PROJECT_ROOT

COUNT = 5_000
_RAM_DISK = Path("/dev/shm")
REPEATS = 5


def measure() -> Row:
    """CPU milliseconds an image; ratio = Celery task ÷ farm."""
    with ExitStack() as stack:
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_RAM_DISK if _RAM_DISK.is_dir() else None)))
        farm = stack.enter_context(running_farm("fake", objects=memory / "objects"))
        on_disk = stack.enter_context(running_farm("fake"))
        celery_pid = stack.enter_context(_noop_worker(broker_url(farm.services.settings)))
        figures: dict[str, list[float]] = {"images_per_second": [], "servers_ms": [], "servers_ms_celery": []}

        def through(farm: RunningFarm) -> float:
            before, beside, started = cpu_seconds(*farm.pids), servers_cpu_seconds(), time.perf_counter()
            batch = farm.client.submit(["x"] * COUNT, model="fake", parameters={"width": 8, "height": 8})
            if batch.wait(timeout=300).succeeded != COUNT:
                raise RuntimeError("jobs failed")
            if farm is not on_disk:
                figures["images_per_second"].append(COUNT / (time.perf_counter() - started))
                figures["servers_ms"].append((servers_cpu_seconds() - beside) / COUNT * 1000)
            return (cpu_seconds(*farm.pids) - before) / COUNT * 1000

        def by_celery() -> float:
            client = redis_client(farm.services.settings, timeout_seconds=10)
            before, beside = cpu_seconds(celery_pid) + _own_seconds(), servers_cpu_seconds()
            for index in range(COUNT):
                noop.delay(f"prompt {index}")
            while client.llen(f"{KEY_PREFIX}celery") or client.hlen(f"{KEY_PREFIX}unacked"):
                time.sleep(0.05)
            figures["servers_ms_celery"].append((servers_cpu_seconds() - beside) / COUNT * 1000)
            return (cpu_seconds(celery_pid) + _own_seconds() - before) / COUNT * 1000

        sides = {"farm": lambda: through(farm), "celery": by_celery, "on_disk": lambda: through(on_disk)}
        samples = interleave(sides, REPEATS)
    farm_ms, celery_ms = median(samples["farm"]), median(samples["celery"])
    return Row(
        id="f",
        title=f"CPU per image, {COUNT:,} images of a zero-cost engine",
        value=farm_ms,
        unit="ms",
        baseline=celery_ms,
        ratio=celery_ms / farm_ms,
        samples=samples,
        extra={"on_disk_ms": median(samples["on_disk"])} | {name: median(values) for name, values in figures.items()},
    )


def _own_seconds() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


@contextmanager
def _noop_worker(broker: str) -> Iterator[int]:
    app.conf.broker_url = broker
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.noop_task", "-b", broker, "worker", "-c", "1"]
    process = subprocess.Popen(
        [*command, "-l", "ERROR", "--without-gossip", "--without-mingle", "--without-heartbeat"],
        cwd=PROJECT_ROOT,
        env={**os.environ, "C_FORCE_ROOT": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        time.sleep(5)
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)
