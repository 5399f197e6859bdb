"""Fails when a source file passes 800 lines; names those over 600 (run by `make lint`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WARN, FAIL = 600, 800


def main() -> int:
    names = subprocess.run(
        ["git", "ls-files", "*.py", "*.rs", "*.cu", "*.cuh"], capture_output=True, text=True, check=True
    )
    sizes = sorted(
        ((Path(n).read_text().count("\n"), n) for n in names.stdout.split() if Path(n).exists()), reverse=True
    )
    for lines, name in sizes:
        if lines > WARN:
            print(f"{lines} lines  {name}  (aim: {WARN}, limit: {FAIL})")
    return int(sizes[0][0] > FAIL)


if __name__ == "__main__":
    sys.exit(main())
