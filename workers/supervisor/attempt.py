"""One attempt, from a claim to its end: fetch, compress, certify, publish, and the one write that ends it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy.orm import Session

from app.artifacts import service as artifacts
from app.attempts import service as attempts
from app.attempts.service import Claim, FailureDetails, Outcome
from app.database import OUTAGES, Database
from app.settings import Settings
from app.storage import Storage, StorageError
from workers.errors import CrashError, InfrastructureError, JobError, UserError, is_disk_full
from workers.supervisor.folders import WorkFolder
from workers.supervisor.lease import DatabaseStillDownError, Lease, insist
from workers.supervisor.messages import DoneMessage, Message, ProgressMessage, Violation, loads
from workers.supervisor.phases import Interrupted, PhaseFailedError, Watch, run_phase
from workers.supervisor.processes import JobProcess
from workers.supervisor.progress import PHASE_WEIGHTS
from workers.supervisor.reporter import Reporter
from workers.supervisor.request import copy_artifact, write_request

logger = logging.getLogger(__name__)

_MAX_REPORT_BYTES = 16 * 1024 * 1024

Ending = Callable[[Session], Outcome]  # the write that ends an attempt; called again when the connection broke


class Processes(Protocol):
    """Where the processes of an attempt come from."""

    def obtain(self, phase: str, log: Path) -> JobProcess:
        """A process for ``phase``, whose output goes to ``log``."""

    def prepare(self) -> None:
        """See that a warm process waits for the next phase."""


class Attempt:
    """One try at one job under one fence."""

    def __init__(
        self, settings: Settings, database: Database, storage: Storage, claim: Claim, stopping: threading.Event
    ) -> None:
        self._settings = settings
        self._database = database
        self._storage = storage
        self._claim = claim
        self._stopping = stopping
        self._lease = Lease(settings, database, claim)
        self._reporter = Reporter(claim, self._lease)
        self._peak_memory_bytes: int | None = None
        self._stores = False  # whether storage may hold files under our fence
        self._names = {"job_id": claim.job_id, "fence": claim.fence}  # for log records

    def run(self, processes: Processes) -> Outcome:
        """Try the job and record how that ended. Raises DatabaseStillDownError when it cannot be recorded."""
        with ExitStack() as folders:
            with self._lease:
                end = self._try(processes, folders)
            # The thread that beats has ended: nothing it writes can come after what follows.
            outcome = self._record(end)
        self._tidy(outcome)
        return outcome

    def _try(self, processes: Processes, folders: ExitStack) -> Ending:
        """Do the work; the write that ends the attempt, however it went."""
        try:
            return self._work(processes, folders)
        except Interrupted as interruption:
            return self._interrupted(interruption)
        except PhaseFailedError as failure:
            return self._failed(failure.error, failure)
        except JobError as error:
            return self._failed(error)
        except StorageError:
            logger.exception("storage failed", extra=self._names)
            return self._failed(InfrastructureError("storage_unavailable", "The storage did not take the artifact."))
        except (*OUTAGES, OSError) as error:
            logger.exception("something of the worker's own failed", extra=self._names)
            if is_disk_full(error):
                return self._failed(
                    InfrastructureError("disk_full", "The worker's disk is full.", hint="Free space on the worker.")
                )
            return self._failed(InfrastructureError("worker_failed", f"The worker failed: {type(error).__name__}"))
        except Exception:
            logger.exception("the supervisor failed", extra=self._names)
            return self._failed(_defect())

    def _work(self, processes: Processes, folders: ExitStack) -> Ending:
        """Do the three phases and publish."""
        claim = self._claim
        watch = Watch(self._settings, self._lease, self._stopping, claim.timeout_seconds)
        folder = folders.enter_context(WorkFolder(self._settings.work_dir, claim.job_id, claim.fence)).path
        write_request(self._settings, claim, folder)
        copy_artifact(self._database, self._storage, claim, folder, watch.check)
        done = DoneMessage(event="done")
        for phase in PHASE_WEIGHTS:
            done = self._phase(phase, folder, processes, watch)
        artifact = folder / "artifact"
        report = _read_report(artifact / "report.json")
        watch.check()
        self._stores = True
        published = artifacts.publish(self._storage, artifact, job_id=claim.job_id, fence=claim.fence)
        broken = attempts.error_json(_violated(done.constraints_violated)) if done.constraints_violated else None

        def end(session: Session) -> Outcome:
            self._reporter.flush(session)
            return attempts.finish(
                session,
                claim,
                "failed" if broken else "succeeded",
                result=done.result,
                report=report,
                error=broken,
                published=published,
                details=FailureDetails(peak_memory_bytes=self._peak_memory_bytes),
            )

        return end

    def _phase(self, phase: str, folder: Path, processes: Processes, watch: Watch) -> DoneMessage:
        watch.check()
        self._reporter.begin(phase)
        log = folder / "logs" / f"{phase}.log"
        order = {
            "phase": phase,
            "work": str(folder),
            "num_threads": self._settings.job_threads,
            "memory_limit_bytes": self._settings.memory_limit_bytes,
        }
        prepared = False

        def hear(message: Message) -> None:
            nonlocal prepared
            self._reporter.hear(message)
            # Neither early, when it would only hold memory, nor while certify measures speed.
            if not prepared and phase == "compress" and _is_half_done(message):
                prepared = True
                processes.prepare()

        done = run_phase(processes.obtain(phase, log), order, log=log, watch=watch, hear=hear)
        self._saw_memory(done.peak_memory_bytes)
        return done

    def _interrupted(self, interruption: Interrupted) -> Ending:
        logger.info("stopping: %s", interruption.reason, extra=self._names)
        if interruption.reason == "lost":
            return lambda _: "lost"
        if interruption.reason == "cancelled":
            return lambda session: attempts.finish(session, self._claim, "cancelled")
        return lambda session: attempts.release(session, self._claim)

    def _failed(self, error: JobError, failure: PhaseFailedError | None = None) -> Ending:
        logger.warning("failed with %s: %s", error.code, error.message, extra=self._names)
        if failure is not None:
            self._saw_memory(failure.ended.peak_memory_bytes)
        details = FailureDetails(
            exit_signal=failure.ended.signal if failure and error.code == "process_killed" else None,
            peak_memory_bytes=self._peak_memory_bytes,
            log_tail=failure.log_tail if failure and error.blame == "crash" else None,
        )

        def end(session: Session) -> Outcome:
            self._reporter.flush(session)
            return attempts.fail_attempt(session, self._claim, error, details)

        return end

    def _record(self, end: Ending) -> Outcome:
        try:
            return insist(self._database, end, self._stopping)
        except DatabaseStillDownError:
            raise
        except Exception:
            logger.exception("the database refused what there was to record", extra=self._names)
            return insist(
                self._database, lambda session: attempts.fail_attempt(session, self._claim, _defect()), self._stopping
            )

    def _saw_memory(self, peak_memory_bytes: int | None) -> None:
        if peak_memory_bytes is not None:
            self._peak_memory_bytes = max(peak_memory_bytes, self._peak_memory_bytes or 0)

    def _tidy(self, outcome: Outcome) -> None:
        """Remove from storage what no row names: our own files when they were not taken, and earlier attempts'."""
        ended = outcome in ("succeeded", "failed", "cancelled")
        if not self._stores and not (ended and self._claim.attempt > 1):
            return
        try:
            with self._database.transaction() as session:
                fences = attempts.unnamed_fences(session, self._claim)
        except OUTAGES:
            logger.exception("files of an ended attempt may be left in storage", extra=self._names)
            return
        for fence in fences:
            if ended or fence == self._claim.fence:
                artifacts.discard(self._storage, artifacts.artifact_prefix(self._claim.job_id, fence))


def _is_half_done(message: Message) -> bool:
    return isinstance(message, ProgressMessage) and message.fraction >= 0.5


def _defect() -> CrashError:
    return CrashError("internal_error", "Attar itself failed; the worker's log says where.")


def _read_report(path: Path) -> dict[str, Any]:
    """The report that certify wrote. Raises CrashError when there is none."""
    with suppress(OSError, ValueError):
        if path.stat().st_size <= _MAX_REPORT_BYTES and not path.is_symlink():
            report = loads(path.read_bytes())
            if isinstance(report, dict):
                return report
    raise CrashError("report_missing", "The certify process ended without a report that can be read.")


def _violated(violations: list[Violation]) -> UserError:
    told = "; ".join(f"{item.name} is {item.limit:.10g} and the result has {item.value:.10g}" for item in violations)
    return UserError(
        "constraint_violated",
        f"The result breaks what the job asks for: {told}.",
        param=f"constraints.{violations[0].name}",
        hint="The artifact is kept. Choose a gentler recipe, or allow more.",
    )
