"""`attar keys`: API keys, made and revoked in the database directly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from app.cli.connection import open_database
from app.cli.output import AsJson, Failed, console, errors, plain, print_json

if TYPE_CHECKING:
    from app.keys.models import ApiKey

application = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)


@application.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    tenant: Annotated[str, typer.Option(help="Whose jobs it sees.")] = "default",
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown once."""
    from app.errors import ServiceError
    from app.keys import service

    with open_database() as database:
        try:
            with database.transaction() as session:
                key, secret = service.create(session, name, tenant)
        except ServiceError as error:
            raise Failed(str(error), code=error.code, exit_code=2, hint=error.hint) from error
    if as_json:
        print_json({**_view(key), "api_key": secret})
        return
    console.print(secret, soft_wrap=True)
    errors.print(f"{key.id} of tenant {key.tenant_id}; keep the key, it is not shown again", soft_wrap=True)


@application.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """List every key; never the keys themselves."""
    from app.keys import service

    with open_database() as database, database.transaction() as session:
        keys = service.list_keys(session)
    if as_json:
        print_json({"object": "list", "data": [_view(key) for key in keys]})
        return
    table = Table(
        Column("id", no_wrap=True, overflow="fold"),
        "name",
        "tenant",
        "begins with",
        "created",
        "revoked",
        box=None,
        pad_edge=False,
    )
    for key in keys:
        revoked = f"{key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else "-"
        created = f"{key.created_at:%Y-%m-%d %H:%M}"
        table.add_row(key.id, plain(key.name), plain(key.tenant_id), plain(key.prefix), created, revoked)
    console.print(table)


@application.command()
def revoke(key_id: Annotated[str, typer.Argument(metavar="ID")], as_json: AsJson = False) -> None:
    """Make a key useless from now on."""
    from app.errors import ServiceError
    from app.keys import service

    with open_database() as database:
        try:
            with database.transaction() as session:
                key = service.revoke(session, key_id)
        except ServiceError as error:
            raise Failed(str(error), code=error.code, exit_code=3, hint=error.hint) from error
    if as_json:
        print_json(_view(key))
        return
    console.print(f"{key.id} revoked")


def _view(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "tenant": key.tenant_id,
        "prefix": key.prefix,
        "created_at": key.created_at.isoformat(),
        "expires_at": key.expires_at.isoformat() if key.expires_at else None,
        "revoked_at": key.revoked_at.isoformat() if key.revoked_at else None,
    }
