"""Jobs, attempts, events, artifacts and API keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

NOW = sa.text("now()")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    _create_jobs()
    _create_children_of_jobs()
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("prefix", sa.Text, nullable=False),
        sa.Column("key_sha256", sa.Text, nullable=False),
        sa.Column("scopes", ARRAY(sa.Text), server_default="{}", nullable=False),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.Column("expires_at", TIME),
        sa.Column("revoked_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("key_sha256", name="uq_api_keys_key_sha256"),
    )
    op.create_index("ix_api_keys_tenant_id", "api_keys", ["tenant_id"])


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("status", sa.Text, server_default="queued", nullable=False),
        sa.Column("model_id", sa.Text, nullable=False),
        sa.Column("requested_revision", sa.Text),
        sa.Column("revision", sa.Text),
        sa.Column("recipe", JSONB, nullable=False),
        sa.Column("shown_recipe", JSONB),
        sa.Column("recipe_version", sa.Integer, nullable=False),
        sa.Column("constraints", JSONB, server_default="{}", nullable=False),
        sa.Column("queue", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, server_default="0", nullable=False),
        sa.Column("timeout_seconds", sa.Integer, nullable=False),
        sa.Column("metadata", JSONB, server_default="{}", nullable=False),
        sa.Column("warnings", JSONB, server_default="[]", nullable=False),
        sa.Column("fence", sa.BigInteger, server_default="0", nullable=False),
        sa.Column("attempt", sa.Integer, server_default="0", nullable=False),
        sa.Column("not_before", TIME),
        sa.Column("lease_expires_at", TIME),
        sa.Column("heartbeat_at", TIME),
        sa.Column("num_infrastructure_failures", sa.Integer, server_default="0", nullable=False),
        sa.Column("num_crashes", sa.Integer, server_default="0", nullable=False),
        sa.Column("progress", JSONB, server_default="{}", nullable=False),
        sa.Column("stages", JSONB, server_default="[]", nullable=False),
        sa.Column("result", JSONB),
        sa.Column("report", JSONB),
        sa.Column("error", JSONB),
        sa.Column("retry_of", sa.Text),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.Column("started_at", TIME),
        sa.Column("finished_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.CheckConstraint(
            "status IN ('queued','running','pausing','paused','cancelling','succeeded','failed','cancelled')",
            name=op.f("ck_jobs_status_known"),
        ),
    )
    op.create_index("ix_jobs_tenant_id_id", "jobs", ["tenant_id", sa.text("id DESC")])
    op.create_index(
        "ix_jobs_claim",
        "jobs",
        ["queue", sa.text("priority DESC"), "id"],
        postgresql_where=sa.text("status = 'queued'"),
    )
    op.create_index(
        "ix_jobs_lease_expires_at",
        "jobs",
        ["lease_expires_at"],
        postgresql_where=sa.text("status IN ('running', 'pausing', 'cancelling')"),
    )


def _create_children_of_jobs() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("body_sha256", sa.Text, nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "key", name="pk_idempotency_keys"),
        _belongs_to_job("idempotency_keys"),
    )
    op.create_table(
        "attempts",
        sa.Column("id", sa.BigInteger, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text),
        sa.Column("error", JSONB),
        sa.Column("exit_signal", sa.Integer),
        sa.Column("peak_memory_bytes", sa.BigInteger),
        sa.Column("started_at", TIME, server_default=NOW, nullable=False),
        sa.Column("ended_at", TIME),
        sa.PrimaryKeyConstraint("id", name="pk_attempts"),
        _belongs_to_job("attempts"),
        sa.UniqueConstraint("job_id", "fence", name="uq_attempts_job_id_fence"),
    )
    op.create_index("ix_attempts_job_id", "attempts", ["job_id"])
    op.create_table(
        "events",
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("sequence", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("data", JSONB, server_default="{}", nullable=False),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "sequence", name="pk_events"),
        _belongs_to_job("events"),
    )
    op.create_table(
        "artifacts",
        sa.Column("id", sa.BigInteger, autoincrement=True, nullable=False),
        sa.Column("job_id", sa.Text, nullable=False),
        sa.Column("fence", sa.BigInteger, nullable=False),
        sa.Column("prefix", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", TIME, server_default=NOW, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_artifacts"),
        _belongs_to_job("artifacts"),
        sa.UniqueConstraint("job_id", name="uq_artifacts_job_id"),
    )
    op.create_table(
        "artifact_files",
        sa.Column("artifact_id", sa.BigInteger, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("artifact_id", "path", name="pk_artifact_files"),
        sa.ForeignKeyConstraint(
            ["artifact_id"], ["artifacts.id"], name="fk_artifact_files_artifact_id_artifacts", ondelete="CASCADE"
        ),
    )


def _belongs_to_job(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=f"fk_{table}_job_id_jobs", ondelete="CASCADE")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '5s'")
    for table in ("api_keys", "artifact_files", "artifacts", "events", "attempts", "idempotency_keys", "jobs"):
        op.drop_table(table)
