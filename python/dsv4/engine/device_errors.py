"""Whether a step failed or the device is gone. The one place that decides it.

After some errors of CUDA every later call in the process fails, whatever it is: only a new process helps. CUDA's
documentation names them; of others nobody knows, so the device is asked. A request's own error (logits that are not
finite, memory that is short, an exception in Python) leaves the device as it was.
"""

from __future__ import annotations

import re
import sys

from dsv4.errors import RankLost

_STICKY = re.compile(
    r"illegal memory access|illegaladdress|illegal_address|device-side assert|cudaerrorassert|cuda_error_assert"
    r"|launch failure|launchfailure|launch_failed|launch timed out|launchtimeout|launch_timeout"
    r"|uncorrectable|illegal ?instruction|illegal_instruction|misaligned ?address|misaligned_address"
    r"|invalid ?program ?counter|invalid_pc|hardware ?stack ?error|hardware_stack_error"
    r"|global/shared address space|invalidaddressspace|invalid_address_space"
    r"|busy or unavailable|devicesunavailable|device_unavailable|no cuda-capable device|context is destroyed"
    r"|contextisdestroyed|mps (server|client)|unknown error|cudaerrorunknown|cuda_error_unknown",
    re.IGNORECASE,
)
"""Texts and names of the errors that leave a CUDA context unusable."""

_OF_CUDA = re.compile(r"cuda|cublas|triton error|nccl", re.IGNORECASE)


def lost(error: BaseException, device: str) -> str | None:
    """One sentence when a step that failed with `error` has left `device` ('cpu', 'cuda') unusable, else None.

    On a GPU the device is asked unless the error says it; the question waits for what the GPU is doing.
    """
    if isinstance(error, RankLost):
        return str(error)
    named = _named(error)
    if named is None and device == "cuda" and (answer := _probe()) is not None:
        named = answer
    return None if named is None else f"the device is lost: {named}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, which for errors of CUDA is the one that says it."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _named(error: BaseException) -> str | None:
    """What the error, or one that it was raised from, says of a lost device."""
    torch = sys.modules.get("torch")
    of_device: tuple[type, ...] = () if torch is None else (torch.AcceleratorError,)
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error)
        of_cuda = isinstance(error, of_device) or _OF_CUDA.search(text)
        if isinstance(error, RuntimeError) and of_cuda and _STICKY.search(text):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return None


def _probe() -> str | None:
    """What the GPU answers when it is asked to finish its work; None when it does."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception as e:
        return first_line(e)
    return None
