"""fair: claims until small tenants are done that arrive behind somebody's 100,000 jobs, against the ideal and FIFO.

A whale has submitted 100,000 jobs and 500 of them were claimed when 20 tenants with 20 jobs each and one of weight 3
with 60 arrive. The ideal is the number of their own jobs: as if the whale were not there. The whale may have its share
too, one claim in each round, which is why a fair queue cannot reach 1. FIFO is counted and not run: with it, the last
small job is claimed after everything that was submitted before it.
`pass_of_8_…`: jobs claimed until then when passes of eight are claimed and the whale's jobs share none with the others.
"""

from __future__ import annotations

from sqlalchemy import text

from benchmarks.claims import Claims, fill, tenant
from benchmarks.farm import bare_services
from benchmarks.measure import Row, interleave, median
from shared.database import transaction
from shared.services import Services

REPEATS = 5
WHALE, SERVED = 100_000, 500
SMALL, SMALL_JOBS = 20, 20
HEAVY_WEIGHT, HEAVY_JOBS = 3.0, 60
IDEAL = SMALL * SMALL_JOBS + HEAVY_JOBS


def measure() -> Row:
    """Claims until the last small job; ratio = that ÷ the ideal."""
    fifo: list[float] = []

    def alone() -> float:
        claimed, ahead = _until_the_small_are_done(limit=1, width=64)
        fifo.append(ahead)
        return claimed

    samples = interleave(
        {"farm": alone, "pass_of_8": lambda: _until_the_small_are_done(limit=8, width=128)[0]}, REPEATS
    )
    samples["fifo"] = fifo
    value = median(samples["farm"])
    return Row(
        id="fair",
        title=f"claims until {SMALL + 1} small tenants behind {WHALE:,} jobs are done",
        value=value,
        unit="claims",
        baseline=IDEAL,
        ratio=value / IDEAL,
        samples=samples,
        extra={
            "fifo_claims": median(fifo),
            "fifo_ratio": median(fifo) / IDEAL,
            "pass_of_8_jobs": median(samples["pass_of_8"]),
            "pass_of_8_ratio": median(samples["pass_of_8"]) / IDEAL,
        },
    )


def _until_the_small_are_done(limit: int, width: int) -> tuple[int, int]:
    """Jobs claimed until then, `limit` at a time, and how many FIFO would have. The whale's are `width` wide."""
    with bare_services() as services:
        whale = tenant(services, "whale")
        fill(services, whale, WHALE, width=width, height=8)
        before = Claims()
        while len(before.ids) < SERVED:
            before.claim(services, limit)
        small = [tenant(services, f"small {number}") for number in range(SMALL)]
        for owner in small:
            fill(services, owner, SMALL_JOBS, width=64, height=8)
        heavy = tenant(services, "heavy", HEAVY_WEIGHT)
        fill(services, heavy, HEAVY_JOBS, width=64, height=8)
        ahead = _queued(services)
        waiting = {owner.id: SMALL_JOBS for owner in small} | {heavy.id: HEAVY_JOBS}
        claimed = 0
        while any(waiting.values()):
            for job in Claims().claim(services, limit):
                claimed += 1
                if job.tenant_id != whale.id:
                    waiting[job.tenant_id] -= 1
        return claimed, ahead


def _queued(services: Services) -> int:
    with transaction(services.engine) as connection:
        return int(connection.execute(text("SELECT count(*) FROM job WHERE state = 'queued'")).scalar_one())
