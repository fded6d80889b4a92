"""Range, If-Range and If-None-Match, as RFC 9110 has them."""

import pytest

from app.artifacts.ranges import Selection, select
from app.errors import PreconditionError, RangeError

ETAG = '"abc"'


def selected(size_bytes: int = 10, **headers: str) -> Selection:
    return select({name.replace("_", "-"): value for name, value in headers.items()}, size_bytes=size_bytes, etag=ETAG)


@pytest.mark.parametrize(
    ("value", "start", "length"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=2-5", 2, 4),
        ("bytes=5-", 5, 5),
        ("bytes=5-999", 5, 5),
        ("bytes=-3", 7, 3),
        ("bytes=-999", 0, 10),
        ("Bytes = 2 - 5", 2, 4),
    ],
)
def test_a_range_selects_its_bytes(value: str, start: int, length: int) -> None:
    assert selected(range=value) == Selection(206, start, length)


@pytest.mark.parametrize(
    "value", ["bytes=5-2", "bytes=-", "bytes=a-b", "lines=0-1", "bytes=0-1,4-5", "", "bytes=0-" + "9" * 99]
)
def test_what_is_no_single_range_of_bytes_selects_everything(value: str) -> None:
    assert selected(range=value) == Selection(200, 0, 10)


@pytest.mark.parametrize(
    ("size_bytes", "value"), [(10, "bytes=10-"), (10, "bytes=-0"), (0, "bytes=0-0"), (0, "bytes=-5")]
)
def test_a_range_without_bytes_is_not_satisfiable(size_bytes: int, value: str) -> None:
    with pytest.raises(RangeError) as caught:
        selected(size_bytes, range=value)
    assert caught.value.headers["Content-Range"] == f"bytes */{size_bytes}"


@pytest.mark.parametrize(
    ("if_range", "status"),
    [(ETAG, 206), ('"other"', 200), ('W/"abc"', 200), ("Wed, 21 Oct 2015 07:28:00 GMT", 200)],
)
def test_if_range_goes_on_only_with_the_very_same_file(if_range: str, status: int) -> None:
    assert selected(range="bytes=2-5", if_range=if_range).status == status


def test_a_range_that_if_range_sets_aside_cannot_be_unsatisfiable() -> None:
    assert selected(range="bytes=50-", if_range='"other"') == Selection(200, 0, 10)


@pytest.mark.parametrize(("known", "status"), [(ETAG, 304), ('"x", W/"abc"', 304), ("*", 304), ('"x"', 200)])
def test_a_file_that_is_known_is_not_sent_again(known: str, status: int) -> None:
    assert selected(if_none_match=known).status == status


def test_if_match_insists_on_the_file() -> None:
    assert selected(if_match=f'"x", {ETAG}').status == 200
    with pytest.raises(PreconditionError):
        selected(if_match='W/"abc"')
