"""Logging that holds nothing up: text or JSON, on a thread, with a bound."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator

import pytest
from dsv4.api import logs
from dsv4.api.logs import FIELDS, TEXT, JsonFormatter, LogWriter


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger("tests.logs")
    found.propagate = False
    found.setLevel("INFO")
    yield found
    found.handlers.clear()


def test_json_has_one_object_per_line(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    writer = LogWriter(JsonFormatter())
    logger.addHandler(writer)
    logger.info("done %d\nof %s", 3, "é", extra={FIELDS: {"status": 200, "reason": None}})
    try:
        raise ValueError("boom")
    except ValueError:
        logger.exception("failed")
    writer.close()
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert first["message"] == "done 3\nof é" and first["level"] == "info" and first["logger"] == "tests.logs"
    assert first["status"] == 200 and first["reason"] is None and first["time"].endswith("Z")
    assert "ValueError: boom" in second["exception"] and second["level"] == "error"


def test_a_reader_that_stops_reading_holds_nothing_up(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "QUEUED", 50)
    monkeypatch.setattr(logs, "LAST_LINES", 0.1)
    read, write = os.pipe()
    stuck = os.fdopen(write, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stuck)
    writer = LogWriter(TEXT)
    logger.addHandler(writer)
    for _ in range(5000):
        logger.info("x" * 2000)  # more than any pipe holds: this would block for ever
    assert writer.dropped > 1000
    writer.close()  # which does not block either
    with os.fdopen(read, "rb") as reader:  # it reads again: what was queued comes, and what was lost is told
        seen = b""
        while b"of log, as nobody took them" not in seen:
            seen += reader.read1(65536)
        drain = threading.Thread(target=reader.read)
        drain.start()
        writer._queue.put(None)
        writer._thread.join()
        stuck.close()
        drain.join()


def test_a_stream_that_fails_is_no_error(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in ("/dev/full", None):
        stream = open(broken, "w") if broken else io.StringIO()  # noqa: SIM115
        if broken is None:
            stream.close()
        monkeypatch.setattr(sys, "stderr", stream)
        writer = LogWriter(TEXT)
        logger.addHandler(writer)
        logger.info("nobody reads this")
        writer.close()
        assert not writer._thread.is_alive()
        logger.handlers.clear()
        if broken:
            with pytest.raises(OSError, match="No space"):
                stream.close()
