"""Every change of a job's state, as guarded verbs. Nothing else in the tree writes `job.state`.

Each UPDATE names the states it leaves; where a worker speaks, it also names the worker's random `lease_token`, so a
late word of a worker that was given up changes nothing (the fence). Counters, attempts and the webhook outbox are
written in the same statement. All times are the database's. The verbs and their moves are data in `shared.states`.

Every function takes an open connection and leaves the transaction to its caller.
"""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import Connection

from shared.lifecycle import statements
from shared.states import POLICY, Outcome, Priority, State

#: counter rows of one batch, so that finishing workers seldom meet
SHARDS = 16
#: rows that one statement of a mass move touches at most
CHUNK = 5_000


class Position(NamedTuple):
    """A place in the queue of a model, in claim order."""

    priority: int
    vt: float
    id: int


#: before every job
_BEGINNING = Position(-1, -math.inf, 0)


@dataclass(frozen=True)
class ClaimedJob:
    """A job that is now ours, with what is needed to render and store it."""

    id: int
    batch_id: int
    idx: int
    tenant_id: int
    model: str
    priority: int
    vt: float
    attempt: int
    lost_count: int
    cancel_requested: bool
    #: its batch, tenant or model is: to be released, which sets it aside
    paused: bool
    #: its tenant has a cap: when it ends, another one may be admitted
    capped: bool
    prompt: str
    seed: int
    overrides: dict[str, Any] | None

    @property
    def position(self) -> Position:
        return Position(self.priority, self.vt, self.id)

    @property
    def own_attempt(self) -> int:
        """Number of this attempt, without those that were lost with a worker: they are counted by themselves."""
        return self.attempt - self.lost_count


class Lease(NamedTuple):
    """The right to render a job: only a worker that holds it may end the attempt."""

    job_id: int
    token: uuid.UUID


