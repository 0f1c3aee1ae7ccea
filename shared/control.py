"""What people may do to what they submitted (cancel, pause, resume, reorder, retry), and operators to the farm.

Everything is idempotent. A word about a batch, a tenant or a model counts from the moment it is stored: workers put
back what they claim of it. The waiting jobs are then moved in chunks that hold nobody up, for a few seconds here; of
huge batches the keeper moves the rest.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection

from sqlalchemy import Connection, Update, func, select, update
from sqlalchemy.dialects.postgresql import insert

from shared import fairness, lifecycle, progress
from shared.database import transaction
from shared.errors import NotFound
from shared.models import Batch, ModelControl, Tenant, Worker
from shared.services import Services
from shared.states import Priority, State

#: how long a caller is kept waiting while jobs are moved
_PATIENCE_SECONDS = 3.0


def cancel_batch(services: Services, tenant_id: int, public_id: uuid.UUID) -> None:
    """Call a batch off. Images that are done stay. Raises `NotFound`."""
    flag = func.coalesce(Batch.cancel_requested_at, func.clock_timestamp())
    batch_id = _mark(services, tenant_id, public_id, lambda mark: mark.values(cancel_requested_at=flag))
    _move(services, lambda connection: cancel_chunk(connection, batch_id))


def cancel_chunk(connection: Connection, batch_id: int) -> int:
    """Cancel up to a chunk of a batch's waiting jobs and give their share of the queue back. Returns how many."""
    moved = lifecycle.cancel(connection, batch_id)
    fairness.refund(connection, batch_id, moved)
    return moved


def cancel_job(services: Services, tenant_id: int, public_id: uuid.UUID, idx: int) -> None:
    """Call one job off: at once where it waits, within a moment where it renders. Raises `NotFound`."""
    with transaction(services.engine) as connection:
        found = progress.job(connection, tenant_id, public_id, idx)
        fairness.refund(connection, found.batch_id, lifecycle.cancel(connection, found.batch_id, found.idx))


def pause_batch(services: Services, tenant_id: int, public_id: uuid.UUID) -> None:
    """Set a batch aside; what renders now is finished. Raises `NotFound`."""
    flag = func.coalesce(Batch.paused_at, func.clock_timestamp())
    batch_id = _mark(services, tenant_id, public_id, lambda mark: mark.values(paused_at=flag))
    _move(services, lambda connection: lifecycle.hold(connection, batch_id))


def resume_batch(services: Services, tenant_id: int, public_id: uuid.UUID) -> None:
    """Let a paused batch go on, where neither its tenant nor its model is paused. Raises `NotFound`."""
    batch_id = _mark(services, tenant_id, public_id, lambda mark: mark.values(paused_at=None))
    _move(services, lambda connection: release_chunk(connection, batch_id))
    _ring(services, batch_id)


def release_chunk(connection: Connection, batch_id: int) -> int:
    """Queue up to a chunk of a batch's held jobs, if nothing holds them any more. Returns how many."""
    with_control = (
        select(Batch.tenant_id, Tenant.max_in_flight)
        .join(Tenant, Tenant.id == Batch.tenant_id)
        .outerjoin(ModelControl, ModelControl.model == Batch.model)
        .where(
            Batch.id == batch_id,
            Batch.paused_at.is_(None),
            Tenant.paused_at.is_(None),
            ModelControl.paused_at.is_(None),
        )
    )
    row = connection.execute(with_control).one_or_none()
    if row is None:
        return 0
    if row.max_in_flight is not None:
        lifecycle.admit(connection, row.tenant_id)
        return 0
    return lifecycle.resume(connection, batch_id)


def set_priority(services: Services, tenant_id: int, public_id: uuid.UUID, priority: Priority) -> None:
    """Put a batch into another class. Raises `NotFound`."""
    values = {"priority": priority.rank, "aged_to": None}
    batch_id = _mark(services, tenant_id, public_id, lambda mark: mark.values(**values))
    _move(services, lambda connection: lifecycle.reprioritize(connection, batch_id, priority))


def retry_batch(
    services: Services,
    tenant_id: int,
    public_id: uuid.UUID,
    *,
    states: Collection[State] = (State.FAILED,),
    error_classes: Collection[str] = (),
) -> int:
    """Queue the failed jobs of a batch again (or those in `states`), narrowed by error class. Returns how many.

    Here the caller waits for the last one: nothing notes what is left to do. Raises `NotFound`.
    """
    with transaction(services.engine) as connection:
        batch_id = progress.internal_batch_id(connection, tenant_id, public_id)
    total, moved = 0, lifecycle.CHUNK
    while moved:
        with transaction(services.engine) as connection:
            moved = lifecycle.resubmit(connection, batch_id, states=states, error_classes=error_classes)
        total += moved
    if total:
        _ring(services, batch_id)
    return total


