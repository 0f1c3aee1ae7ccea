"""Reads how things stand: batches, jobs, workers. Writes nothing; counts come from counters, lists from keyset cursors.

The API, the dashboard and the command line all show what is read here.
"""

from __future__ import annotations

import base64
import binascii
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, Connection, Row, Select, func, select

from shared.errors import Fault, InvalidInput, NotFound
from shared.ids import NO_BATCH, NO_JOB
from shared.models import Attempt, Batch, BatchCounter, Job, Worker
from shared.states import FINAL, Priority, State

T = TypeVar("T")

#: most items in one part of a list
MAX_PAGE = 1000


class BatchState(StrEnum):
    """Where a batch stands, derived from its counts and flags."""

    QUEUED = "queued"
    RENDERING = "rendering"
    PAUSED = "paused"
    #: its waiting jobs are being called off
    CANCELING = "canceling"
    CANCELED = "canceled"
    #: no job is open any more; `counts` tells how they ended
    FINISHED = "finished"


@dataclass(frozen=True)
class BatchView:
    """A batch as it stands now."""

    id: int
    public_id: uuid.UUID
    name: str
    model: str
    priority: Priority
    parameters: dict[str, Any]
    job_count: int
    counts: dict[State, int]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    paused: bool
    cancel_requested: bool
    #: seconds since the first claim
    elapsed: float | None
    retention_seconds: int | None

    @property
    def open(self) -> int:
        """Jobs that have not ended."""
        return self.job_count - sum(self.counts[state] for state in FINAL)

    @property
    def state(self) -> BatchState:
        canceled = self.counts[State.CANCELED]
        if not self.open:
            called_off = canceled == self.job_count or (canceled and self.cancel_requested)
            return BatchState.CANCELED if called_off else BatchState.FINISHED
        if self.cancel_requested:
            return BatchState.CANCELING
        if self.paused:
            return BatchState.PAUSED
        ended = self.job_count - self.open
        return BatchState.RENDERING if self.counts[State.RENDERING] or ended else BatchState.QUEUED

    @property
    def images_per_second(self) -> float | None:
        """Mean rate since the first claim, while the batch runs."""
        ended = self.counts[State.SUCCEEDED] + self.counts[State.FAILED]
        return ended / self.elapsed if self.open and ended and self.elapsed else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last job ends, at the present rate."""
        rate = self.images_per_second
        return self.open / rate if rate else None


@dataclass(frozen=True)
class JobView:
    """A job as it stands now. `parameters` are the effective ones."""

    batch_public_id: uuid.UUID
    batch_id: int
    idx: int
    model: str
    state: State
    prompt: str
    seed: int
    parameters: dict[str, Any]
    attempt: int
    cancel_requested: bool
    run_at: datetime | None
    worker: str | None
    result_key: str | None
    result_sha256: bytes | None
    result: dict[str, Any] | None
    error_class: str | None
    error_detail: str | None
    finished_at: datetime | None


@dataclass(frozen=True)
class AttemptView:
    """One ended lease of a job."""

    attempt: int
    worker_id: str
    started_at: datetime
    finished_at: datetime
    outcome: str
    error_class: str | None
    error_detail: str | None
    gpu_seconds: float | None


@dataclass(frozen=True)
class WorkerView:
    """A worker that has said hello. `alive` while its heartbeat is younger than a lease."""

    id: str
    host: str
    pid: int
    models: list[str]
    #: jobs that it holds now
    rendering: int
    resident: list[str]
    device: dict[str, Any]
    images: int
    rates: dict[str, Any]
    resting: dict[str, Any]
    last_error: str | None
    started_at: datetime
    heartbeat_at: datetime
    draining_at: datetime | None
    alive: bool

    @property
    def state(self) -> str:
        """One word for people."""
        return (
            "silent" if not self.alive else "draining" if self.draining_at else "resting" if self.resting else "alive"
        )


@dataclass(frozen=True)
class Page(Generic[T]):
    """Part of a list, and the cursor of the next part (None at the end)."""

    items: Sequence[T]
    next_cursor: str | None


_COUNTS = [func.coalesce(func.sum(getattr(BatchCounter, state)), 0).label(state) for state in State]


def _encode_cursor(value: int) -> str:
    return base64.urlsafe_b64encode(f"k{value}".encode()).decode().rstrip("=")


def _decode_cursor(cursor: str) -> int:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode("ascii")
        if text[:1] != "k" or len(text) > 20:
            raise ValueError(text)
        return int(text[1:])
    except (ValueError, binascii.Error):
        raise InvalidInput([Fault("/cursor", "invalid-cursor", "is not a cursor of this list")]) from None


def _batches() -> Select[Any]:
    return (
        select(
            Batch.id,
            Batch.public_id,
            Batch.name,
            Batch.model,
            Batch.priority,
            Batch.parameters,
            Batch.job_count,
            Batch.created_at,
            Batch.started_at,
            Batch.finished_at,
            Batch.paused_at,
            Batch.cancel_requested_at,
            Batch.retention_seconds,
            func.extract("epoch", func.clock_timestamp() - Batch.started_at).label("elapsed"),
            *_COUNTS,
        )
        .outerjoin(BatchCounter, BatchCounter.batch_id == Batch.id)
        .group_by(Batch.id)
    )


def _batch_view(row: Row[Any]) -> BatchView:
    return BatchView(
        id=row.id,
        public_id=row.public_id,
        name=row.name,
        model=row.model,
        priority=Priority.of_rank(row.priority),
        parameters=row.parameters,
        job_count=row.job_count,
        counts={state: int(getattr(row, state)) for state in State},
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        paused=row.paused_at is not None,
        cancel_requested=row.cancel_requested_at is not None,
        elapsed=float(row.elapsed) if row.elapsed is not None else None,
        retention_seconds=row.retention_seconds,
    )


def internal_batch_id(connection: Connection, tenant_id: int, public_id: uuid.UUID) -> int:
    """The row id of a tenant's batch. Raises `NotFound`, also for another tenant's batch."""
    found = connection.execute(
        select(Batch.id).where(Batch.public_id == public_id, Batch.tenant_id == tenant_id)
    ).scalar_one_or_none()
    if found is None:
        raise NotFound(NO_BATCH)
    return found


def batch(connection: Connection, tenant_id: int, public_id: uuid.UUID) -> BatchView:
    """One batch of a tenant. Raises `NotFound`."""
    statement = _batches().where(Batch.public_id == public_id, Batch.tenant_id == tenant_id)
    row = connection.execute(statement).one_or_none()
    if row is None:
        raise NotFound(NO_BATCH)
    return _batch_view(row)


def batches(connection: Connection, tenant_id: int, *, cursor: str | None, limit: int) -> Page[BatchView]:
    """A tenant's batches, newest first."""
    statement = _batches().where(Batch.tenant_id == tenant_id).order_by(Batch.id.desc()).limit(limit + 1)
    if cursor is not None:
        statement = statement.where(Batch.id < _decode_cursor(cursor))
    rows = connection.execute(statement).all()
    more = _encode_cursor(rows[limit - 1].id) if len(rows) > limit else None
    return Page([_batch_view(row) for row in rows[:limit]], more)


