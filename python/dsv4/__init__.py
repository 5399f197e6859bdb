"""dsv4: a serving engine for DeepSeek-V4 at million-token context.

The public names are loaded when first used, so that `import dsv4` and the command line stay quick.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4.config import EngineConfig as EngineConfig
    from dsv4.engine.async_engine import AsyncEngine as AsyncEngine
    from dsv4.engine.llm import LLM as LLM
    from dsv4.sampling import SamplingParams as SamplingParams

_EXPORTS = {
    "LLM": "dsv4.engine.llm",
    "AsyncEngine": "dsv4.engine.async_engine",
    "SamplingParams": "dsv4.sampling",
    "EngineConfig": "dsv4.config",
}

# Worker threads of torch spin for milliseconds before they sleep: on a busy machine that slows the model down tenfold. A
# thousand rounds is what OpenMP itself takes where it knows that threads outnumber processors. Read when torch is loaded.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

# Intel's MKL otherwise rounds by where an array lies in memory, with many threads: on a CPU a prompt that is read in chunks would not
# give the bits of one that is read at once (docs/decisions/0002). Read when MKL is first used.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

__all__ = [*_EXPORTS, "__version__"]

try:
    __version__ = version("dsv4")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dsv4' has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
