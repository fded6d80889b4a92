"""Every setting of the service, read from the environment with the prefix ``ATTAR_``."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class SettingInvalidError(ValueError):
    """A setting has a value that cannot be."""


class SettingMissingError(RuntimeError):
    """A role was started without a setting that it needs."""


class Settings(BaseSettings):
    """The settings of one process. A path below ``home`` that is not set follows ``home``."""

    model_config = SettingsConfigDict(env_prefix="ATTAR_", env_ignore_empty=True, extra="ignore", frozen=True)

    # Where things are. Null URLs mean the embedded servers, which `attar serve` starts.
    database_url: Annotated[str | None, Field(repr=False)] = None  # repr=False: they hold passwords
    redis_url: Annotated[str | None, Field(repr=False)] = None
    home: Path = Path("~/.attar")
    # Folders that `file:` models and datasets may lie in, separated like PATH in the environment.
    model_roots: Annotated[list[Path], NoDecode] = Field(default_factory=lambda data: [data["home"] / "models"])
    # A folder (file:///…) or a bucket (s3://bucket/prefix and what else obstore reads); null for home/storage.
    storage_url: str | None = None
    work_dir: Path = Field(default_factory=lambda data: data["home"] / "work")  # folders of running attempts

    # The API.
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    max_body_bytes: Annotated[int, Field(ge=1)] = 16 * 1024 * 1024
    hub_timeout_seconds: Annotated[float, Field(gt=0)] = 10

    # Leases and the loops that watch them.
    lease_seconds: Annotated[float, Field(gt=0)] = 90
    heartbeat_seconds: Annotated[float, Field(gt=0)] = 15
    status_poll_seconds: Annotated[float, Field(gt=0)] = 1
    reap_seconds: Annotated[float, Field(gt=0)] = 5
    dispatch_seconds: Annotated[float, Field(gt=0)] = 1

    # The work.
    queue: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")] = "cpu"
    num_threads: Annotated[int | None, Field(ge=1)] = None  # of a job's process; null for every core
    memory_limit_bytes: Annotated[int | None, Field(ge=1)] = None

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("home", "work_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: object) -> object:
        return [part for part in value.split(os.pathsep) if part] if isinstance(value, str) else value

    @field_validator("model_roots")
    @classmethod
    def _absolute_roots(cls, value: list[Path]) -> list[Path]:
        return [root.expanduser().absolute() for root in value]

    @field_validator("database_url")
    @classmethod
    def _postgresql(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("postgresql://", "postgres://", "postgresql+psycopg://")):
            raise ValueError("must begin with postgresql://")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("redis://", "rediss://")):
            raise ValueError("must begin with redis:// or rediss://")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @property
    def required_database_url(self) -> str:
        """The database's URL, for a role that cannot do without."""
        return _required(self.database_url, "ATTAR_DATABASE_URL")

    @property
    def required_redis_url(self) -> str:
        """The broker's URL, for a role that cannot do without."""
        return _required(self.redis_url, "ATTAR_REDIS_URL")

    @property
    def job_threads(self) -> int:
        """Threads that a job's process computes with."""
        return self.num_threads or os.cpu_count() or 1


def _required(value: str | None, name: str) -> str:
    if value is None:
        raise SettingMissingError(
            f"set {name}, as every process that runs by itself needs it; `attar serve` has all of them in one, "
            "`--workers N` as many workers"
        )
    return value


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process, read once; raises SettingInvalidError, which names the variable."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(["ATTAR", *(str(part) for part in first["loc"][:1])]).upper()
        raise SettingInvalidError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from error
