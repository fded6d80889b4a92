"""Tables of jobs and of idempotent submissions."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, DateTime, ForeignKey, Index, Text, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from app.database import Base

STATUSES = ("queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled")
ENDED = ("succeeded", "failed", "cancelled")

JOB_ID = re.compile(r"job_[0-9A-HJKMNP-TV-Z]{26}")


class Job(Base):
    """One request and everything that is known of it."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("status IN ('" + "','".join(STATUSES) + "')", name="status_known"),
        Index("ix_jobs_tenant_id_id", "tenant_id", text("id DESC")),
        Index(
            "ix_jobs_claim",
            "queue",
            text("priority DESC"),
            "id",
            postgresql_where=text("status = 'queued'"),
        ),
        Index(
            "ix_jobs_lease_expires_at",
            "lease_expires_at",
            postgresql_where=text("status IN ('running', 'pausing', 'cancelling')"),
        ),
    )

    id: Mapped[str] = mapped_column(Text, primary_key=True)  # job_ + ULID: ordered by time
    tenant_id: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text, server_default="queued")
    model_id: Mapped[str] = mapped_column(Text)
    requested_revision: Mapped[str | None] = mapped_column(Text)
    revision: Mapped[str | None] = mapped_column(Text)  # 40 hex digits once resolved
    recipe: Mapped[dict[str, Any]] = mapped_column(JSONB)  # resolved: every default filled in
    # The recipe as answers show it, where that is shorter: a poll must not carry megabytes of inline texts.
    shown_recipe: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    recipe_version: Mapped[int]
    constraints: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default="{}")
    queue: Mapped[str] = mapped_column(Text)
    priority: Mapped[int] = mapped_column(server_default="0")
    timeout_seconds: Mapped[int]
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata", JSONB, server_default="{}")
    warnings: Mapped[list[Any]] = mapped_column(JSONB, server_default="[]")

    # The lease. `fence` outdates older attempts; time is the database's clock alone.
    fence: Mapped[int] = mapped_column(BigInteger, server_default="0")
    attempt: Mapped[int] = mapped_column(server_default="0")
    not_before: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))  # delay of a retry
    lease_expires_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    heartbeat_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    num_infrastructure_failures: Mapped[int] = mapped_column(server_default="0")
    num_crashes: Mapped[int] = mapped_column(server_default="0")

    progress: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default="{}")
    stages: Mapped[list[Any]] = mapped_column(JSONB, server_default="[]")
    result: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    report: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    retry_of: Mapped[str | None] = mapped_column(Text)

    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=text("now()"))
    started_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    finished_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class IdempotencyKey(Base):
    """The first answer to a submission that carried an ``Idempotency-Key``."""

    __tablename__ = "idempotency_keys"

    tenant_id: Mapped[str] = mapped_column(Text, primary_key=True)
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    body_sha256: Mapped[str] = mapped_column(Text)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=text("now()"))