@dataclass(frozen=True)
class Result:
    """What is recorded of a stored image. `seconds` is its share of the pass."""

    job_id: int
    key: str
    sha256: bytes
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why one attempt ended without an image."""

    job_id: int
    outcome: Outcome
    error_class: str
    detail: str


def _shard() -> int:
    return random.randrange(SHARDS)


def claim(
    connection: Connection,
    model: str,
    *,
    worker: str,
    token: uuid.UUID,
    lease_seconds: float,
    limit: int,
    floor: Position | None = None,
) -> list[ClaimedJob]:
    """Lease the head job of a model's queue and up to `limit - 1` jobs of the same batch key, in claim order.

    `token` is drawn by the caller, who can therefore find the claim again (`claimed`) when the answer to the commit
    was lost. A job without a batch key is claimed alone. Jobs before `floor` are not looked at, which spares the walk
    over claimed rows that PostgreSQL cannot remove yet (`worker.floors`).
    """
    floor = floor or _BEGINNING
    values = {
        "model": model,
        "worker": worker,
        "token": token,
        "lease": lease_seconds,
        "mates": limit - 1,
        "floor_priority": floor.priority,
        "floor_vt": floor.vt,
        "floor_id": floor.id,
        "shard": _shard(),
    }
    return [ClaimedJob(*row) for row in connection.execute(statements.CLAIM, values)]


def claimed(connection: Connection, token: uuid.UUID) -> list[ClaimedJob]:
    """The jobs that this token holds: what a claim got whose answer never came."""
    return [ClaimedJob(*row) for row in connection.execute(statements.CLAIMED, {"token": token})]


def extend(connection: Connection, leases: Collection[Lease], *, lease_seconds: float) -> set[Lease]:
    """Heartbeat: renew these leases in one statement. Returns those that are still ours."""
    values = {
        "ids": [lease.job_id for lease in leases],
        "tokens": [lease.token for lease in leases],
        "lease": lease_seconds,
    }
    return {Lease(*row) for row in connection.execute(statements.EXTEND, values)}


def unwanted(connection: Connection, ids: Sequence[int]) -> set[int]:
    """Which of these jobs somebody asked to cancel."""
    return set(connection.execute(statements.UNWANTED, {"ids": list(ids)}).scalars())


def succeed(connection: Connection, token: uuid.UUID, results: Sequence[Result]) -> set[int]:
    """Record stored images, all in one statement. Returns the jobs whose result stands.

    A job missing from the answer was lost (its lease is somebody else's) or is to be dropped (`drop`). A call repeated
    after an ambiguous commit finds its own attempt rows and reports the same jobs again.
    """
    values = {
        "token": token,
        "ids": [r.job_id for r in results],
        "keys": [r.key for r in results],
        "hashes": [r.sha256 for r in results],
        "facts": [r.facts for r in results],
        "seconds": [r.seconds for r in results],
        "shard": _shard(),
    }
    accepted = set(connection.execute(statements.SUCCEED, values).scalars())
    missing = [r.job_id for r in results if r.job_id not in accepted]
    if missing:
        accepted |= set(connection.execute(statements.ALREADY_MINE, {"ids": missing, "token": token}).scalars())
    return accepted


def _give_up(
    connection: Connection,
    statement: Any,
    token: uuid.UUID,
    failures: Sequence[Failure],
    delays: Sequence[float] | None = None,
) -> set[int]:
    values = {
        "token": token,
        "ids": [f.job_id for f in failures],
        "outcomes": [str(f.outcome) for f in failures],
        "classes": [f.error_class for f in failures],
        "details": [f.detail for f in failures],
        "delays": list(delays) if delays is not None else [0.0] * len(failures),
        "shard": _shard(),
    }
    return set(connection.execute(statement, values).scalars())


def fail(connection: Connection, token: uuid.UUID, failures: Sequence[Failure]) -> set[int]:
    """Give these jobs up for good. Returns those that were still ours."""
    return _give_up(connection, statements.FAIL, token, failures)


def retry(connection: Connection, token: uuid.UUID, failures: Sequence[Failure], delays: Sequence[float]) -> set[int]:
    """Let these jobs run again, each after its delay in seconds; a canceled one ends. Returns those still ours."""
    return _give_up(connection, statements.RETRY, token, failures, delays)


def release(
    connection: Connection, token: uuid.UUID, ids: Sequence[int], reason: str = "the worker stopped"
) -> set[int]:
    """Put these jobs back as if they had not been claimed: the attempt does not count.

    A canceled one ends, a paused one is set aside.
    """
    failures = [Failure(i, Outcome.INTERRUPTED, "interrupted", reason) for i in ids]
    return _give_up(connection, statements.RELEASE, token, failures)


def drop(connection: Connection, token: uuid.UUID, ids: Sequence[int]) -> set[int]:
    """End these jobs as canceled, as somebody asked while they were rendered."""
    return _give_up(connection, statements.DROP, token, [Failure(i, Outcome.CANCELED, "canceled", "") for i in ids])


def backoff(outcome: Outcome, attempt: int, retry_after: float | None = None) -> float | None:
    """Seconds until the next try after attempt number `attempt` (from 1), or None where there is none.

    Exponential with full jitter, never earlier than the other side asked.
    """
    policy = POLICY[outcome]
    if attempt >= policy.tries:
        return None
    window = min(policy.base.total_seconds() * 2.0 ** (attempt - 1), policy.ceiling.total_seconds())
    return max(random.uniform(0.1, 1.0) * window, retry_after or 0.0)


def rescue(connection: Connection, *, limit: int = 500, workers: Sequence[str] = ()) -> list[tuple[str, State]]:
    """Take back jobs whose lease ran out, and at once those of `workers` that are known to be dead.

    They are queued again, alone in their pass; after the third loss they fail as `poison`. Returns (model, new state).
    """
    values = {
        "limit": limit,
        "losses": POLICY[Outcome.WORKER_LOST].tries,
        "workers": list(workers),
        "shard": _shard(),
    }
    return [(row.model, State(row.now)) for row in connection.execute(statements.RESCUE, values)]


def promote(connection: Connection, *, limit: int = CHUNK) -> list[str]:
    """Queue the scheduled jobs whose time has come. Returns their models."""
    return list(connection.execute(statements.PROMOTE, {"limit": limit, "shard": _shard()}).scalars())


def _move_chunk(connection: Connection, statement: Any, batch_id: int, idx: int | None, limit: int, **more: Any) -> int:
    values = {"batch": batch_id, "idx": idx, "limit": limit, "shard": _shard(), **more}
    return int(connection.execute(statement, values).scalar_one())


def cancel(connection: Connection, batch_id: int, idx: int | None = None, *, limit: int = CHUNK) -> int:
    """Cancel up to `limit` waiting jobs of a batch (or its job `idx`) and flag the rendering ones for their worker.

    Returns how many ended here; call again until it is 0.
    """
    if idx is not None:
        connection.execute(statements.LOCK_JOB, {"batch": batch_id, "idx": idx})
    moved = _move_chunk(connection, statements.CANCEL, batch_id, idx, limit)
    connection.execute(statements.FLAG_RENDERING, {"batch": batch_id, "idx": idx})
    return moved


def hold(connection: Connection, batch_id: int, idx: int | None = None, *, limit: int = CHUNK) -> int:
    """Set waiting jobs aside, so that they do not stand at the head of a queue. Returns how many; call until 0."""
    return _move_chunk(connection, statements.HOLD, batch_id, idx, limit)


def resume(
    connection: Connection,
    batch_id: int,
    idx: int | None = None,
    *,
    vt: float | None = None,
    step: float = 0.0,
    limit: int = CHUNK,
) -> int:
    """Queue held jobs again, from virtual time `vt` on, `step` apart (`shared.fairness`). Call until 0."""
    return _move_chunk(connection, statements.RESUME, batch_id, idx, limit, vt=vt, step=step)


def resubmit(
    connection: Connection,
    batch_id: int,
    idx: int | None = None,
    *,
    states: Collection[State] = (),
    error_classes: Collection[str] = (),
    vt: float | None = None,
    step: float = 0.0,
    limit: int = CHUNK,
) -> int:
    """Queue failed and canceled jobs again with a clean record; their batch is open again. Call until 0.

    Narrowed to those in `states` and of `error_classes` where these are given; stamped as by `resume`. They are held
    where their batch, tenant or model is paused or capped.
    """
    # before the first of them is open: whoever closes the batch must see either none of this or all
    connection.execute(statements.LOCK_BATCH, {"batch": batch_id})
    only = {"states": [str(state) for state in states] or None, "classes": list(error_classes) or None}
    moved = _move_chunk(connection, statements.RESUBMIT, batch_id, idx, limit, vt=vt, step=step, **only)
    if moved:
        connection.execute(statements.REOPEN_BATCH, {"batch": batch_id})
    return moved


def admit(connection: Connection, tenant_id: int, model: str) -> int:
    """Queue as many held jobs of a capped tenant as there is room for with this model. Returns how many.

    Does nothing for a tenant without a cap, whose held jobs are paused (`resume`).
    """
    connection.execute(statements.LOCK_ROOM, {"tenant": tenant_id})
    values = {"tenant": tenant_id, "model": model, "shard": _shard()}
    return int(connection.execute(statements.ADMIT, values).scalar_one())


def hold_excess(connection: Connection, tenant_id: int, model: str, *, limit: int = CHUNK) -> int:
    """Set aside the last queued jobs of a tenant that has more in flight than its cap. Returns how many."""
    connection.execute(statements.LOCK_ROOM, {"tenant": tenant_id})
    values = {"tenant": tenant_id, "model": model, "limit": limit, "shard": _shard()}
    return int(connection.execute(statements.HOLD_EXCESS, values).scalar_one())


def reprioritize(connection: Connection, batch_id: int, priority: Priority, *, limit: int = CHUNK) -> int:
    """Put waiting jobs of a batch into a class. Returns how many; call until 0."""
    values = {"batch": batch_id, "priority": priority.rank, "limit": limit}
    return int(connection.execute(statements.REPRIORITIZE, values).scalar_one())


def raise_head(connection: Connection, model: str, priority: Priority, *, limit: int) -> int:
    """Let the first jobs of a class go with the highest one. Returns how many."""
    values = {"model": model, "priority": priority.rank, "limit": limit}
    return int(connection.execute(statements.RAISE_HEAD, values).scalar_one())
