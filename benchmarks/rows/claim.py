"""claim: one claim at 1,000,000 queued rows against one at 10,000; 64 claimers at once; an old transaction held open.

`value`, `baseline` and `ratio` speak of the claiming statement; `…_commit_…` has the commit too, which waits for the
disk. `naive` is the claim that everybody writes first: oldest row first, with an index on the state only. `held` are
claims while an idle REPEATABLE READ transaction, such as a dump, keeps PostgreSQL from cleaning up behind the head of
the queue; `held_…_without_…` are claims without the executor's floor, in turn with them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from sqlalchemy import text

from benchmarks.claims import Claims, fill, settle, tenant
from benchmarks.farm import bare_services
from benchmarks.measure import Row, interleave, median
from shared.database import transaction
from shared.services import Services
from worker.floors import Floors

LARGE, SMALL = 1_000_000, 10_000
REPEATS = 5
CLAIMS = 200
NAIVE_CLAIMS = 3
CLAIMERS = 64
CROWD_SECONDS = 20.0
HELD_CLAIMERS = 4
SLICE_SECONDS = 5.0
#: claims of a slice without the floor, and of eight jobs, the size of a pass
ASIDE = 20

_NAIVE = """
CREATE TABLE naive_job AS
SELECT id, 'queued'::text AS state, clock_timestamp() AS created_at, prompt, NULL::text AS claimed_by FROM job;
ALTER TABLE naive_job ADD PRIMARY KEY (id);
CREATE INDEX ON naive_job (state);
ANALYZE naive_job
"""

_NAIVE_CLAIM = text("""
UPDATE naive_job SET state = 'running', claimed_by = 'benchmark' WHERE id = (
    SELECT id FROM naive_job WHERE state = 'queued' ORDER BY created_at LIMIT 1 FOR UPDATE SKIP LOCKED)
""")


def measure(held_seconds: float = 60.0) -> Row:
    """Milliseconds of a claim; ratio = at 1,000,000 ÷ at 10,000. `held_seconds`: how long the old transaction lives."""
    with ExitStack() as stack:
        large = stack.enter_context(_queue(LARGE))
        small = stack.enter_context(_queue(SMALL))
        alone = {"large": Claims(), "small": Claims(), "pass_of_8": Claims()}

        def claims(name: str, services: Services, limit: int = 1) -> float:
            these = Claims()
            for _ in range(CLAIMS):
                these.claim(services, limit)
            alone[name].add(these)
            return median(these.statement_ms)

        samples = interleave(
            {
                "large": lambda: claims("large", large),
                "small": lambda: claims("small", small),
                "pass_of_8": lambda: claims("pass_of_8", large, limit=8),
                "naive": lambda: _naive(large),
            },
            REPEATS,
        )
        crowd = _crowd(large, CLAIMERS, CROWD_SECONDS)
        held, without, passes = _held(large, held_seconds)
    of_large = (alone["large"], alone["pass_of_8"], crowd, held, without, passes)
    claimed = [job for part in of_large for job in part.ids]
    value, baseline = median(samples["large"]), median(samples["small"])
    return Row(
        id="claim",
        title=f"one claim at {LARGE:,} queued rows, against {SMALL:,}",
        value=value,
        unit="ms",
        baseline=baseline,
        ratio=value / baseline,
        samples=samples,
        extra=alone["large"].figures("large")
        | {"naive_ms": median(samples["naive"]), "pass_of_8_ms": median(samples["pass_of_8"])}
        | {"claimers": CLAIMERS, "crowd_claims": len(crowd.ids), "crowd_per_second": len(crowd.ids) / CROWD_SECONDS}
        | {"crowd_duplicates": len(crowd.ids) - len(set(crowd.ids))}
        | crowd.figures("crowd")
        | {"jobs_claimed": len(claimed), "duplicates": len(claimed) - len(set(claimed))}
        | {"held_seconds": held_seconds, "held_claims": len(held.ids)}
        | held.figures("held")
        | without.figures("held_without_floor")
        | passes.figures("held_pass_of_8"),
    )


@contextmanager
def _queue(count: int) -> Iterator[Services]:
    """A database of its own with `count` queued jobs of ten tenants."""
    with bare_services(pool_size=CLAIMERS + 2) as services:
        for number in range(10):
            fill(services, tenant(services, f"tenant {number}"), count // 10)
        with transaction(services.engine) as connection:
            connection.execute(text("SET LOCAL statement_timeout = '10min'"))
            if count == LARGE:
                connection.execute(text(_NAIVE))
        settle(services)
        yield services


def _naive(services: Services) -> float:
    taken = []
    for _ in range(NAIVE_CLAIMS):
        with transaction(services.engine) as connection:
            connection.execute(text("SET LOCAL statement_timeout = '10min'"))
            started = time.perf_counter()
            connection.execute(_NAIVE_CLAIM)
            taken.append((time.perf_counter() - started) * 1000)
    return median(taken)


def _crowd(services: Services, claimers: int, seconds: float) -> Claims:
    """All claim at once, one job at a time, for a while."""
    until = time.monotonic() + seconds
    return _at_once([partial(Claims.claim, services=services)] * claimers, lambda: time.monotonic() >= until)


def _at_once(claimers: list[Callable[[Claims], object]], over: Callable[[], bool]) -> Claims:
    each = [Claims() for _ in claimers]

    def work(claim: Callable[[Claims], object], mine: Claims) -> None:
        while not over():
            claim(mine)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(claimers, each, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = Claims()
    for claims in each:
        together.add(claims)
    return together


def _held(services: Services, seconds: float) -> tuple[Claims, Claims, Claims]:
    """Claims of four workers, flat out, as executors make them; between, a few without the floor, and of passes."""
    held, without, passes = Claims(), Claims(), Claims()
    floors = Floors()
    workers = [partial(Claims.claim, services=services, floors=Floors()) for _ in range(HELD_CLAIMERS)]
    with services.engine.connect().execution_options(isolation_level="REPEATABLE READ") as old:
        old.execute(text("SET idle_in_transaction_session_timeout = 0"))
        old.commit()
        old.execute(text("SELECT count(*) FROM batch"))
        ends = time.monotonic() + seconds
        while (now := time.monotonic()) < ends:
            until = min(ends, now + SLICE_SECONDS)
            held.add(_at_once(workers, lambda until=until: time.monotonic() >= until))
            for _ in range(ASIDE):
                without.claim(services)
                passes.claim(services, limit=8, floors=floors)
        old.rollback()
    return held, without, passes
