"""What people may do to what they submitted (cancel, pause, resume, reorder, retry), and operators to the farm.

Everything is idempotent. A word about a batch, a tenant or a model counts from the moment it is stored: workers put
back what they claim of it. The waiting jobs are then moved in chunks that hold nobody up, for a few seconds here; of
huge batches the keeper moves the rest.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection
from functools import partial

from sqlalchemy import Connection, func, select, update
from sqlalchemy.dialects.postgresql import insert

from shared import fairness, lifecycle, progress
from shared.database import transaction
from shared.errors import Conflict, NotFound
from shared.models import Batch, ModelControl, Tenant, Worker
from shared.services import Services
from shared.states import Priority, State

#: how long a caller is kept waiting while jobs are moved
_PATIENCE_SECONDS = 3.0


def cancel_batch(services: Services, tenant_id: int, public_id: uuid.UUID) -> None:
    """Call a batch off. Images that are done stay. Raises `NotFound`."""
    flag = func.coalesce(Batch.cancel_requested_at, func.clock_timestamp())
    batch_id = _mark(services, tenant_id, public_id, cancel_requested_at=flag)
    _move(services, lambda connection: lifecycle.cancel(connection, batch_id))


def cancel_job(services: Services, tenant_id: int, public_id: uuid.UUID, idx: int) -> None:
    """Call one job off: at once where it waits, within a moment where it renders. Raises `NotFound`."""
    with transaction(services.engine) as connection:
        found = progress.job(connection, tenant_id, public_id, idx)
        lifecycle.cancel(connection, found.batch_id, found.idx)


def pause_batch(services: Services, tenant_id: int, public_id: uuid.UUID) -> None:
    """Set a batch aside; what renders now is finished. Raises `NotFound`."""
    flag = func.coalesce(Batch.paused_at, func.clock_timestamp())
    batch_id = _mark(services, tenant_id, public_id, paused_at=flag)
    _move(services, lambda connection: lifecycle.hold(connection, batch_id))


def resume_batch(services: Services, tenant_id: int, public_id: uuid.UUID) -> None:
    """Let a paused batch go on, where neither its tenant nor its model is paused. Raises `NotFound`."""
    batch_id = _mark(services, tenant_id, public_id, paused_at=None)
    _move(services, lambda connection: release_chunk(connection, batch_id))
    _ring(services, batch_id)


def release_chunk(connection: Connection, batch_id: int) -> int:
    """Queue up to a chunk of a batch's held jobs, if nothing holds them any more. Returns how many.

    They stand where a new submission would: not before all that came meanwhile.
    """
    going_on = (
        select(Batch.tenant_id, Batch.model, Tenant.max_in_flight)
        .join(Tenant, Tenant.id == Batch.tenant_id)
        .outerjoin(ModelControl, ModelControl.model == Batch.model)
        .where(
            Batch.id == batch_id,
            Batch.paused_at.is_(None),
            Tenant.paused_at.is_(None),
            ModelControl.paused_at.is_(None),
        )
    )
    row = connection.execute(going_on).one_or_none()
    if row is None:
        return 0
    if row.max_in_flight is not None:
        lifecycle.admit(connection, row.tenant_id, row.model)
        return 0
    return _stamped(connection, batch_id, lifecycle.CHUNK, partial(lifecycle.resume, connection, batch_id))


def _stamped(connection: Connection, batch_id: int, most: int, move: Callable[..., int]) -> int:
    """Move jobs back into the queue under new virtual times, and charge their tenant for as many as there were."""
    vt, step = fairness.place(connection, batch_id, most)
    moved = move(vt=vt, step=step, limit=most)
    fairness.refund(connection, batch_id, most - moved)
    return moved


def set_priority(services: Services, tenant_id: int, public_id: uuid.UUID, priority: Priority) -> None:
    """Put a batch into another class. Raises `NotFound`."""
    batch_id = _mark(services, tenant_id, public_id, priority=priority.rank, reordering=True)
    _move(services, lambda connection: reorder_chunk(connection, batch_id))


def reorder_chunk(connection: Connection, batch_id: int) -> int:
    """Put up to a chunk of a batch's waiting jobs into its class. Returns how many; after 0 it is done."""
    statement = select(Batch.priority).where(Batch.id == batch_id).with_for_update(key_share=True)
    rank = connection.execute(statement).scalar_one()
    moved = lifecycle.reprioritize(connection, batch_id, Priority.of_rank(rank))
    if not moved:
        connection.execute(update(Batch).where(Batch.id == batch_id).values(reordering=False))
    return moved


