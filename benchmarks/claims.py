"""Fills and claims queues directly, below the API: what the rows about the queue itself share."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field

from sqlalchemy import text

from benchmarks.measure import percentile
from shared import lifecycle, tenants
from shared.database import transaction
from shared.lifecycle import ClaimedJob
from shared.plan import plan
from shared.services import Services
from shared.submit import submit
from shared.tenants import TenantIdentity
from worker.floors import Floors

MODEL = "fake"


def tenant(services: Services, name: str, weight: float = 1.0) -> TenantIdentity:
    """A tenant of this name."""
    with transaction(services.engine) as connection:
        return TenantIdentity(tenants.ensure_tenant(connection, name, weight), name, weight)


def fill(services: Services, owner: TenantIdentity, count: int, **parameters: object) -> None:
    """Submit `count` jobs of a tenant, as the API does."""
    prompts = [f"a large red circle on a blue background, variation {index}" for index in range(count)]
    submit(services, owner, plan(services.catalogue[MODEL], parameters, prompts=prompts, max_jobs=count))


def settle(services: Services) -> None:
    """Clean and analyze the table of jobs, as autovacuum does a while after a large submission."""
    with services.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SET statement_timeout = '10min'"))
        connection.execute(text("VACUUM (ANALYZE) job"))
        connection.execute(text("SET statement_timeout = '10s'"))


@dataclass
class Claims:
    """What claims brought and how long they took."""

    ids: list[int] = field(default_factory=list)
    #: milliseconds of the claiming statement, which are ours to choose
    statement_ms: list[float] = field(default_factory=list)
    #: milliseconds with the commit, that is with the wait for the disk
    commit_ms: list[float] = field(default_factory=list)

    def add(self, other: Claims) -> None:
        self.ids += other.ids
        self.statement_ms += other.statement_ms
        self.commit_ms += other.commit_ms

    def figures(self, name: str) -> dict[str, float]:
        """Median and 99th percentile, for a row's `extra`."""
        return {
            f"{name}_p50_ms": percentile(self.statement_ms, 50),
            f"{name}_p99_ms": percentile(self.statement_ms, 99),
            f"{name}_commit_p50_ms": percentile(self.commit_ms, 50),
            f"{name}_commit_p99_ms": percentile(self.commit_ms, 99),
        }

    def claim(self, services: Services, limit: int = 1, floors: Floors | None = None) -> list[ClaimedJob]:
        """Claim once in a transaction of its own, with the floors of a worker where given, and note it."""
        look = floors.claim if floors else lifecycle.claim
        started = time.perf_counter()
        with transaction(services.engine) as connection:
            connection.execute(text("SELECT 1"))  # the transaction begins: its round trip is no part of the claim
            began = time.perf_counter()
            jobs = look(connection, MODEL, worker="benchmark", token=uuid.uuid4(), lease_seconds=3600, limit=limit)
            claimed = time.perf_counter()
        self.ids += [job.id for job in jobs]
        self.statement_ms.append((claimed - began) * 1000)
        self.commit_ms.append((time.perf_counter() - started) * 1000)
        return jobs
