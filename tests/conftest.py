"""Settings for all tests."""

from __future__ import annotations

import os

# Worker threads of torch sleep instead of spinning, here and in servers that tests start: a busy machine with few cores
# is otherwise slowed down tenfold. Read when torch is loaded, so it is set before anything imports it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
