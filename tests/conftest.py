"""Settings for all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Worker threads of torch sleep instead of spinning, here and in servers that tests start: a busy machine with few cores
# is otherwise slowed down tenfold. Read when torch is loaded, so it is set before anything imports it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Without a GPU the kernels run in Triton's interpreter, which must be known before triton is loaded.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Triton 3.9 warns where this is not said; it is what all versions do.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
