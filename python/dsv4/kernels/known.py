"""What an earlier start found that it needs, beside the compiled kernels: a start with the same settings needs no dry run.

The list is kept under a name made of all that decides it: the sources of this package, torch, Triton, the kind of GPU, and what the caller
says of model, cache and sizes of steps. A list of which one kernel is no longer in Triton's cache is none.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dsv4.kernels.compiling import Needed

log = logging.getLogger("dsv4.kernels")

MOST = 64
"""Lists that are kept; each version and each change of settings leaves one a rank."""


class Known:
    """The list of starts that `what` describes. `folder`: of the lists, which is the user's own as Triton's cache is."""

    def __init__(self, what: str, folder: Path) -> None:
        said = f"{_sources()} {_versions()} {what}"
        self.name = hashlib.sha256(said.encode()).hexdigest()[:16]
        self.path = folder / f"needed-{self.name}"

    def recall(self) -> list[Needed] | None:
        """None where there is no list, or it cannot be read."""
        try:
            needed: list[Needed] = pickle.loads(self.path.read_bytes())
        except Exception:  # a file that was cut raises almost anything; without it a dry run finds the same
            return None
        return needed

    def keep(self, needed: list[Needed]) -> None:
        """Replaces the list at once, as another process may read it, and removes the oldest of many. Where that cannot be written, as in an image
        with a cache that is full already, the log says so."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            written = self.path.with_suffix(f".{os.getpid()}")
            written.write_bytes(pickle.dumps(needed))
            written.replace(self.path)
            lists = sorted(self.path.parent.glob("needed-*"), key=lambda path: path.stat().st_mtime)
            for old in lists[:-MOST]:
                old.unlink(missing_ok=True)
        except OSError as e:
            log.warning(
                "the list of needed kernels is not kept, so the next start looks for them again: %s", e
            )


@cache
def _sources() -> str:
    """A digest of the package, any part of which may decide what a step launches."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _versions() -> str:
    import triton

    gpu = "none"
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties()
        gpu = f"{found.name} {found.major}.{found.minor} {found.multi_processor_count}"
    return f"{torch.__version__} {triton.__version__} {gpu}"
