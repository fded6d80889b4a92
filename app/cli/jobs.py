"""The life of a job: `attar submit`, `list`, `show`, `watch`, `cancel`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Column, Table

from app.cli.connection import open_client
from app.cli.display import JobDisplay, describe
from app.cli.output import (
    AsJson,
    Failed,
    console,
    duration,
    errors,
    number,
    plain,
    print_json,
    size,
    techniques_of,
)
from app.cli.recipe_file import read_recipe
from app.client import Client, RefusedError

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


def register(application: typer.Typer) -> None:
    """Add these commands."""
    application.command()(submit)
    application.command("list")(list_jobs)
    for command in (show, watch, cancel):
        application.command()(command)


def submit(
    model: Annotated[str, typer.Argument(help="A hub id, file:NAME below ATTAR_MODEL_ROOTS, or job:ID.")],
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="FILE or PRESET", help="A JSON or YAML file (- for stdin).")
    ] = "int4",
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit of a hub model.")] = None,
    constraint: Annotated[
        list[str] | None, typer.Option("--constraint", metavar="NAME=VALUE", help="Such as max_size_bytes=140000000.")
    ] = None,
    metadata: Annotated[list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE")] = None,
    queue: Annotated[str | None, typer.Option(help="The workers' queue.")] = None,
    priority: Annotated[int | None, typer.Option(help="Higher runs first.")] = None,
    timeout_seconds: Annotated[int | None, typer.Option(help="Seconds after which an attempt fails.")] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="Submitting again with it makes no second job.")] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Stay until the job ends; exit with its outcome.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job."""
    body: dict[str, Any] = {"model": {"id": model}, "recipe": read_recipe(recipe)}
    if revision is not None:
        body["model"]["revision"] = revision
    optional = {
        "constraints": {name: _number(value) for name, value in _pairs(constraint, "--constraint").items()},
        "metadata": _pairs(metadata, "--metadata"),
        "queue": queue,
        "priority": priority,
        "timeout_seconds": timeout_seconds,
    }
    body |= {name: value for name, value in optional.items() if value not in (None, {})}
    with open_client() as client:
        try:
            job = client.submit(body, idempotency_key=idempotency_key)
        except RefusedError as error:
            if error.param == "model.id" and Path(model).exists():
                error.hint = f"the folder must lie below ATTAR_MODEL_ROOTS; it is then named file:{Path(model).name}"
            raise
        if not as_json:
            console.print(f"{job['id']} {job['status']}", soft_wrap=True)
            for warning in job.get("warnings", []):
                errors.print(f"warning: {plain(warning['message'])}", style="yellow", soft_wrap=True)
        if wait:
            _follow(client, job["id"], as_json=as_json, every_change=False)
    if as_json:
        print_json(job)
    else:
        errors.print(f"follow it with: attar watch {job['id']}", soft_wrap=True)


def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs of this status.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs of this model.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many.")] = 20,
    after: Annotated[str | None, typer.Option(help="Go on after this job.")] = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with open_client() as client:
        page = client.jobs(after=after, limit=limit, status=status, model=model)
    if as_json:
        print_json(page)
        return
    table = Table(
        Column("id", no_wrap=True, overflow="fold"),
        "status",
        "",
        "model",
        "recipe",
        "created",
        box=None,
        pad_edge=False,
    )
    for job in page["data"]:
        fraction = float(job["progress"].get("fraction") or 0)
        progress = f"{100 * fraction:.0f} %" if job["status"] in ("running", "pausing", "cancelling") else ""
        created = str(job["created_at"])[:16].replace("T", " ")
        table.add_row(job["id"], job["status"], progress, plain(job["model"]["id"]), plain(techniques_of(job)), created)
    console.print(table)
    if page["has_more"]:
        errors.print(f"more: attar list --after {page['last_id']}", soft_wrap=True)


