"""`attar report` and `attar download`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from app.cli.connection import open_client
from app.cli.jobs import JobId
from app.cli.output import AsJson, console, errors, print_json, size
from app.cli.report import print_report
from app.client import Client
from app.downloads import Downloaded, download_artifact


def register(application: typer.Typer) -> None:
    """Add these commands."""
    application.command()(report)
    application.command()(download)


def report(job_id: JobId, as_json: AsJson = False) -> None:
    """Show what was measured on a job's result."""
    with open_client() as client:
        measured = client.report(job_id)
    if as_json:
        print_json(measured)
    else:
        print_report(console, measured)


def download(
    job_id: JobId,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to.  [default: the job's id]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a job's artifact and verify it; run it again to go on after an interruption."""
    with open_client() as client:
        downloaded = download_with_progress(client, job_id, output or Path(job_id), errors, quiet=as_json)
    if as_json:
        print_json(
            {
                "folder": str(downloaded.folder),
                "num_files": downloaded.num_files,
                "size_bytes": downloaded.size_bytes,
                "verified": True,
            }
        )
    else:
        num_bytes = size(downloaded.size_bytes)
        console.print(f"{downloaded.folder}: {downloaded.num_files} files, {num_bytes}, verified", soft_wrap=True)


def download_with_progress(
    client: Client, job_id: str, folder: Path, output: Console, *, quiet: bool = False
) -> Downloaded:
    """Download with a live line where ``output`` is a terminal."""
    progress = Progress(
        TextColumn("downloading"),
        BarColumn(bar_width=30),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=output,
        transient=True,
        disable=quiet or not output.is_terminal,
    )
    with progress:
        task = progress.add_task("", total=None)
        return download_artifact(
            client,
            job_id,
            folder,
            on_total=lambda num_bytes: progress.update(task, total=num_bytes),
            on_bytes=lambda num_bytes: progress.advance(task, num_bytes),
        )
