"""Ranks that share one GPU: `python -m tests.support.sharing_gpu` is the process of another rank. NCCL does not take two ranks on a GPU, so
long messages go over gloo, through the host; short ones are written into each other's memory as on several GPUs."""

from __future__ import annotations

from typing import Any

import torch
from dsv4.engine import build, follower, group, meeting

_meet = meeting.meet


def _over_gloo(path: str, rank: int, ranks: int, device: str, time: int, limit: float) -> Any:
    return _meet(path, rank, ranks, "cpu", time, limit)


CHANGES: tuple[tuple[Any, str, Any], ...] = (
    (meeting, "meet", _over_gloo),
    (group, "meet", _over_gloo),
    (build, "settle_rank", lambda config, rank, ranks: torch.cuda.set_device(0)),
    (follower, "stay_near", lambda device: None),
)
"""What is another in each process."""


def main() -> None:
    for module, name, value in CHANGES:
        setattr(module, name, value)
    follower.main()


if __name__ == "__main__":
    main()
