"""What lies on a GPU beside weights, state, workspace and pool, within the share that `--gpu-memory-utilization` leaves: allowances, as it
follows from no formula. A start on a GPU compares them with what was taken (`dsv4.engine.taken`)."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Outside:
    """One allowance."""

    name: str
    size: int
    """Bytes."""
    why: str


CONTEXT = Outside(
    "CUDA context and kernels",
    704 * MIB,
    "0.74 GiB lay outside of torch's allocator on an H100, with 30 captured steps of 8 layers",
)
LIBRARIES = Outside(
    "workspaces of cuBLAS", 128 * MIB, "32 MiB for each of cuBLAS and cuBLASLt on each of two streams"
)
ALLOCATOR = Outside(
    "rest of the allocator's segments", 256 * MIB, "torch takes 2 to 20 MiB at a time and rounds sizes up"
)
COLLECTIVES = Outside(
    "NCCL", 1152 * MIB, "1.16 GiB more lay outside of torch's allocator with two ranks than with one, on H200"
)


def outside(ranks: int) -> tuple[Outside, ...]:
    """Of a GPU of so many ranks."""
    return (CONTEXT, LIBRARIES, ALLOCATOR) if ranks == 1 else (CONTEXT, LIBRARIES, ALLOCATOR, COLLECTIVES)
