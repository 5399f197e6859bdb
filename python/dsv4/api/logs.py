"""Logging on standard error, as text or JSON, by a thread of its own: whoever reads it slowly (a terminal that is held, a
pipe that is full) does not hold up the server. What does not fit in the queue is dropped and counted."""

from __future__ import annotations

import atexit
import logging
import queue
import sys
import threading
from datetime import datetime, timezone
from typing import Any

import orjson

from dsv4.quantities import counted

QUEUED = 10_000
"""Lines that may wait to be written."""

LAST_LINES = 2.0
"""Seconds that the last lines may take at the end of the process."""

FIELDS = "fields"
"""The attribute of a record that holds its fields, for `extra={FIELDS: {…}}`. JSON has them one by one."""


class JsonFormatter(logging.Formatter):
    """One object per line: time, level, logger, message, then the fields of the record and an exception's traceback."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        elif record.exc_text:  # of the engine's process, which has the exception
            line["exception"] = record.exc_text
        return orjson.dumps(line, default=str).decode()


TEXT = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


class LogWriter(logging.Handler):
    """Hands records to a thread that writes them to `sys.stderr`."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.dropped = 0
        self._queue: queue.Queue[logging.LogRecord | None] = queue.Queue(QUEUED)
        self._thread = threading.Thread(target=self._write, name="dsv4-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args = record.getMessage(), None  # what it speaks of may change
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Writes what is queued, unless nobody takes it."""
        try:
            self._queue.put(None, timeout=LAST_LINES)
            self._thread.join(LAST_LINES)
        except queue.Full:
            pass
        super().close()

    def _write(self) -> None:
        while (record := self._queue.get()) is not None:
            lines = self.format(record)
            if self.dropped:
                lost, self.dropped = self.dropped, 0
                text = f"dropped {counted(lost, 'line')} of log, as nobody took them"
                about = logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)
                lines += "\n" + self.format(about)
            try:
                sys.stderr.write(lines + "\n")
                sys.stderr.flush()
            except (OSError, ValueError):  # full, or closed
                pass


def set_up(level: str, form: str) -> LogWriter:
    """Logs from `level` on, as `text` or `json`. Prompts and answers are never logged."""
    writer = LogWriter(JsonFormatter() if form == "json" else TEXT)
    root = logging.getLogger()
    root.handlers[:] = [writer]
    root.setLevel(level.upper())
    # What uvicorn says of single requests is in their own lines.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    atexit.register(writer.close)
    return writer