def retry_batch(
    services: Services,
    tenant_id: int,
    public_id: uuid.UUID,
    *,
    states: Collection[State] = (State.FAILED,),
    error_classes: Collection[str] = (),
) -> int:
    """Queue the failed jobs of a batch again (or those in `states`), narrowed by error class. Returns how many.

    At most as many as there were when this began: some may fail again meanwhile. Here the caller waits for the last
    one, for nothing notes what is left to do. Raises `NotFound`, and `Conflict` while the batch is being canceled.
    """
    with transaction(services.engine) as connection:
        batch = progress.batch(connection, tenant_id, public_id)
        _refuse_while_canceling(batch)
    total, left, moved = 0, sum(batch.counts[state] for state in states), 1
    while moved and left:
        with transaction(services.engine) as connection:
            again = partial(lifecycle.resubmit, connection, batch.id, states=states, error_classes=error_classes)
            moved = _stamped(connection, batch.id, min(left, lifecycle.CHUNK), again)
        total, left = total + moved, left - moved
    if total:
        _queued_again(services, tenant_id, batch.id)
    return total


def retry_job(services: Services, tenant_id: int, public_id: uuid.UUID, idx: int) -> bool:
    """Queue one failed or canceled job again. Returns whether it was one. Raises `NotFound` and `Conflict`."""
    with transaction(services.engine) as connection:
        _refuse_while_canceling(progress.batch(connection, tenant_id, public_id))
        found = progress.job(connection, tenant_id, public_id, idx)
        moved = _stamped(connection, found.batch_id, 1, partial(lifecycle.resubmit, connection, found.batch_id, idx))
    if moved:
        _queued_again(services, tenant_id, found.batch_id)
    return bool(moved)


def _refuse_while_canceling(batch: progress.BatchView) -> None:
    if batch.cancel_requested and batch.open:
        raise Conflict("This batch is being canceled; retry when it has ended.")


def _queued_again(services: Services, tenant_id: int, batch_id: int) -> None:
    """Let in what has room, and ring."""
    with transaction(services.engine) as connection:
        model = connection.execute(select(Batch.model).where(Batch.id == batch_id)).scalar_one()
        lifecycle.admit(connection, tenant_id, model)
    services.bell.ring([model])


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
        found = select(Tenant.id).where(Tenant.name == name)
        if changes:
            connection.execute(update(Tenant).where(Tenant.name == name).values(**changes))
        tenant_id = connection.execute(found).scalar_one_or_none()
    if tenant_id is None:
        raise NotFound(f"There is no tenant {name!r}.")
    if max_in_flight is not None:
        for model in open_models(services, tenant_id):
            _move(services, partial(lifecycle.hold_excess, tenant_id=tenant_id, model=model))
    if changes:
        _move_all(services, Batch.tenant_id == tenant_id, bool(paused))


def open_models(services: Services, tenant_id: int) -> list[str]:
    """The models of a tenant's unfinished batches."""
    statement = select(Batch.model).where(Batch.tenant_id == tenant_id, Batch.finished_at.is_(None)).distinct()
    with transaction(services.engine) as connection:
        return list(connection.execute(statement.order_by(Batch.model)).scalars())


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


def _mark(services: Services, tenant_id: int, public_id: uuid.UUID, **values: object) -> int:
    """Store a word about a batch that is not over; returns its row id."""
    with transaction(services.engine) as connection:
        batch_id = progress.internal_batch_id(connection, tenant_id, public_id)
        connection.execute(update(Batch).where(Batch.id == batch_id, Batch.finished_at.is_(None)).values(**values))
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
