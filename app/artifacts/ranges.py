"""Conditional and range requests on an immutable file, as RFC 9110 (sections 13 and 14) says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from app.errors import PreconditionError, RangeError

_RANGE = re.compile(r"bytes\s*=\s*(\d{0,40})\s*-\s*(\d{0,40})", re.IGNORECASE)


@dataclass(frozen=True)
class Selection:
    """What of a file to send: a status of 200, 206 or 304, and the bytes."""

    status: int
    start: int
    length: int


def select(headers: Mapping[str, str], *, size_bytes: int, etag: str) -> Selection:
    """What a request's headers (names in lower case) ask of a file.

    A range in a unit that we do not know, several ranges, or one that is not well-formed select the whole file, as the
    RFC allows. Raises RangeError (416) where no byte lies in the range, PreconditionError (412) for ``If-Match``.
    """
    whole = Selection(200, 0, size_bytes)
    expected = headers.get("if-match")
    if expected is not None and not _names(expected, etag, weakly=False):
        raise PreconditionError("etag_mismatch", f"The file's ETag is {etag}.", headers={"ETag": etag})
    known = headers.get("if-none-match")
    if known is not None and _names(known, etag, weakly=True):
        return Selection(304, 0, 0)
    asked = _RANGE.fullmatch(headers.get("range", "").strip())
    if asked is None or asked[1] == asked[2] == "":
        return whole
    # If-Range may hold a date; we send none, so that none can match.
    if "if-range" in headers and headers["if-range"].strip() != etag:
        return whole
    if asked[1] == "":
        start, end = max(size_bytes - int(asked[2]), 0), size_bytes - 1
    else:
        start, end = int(asked[1]), min(int(asked[2] or size_bytes - 1), size_bytes - 1)
        if asked[2] and int(asked[2]) < start:
            return whole
    if start > end:
        raise RangeError(
            "range_not_satisfiable",
            f"The file has {size_bytes} bytes.",
            headers={"Content-Range": f"bytes */{size_bytes}", "ETag": etag},
        )
    return Selection(206, start, end - start + 1)


def _names(header: str, etag: str, *, weakly: bool) -> bool:
    """Whether a list of entity tags holds ``etag``."""
    if header.strip() == "*":
        return True
    tags = [tag.strip() for tag in header.split(",")]
    return etag in ([tag.removeprefix("W/") for tag in tags] if weakly else tags)