def retry_job(services: Services, tenant_id: int, public_id: uuid.UUID, idx: int) -> bool:
    """Queue one failed or canceled job again. Returns whether it was one. Raises `NotFound`."""
    with transaction(services.engine) as connection:
        found = progress.job(connection, tenant_id, public_id, idx)
        moved = lifecycle.resubmit(connection, found.batch_id, found.idx)
    if moved:
        _ring(services, found.batch_id)
    return bool(moved)


# ------------------------------------------------------------------------------------------------------- operators


def pause_model(services: Services, model: str, paused: bool) -> None:
    """Stop or go on rendering with a model, everywhere. New batches for it are taken and set aside."""
    now = func.clock_timestamp()
    statement = insert(ModelControl).values(model=model, paused_at=now if paused else None)
    kept = func.coalesce(ModelControl.paused_at, now) if paused else None
    with transaction(services.engine) as connection:
        connection.execute(statement.on_conflict_do_update(index_elements=["model"], set_={"paused_at": kept}))
    _move_all(services, Batch.model == model, paused)
    if not paused:
        services.bell.ring([model])


def set_tenant(
    services: Services, name: str, *, paused: bool | None = None, max_in_flight: int | None = None, uncap: bool = False
) -> None:
    """Pause a tenant or let it go on; set or lift the cap of its jobs in flight. Raises `NotFound`."""
    changes: dict[str, object] = {}
    if paused is not None:
        changes["paused_at"] = func.coalesce(Tenant.paused_at, func.clock_timestamp()) if paused else None
    if max_in_flight is not None or uncap:
        changes["max_in_flight"] = max_in_flight
    with transaction(services.engine) as connection:
        statement = update(Tenant).where(Tenant.name == name).values(**changes).returning(Tenant.id)
        tenant_id = connection.execute(statement).scalar_one_or_none()
    if tenant_id is None:
        raise NotFound(f"There is no tenant {name!r}.")
    if max_in_flight is not None:
        _move(services, lambda connection: lifecycle.hold_excess(connection, tenant_id))
    _move_all(services, Batch.tenant_id == tenant_id, bool(paused))


def drain_worker(services: Services, worker_id: str, draining: bool) -> None:
    """Let a worker claim nothing more, or again. Raises `NotFound`."""
    at = func.coalesce(Worker.draining_at, func.clock_timestamp()) if draining else None
    statement = update(Worker).where(Worker.id == worker_id, Worker.stopped_at.is_(None)).values(draining_at=at)
    with transaction(services.engine) as connection:
        models = connection.execute(statement.returning(Worker.models)).scalar_one_or_none()
    if models is None:
        raise NotFound("There is no such worker.")
    if not draining:
        services.bell.ring(models)


# ------------------------------------------------------------------------------------------------------------ moves


def _mark(services: Services, tenant_id: int, public_id: uuid.UUID, change: Callable[[Update], Update]) -> int:
    """Store a word about a batch that is not over; returns its row id."""
    with transaction(services.engine) as connection:
        batch_id = progress.internal_batch_id(connection, tenant_id, public_id)
        connection.execute(change(update(Batch).where(Batch.id == batch_id, Batch.finished_at.is_(None))))
    return batch_id


def _move(services: Services, chunk: Callable[[Connection], int], deadline: float | None = None) -> None:
    """Move chunk after chunk until there is nothing to move or the caller has waited enough."""
    deadline = deadline or time.monotonic() + _PATIENCE_SECONDS
    moved = 1
    while moved and time.monotonic() < deadline:
        with transaction(services.engine) as connection:
            moved = chunk(connection)


def _move_all(services: Services, of: object, paused: bool) -> None:
    """Hold or release the unfinished batches of a tenant or a model."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with transaction(services.engine) as connection:
        statement = select(Batch.id).where(of, Batch.finished_at.is_(None)).order_by(Batch.id)  # type: ignore[arg-type]
        batch_ids = list(connection.execute(statement).scalars())
    chunk = lifecycle.hold if paused else release_chunk
    for batch_id in batch_ids:
        _move(services, lambda connection, batch_id=batch_id: chunk(connection, batch_id), deadline)  # type: ignore[misc]


def _ring(services: Services, batch_id: int) -> None:
    with transaction(services.engine) as connection:
        model = connection.execute(select(Batch.model).where(Batch.id == batch_id)).scalar_one()
    services.bell.ring([model])
