"""Takes single files out of a wheel on the package index by range reads, with pip's own client: megabytes, not the wheel."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from zipfile import ZipFile

FOLDER = Path(__file__).parents[1] / ".peer"
"""Where peers lie; git ignores it."""


def fetch(package: str, version: str, members: str, target: Path = FOLDER) -> str:
    """Extracts the members whose names match into `target` and says what came. Raises OSError when it cannot."""
    from pip._internal.models.index import PyPI
    from pip._internal.network.lazy_wheel import LazyZipOverHTTP
    from pip._internal.network.session import PipSession

    session = PipSession()
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    answer = session.get(f"{PyPI.simple_url}/{package}/", headers=accept)
    files = answer.json()["files"] if answer.ok else []
    wheel = next((f for f in files if _fits(f["filename"], package, version)), None)
    if wheel is None:
        raise OSError(f"the index has no wheel of {package} {version} for this machine")
    archive = ZipFile(LazyZipOverHTTP(wheel["url"], session))
    found = [m for m in archive.infolist() if re.search(members, m.filename)]
    for member in found:
        archive.extract(member, target)
    size = sum(m.compress_size for m in found) / 2**20
    return f"{package} {version}: {len(found)} files, {size:.1f} MiB fetched"


def _fits(name: str, package: str, version: str) -> bool:
    """Pure wheels, and x86-64 ones of the stable ABI or this Python."""
    python = f"cp3{sys.version_info.minor}"
    tags = rf"(py3-none-any|{python}-{python}-.*x86_64|cp3\d+-abi3-.*x86_64)"
    return re.fullmatch(rf"{package.replace('-', '_')}-{re.escape(version)}-{tags}\.whl", name) is not None
