"""The rows of the farm (SQLAlchemy). Constraints repeat what the code promises; Alembic migrations equal these models.

Times are the database's (`clock_timestamp()`), in every process. A batch holds the shared parameters once; a job holds
its prompt, its seed and what differs. `batch_counter` is sharded so that finishing workers do not wait for each other.
"""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Text,
    UniqueConstraint,
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shared.states import FINAL, Outcome, State


def _one_of(column: str, values: type[State] | type[Outcome]) -> str:
    return f"{column} IN ({', '.join(repr(str(v)) for v in values)})"


class Base(DeclarativeBase):
    """Naming makes every constraint addressable in migrations and error handling."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy reads it as a class attribute
        str: Text, int: BigInteger, float: Double, bytes: LargeBinary, bool: Boolean,
        datetime: DateTime(timezone=True), uuid.UUID: UUID(as_uuid=True), dict[str, Any]: JSONB,
    }  # fmt: skip


def _id() -> Mapped[int]:
    return mapped_column(BigInteger, Identity(always=True), primary_key=True)


def _now() -> Mapped[datetime]:
    return mapped_column(server_default=func.clock_timestamp())


class Tenant(Base):
    """Who owns keys, batches and quotas. `weight` is its share of each queue."""

    __tablename__ = "tenant"
    __table_args__ = (
        # NaN counts as the largest number
        CheckConstraint("weight > 0 AND weight < 'Infinity'", name="weight_positive"),
        CheckConstraint("max_in_flight > 0", name="max_in_flight_positive"),
    )

    id: Mapped[int] = _id()
    name: Mapped[str] = mapped_column(unique=True)
    weight: Mapped[float] = mapped_column(server_default=text("1"))
    #: most jobs of each model that are queued or rendered at a time; the others are held until there is room
    max_in_flight: Mapped[int | None] = mapped_column(Integer)
    paused_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = _now()


class TenantClock(Base):
    """How far in virtual time a tenant has got in the queue of one model (start-time fair queueing)."""

    __tablename__ = "tenant_clock"
    __table_args__ = (PrimaryKeyConstraint("model", "tenant_id"),)

    model: Mapped[str]
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenant.id", ondelete="CASCADE"))
    vt: Mapped[float]


class ModelControl(Base):
    """What operators said about a model of the catalogue."""

    __tablename__ = "model_control"

    model: Mapped[str] = mapped_column(primary_key=True)
    paused_at: Mapped[datetime | None]
    #: when the keeper last let starving classes have their turn
    raised_at: Mapped[datetime | None]


class ModelRate(Base):
    """How fast a model was rendered lately, as its workers measured it; written by the keeper."""

    __tablename__ = "model_rate"

    model: Mapped[str] = mapped_column(primary_key=True)
    #: device seconds of one unit of work (see `RenderSpec.work`)
    seconds_per_work: Mapped[float]
    updated_at: Mapped[datetime] = _now()


class ApiKey(Base):
    """A bearer key: the prefix finds it, the SHA-256 proves it. The key itself is shown once and never stored."""

    __tablename__ = "api_key"
    __table_args__ = (CheckConstraint("octet_length(sha256) = 32", name="sha256_size"),)

    id: Mapped[int] = _id()
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenant.id", ondelete="CASCADE"), index=True)
    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(unique=True)
    sha256: Mapped[bytes]
    #: may speak for the whole farm: models, workers, other tenants
    operator: Mapped[bool] = mapped_column(server_default=false())
    created_at: Mapped[datetime] = _now()
    revoked_at: Mapped[datetime | None]


class Batch(Base):
    """One submission: shared parameters and 1…1,000,000 jobs."""

    __tablename__ = "batch"
    __table_args__ = (
        CheckConstraint("job_count > 0", name="job_count_positive"),
        CheckConstraint("priority BETWEEN 0 AND 2", name="priority_known"),
        CheckConstraint("retention_seconds > 0", name="retention_positive"),
        Index("ix_batch_expiring", "finished_at", postgresql_where=text("retention_seconds IS NOT NULL")),
        UniqueConstraint("id", "tenant_id"),
        Index("ix_batch_tenant_id_id", "tenant_id", "id"),
        Index("ix_batch_unfinished", "id", postgresql_where=text("finished_at IS NULL")),
    )

    id: Mapped[int] = _id()
    public_id: Mapped[uuid.UUID] = mapped_column(unique=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenant.id"))
    name: Mapped[str] = mapped_column(server_default=text("''"))
    model: Mapped[str]
    priority: Mapped[int] = mapped_column(SmallInteger)
    #: the full spec shared by the jobs, without prompt and seed
    parameters: Mapped[dict[str, Any]]
    job_count: Mapped[int] = mapped_column(Integer)
    #: effort of all jobs together, in the unit of `RenderSpec.work`
    work: Mapped[float] = mapped_column(server_default=text("0"))
    #: its waiting jobs are still being moved into its class
    reordering: Mapped[bool] = mapped_column(server_default=false())
    #: rows and images are deleted so long after the end; NULL keeps them
    retention_seconds: Mapped[int | None]
    webhook_url: Mapped[str | None]
    created_at: Mapped[datetime] = _now()
    #: first claim
    started_at: Mapped[datetime | None]
    #: no job is open any more; set by the keeper
    finished_at: Mapped[datetime | None]
    paused_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]


class Job(Base):
    """One image to render. `state` and the lease are written by `shared.lifecycle` alone."""

    __tablename__ = "job"
    __table_args__ = (
        UniqueConstraint("batch_id", "idx"),
        # a job can only belong to the tenant of its batch
        ForeignKeyConstraint(["batch_id", "tenant_id"], ["batch.id", "batch.tenant_id"], ondelete="CASCADE"),
        CheckConstraint(_one_of("state", State), name="state_known"),
        CheckConstraint(
            "(state = 'rendering') = (lease_token IS NOT NULL)"
            " AND (state = 'rendering') = (lease_expires_at IS NOT NULL)",
            name="lease_while_rendering",
        ),
        CheckConstraint(
            "(state = 'succeeded') = (result_key IS NOT NULL)"
            " AND (state = 'succeeded') = (result_sha256 IS NOT NULL)",
            name="result_when_succeeded",
        ),
        CheckConstraint("(state = 'scheduled') = (run_at IS NOT NULL)", name="run_at_when_scheduled"),
        CheckConstraint("(state = 'failed') = (error_class IS NOT NULL)", name="error_when_failed"),
        CheckConstraint(
            f"(state IN ({', '.join(sorted(repr(str(s)) for s in FINAL))})) = (finished_at IS NOT NULL)",
            name="finished_when_final",
        ),
        CheckConstraint("attempt >= 0 AND lost_count >= 0 AND idx >= 0 AND seed >= 0", name="not_negative"),
        # one index probe finds the head of a queue, another the mates that may share its pass
        Index("ix_job_claim", "model", "priority", "vt", "id", postgresql_where=text("state = 'queued'")),
        Index(
            "ix_job_claim_mates", "model", "batch_key", "priority", "vt", "id",
            postgresql_where=text("state = 'queued'"),
        ),
        # not on lease_expires_at: a heartbeat then stays a heap-only update
        Index("ix_job_rendering", "id", postgresql_where=text("state = 'rendering'")),
        Index("ix_job_scheduled", "run_at", postgresql_where=text("state = 'scheduled'")),
        # who is admitted next of the jobs that wait for room; those of paused batches are not in the way
        Index("ix_job_held", "batch_id", "priority", "vt", "id", postgresql_where=text("state = 'held'")),
        Index("ix_job_unsuccessful", "batch_id", "id", postgresql_where=text("state IN ('failed', 'canceled')")),
        Index("ix_job_open", "batch_id", "id", postgresql_where=text("state IN ('queued', 'scheduled', 'held')")),
        {
            "postgresql_with": {
                "fillfactor": "85",
                "autovacuum_vacuum_scale_factor": "0.01",
                "autovacuum_vacuum_cost_delay": "1",
            }
        },
    )  # fmt: skip

    id: Mapped[int] = _id()
    batch_id: Mapped[int]
    #: position in the batch, from 0
    idx: Mapped[int] = mapped_column(Integer)
    tenant_id: Mapped[int]
    model: Mapped[str]
    #: 0 is claimed first
    priority: Mapped[int] = mapped_column(SmallInteger)
    #: virtual time: the claim order within a priority
    vt: Mapped[float]
    #: what must be equal to share a pass; NULL is rendered alone
    batch_key: Mapped[int | None]
    state: Mapped[str] = mapped_column(server_default=text("'queued'"))
    run_at: Mapped[datetime | None]
    attempt: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    lost_count: Mapped[int] = mapped_column(SmallInteger, server_default=text("0"))
    lease_token: Mapped[uuid.UUID | None]
    lease_expires_at: Mapped[datetime | None]
    claimed_by: Mapped[str | None]
    claimed_at: Mapped[datetime | None]
    cancel_requested: Mapped[bool] = mapped_column(server_default=false())
    prompt: Mapped[str]
    seed: Mapped[int]
    #: parameters that differ from the batch's
    overrides: Mapped[dict[str, Any] | None]
    result_key: Mapped[str | None]
    result_sha256: Mapped[bytes | None]
    #: size, type, device, batch shape and engine notes of the stored image
    result: Mapped[dict[str, Any] | None]
    error_class: Mapped[str | None]
    error_detail: Mapped[str | None]
    finished_at: Mapped[datetime | None]


class Attempt(Base):
    """One lease of one job, written when it ends. The lease token is its natural key: a repeated write is one row."""

    __tablename__ = "attempt"
    __table_args__ = (
        PrimaryKeyConstraint("job_id", "lease_token"),
        CheckConstraint(_one_of("outcome", Outcome), name="outcome_known"),
    )

    job_id: Mapped[int] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    lease_token: Mapped[uuid.UUID]
    attempt: Mapped[int] = mapped_column(SmallInteger)
    worker_id: Mapped[str]
    started_at: Mapped[datetime]
    finished_at: Mapped[datetime] = _now()
    outcome: Mapped[str]
    error_class: Mapped[str | None]
    error_detail: Mapped[str | None]
    #: this image's share of the pass, in seconds of device time
    gpu_seconds: Mapped[float | None]


class BatchCounter(Base):
    """How many jobs of a batch are in each state, as the sum over the shards. A single shard may be negative."""

    __tablename__ = "batch_counter"
    __table_args__ = (PrimaryKeyConstraint("batch_id", "shard"), {"postgresql_with": {"fillfactor": "50"}})

    batch_id: Mapped[int] = mapped_column(ForeignKey("batch.id", ondelete="CASCADE"))
    shard: Mapped[int] = mapped_column(SmallInteger)
    scheduled: Mapped[int] = mapped_column(server_default=text("0"))
    queued: Mapped[int] = mapped_column(server_default=text("0"))
    held: Mapped[int] = mapped_column(server_default=text("0"))
    rendering: Mapped[int] = mapped_column(server_default=text("0"))
    succeeded: Mapped[int] = mapped_column(server_default=text("0"))
    failed: Mapped[int] = mapped_column(server_default=text("0"))
    canceled: Mapped[int] = mapped_column(server_default=text("0"))


class Worker(Base):
    """A render process that has said hello. It counts as alive while `heartbeat_at` is younger than the lease."""

    __tablename__ = "worker"

    id: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int] = mapped_column(Integer)
    #: models that it serves, and those in memory now
    models: Mapped[list[str]] = mapped_column(ARRAY(Text))
    resident: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default=text("'{}'"))
    #: device name, memory in bytes, library versions
    device: Mapped[dict[str, Any]]
    images: Mapped[int] = mapped_column(server_default=text("0"))
    #: by model: images_per_second and seconds_per_work, measured lately
    rates: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    #: by model and priority: seconds since the last claim, at the last heartbeat
    claimed: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    #: models that it leaves alone after failures, and why
    resting: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    last_error: Mapped[str | None]
    #: an operator asked it to claim nothing more
    draining_at: Mapped[datetime | None]
    started_at: Mapped[datetime] = _now()
    heartbeat_at: Mapped[datetime] = _now()
    stopped_at: Mapped[datetime | None]


class Asset(Base):
    """An uploaded input image or mask, private to its tenant, stored once for each content."""

    __tablename__ = "asset"
    __table_args__ = (
        UniqueConstraint("tenant_id", "sha256"),
        CheckConstraint("octet_length(sha256) = 32", name="sha256_size"),
        CheckConstraint("width > 0 AND height > 0 AND bytes > 0", name="size_positive"),
    )

    id: Mapped[int] = _id()
    public_id: Mapped[uuid.UUID] = mapped_column(unique=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenant.id"))
    sha256: Mapped[bytes]
    storage_key: Mapped[str]
    content_type: Mapped[str]
    bytes: Mapped[int]
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[datetime] = _now()


class IdempotencyKey(Base):
    """A client's name for one submission: the same key and body find the batch that the first call made."""

    __tablename__ = "idempotency_key"
    __table_args__ = (
        PrimaryKeyConstraint("tenant_id", "key"),
        CheckConstraint("octet_length(request_sha256) = 32", name="sha256_size"),
    )

    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenant.id", ondelete="CASCADE"))
    key: Mapped[str]
    request_sha256: Mapped[bytes]
    batch_id: Mapped[int] = mapped_column(ForeignKey("batch.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = _now()


class WebhookOutbox(Base):
    """An event to deliver, written in the transaction that made it true. The natural key makes it exactly one."""

    __tablename__ = "webhook_outbox"
    __table_args__ = (
        UniqueConstraint("event", "batch_id", "job_id", postgresql_nulls_not_distinct=True),
        Index("ix_webhook_outbox_due", "id", postgresql_where=text("delivered_at IS NULL")),
    )

    id: Mapped[int] = _id()
    event: Mapped[str]
    batch_id: Mapped[int] = mapped_column(ForeignKey("batch.id", ondelete="CASCADE"))
    job_id: Mapped[int | None] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    payload: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = _now()
    delivered_at: Mapped[datetime | None]
