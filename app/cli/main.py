"""All commands together, and what each kind of failure tells the user."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

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
_MOST_OTHERS = 4  # faults of one request that are written out beside the first

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
        others = (error.problem.get("errors") or [])[1:]
        tell(str(error), hint=error.hint, code=error.code, param=error.param, others=others)
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


def tell(
    message: str,
    *,
    code: str,
    hint: str | None = None,
    param: str | None = None,
    others: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Say on standard error what went wrong: for people, or as JSON where the command speaks JSON.

    ``others`` are what else is wrong with the same request, as the service tells it.
    """
    first = {"code": code, "detail": message, "param": param, "hint": hint}
    if "--json" in sys.argv[1:]:
        problem = {**first, "errors": [first, *others]} if others else first
        sys.stderr.write(json.dumps(problem, ensure_ascii=False) + "\n")
        return
    for fault in (first, *others[:_MOST_OTHERS]):
        detail, where = str(fault["detail"]), fault["param"]
        named = f" ({where})" if where and where not in detail else ""
        errors.print(f"attar: {detail}{named}", style="red", markup=False, highlight=False, soft_wrap=True)
        if fault["hint"]:
            errors.print(f"hint: {fault['hint']}", markup=False, highlight=False, soft_wrap=True)
