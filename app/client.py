"""The Python client of the HTTP interface, which the command line uses too.

AttarError
├── RefusedError       the service answered with a problem: status, code, param, hint
├── UnreachableError   nothing, or nothing that can be understood, answers at the address
├── NoArtifactError    the job has no artifact to download (app.downloads)
├── UnwritableError    a download cannot be written where it shall be (app.downloads)
├── OtherArtifactError the folder of a download holds another job's artifact (app.downloads)
└── DamagedError       a downloaded file is not what its manifest says (app.downloads)
"""

from __future__ import annotations

import errno
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx2

ENDED = frozenset({"succeeded", "failed", "cancelled"})

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_NUM_TRIES = 3


class AttarError(Exception):
    """A call that did not do what it should."""


class RefusedError(AttarError):
    """The service answered, and the answer is no."""

    def __init__(self, problem: Mapping[str, Any], status: int) -> None:
        self.problem = dict(problem)
        self.status = status
        self.code: str = problem.get("code") or f"http_{status}"
        self.param: str | None = problem.get("param")
        self.hint: str | None = problem.get("hint")
        super().__init__(problem.get("detail") or problem.get("title") or HTTPStatus(status).phrase)


class UnreachableError(AttarError):
    """No service answers at the address."""


class NoArtifactError(AttarError):
    """The job has no artifact, or none yet."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        super().__init__(f"job {job['id']} is {job['status']} and has no artifact")
        self.hint = (
            "`attar show` tells why" if job["status"] in ENDED else "a job has one once it has succeeded: `attar watch`"
        )


class UnwritableError(AttarError):
    """A file or folder cannot be written on this machine."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(f"cannot write to {error.filename or folder}: {error.strerror or error}")
        self.hint = (
            "free space and run it again: it goes on where it stopped"
            if error.errno in {errno.ENOSPC, errno.EDQUOT}
            else "choose another folder"
        )


class OtherArtifactError(AttarError):
    """The folder holds another artifact."""

    hint = "choose another folder, or empty this one"

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} holds another artifact, whose files would stay beside this one's")


class DamagedError(AttarError):
    """A file is not what its manifest says."""


class Client:
    """Calls of one service with one key. Use it as a context manager, or close it."""

    def __init__(self, url: str, api_key: str | None = None, *, timeout_seconds: float = 30) -> None:
        self.url = url.rstrip("/")
        headers = {"User-Agent": "attar-client"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        try:
            # A proxy from the environment has nothing to do with a service on this machine.
            trust_env = urlsplit(self.url).hostname not in _LOOPBACK
            self._http = httpx2.Client(
                base_url=self.url, headers=headers, timeout=timeout_seconds, trust_env=trust_env, follow_redirects=False
            )
        except (httpx2.InvalidURL, ValueError) as error:
            raise UnreachableError(f"{url!r} is not an address: {error}") from error

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(self, body: Mapping[str, Any], *, idempotency_key: str | None = None) -> dict[str, Any]:
        """Submit a job. A lost answer is asked for again under one key, and so makes no second job."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        # Preflight may ask a hub about the model: give it time.
        return self._json("POST", "/v1/jobs", json=dict(body), headers=headers, timeout=120)

    def job(self, job_id: str) -> dict[str, Any]:
        """One job."""
        return self._json("GET", f"/v1/jobs/{_part(job_id)}")

    def jobs(
        self,
        *,
        after: str | None = None,
        limit: int | None = None,
        status: str | None = None,
        model: str | None = None,
    ) -> dict[str, Any]:
        """A page of jobs, newest first: ``data``, ``last_id``, ``has_more``."""
        wanted = {"after": after, "limit": limit, "status": status, "model": model}
        return self._json(
            "GET", "/v1/jobs", params={name: value for name, value in wanted.items() if value is not None}
        )

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ask for the job's end."""
        return self._json("POST", f"/v1/jobs/{_part(job_id)}/cancel")

    def report(self, job_id: str) -> dict[str, Any]:
        """What was measured on the job's result."""
        return self._json("GET", f"/v1/jobs/{_part(job_id)}/report")

    def artifacts(self, job_id: str) -> list[dict[str, Any]]:
        """The result's files: ``path``, ``size_bytes``, ``sha256``."""
        files: list[dict[str, Any]] = self._json("GET", f"/v1/jobs/{_part(job_id)}/artifacts")["data"]
        return files

    def techniques(self) -> dict[str, Any]:
        """Every technique with the JSON Schema of its options."""
        return self._json("GET", "/v1/techniques")

    def recipes(self) -> dict[str, Any]:
        """Every preset with its recipe."""
        return self._json("GET", "/v1/recipes")

    def ready(self) -> bool:
        """Whether the service and what it needs answer."""
        try:
            return self._http.get("/readyz", timeout=5).status_code == HTTPStatus.OK
        except httpx2.TransportError:
            return False

    def watch(
        self,
        job_id: str,
        *,
        poll_seconds: float = 1.0,
        patience_seconds: float = 120.0,
        between: Callable[[], None] | None = None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> Iterator[dict[str, Any]]:
        """The job, again and again until it has ended; the last one has.

        A service that did answer, and then does not or restarts, is waited for ``patience_seconds``; ``on_lost`` is
        called when the wait begins. ``between`` is called after each wait, and may raise.
        """
        lost_since: float | None = None
        answered = False
        while True:
            try:
                job = self.job(job_id)
            except (UnreachableError, RefusedError) as error:
                if isinstance(error, RefusedError) and error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
                    raise
                now = time.monotonic()
                if lost_since is None:
                    lost_since = now
                    if answered:
                        on_lost()
                if not answered or now - lost_since > patience_seconds:
                    raise
            else:
                lost_since, answered = None, True
                yield job
                if job["status"] in ENDED:
                    return
            time.sleep(poll_seconds)
            if between is not None:
                between()

    @contextmanager
    def open_artifact(self, job_id: str, path: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """The answer to a request for a file, its body not read yet; a refusal other than 416 raises."""
        url = f"/v1/jobs/{_part(job_id)}/artifacts/{quote(path)}"
        with (
            _reachable(self.url),
            self._http.stream("GET", url, headers={"Accept-Encoding": "identity", **headers}) as response,
        ):
            if response.is_error and response.status_code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                response.read()
                raise _refusal(response)
            yield response

    def _json(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        for num_left in reversed(range(_NUM_TRIES)):
            try:
                with _reachable(self.url):
                    response = self._http.request(
                        method,
                        path,
                        params=params,
                        json=json,
                        headers=headers,
                        timeout=timeout or self._http.timeout,
                    )
            except UnreachableError as error:
                # A connection that broke half-way is worth another try: every call here may be repeated.
                if num_left and isinstance(error.__cause__, (httpx2.RemoteProtocolError, httpx2.ReadError)):
                    time.sleep(0.2)
                    continue
                raise
            break
        if response.is_error:
            raise _refusal(response)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UnreachableError(f"what answers at {self.url} is not Attar")
        return answer


@contextmanager
def _reachable(url: str) -> Iterator[None]:
    try:
        yield
    except httpx2.TransportError as error:
        reason = str(error) or type(error).__name__
        raise UnreachableError(f"no answer from {url}: {reason}") from error


def _refusal(response: httpx2.Response) -> AttarError:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict) or "status" not in problem:
        return UnreachableError(f"what answers at {response.url} is not Attar: HTTP status {response.status_code}")
    return RefusedError(problem, response.status_code)


def _part(identifier: str) -> str:
    """An id as one part of a path, whatever a user typed."""
    return quote(identifier, safe="") or "-"
