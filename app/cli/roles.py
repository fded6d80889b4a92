"""`attar serve` and the roles that it consists of, each a command of its own for production."""

from __future__ import annotations

import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

from app.cli.output import Failed, errors
from app.logs import configure_logging
from app.settings import SettingMissingError, Settings, get_settings

CHECK_SECONDS = 0.5


def register(application: typer.Typer) -> None:
    """Add these commands."""
    for command in (serve, api, dispatcher, worker, migrate, demo):
        application.command()(command)


@contextmanager
def explained() -> Iterator[None]:
    """Turn what keeps a role from starting into a message and an exit code."""
    from sqlalchemy.exc import OperationalError

    from app.local import LocalServersError
    from app.serve import ServeError

    try:
        yield
    except SettingMissingError as error:
        raise Failed(str(error), code="setting_missing", exit_code=2) from error
    except (ServeError, LocalServersError) as error:
        raise Failed(str(error), code="cannot_serve", exit_code=1, hint=error.hint) from error
    except OperationalError as error:
        reason = str(error.orig or error).strip().splitlines()[0]
        hint = "is ATTAR_DATABASE_URL right, and the server up?"
        raise Failed(f"cannot reach the database: {reason}", code="no_database", exit_code=1, hint=hint) from error


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="Port; 0 for any that is free.  [default: 8000]")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, max=64, help="Worker processes; each runs one job.")] = 1,
) -> None:
    """Run API, dispatcher and workers until Ctrl-C, with embedded PostgreSQL and Redis unless others are set."""
    from app.serve import StopRequested, running_service, stop_signals

    settings = _settings(host, port)
    configure_logging(settings, "serve")
    with explained(), stop_signals():
        try:
            with running_service(settings, num_workers=workers, say=_say) as service:
                _say(f"Attar is ready at {service.url} (documentation: {service.url}/docs); Ctrl-C stops it")
                _say(f"In another terminal: {_command()} submit MODEL --recipe int4 --wait")
                while True:
                    time.sleep(CHECK_SECONDS)
                    service.check()
        except StopRequested:
            _say("Stopped")


def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65_535, help="Port.")] = None,
    fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the API alone."""
    import uvicorn

    from app.main import create_app

    settings = _settings(host, port)
    configure_logging(settings, "api")
    with explained():
        _ = settings.required_database_url, settings.required_redis_url
        config = uvicorn.Config(
            create_app(settings),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=settings.log_level == "DEBUG",
            server_header=False,
            timeout_graceful_shutdown=10,
        )
        server = uvicorn.Server(config)
        with suppress(SystemExit):  # its own exit codes mean other things here
            server.run(sockets=[socket.socket(fileno=fd)] if fd is not None else None)
    if not server.started:
        raise Failed("the API did not start; its log says why", code="cannot_serve", exit_code=1)


def dispatcher() -> None:
    """Run the dispatcher alone."""
    from app import dispatcher as role

    settings = get_settings()
    configure_logging(settings, "dispatcher")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with explained():
        _ = settings.required_database_url, settings.required_redis_url
        role.run(settings, stop)


def worker(
    queue: Annotated[str | None, typer.Option(help="The queue to work for.  [default: cpu]")] = None,
) -> None:
    """Run one worker, which works on one job at a time."""
    from app.queue import connect, run_worker

    # Celery warns of root because messages could hold code; ours are JSON and hold the name of a queue.
    warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
    settings = get_settings()
    configure_logging(settings, "worker")
    with explained():
        _ = settings.required_database_url, settings.required_redis_url
        connect(settings)
        run_worker(queue or settings.queue)


def migrate() -> None:
    """Bring the database's tables up to date."""
    from app.migrate import upgrade

    settings = get_settings()
    configure_logging(settings, "migrate")
    with explained():
        upgrade(settings.required_database_url)
    _say("Database migrated")


def demo() -> None:
    """Compress a real model through the real service on this machine, and show what came out."""
    from app.demo import run_demo

    with explained():
        run_demo()


def _settings(host: str | None, port: int | None) -> Settings:
    given = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    return get_settings().model_copy(update=given)


def _command() -> str:
    """How a user of this environment calls the command line."""
    return "attar" if shutil.which("attar") else str(Path(sys.executable).with_name("attar"))


def _say(text: str) -> None:
    errors.print(text, soft_wrap=True)
