"""Starts an engine's process and waits until it takes requests."""

from __future__ import annotations

import logging

from dsv4 import errors
from dsv4.config import EngineConfig
from dsv4.engine.child import Child
from dsv4.engine.messages import Begin, Failed, Loading, Log, Ready, encode, from_engine
from dsv4.engine.progress import Progress
from dsv4.errors import CheckpointError, ConfigError, Dsv4Error, EngineDead

PROCESS = "dsv4.engine.process"
"""What is started; tests put another module in its place."""

LAST_MOMENTS = 30.0
"""Seconds that a process may take to end once its socket is closed: a driver gives memory back meanwhile."""

CAUSE = 1.0
"""Seconds to find out how it has ended, before those who wait for it are told that it has."""


class ProcessGone(EngineDead):
    """A process has ended before it was ready, and did not say why."""


def start() -> Child:
    """The process, which waits for its settings. It loads torch meanwhile."""
    return Child(PROCESS, "engine")


def await_ready(
    child: Child, config: EngineConfig, eos_ids: frozenset[int], progress: Progress | None
) -> Ready:
    """Gives the process its settings and waits until it takes requests. Raises what it could not start for: ConfigError,
    CheckpointError, EngineDead; it is gone then."""
    level = logging.getLogger("dsv4").getEffectiveLevel()
    child.link.send(encode(Begin(config, sorted(eos_ids), level)))
    try:
        failed = None
        while (received := child.link.receive()) is not None:
            message = from_engine(received[0])
            if isinstance(message, Ready):
                return message
            if isinstance(message, Log):
                write(message)
            elif isinstance(message, Loading) and progress is not None:
                progress(message.done, message.total, message.name, message.stage)
            elif isinstance(message, Failed):
                failed = message
    except BaseException:  # Ctrl-C, above all
        child.kill()
        raise
    how = ended(child)
    raise as_error(failed) if failed is not None else ProcessGone(f"the engine's process is gone, {how}")


def cause(child: Child) -> str:
    """Why a process is gone that has said nothing. Those who wait for it are not held up by how long it takes to end."""
    return f"its process is gone, {child.how()}" if child.wait(CAUSE) else "its process is gone"


def ended(child: Child) -> str:
    """How a process has ended whose socket is closed; it has when this returns."""
    if not child.wait(LAST_MOMENTS):
        child.kill()
    child.link.release()
    return child.how()


def write(line: Log) -> None:
    """Writes a line of the process's log as one of our own."""
    logger = logging.getLogger(line.logger)
    if logger.isEnabledFor(line.level):
        record = logger.makeRecord(line.logger, line.level, "(engine)", 0, line.text, (), None)
        record.exc_text = line.traceback
        logger.handle(record)


def as_error(failed: Failed) -> Dsv4Error:
    """What a process could not start for."""
    kinds: dict[str, type[Dsv4Error]] = {k.__name__: k for k in (ConfigError, CheckpointError)}
    return kinds.get(failed.kind, EngineDead)(failed.text)


def as_raised(kind: str, text: str) -> Dsv4Error:
    """An error of the core by the name of its class."""
    from dsv4 import _core

    found = getattr(errors, kind, None) or getattr(_core, kind, None)
    if isinstance(found, type) and issubclass(found, Dsv4Error):
        return found(text)
    return Dsv4Error(f"{kind}: {text}")
