"""Logs: one line a record, written as ``key=value``, with the job named wherever one is concerned.

Give a job's id as ``extra={"job_id": job_id}``; whatever else is in ``extra`` becomes a key of its own.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

from app.settings import Settings

_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_QUIET = ("httpx", "httpx2", "httpcore2", "botocore", "alembic.runtime.plugins")


class LineFormatter(logging.Formatter):
    """Formats a record as one line; newlines and control characters in values are escaped."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "role": self.role,
            "logger": record.name,
        }
        fields |= {key: value for key, value in vars(record).items() if key not in _OWN_FIELDS and value is not None}
        fields["message"] = record.getMessage()
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return " ".join(f"{key}={_quoted(str(value))}" for key, value in fields.items())


def _quoted(value: str) -> str:
    """``value`` as it is where that is unambiguous, else as a JSON string: no newline ever survives."""
    plain = value.isascii() and value.isprintable() and value != "" and not set(value) & set(' "=\\')
    return value if plain else json.dumps(value)


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that a second call replaces it and leaves other handlers alone."""


def configure_logging(settings: Settings, role: str) -> None:
    """Send every log record of this process to standard error, one line each."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(LineFormatter(role))
    root = logging.getLogger()
    root.handlers = [other for other in root.handlers if not isinstance(other, _Handler)]
    root.addHandler(handler)
    root.setLevel(settings.log_level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
