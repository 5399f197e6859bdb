"""Prompts as the engine takes them: one int32 array from tokenizer or parser to `Core.submit`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsv4.errors import RequestError

TokenIds = Sequence[int] | np.ndarray
"""Token ids in any form that `as_prompt` takes."""


def as_prompt(ids: TokenIds) -> np.ndarray:
    """Token ids as int32 [tokens], contiguous; an array that is so already comes back as it is, and is not to be written
    any more. Raises RequestError for what is no list of whole numbers of 32 bits."""
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError):  # lists in it, or numbers of more than 64 bits
        array = np.empty(1, object)
    if not array.size:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError(
            "prompt is no list of token ids, all whole numbers", "prompt", "invalid_value", 400
        )
    if array.dtype != np.int32:
        limits = np.iinfo(np.int32)
        for token in (array.min(), array.max()):
            if not limits.min <= token <= limits.max:
                raise RequestError(
                    f"prompt holds {token}, which is no token id", "prompt", "invalid_value", 400
                )
        array = array.astype(np.int32)
    return np.ascontiguousarray(array)
