"""What a job's processes say, turned into progress, stages, warnings and events of the job."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from app.attempts.service import Claim, JobEvent
from workers.supervisor.lease import Lease, Update
from workers.supervisor.messages import Message, ProgressMessage, ResolvedMessage, StageMessage, WarningMessage
from workers.supervisor.progress import Progress

_MAX_WARNINGS = 100


class Reporter:
    """Hands the news of one attempt to its lease, and what is left to the write that ends it."""

    def __init__(self, claim: Claim, lease: Lease) -> None:
        self._claim = claim
        self._lease = lease
        self._progress = Progress([stage["technique"] for stage in claim.recipe["stages"]])
        self._is_silent = True  # the phase's process has not told how far it is
        self._num_warnings = 0
        self._unwritten: Update | None = None

    def begin(self, phase: str) -> None:
        """A phase starts."""
        self._progress.begin(phase)
        self._is_silent = True
        self._post(at_once=True)

    def hear(self, message: Message) -> None:
        """Keep what a process says, to be written soon."""
        if isinstance(message, ProgressMessage):
            self._progress.update(message)
            # A user sees at once that a phase works; how far it is may come a second late.
            self._post(at_once=self._is_silent)
            self._is_silent = False
        elif isinstance(message, StageMessage) and self._progress.update_stage(message):
            data = {"index": message.index, "metrics": message.metrics}
            self._post(events=(JobEvent(f"stage.{message.status}", data),))
        elif isinstance(message, ResolvedMessage):
            self._post(revision=message.revision, events=(JobEvent("model.resolved", {"revision": message.revision}),))
        elif isinstance(message, WarningMessage) and self._num_warnings < _MAX_WARNINGS:
            self._num_warnings += 1
            warning = {"code": message.code, "message": message.message, "param": message.param}
            self._post(warnings=(warning,), events=(JobEvent("warning", warning),))

    def flush(self, session: Session) -> None:
        """Write what the lease's thread did not come to. May be called again when the transaction failed."""
        if self._unwritten is None:
            self._unwritten = self._lease.take_pending()
        if self._unwritten is not None:
            self._unwritten.write(session, self._claim)

    def _post(
        self,
        *,
        revision: str | None = None,
        warnings: tuple[dict[str, Any], ...] = (),
        events: tuple[JobEvent, ...] = (),
        at_once: bool = False,
    ) -> None:
        update = Update(self._progress.snapshot(), self._progress.stages, revision, warnings, events)
        self._lease.post(update, at_once=at_once)
