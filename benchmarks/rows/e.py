"""e: images/s of eight workers, against one worker, on one database.

Everything is real (API, PostgreSQL, Redis, nine Celery workers, stored images) but the rendering, which sleeps: a pass
of four images takes 0.4 s whatever the machine, as a GPU would be busy for so long. What is measured is hence whether
the farm itself (claims, leases, heartbeats, records, storage) lets workers scale, and no processor's power. Two models
stand for the two sides, one with one worker and one with eight, so that both are measured in turn on a farm that stays
up. Each side gets as many jobs as keep its workers busy for the same time.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from sqlalchemy import text

from benchmarks.claims import settle
from benchmarks.farm import RunningFarm, rendering_worker, running_farm
from benchmarks.measure import Row, interleave, median
from shared.database import transaction

REPEATS = 5
WORKERS = 8
PASS_IMAGES = 4
#: passes that each worker renders in one measurement
PASSES = 50
STEPS, STEP_SECONDS = 4, 0.1

_SECONDS = text("""
SELECT extract(epoch FROM max(job.finished_at) - min(batch.created_at))
FROM batch JOIN job ON job.batch_id = batch.id WHERE batch.id = (SELECT max(id) FROM batch)
""")

CATALOGUE = "".join(
    f'[models.{name}]\nbackend = "fake"\nmax_batch = {PASS_IMAGES}\n'
    "limits = { size_multiple = 1, min_size = 1, max_size = 4096 }\n"
    for name in ("one", "many")
)


def measure() -> Row:
    """Images per second; ratio = eight workers ÷ one."""
    with ExitStack() as stack:
        farm = stack.enter_context(running_farm("one", catalogue=CATALOGUE))
        for _ in range(WORKERS):
            stack.enter_context(rendering_worker(farm.folder, farm.services.settings, "many"))
        _await_all(farm, WORKERS + 1)
        farm.warm_up("many")
        settle(farm.services)
        samples = interleave(
            {"eight": lambda: _rate(farm, "many", WORKERS), "one": lambda: _rate(farm, "one", 1)}, REPEATS
        )
    value, baseline = median(samples["eight"]), median(samples["one"])
    return Row(
        id="e",
        title=f"{WORKERS} workers whose passes sleep {STEPS * STEP_SECONDS:.1f} s",
        value=value,
        unit="images/s",
        baseline=baseline,
        ratio=value / baseline,
        samples=samples,
        extra={
            "workers": WORKERS,
            "images_per_worker": PASSES * PASS_IMAGES,
            "ceiling_images_per_second": WORKERS * PASS_IMAGES / (STEPS * STEP_SECONDS),
            "efficiency": value / baseline / WORKERS,
        },
    )


def _rate(farm: RunningFarm, model: str, workers: int) -> float:
    """Images per second from the submit to the last recorded image, on the database's clock.

    Our own polls are too far apart: both sides would be seen to end at the same one.
    """
    parameters = {"width": 8, "height": 8, "num_inference_steps": STEPS, "step_seconds": STEP_SECONDS}
    count = workers * PASSES * PASS_IMAGES
    batch = farm.client.submit(["x"] * count, model=model, parameters=parameters)
    if batch.wait(timeout=300).succeeded != count:
        raise RuntimeError("jobs failed")
    with transaction(farm.services.engine) as connection:
        return count / float(connection.execute(_SECONDS).scalar_one())


def _await_all(farm: RunningFarm, count: int) -> None:
    """Until as many workers have said hello."""
    deadline = time.monotonic() + 120
    while len(farm.client.workers()) < count:
        if time.monotonic() > deadline:
            raise RuntimeError("not all workers came up")
        time.sleep(0.2)
