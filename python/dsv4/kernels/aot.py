"""Compiles kernels ahead of time for GPUs that are not here: `python -m dsv4.kernels.aot [--arch 90 100] [MODULE ...]`.

A kernel file exports `AOT`, a list of `Aot`. The command compiles every one for every architecture that it is meant
for, prints registers, spills and which matrix instruction the machine code uses, and fails when that is not the one
that was promised. Needs triton, but no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MATRIX = {90: "wgmma", 100: "tcgen05.mma"}
"""Matrix instruction of an architecture, as PTX names it."""
SHARED, COLUMNS = 227 * 1024, 512
"""Most bytes of shared memory and columns of tensor memory of a program."""


@dataclass(frozen=True, slots=True)
class Aot:
    """One compilation. `signature`: type of each argument that is not constexpr, such as `*bf16`, `i32`, `fp32`, with
    `:16` after it for an integer that is a multiple of 16 (pointers are aligned to 16 bytes as torch's are).
    `matrix`: the machine code must use the architecture's matrix instruction; `stack`: most bytes of it a thread."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    matrix: bool = False
    stack: int | None = None
    archs: tuple[int, ...] = (90, 100)
    options: dict[str, Any] = field(default_factory=dict)


def build(entry: Aot, arch: int) -> Any:
    """The compiled kernel (`.asm`, `.metadata`) for sm_<arch>. Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = entry.kernel.arg_names
    signature, attrs = {}, {}
    for i, name in enumerate(names):
        if name in entry.constexprs:
            signature[name] = "constexpr"
            continue
        kind, _, aligned = entry.signature[name].partition(":")
        signature[name] = kind
        if kind.startswith("*") or aligned:
            attrs[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(names.index(k),): v for k, v in entry.constexprs.items()}
    gluon = getattr(entry.kernel, "is_gluon", lambda: False)()
    source = (GluonASTSource if gluon else ASTSource)(entry.kernel, signature, constexprs, attrs)
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, **entry.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def spills(compiled: Any) -> tuple[int, int]:
    """(registers, spilled bytes moved per thread) as the assembler counted them for the whole kernel."""
    import tempfile
    from subprocess import run

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True
        ).stdout
    used = {k: int(v) for k, v in re.findall(r"\b(REG|STACK):(\d+)", text)}
    return used.get("REG", 0), used.get("STACK", 0)


def entries(modules: Iterable[str]) -> Iterable[tuple[str, int, Aot]]:
    """(module, number, entry) of every kernel file that exports AOT."""
    for name in modules:
        for i, entry in enumerate(getattr(importlib.import_module(name), "AOT", ())):
            yield name.removeprefix("dsv4.kernels."), i, entry


def modules() -> list[str]:
    """Every module of every backend."""
    from dsv4.kernels import BACKENDS

    found = []
    for backend in BACKENDS:
        package = importlib.import_module(f"dsv4.kernels.{backend}")
        found += [m.name for m in pkgutil.iter_modules(package.__path__, package.__name__ + ".")]
    return sorted(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("modules", nargs="*", help="dotted names below dsv4.kernels; default all")
    parser.add_argument("--arch", type=int, nargs="+", default=[90, 100])
    args = parser.parse_args(argv)
    names = [m if m.startswith("dsv4.") else f"dsv4.kernels.{m}" for m in args.modules] or modules()
    failed = 0
    for module, number, entry in entries(names):
        for arch in sorted(set(args.arch) & set(entry.archs)):
            label = f"{module}[{number}] {entry.kernel.fn.__name__} sm_{arch}"
            try:
                compiled = build(entry, arch)
            except Exception as e:  # the compiler raises many kinds; all are a failed row of the table
                print(f"{label}: FAILED {type(e).__name__}: {str(e)[-2000:]}")
                failed += 1
                continue
            used = [name for name in MATRIX.values() if name in compiled.asm["ptx"]]
            registers, stack = spills(compiled)
            shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
            wrong = [f"MISSING {MATRIX[arch]}"] * (entry.matrix and MATRIX[arch] not in used)
            wrong += ["TOO MUCH STACK"] * (entry.stack is not None and stack > entry.stack)
            wrong += ["TOO MUCH MEMORY"] * (shared > SHARED or columns > COLUMNS)
            print(
                f"{label}: {registers} registers, {stack} B stack, {shared} B shared, "
                + (f"{columns} columns of tensor memory, " if columns else "")
                + "; ".join([", ".join(used) or "no matrix instruction", *wrong])
            )
            failed += bool(wrong)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