def _jobs(tenant_id: int, public_id: uuid.UUID) -> Select[Any]:
    return (
        select(Job, Batch.public_id, Batch.parameters)
        .join(Batch, Batch.id == Job.batch_id)
        .where(Batch.public_id == public_id, Batch.tenant_id == tenant_id)
    )


def _job_view(row: Row[Any]) -> JobView:
    return JobView(
        batch_public_id=row.public_id,
        batch_id=row.batch_id,
        idx=row.idx,
        model=row.model,
        state=State(row.state),
        prompt=row.prompt,
        seed=row.seed,
        parameters={**row.parameters, **(row.overrides or {})},
        attempt=row.attempt,
        cancel_requested=row.cancel_requested,
        run_at=row.run_at,
        worker=row.claimed_by,
        result_key=row.result_key,
        result_sha256=row.result_sha256,
        result=row.result,
        error_class=row.error_class,
        error_detail=row.error_detail,
        finished_at=row.finished_at,
    )


def job(connection: Connection, tenant_id: int, public_id: uuid.UUID, idx: int) -> JobView:
    """One job of a tenant. Raises `NotFound`."""
    row = connection.execute(_flat(_jobs(tenant_id, public_id)).where(Job.idx == idx)).one_or_none()
    if row is None:
        raise NotFound(NO_JOB)
    return _job_view(row)


def jobs(
    connection: Connection,
    tenant_id: int,
    public_id: uuid.UUID,
    *,
    states: Sequence[State] = (),
    cursor: str | None,
    limit: int,
) -> Page[JobView]:
    """The jobs of a batch in order of position, optionally only those in `states`. Raises `NotFound`."""
    internal_batch_id(connection, tenant_id, public_id)
    statement = _flat(_jobs(tenant_id, public_id)).order_by(Job.idx).limit(limit + 1)
    if states:
        statement = statement.where(_in_states(states))
    if cursor is not None:
        statement = statement.where(Job.idx > _decode_cursor(cursor))
    rows = connection.execute(statement).all()
    more = _encode_cursor(rows[limit - 1].idx) if len(rows) > limit else None
    return Page([_job_view(row) for row in rows[:limit]], more)


def _flat(statement: Select[Any]) -> Select[Any]:
    return statement.with_only_columns(*Job.__table__.columns, Batch.public_id, Batch.parameters)


def _in_states(states: Sequence[State]) -> ColumnElement[bool]:
    return Job.state.in_([str(state) for state in states])


def workers(connection: Connection, *, lease_seconds: float) -> list[WorkerView]:
    """Workers that have not said goodbye, the living ones first."""
    age = func.extract("epoch", func.clock_timestamp() - Worker.heartbeat_at)
    alive = (age < lease_seconds).label("alive")
    holds = select(func.count()).where(Job.state == State.RENDERING, Job.claimed_by == Worker.id).scalar_subquery()
    rendering = holds.label("rendering")
    statement = (
        select(Worker, alive)
        .with_only_columns(*Worker.__table__.columns, alive, rendering)
        .where(Worker.stopped_at.is_(None), age < 86_400)
        .order_by(alive.desc(), Worker.host, Worker.pid)
    )
    fields = WorkerView.__dataclass_fields__
    return [WorkerView(**{name: getattr(row, name) for name in fields}) for row in connection.execute(statement)]


def served_models(connection: Connection, *, lease_seconds: float) -> set[str]:
    """Models that at least one living worker serves."""
    return {
        name for worker in workers(connection, lease_seconds=lease_seconds) if worker.alive for name in worker.models
    }


def attempts(connection: Connection, batch_id: int, idx: int) -> list[AttemptView]:
    """The ended attempts of a job, oldest first."""
    fields = list(AttemptView.__dataclass_fields__)
    statement = (
        select(*(getattr(Attempt, name) for name in fields))
        .join(Job, Job.id == Attempt.job_id)
        .where(Job.batch_id == batch_id, Job.idx == idx)
        .order_by(Attempt.started_at)
    )
    return [AttemptView(*row) for row in connection.execute(statement)]
