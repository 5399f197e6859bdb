"""Runs the kernel benches and writes benches/results/<device>/kernels-<date>.{json,md,svg}."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path

import torch

from benches.gpu import FILES
from benches.gpu.report import header, table, write
from benches.gpu.timing import Bench


def main() -> int:
    parser = argparse.ArgumentParser(prog="benches.gpu", description=__doc__)
    parser.add_argument("--only", default="", help="bench files by name, comma separated; default all")
    parser.add_argument("--quick", action="store_true", help="few shapes, few repeats")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch sees no CUDA device; the kernel benches need one", file=sys.stderr)
        return 2
    wanted = [name for name in args.only.split(",") if name] or FILES
    if unknown := sorted(set(wanted) - set(FILES)):
        print(f"--only names {', '.join(unknown)}; known: {', '.join(FILES)}", file=sys.stderr)
        return 2
    bench = Bench(quick=args.quick)
    head, rows, failed = header(bench), [], 0
    for name in wanted:
        begin = time.monotonic()
        try:
            for row in importlib.import_module(f"benches.gpu.{name}").rows(bench):
                rows.append(bench.record(row))
                print(table(head, rows[-1:]).splitlines()[-1], flush=True)
        except Exception:  # one kernel's failure must not cost the others their measurement
            failed += 1
            traceback.print_exc()
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        bench.free()
        path = write(args.out, head, rows)  # after each file: a run that is stopped keeps what it has
    print("\n" + table(head, rows))
    print(f"written: {path}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
