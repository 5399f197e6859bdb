"""The errors that callers see. Each message is one line that names the field, the value and the remedy.

`Dsv4Error` is the base of all, the core's included; `ConfigError` (also a ValueError) is a setting, array or
config.json that cannot work.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from dsv4._core import ConfigError, Dsv4Error
except ImportError:  # ops, kernels and their benches also run from a source tree where the core is not built

    class Dsv4Error(Exception):
        """Base of all errors."""

    class ConfigError(Dsv4Error, ValueError):
        """A setting, array or config.json that cannot work."""


__all__ = [
    "CheckpointError",
    "ConfigError",
    "Dsv4Error",
    "EngineDead",
    "RankLost",
    "RequestError",
    "kind",
    "show",
]


class CheckpointError(Dsv4Error, ValueError):
    """Weights that are damaged, incomplete or not what the config says."""


class EngineDead(Dsv4Error):
    """The engine cannot go on: its device is lost, or every step fails. Only a new process helps."""


class RankLost(EngineDead):
    """A rank of the engine is gone, or does not go on; the message says which."""


class RequestError(Dsv4Error):
    """A request that is refused or failed, in the terms of the HTTP API.

    `param` names the field at fault, `code` is machine-readable, `status` is the HTTP status; `retry_after`: seconds
    after which it may be taken, where that is known.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str = "invalid_value",
        status: int = 400,
        *,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.retry_after = retry_after


_SHOWN = 60
"""Characters of a bad value that an error message repeats."""

_KINDS: dict[type, str] = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    np.ndarray: "a list",
    dict: "an object",
    type(None): "null",
}


def kind(value: Any) -> str:
    """What JSON calls a value's type, for messages about wrong ones: `a list`, `text`, `null`."""
    return _KINDS.get(type(value), type(value).__name__)


def show(value: Any) -> str:
    """A value as an error message repeats it: short, in JSON's words, and containers only by kind and length."""
    if isinstance(value, (list, tuple, np.ndarray, dict)):
        return f"{kind(value)} of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…" + text[-1] * isinstance(value, str)
