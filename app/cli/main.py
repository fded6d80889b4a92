"""All commands together, and what each kind of failure tells the user."""

from __future__ import annotations

import json
import sys

import typer

from app.cli import catalog, jobs, keys, roles, transfer
from app.cli.output import Failed, errors
from app.client import (
    AttarError,
    NoArtifactError,
    OtherArtifactError,
    RefusedError,
    UnreachableError,
    UnwritableError,
)
from app.settings import SettingInvalidError

WRONG_USE, REFUSED, UNREACHABLE = 2, 3, 4

application = typer.Typer(
    name="attar",
    help="Make language models smaller, as a service.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
application.add_typer(keys.application, name="keys")
for commands in (roles, jobs, transfer, catalog):
    commands.register(application)


def main() -> None:
    """Run the command that the arguments name, and exit with its code."""
    try:
        application()
    except RefusedError as error:
        tell(str(error), hint=error.hint, code=error.code, param=error.param)
        sys.exit(REFUSED)
    except UnreachableError as error:
        tell(str(error), hint="is `attar serve` running? ATTAR_URL names another address", code="unreachable")
        sys.exit(UNREACHABLE)
    except (UnwritableError, OtherArtifactError) as error:
        tell(str(error), hint=error.hint, code="cannot_write")
        sys.exit(WRONG_USE)
    except NoArtifactError as error:
        tell(str(error), hint=error.hint, code="artifact_not_found")
        sys.exit(REFUSED)
    except AttarError as error:
        tell(str(error), code="damaged_download")
        sys.exit(1)
    except SettingInvalidError as error:
        tell(str(error), code="setting_invalid")
        sys.exit(WRONG_USE)
    except Failed as error:
        tell(str(error), hint=error.hint, code=error.code)
        sys.exit(error.exit_code)


def tell(message: str, *, code: str, hint: str | None = None, param: str | None = None) -> None:
    """Say on standard error what went wrong: for people, or as JSON where the command speaks JSON."""
    if "--json" in sys.argv[1:]:
        problem = {"code": code, "detail": message, "param": param, "hint": hint}
        sys.stderr.write(json.dumps(problem, ensure_ascii=False) + "\n")
        return
    where = f" ({param})" if param and param not in message else ""
    errors.print(f"attar: {message}{where}", style="red", markup=False, highlight=False, soft_wrap=True)
    if hint:
        errors.print(f"hint: {hint}", markup=False, highlight=False, soft_wrap=True)
