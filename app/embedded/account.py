"""Who the embedded servers run as: the user who starts them, or a dedicated account where that is root.

PostgreSQL refuses to run as root, and a server should own no more than its data. As root everything of the servers
lies under ``/var/lib/attar``, because a dedicated account cannot, and should not, reach into a home folder.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from app.embedded.errors import LocalServersError

SYSTEM_USER = "_attar"
SYSTEM_FOLDER = Path("/var/lib/attar")


class UserArguments(TypedDict, total=False):
    """Arguments of :class:`subprocess.Popen` that start a process as another user."""

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True)
class Account:
    """The account of the servers; null ids mean the one of this process."""

    uid: int | None = None
    gid: int | None = None
    shared_folder: Path | None = None

    def as_user(self) -> UserArguments:
        """How :mod:`subprocess` starts a process as this account."""
        if self.uid is None or self.gid is None:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def own(self, path: Path) -> None:
        """Give ``path`` to this account."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)


def servers_account() -> Account:
    """The account to run servers as; made when root starts them for the first time."""
    if os.geteuid() != 0:
        return Account()
    entry = _system_user()
    SYSTEM_FOLDER.mkdir(mode=0o711, parents=True, exist_ok=True)
    return Account(entry.pw_uid, entry.pw_gid, SYSTEM_FOLDER)


def _system_user() -> pwd.struct_passwd:
    with suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    useradd = shutil.which("useradd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    reason = "useradd is not installed"
    if useradd is not None:
        command = [useradd, "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
        result = subprocess.run(
            [*command, "--shell", "/usr/sbin/nologin", SYSTEM_USER], capture_output=True, text=True, check=False
        )
        reason = result.stderr.strip()
    try:
        return pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        raise LocalServersError(
            f"PostgreSQL does not run as root, and the account {SYSTEM_USER} for it could not be made: {reason}",
            hint=f"make a system user named {SYSTEM_USER}, start Attar as an ordinary user, "
            "or set ATTAR_DATABASE_URL and ATTAR_REDIS_URL",
        ) from None
