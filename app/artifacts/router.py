"""``/v1/jobs/{id}/artifacts``: the files of a result, and their bytes."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from app.artifacts import ranges, service
from app.auth import CurrentPrincipal
from app.dependencies import AppParts
from app.errors import responses

router = APIRouter(prefix="/v1/jobs/{job_id}/artifacts", tags=["artifacts"], responses=responses(401, 404, 422))

_MEDIA_TYPES = {".json": "application/json", ".md": "text/markdown; charset=utf-8", ".txt": "text/plain; charset=utf-8"}
_BYTES: dict[str, Any] = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


class ArtifactFileView(BaseModel):
    """A file of an artifact."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "object": "artifact_file",
                    "path": "model.safetensors",
                    "size_bytes": 113_186_400,
                    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                }
            ]
        }
    )

    object: Literal["artifact_file"]
    path: str
    size_bytes: int
    sha256: str


class ArtifactFileList(BaseModel):
    """Every file of a job's artifact; empty while there is none."""

    object: Literal["list"]
    data: list[ArtifactFileView]
    size_bytes: int
    has_more: bool


@router.get("", summary="List a job's artifact files")
def list_artifact_files(job_id: str, principal: CurrentPrincipal, parts: AppParts) -> ArtifactFileList:
    """Path, size and sha256 of every file; `manifest.json` holds the same of all the others."""
    with parts.database.transaction() as session:
        artifact, files = service.list_files(session, principal.tenant_id, job_id)
    return ArtifactFileList(
        object="list",
        data=[
            ArtifactFileView(object="artifact_file", path=file.path, size_bytes=file.size_bytes, sha256=file.sha256)
            for file in files
        ],
        size_bytes=artifact.size_bytes if artifact is not None else 0,
        has_more=False,
    )


@router.head("/{path:path}", include_in_schema=False)
@router.get(
    "/{path:path}",
    summary="Download a file",
    response_class=Response,
    responses=responses(410, 412, 416)
    | {
        200: {"description": "The file. `ETag` is its sha256.", **_BYTES},
        206: {"description": "The part that `Range` asked for.", **_BYTES},
        304: {"description": "`If-None-Match` names this file."},
    },
)
def download_artifact_file(
    job_id: str, path: str, request: Request, principal: CurrentPrincipal, parts: AppParts
) -> Response:
    """The bytes of a file, streamed; `Range` and `If-Range` let a download go on where it stopped."""
    with parts.database.transaction() as session:
        file = service.find_file(session, principal.tenant_id, job_id, path)
    etag = f'"{file.sha256}"'
    name = PurePosixPath(file.path).name
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}",
        "X-Content-Type-Options": "nosniff",
    }
    asked = dict(request.headers)
    if request.method == "HEAD":
        asked.pop("range", None)  # RFC 9110, 14.2: a range is defined for GET alone
    selection = ranges.select(asked, size_bytes=file.size_bytes, etag=etag)
    if selection.status == 304:
        return Response(status_code=304, headers=headers)
    headers["Content-Length"] = str(selection.length)
    if selection.status == 206:
        last = selection.start + selection.length - 1
        headers["Content-Range"] = f"bytes {selection.start}-{last}/{file.size_bytes}"
    media_type = _MEDIA_TYPES.get(PurePosixPath(name).suffix, "application/octet-stream")
    if request.method == "HEAD":
        return Response(headers=headers, media_type=media_type)
    pieces = service.open_file(parts.storage, file, selection.start, selection.length)
    return StreamingResponse(pieces, status_code=selection.status, headers=headers, media_type=media_type)
