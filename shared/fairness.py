"""Start-time fair queueing: each job gets a virtual time when it is inserted, and a queue is served in that order.

A tenant's clock advances by effort / weight for every job it submits, and never lags behind the queue that it joins,
so a newcomer stands beside the heads of the others instead of behind their last jobs (Goyal, Vin & Cheng, "Start-time
Fair Queueing", 1996). Because the stamp is made at insert, a claim stays one index probe.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

_RESERVE = text("""
WITH base AS (
    SELECT GREATEST(
        COALESCE((SELECT vt FROM tenant_clock WHERE model = :model AND tenant_id = :tenant), 0),
        COALESCE(
            (SELECT vt FROM job WHERE state = 'queued' AND model = :model AND priority = :priority
             ORDER BY vt LIMIT 1),
            (SELECT max(vt) FROM tenant_clock WHERE model = :model),
            0)) AS vt)
INSERT INTO tenant_clock AS c (model, tenant_id, vt)
SELECT :model, :tenant, base.vt + :advance FROM base
ON CONFLICT (model, tenant_id) DO UPDATE SET vt = GREATEST(c.vt, EXCLUDED.vt - :advance) + :advance
RETURNING vt - :advance
""")


def reserve(connection: Connection, *, model: str, tenant_id: int, priority: int, work: float, weight: float) -> float:
    """Advance the tenant's clock by `work / weight`; returns the virtual time at which the new jobs begin.

    Meant for a short transaction of its own, so that a long COPY does not hold the clock's row.
    """
    values = {"model": model, "tenant": tenant_id, "priority": priority, "advance": work / weight}
    return float(connection.execute(_RESERVE, values).scalar_one())


_REFUND = text("""
UPDATE tenant_clock c SET vt = GREATEST(c.vt - :jobs * b.work / b.job_count / t.weight, 0)
FROM batch b JOIN tenant t ON t.id = b.tenant_id
WHERE b.id = :batch AND c.model = b.model AND c.tenant_id = b.tenant_id
""")


def refund(connection: Connection, batch_id: int, jobs: int) -> None:
    """Turn the tenant's clock back by what `jobs` canceled jobs of this batch would have cost, at the mean of all."""
    if jobs:
        connection.execute(_REFUND, {"batch": batch_id, "jobs": jobs})


_OF_A_BATCH = text("""
SELECT b.model, b.tenant_id, b.priority, b.work / b.job_count AS work, t.weight
FROM batch b JOIN tenant t ON t.id = b.tenant_id WHERE b.id = :batch
""")


def place(connection: Connection, batch_id: int, jobs: int) -> tuple[float, float]:
    """Reserve the place of `jobs` jobs of a batch that come back into the queue: the first virtual time, and the step.

    What was not used of it is given back by `refund`, in the same transaction.
    """
    batch = connection.execute(_OF_A_BATCH, {"batch": batch_id}).one()
    start = reserve(
        connection,
        model=batch.model,
        tenant_id=batch.tenant_id,
        priority=batch.priority,
        work=jobs * batch.work,
        weight=batch.weight,
    )
    return start, batch.work / batch.weight
