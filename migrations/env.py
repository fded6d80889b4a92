"""What alembic runs: one migration a transaction, on the connection that ``app.migrate`` hands over."""

from __future__ import annotations

from alembic import context

from app.artifacts import models as _artifacts
from app.attempts import models as _attempts
from app.database import Base
from app.events import models as _events
from app.jobs import models as _jobs
from app.keys import models as _keys

# Importing a domain's models is what puts its tables into the metadata.
TABLES = (_jobs, _attempts, _events, _artifacts, _keys)

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transaction_per_migration=True,
    compare_server_default=True,
)
with context.begin_transaction():
    context.run_migrations()
