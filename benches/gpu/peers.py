"""Public kernels to compare with, where they are at hand: in `.peer/`, filled by fetch_peers.py. Absent, the columns
stay empty; nothing of ours depends on them."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[2] / ".peer"


@lru_cache
def flashmla() -> Any | None:
    """FlashMLA's ops (`sparse_decode_fwd`, `sparse_prefill_fwd`) as built into vllm, or None."""
    library = FOLDER / "vllm" / "_flashmla_C.abi3.so"
    if not library.exists():
        print(f"no FlashMLA: {library} is missing (python -m benches.gpu.fetch_peers)", file=sys.stderr)
        return None
    try:
        torch.ops.load_library(str(library))
    except OSError as e:
        print(f"no FlashMLA: {e}", file=sys.stderr)
        return None
    return torch.ops._flashmla_C


@lru_cache
def deep_gemm() -> Any | None:
    """The deep_gemm package as shipped in vllm, or None."""
    folder = FOLDER / "vllm" / "third_party"
    if not (folder / "deep_gemm").exists():
        print("no DeepGEMM: .peer is missing (python -m benches.gpu.fetch_peers)", file=sys.stderr)
        return None
    sys.path.insert(0, str(folder))
    try:
        import deep_gemm as package
    except Exception as e:  # built for one torch and one Python; anything else fails in its own way
        print(f"no DeepGEMM: {type(e).__name__}: {e}", file=sys.stderr)
        return None
    return package
