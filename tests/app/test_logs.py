"""Log records are one line each, whatever a user put into them."""

import logging

import pytest

from app.logs import LineFormatter, configure_logging
from app.settings import Settings


def line_of(message: str, **extra: object) -> str:
    record = logging.makeLogRecord({"name": "app.jobs", "levelname": "INFO", "msg": message, **extra})
    return LineFormatter("api").format(record)


def test_a_record_is_one_line_of_keys_and_values_with_the_job() -> None:
    line = line_of("queued", job_id="job_01", num_files=3)
    assert "level=info role=api logger=app.jobs job_id=job_01 num_files=3 message=queued" in line


def test_newlines_and_quotes_cannot_forge_a_line() -> None:
    line = line_of("a\nlevel=error", model='x" job_id=job_02\r\n\x1b[2J\u2028')
    assert line.splitlines() == [line]
    assert r'message="a\nlevel=error"' in line
    assert r'model="x\" job_id=job_02\r\n\u001b[2J\u2028"' in line


def test_an_exception_stays_on_its_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        line = line_of("failed", exc_info=(type(error), error, error.__traceback__))
    assert "\n" not in line
    assert "Traceback" in line


def test_configuring_twice_writes_each_record_once(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        configure_logging(Settings(), "api")
        configure_logging(Settings(), "worker")
        logging.getLogger("app.test").info("once")
        assert capsys.readouterr().err.count("message=once") == 1
    finally:
        root.handlers, root.level = before, level
