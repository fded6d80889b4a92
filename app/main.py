"""Builds the FastAPI app: routers, error handlers, lifespan."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from app import errors, queue
from app.artifacts.router import router as artifacts
from app.body_limit import BodyLimit
from app.catalog.router import router as catalog
from app.database import Database
from app.dependencies import Parts
from app.events.router import router as events
from app.health.router import router as health
from app.jobs.router import router as jobs
from app.jobs.router import submissions
from app.settings import Settings, get_settings
from app.storage import open_storage

DESCRIPTION = """\
Attar makes language models smaller. Submit a model and a recipe; a worker compresses it, opens the result again in a
fresh process, measures what it cost, and lets you download it.

Every error is `application/problem+json`, with a stable `code` and, where a field is at fault, its path in `param`.
"""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The app, for `uvicorn --factory app.main:create_app` and for tests."""
    settings = settings or get_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        database = Database(settings.required_database_url)
        queue.connect(settings)
        app.state.parts = Parts(settings, database, open_storage(settings))
        try:
            yield
        finally:
            database.dispose()

    # Its assets come with a package: a service without the internet shows its page at /docs too.
    app = FastAPIOffline(
        title="Attar",
        summary="Language models made smaller, with proof.",
        description=DESCRIPTION,
        version=version("attar"),
        lifespan=lifespan,
        redoc_url=None,
    )
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes)
    errors.install(app)
    for router in (submissions, jobs, events, artifacts, catalog, health):
        app.include_router(router)
    return app
