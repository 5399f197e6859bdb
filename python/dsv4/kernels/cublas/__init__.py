"""Products of many tokens with FP8 weights on cuBLAS, through torch's blockwise `scaled_mm`: on Hopper it reaches 1,335
TFLOP/s of 1,442 where our Triton kernel reaches 857 (benches/gpu/gemm_fp8.py times both). Few tokens go to the Triton
kernel, which reads weights faster and quantises on the way. The grouped projection is a launch per group, which writes
into place (738 us for Flash at 8,192 tokens where Triton takes 912; 902 with a copy into place)."""

from __future__ import annotations

from dsv4.kernels.device import capability, has_triton

OPS: dict[str, str] = {"linear": "linear", "grouped_linear": "linear", "swiglu": "linear"}


def usable(device: str, op: str = "linear") -> bool:
    """Hopper, and a torch whose cuBLAS has products with scales per 1 x 128 and 128 x 128 (CUDA 12.9)."""
    if device != "cuda" or not has_triton() or capability()[0] != 9:
        return False
    import torch
    from torch.nn import functional

    version = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return version >= (12, 9) and hasattr(functional, "scaled_mm")
