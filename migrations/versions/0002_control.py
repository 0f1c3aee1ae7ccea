"""Pauses, caps, retention, operators, and the rates that workers measure"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "model_control",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("paused_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("raised_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("model", name=op.f("pk_model_control")),
    )
    op.create_table(
        "model_rate",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("seconds_per_work", sa.Double(), nullable=False),
        sa.Column(
            "updated_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("model", name=op.f("pk_model_rate")),
    )
    op.add_column("api_key", sa.Column("operator", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.add_column("batch", sa.Column("work", sa.Double(), server_default=sa.text("0"), nullable=False))
    op.add_column("batch", sa.Column("reordering", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.add_column("batch", sa.Column("retention_seconds", sa.BigInteger(), nullable=True))
    op.create_index(
        "ix_batch_expiring",
        "batch",
        ["finished_at"],
        unique=False,
        postgresql_where=sa.text("retention_seconds IS NOT NULL"),
    )
    op.create_index(
        "ix_job_held",
        "job",
        ["batch_id", "priority", "vt", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'held'"),
    )
    op.create_index(
        "ix_job_unsuccessful",
        "job",
        ["batch_id", "id"],
        unique=False,
        postgresql_where=sa.text("state IN ('failed', 'canceled')"),
    )
    op.add_column("tenant", sa.Column("max_in_flight", sa.Integer(), nullable=True))
    op.add_column("tenant", sa.Column("paused_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column(
        "worker",
        sa.Column("rates", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False),
    )
    op.add_column(
        "worker",
        sa.Column("resting", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False),
    )
    op.add_column(
        "worker",
        sa.Column("claimed", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False),
    )
    op.add_column("worker", sa.Column("draining_at", sa.DateTime(timezone=True), nullable=True))
    op.drop_constraint(op.f("ck_tenant_weight_positive"), "tenant")
    op.create_check_constraint(op.f("ck_tenant_weight_positive"), "tenant", "weight > 0 AND weight < 'Infinity'")
    op.create_check_constraint(op.f("ck_tenant_max_in_flight_positive"), "tenant", "max_in_flight > 0")
    op.create_check_constraint(op.f("ck_batch_retention_positive"), "batch", "retention_seconds > 0")


def downgrade() -> None:
    op.drop_constraint(op.f("ck_tenant_weight_positive"), "tenant")
    op.create_check_constraint(op.f("ck_tenant_weight_positive"), "tenant", "weight > 0")
    op.drop_column("worker", "draining_at")
    op.drop_column("worker", "resting")
    op.drop_column("worker", "claimed")
    op.drop_column("worker", "rates")
    op.drop_column("tenant", "paused_at")
    op.drop_column("tenant", "max_in_flight")
    op.drop_index("ix_job_unsuccessful", table_name="job")
    op.drop_index("ix_job_held", table_name="job", postgresql_where=sa.text("state = 'held'"))
    op.drop_index("ix_batch_expiring", table_name="batch", postgresql_where=sa.text("retention_seconds IS NOT NULL"))
    op.drop_column("batch", "retention_seconds")
    op.drop_column("batch", "reordering")
    op.drop_column("batch", "work")
    op.drop_column("api_key", "operator")
    op.drop_table("model_rate")
    op.drop_table("model_control")