def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show a job."""
    with open_client() as client:
        job = client.job(job_id)
    if as_json:
        print_json(job)
        return
    revision = f" at {job['model']['revision'][:12]}" if job["model"].get("revision") else ""
    lines = {
        "job": job["id"],
        "status": describe(job),
        "model": job["model"]["id"] + revision,
        "recipe": techniques_of(job),
        "created": job["created_at"],
        "started": job["started_at"],
        "finished": job["finished_at"],
        **{f"metadata {key}": value for key, value in job["metadata"].items()},
    }
    table = Table.grid(padding=(0, 2))
    for name, value in lines.items():
        if value is not None:
            table.add_row(name, plain(value))
    console.print(table)
    _print_outcome(job)


def watch(job_id: JobId, as_json: AsJson = False) -> None:
    """Follow a job until it ends; with --json a line for each change."""
    with open_client() as client:
        _follow(client, job_id, as_json=as_json, every_change=True)


def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Cancel a job."""
    with open_client() as client:
        job = client.cancel(job_id)
    if as_json:
        print_json(job)
    else:
        console.print(f"{job['id']} {job['status']}", soft_wrap=True)


def _follow(client: Client, job_id: str, *, as_json: bool, every_change: bool) -> NoReturn:
    """Show a job until it ends, then exit with the code that tells how."""
    job: dict[str, Any] = {}
    try:
        if as_json:
            for newer in client.watch(job_id, on_lost=_tell_lost):
                if every_change and newer != job:
                    print_json(newer, one_line=True)
                job = newer
            if not every_change:
                print_json(job)
        else:
            with JobDisplay(errors) as display:
                for job in client.watch(job_id, on_lost=_tell_lost):
                    display.show(job)
            console.print(f"{job['id']} {job['status']}", soft_wrap=True)
            _print_outcome(job)
    except KeyboardInterrupt:
        errors.print(f"the job goes on; follow it with: attar watch {job_id}", soft_wrap=True)
        raise typer.Exit(130) from None
    raise typer.Exit(0 if job["status"] == "succeeded" else 1)


def _tell_lost() -> None:
    errors.print("the service does not answer; trying again for two minutes", style="yellow", soft_wrap=True)


def _print_outcome(job: Mapping[str, Any]) -> None:
    for warning in job["warnings"]:
        console.print(f"warning: {plain(warning['message'])}", style="yellow", soft_wrap=True)
    if job["error"]:
        error = job["error"]
        where = f" ({error['param']})" if error.get("param") else ""
        console.print(f"{plain(error['code'])}: {plain(error['message'])}{where}", style="red", soft_wrap=True)
        if error.get("hint"):
            console.print(f"hint: {plain(error['hint'])}", soft_wrap=True)
    result = job["result"]
    if result and result.get("size_bytes") is not None:
        ratio = number(result.get("compression_ratio"), 2)
        before, after = size(result.get("original_size_bytes")), size(result["size_bytes"])
        change = f"{ratio} times smaller" if (result.get("compression_ratio") or 0) >= 1.005 else "no smaller on disk"
        console.print(f"{before} before, {after} after: {change}", soft_wrap=True)
    if result and result.get("perplexity") is not None:
        before, after = number(result.get("original_perplexity"), 2), number(result["perplexity"], 2)
        console.print(f"perplexity {before} before, {after} after", soft_wrap=True)
    if result and result.get("accuracy") is not None:
        before, after = number(result.get("original_accuracy"), 4), number(result["accuracy"], 4)
        console.print(f"accuracy {before} before, {after} after", soft_wrap=True)
    if job["status"] == "failed" and result:
        console.print(f"its artifact is kept: attar download {job['id']}", soft_wrap=True)
    if job["status"] == "succeeded":
        took = _seconds_between(job["started_at"], job["finished_at"])
        console.print(f"took {duration(took)}; fetch it with: attar download {job['id']}", soft_wrap=True)


def _seconds_between(start: str | None, end: str | None) -> float | None:
    if start is None or end is None:
        return None
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for text in texts or []:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise Failed(f"{option} wants NAME=VALUE, not {text!r}", code="wrong_use", exit_code=2)
        pairs[name] = value
    return pairs


def _number(text: str) -> object:
    """A JSON value where the text is one; the service says what it makes of anything else."""
    try:
        value: object = json.loads(text)
    except ValueError:
        return text
    return value
