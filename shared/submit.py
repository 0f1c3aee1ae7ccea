"""Stores a plan: one transaction, one COPY, whole or not at all; then the bell."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from psycopg.errors import LockNotAvailable
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import OperationalError

from shared import failpoints, fairness, lifecycle
from shared.database import transaction
from shared.errors import Fault, InProgress, InvalidInput
from shared.models import Batch, BatchCounter, IdempotencyKey
from shared.plan import Plan, PlannedJob
from shared.services import Services
from shared.states import Priority, State
from shared.tenants import TenantIdentity

#: rows in one block of the COPY stream
_BLOCK_ROWS = 2_000

_COPY = "COPY job (batch_id, idx, tenant_id, model, priority, vt, batch_key, state, prompt, seed, overrides) FROM STDIN"

# a tenant with a cap is let in job by job
_HELD = text("""
SELECT t.paused_at IS NOT NULL OR m.paused_at IS NOT NULL AS paused, t.max_in_flight IS NOT NULL AS capped
FROM tenant t LEFT JOIN model_control m ON m.model = :model WHERE t.id = :tenant
""")


@dataclass(frozen=True)
class Idempotency:
    """A client's name for this submission and the hash of its body."""

    key: str
    request_sha256: bytes


@dataclass(frozen=True)
class Submitted:
    """The stored batch. `replayed` tells that an earlier call with the same idempotency key had made it."""

    public_id: uuid.UUID
    replayed: bool


def submit(
    services: Services,
    tenant: TenantIdentity,
    plan: Plan,
    *,
    name: str = "",
    priority: Priority = Priority.NORMAL,
    idempotency: Idempotency | None = None,
    retention_seconds: int | None = None,
) -> Submitted:
    """Store the batch and its jobs, commit, then ring. A bell that cannot be rung never fails a submit.

    Raises `InProgress` while an equal idempotency key is being used by another call, `InvalidInput` where the key was
    used for another body, `Unavailable` where the database is out of reach.
    """
    model = plan.entry.name
    with transaction(services.engine) as connection:
        if idempotency and (earlier := _replay(connection, tenant.id, idempotency)):
            return earlier
        # a commit of its own: a long COPY must not hold the tenant's clock; losing it in a crash costs nothing
        connection.execute(text("SET LOCAL synchronous_commit = off"))
        vt = fairness.reserve(
            connection,
            model=model,
            tenant_id=tenant.id,
            priority=priority.rank,
            work=plan.work,
            weight=tenant.weight,
        )
    public_id = uuid.uuid4()
    try:
        with transaction(services.engine) as connection:
            connection.execute(text("SET LOCAL statement_timeout = '10min'"))
            batch_id = connection.execute(
                insert(Batch)
                .values(
                    public_id=public_id,
                    tenant_id=tenant.id,
                    name=name,
                    model=model,
                    priority=priority.rank,
                    parameters=plan.parameters,
                    job_count=plan.job_count,
                    work=plan.work,
                    retention_seconds=retention_seconds,
                )
                .returning(Batch.id)
            ).scalar_one()
            if idempotency:
                _remember(connection, tenant.id, batch_id, idempotency)
            paused, capped = connection.execute(_HELD, {"model": model, "tenant": tenant.id}).one()
            state = State.HELD if paused or capped else State.QUEUED
            connection.execute(insert(BatchCounter).values(batch_id=batch_id, shard=0, **{state: plan.job_count}))
            _copy_jobs(connection, plan, batch_id, tenant, priority, vt, state)
            if capped:
                lifecycle.admit(connection, tenant.id, model)
            elif paused:
                fairness.refund(connection, batch_id, plan.job_count)
    except _KeyTaken as taken:
        with transaction(services.engine) as connection:
            if idempotency and (earlier := _replay(connection, tenant.id, idempotency)):
                return earlier
        raise InProgress from taken
    failpoints.hit("before_bell")
    services.bell.ring([model], wanted=plan.job_count)
    return Submitted(public_id, replayed=False)


class _KeyTaken(Exception):
    """Another call holds this idempotency key, or has just stored its batch under it."""


def _copy_jobs(
    connection: Connection,
    plan: Plan,
    batch_id: int,
    tenant: TenantIdentity,
    priority: Priority,
    vt: float,
    state: State,
) -> None:
    driver = connection.connection.driver_connection
    assert driver is not None
    with driver.cursor() as cursor, cursor.copy(_COPY) as copy:
        for block in _blocks(plan, batch_id, tenant, priority, vt, state):
            copy.write(block)
            failpoints.hit("mid_copy")


def _blocks(
    plan: Plan, batch_id: int, tenant: TenantIdentity, priority: Priority, vt: float, state: State
) -> Iterator[str]:
    """The rows in COPY's text format. Written by hand: twice as fast as a call for each row."""
    middle = f"\t{tenant.id}\t{plan.entry.name}\t{priority.rank}\t"
    rows: list[str] = []
    for idx, job in enumerate(plan.jobs()):
        rows.append(
            f"{batch_id}\t{idx}{middle}{vt!r}\t{job.batch_key}\t{state}\t"
            f"{_escape(job.prompt)}\t{job.seed}\t{_json(job)}\n"
        )
        vt += job.work / tenant.weight
        if len(rows) == _BLOCK_ROWS:
            yield "".join(rows)
            rows.clear()
    yield "".join(rows)


def _escape(value: str) -> str:
    """`value` as COPY's text format spells it. Replacing nothing costs next to nothing."""
    return value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def _json(job: PlannedJob) -> str:
    return _escape(json.dumps(job.overrides)) if job.overrides else "\\N"


def _replay(connection: Connection, tenant_id: int, idempotency: Idempotency) -> Submitted | None:
    row = connection.execute(
        select(Batch.public_id, IdempotencyKey.request_sha256)
        .join(IdempotencyKey, IdempotencyKey.batch_id == Batch.id)
        .where(IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key == idempotency.key)
    ).one_or_none()
    if row is None:
        return None
    if row.request_sha256 != idempotency.request_sha256:
        detail = "this key was used for another request; a new request needs a new key"
        raise InvalidInput([Fault("/Idempotency-Key", "idempotency-key-reused", detail)])
    return Submitted(row.public_id, replayed=True)


def _remember(connection: Connection, tenant_id: int, batch_id: int, idempotency: Idempotency) -> None:
    """Claim the key for this batch. Waits for another call that holds it, up to the lock time-out."""
    statement = (
        postgresql.insert(IdempotencyKey)
        .values(tenant_id=tenant_id, key=idempotency.key, request_sha256=idempotency.request_sha256, batch_id=batch_id)
        .on_conflict_do_nothing()
        .returning(IdempotencyKey.key)
    )
    try:
        claimed = connection.execute(statement).scalar_one_or_none()
    except OperationalError as error:
        if isinstance(error.orig, LockNotAvailable):
            raise _KeyTaken from error
        raise
    if claimed is None:
        raise _KeyTaken
