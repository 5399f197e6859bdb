"""Takes FlashMLA's and DeepGEMM's binaries out of a vllm wheel into `.peer/`: some 7 MB by range reads, not 290 MB.

python benches/gpu/fetch_peers.py          needs pip and a package index; the binaries fit Python 3.12 and torch 2.11
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from zipfile import ZipFile

PACKAGE, VERSION = "vllm", "0.26.0"
MEMBERS = re.compile(
    r"vllm/_flashmla_C\.abi3\.so|vllm/third_party/(flashmla|deep_gemm)/(?!.*cpython-31[0134])"
)


def main() -> int:
    from pip._internal.models.index import PyPI
    from pip._internal.network.lazy_wheel import LazyZipOverHTTP
    from pip._internal.network.session import PipSession

    session = PipSession()
    accept = {"Accept": "application/vnd.pypi.simple.v1+json"}
    files = session.get(f"{PyPI.simple_url}/{PACKAGE}/", headers=accept).json()["files"]
    name = re.compile(rf"{PACKAGE}-{re.escape(VERSION)}-.*x86_64\.whl")
    wheel = next((f for f in files if name.fullmatch(f["filename"])), None)
    if wheel is None:
        print(f"the index has no x86-64 wheel of {PACKAGE} {VERSION}", file=sys.stderr)
        return 1
    target = Path(__file__).parents[2] / ".peer"
    archive = ZipFile(LazyZipOverHTTP(wheel["url"], session))
    members = [m for m in archive.infolist() if MEMBERS.search(m.filename)]
    for member in members:
        archive.extract(member, target)
    print(
        f"{len(members)} files, {sum(m.compress_size for m in members) / 2**20:.1f} MiB fetched to {target}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
