"""Takes FlashMLA's and DeepGEMM's binaries out of a vllm wheel into `.peer/`: some 7 MB by range reads, not 290 MB.

python -m benches.gpu.fetch_peers      needs pip and a package index; the binaries fit Python 3.12 and torch 2.11
"""

from __future__ import annotations

import sys

from benches.wheels import fetch

MEMBERS = r"vllm/_flashmla_C\.abi3\.so|vllm/third_party/(flashmla|deep_gemm)/(?!.*cpython-31[0134])"


def main() -> int:
    try:
        print(fetch("vllm", "0.26.0", MEMBERS))
    except OSError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
