"""Products of many tokens with FP8 weights on cuBLAS, through torch's blockwise `scaled_mm`: on Hopper it reaches 1,335
TFLOP/s of 1,442 where our Triton kernel reaches 857 (benches/gpu/gemm_fp8.py times both). Few tokens are left to the Triton
kernel, which reads weights faster and quantises on the way. The grouped projection is a launch per group, which writes
into place (738 us for Flash at 8,192 tokens where Triton takes 912; 902 with a copy into place)."""

from __future__ import annotations

from dsv4.kernels.cublas.forms import FORMS

__all__ = ["FORMS"]
