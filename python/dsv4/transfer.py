"""Numbers between host and device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on `device`. To a GPU it goes through page-locked memory, which torch keeps until the copy is over: from
    pageable memory the host would wait for all that the GPU still has to do."""
    device = torch.device(device)
    if device.type == "cpu" or host.device.type != "cpu":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def put(host: Tensor, target: Tensor) -> None:
    """Copies a CPU tensor into one of its shape, in the same way."""
    if target.device.type != "cpu":
        host = host.pin_memory()
    target.copy_(host, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """A tensor's copy on the host, in page-locked memory from a GPU: its numbers are there once the device has come so far,
    which an event recorded after this call tells."""
    if x.device.type == "cpu":
        return x.clone()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)
