"""Kernels compiled before they are needed: what a dry run would launch is collected, compiled by processes beside each other into Triton's
cache on disk, and loaded. Compilations are counted.

All goes through `JITFunction._do_compile`, which Triton calls where a kernel with these types, alignments and constants is not in this
process yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger("dsv4.kernels")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Specialisation:
    """A kernel with types, alignments and constants of its arguments, as Triton compiles it."""

    module: str
    kernel: str
    key: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    target: tuple[Any, ...]
    """Backend, architecture and warp size."""

    def function(self) -> Any:
        """The decorated function."""
        function = getattr(importlib.import_module(self.module), self.kernel)
        name_callees_first(function)
        return function

    def digest(self) -> str:
        """Names what is compiled, for the mark that it lies in the cache."""
        import triton

        said = (
            self.signature,
            self.constants,
            self.attributes,
            sorted(self.options.items(), key=str),
            self.target,
        )
        text = f"{triton.__version__} {self.function().cache_key} {said!r}"
        return hashlib.sha256(text.encode()).hexdigest()

    def compile(self) -> None:
        """Into the cache on disk."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource

        function = self.function()
        gluon = getattr(function, "is_gluon", lambda: False)()
        source = (GluonASTSource if gluon else ASTSource)(
            function, self.signature, self.constants, self.attributes
        )
        kernel = triton.compile(source, target=GPUTarget(*self.target), options=self.options)
        build_launcher(source, kernel.metadata)
        _mark(self).parent.mkdir(parents=True, exist_ok=True)
        _mark(self).touch()


Needed = tuple[Specialisation, tuple[Any, ...]]
"""A specialisation, and the arguments after the function with which Triton compiles or loads it."""


def build_launcher(source: Any, metadata: Any) -> None:
    """Up to Triton 3.6 each signature has a launcher in C, which a compiler takes a tenth of a second for: that goes into the cache on disk too.
    It is linked with the driver, so only a machine with a GPU can do that."""
    import torch
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher") and torch.cuda.is_available():
        driver.CudaLauncher(source, metadata)


def name_callees_first(function: Any, seen: set[int] | None = None) -> None:
    """Makes Triton work out the cache key of what a kernel calls before its own. Up to Triton 3.6 a key takes in the constants of only
    those callees that have theirs already, so it depends on which kernels came before, and what one process compiled another does not find."""
    from triton.runtime.jit import JITFunction

    seen = set() if seen is None else seen
    if id(function) in seen or getattr(function, "hash", None) is not None:
        return
    seen.add(id(function))
    code, scope = function.fn.__code__, function.fn.__globals__
    named = [scope[name] for name in code.co_names if name in scope]
    named += [getattr(x, name, None) for x in named if isinstance(x, ModuleType) for name in code.co_names]
    for callee in named:
        if isinstance(callee, JITFunction):
            name_callees_first(callee, seen)
    _ = function.cache_key


class _Collected:
    """In place of a kernel that a dry run has met: launches nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        pass

    def run(self, *_: Any) -> None:
        pass


class Compilations:
    """What this process compiles, or reads from the cache on disk, from `watch` on."""

    def __init__(self) -> None:
        self.count, self.ready = 0, False
        self.needed: list[Needed] = []
        """What `load` loads: what the last dry run found, or what is put here."""
        self._collected: dict[Any, Needed] | None = None
        self._original: Any = None

    def watch(self) -> None:
        """Begins to count. Does nothing the second time, or where kernels are interpreted."""
        if self._original is None:
            from triton.runtime.jit import JITFunction

            self._original = original = JITFunction._do_compile

            def compiled(function: Any, *args: Any, **kwargs: Any) -> Any:
                if self._collected is not None:
                    return self._collect(function, *args, **kwargs)
                name_callees_first(function)
                self.count += 1
                if self.ready:
                    log.warning("a kernel is compiled while requests wait: %s %s", function, args[0])
                return original(function, *args, **kwargs)

            JITFunction._do_compile = compiled

    @contextlib.contextmanager
    def dry(self) -> Iterator[list[Specialisation]]:
        """Nothing is launched inside, also no kernel that this process has already; on leaving, the list holds all of them. What kernels did
        not write is zero, as it may be an index (`torch.empty` is `torch.zeros` inside: for a process that does nothing else)."""
        import torch

        self.watch()
        found: list[Specialisation] = []
        self._collected, empty, empty_like = {}, torch.empty, torch.empty_like
        torch.empty, torch.empty_like = torch.zeros, torch.zeros_like
        held = {}  # by id: the hash of a function is made of its source and what it calls
        try:
            for function in _loaded():
                held[id(function)] = function.device_caches
                function.device_caches = defaultdict(function.create_binder)
            yield found
        finally:
            torch.empty, torch.empty_like = empty, empty_like
            for function in _loaded():  # of a module that was imported inside nothing is compiled
                fresh = defaultdict(function.create_binder)
                function.device_caches = held.get(id(function), fresh)
            self.needed = list(self._collected.values())
            found += [spec for spec, _ in self.needed]
            self._collected = None

    def _collect(
        self, function: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> None:  # fmt: skip
        from triton.runtime.driver import driver

        target = driver.active.get_current_target()
        spec = Specialisation(
            function.fn.__module__, function.fn.__qualname__, key, dict(signature), dict(constants), dict(attributes),
            dict(options.__dict__), (target.backend, target.arch, target.warp_size),
        )  # fmt: skip
        call = (key, signature, device, constants, options, attributes, warmup)
        self._collected[id(function), key] = (spec, call)  # type: ignore[index]
        # Triton takes ten times as long for a call of what it has not.
        function.device_caches[device][0][key] = _Collected()

    def all_ready(self) -> None:
        """Counts from 0 on; what is compiled from now on is told."""
        self.count, self.ready = 0, True

    def load(self) -> None:
        """What is `needed`, from the cache on disk into this process and onto the GPU. What is not there is compiled."""
        self.watch()
        for spec, call in self.needed:
            kernel = self._original(spec.function(), *call)
            if kernel is not None and hasattr(kernel, "_init_handles"):
                kernel._init_handles()
        self.needed = []


def _loaded() -> list[Any]:
    """The kernels of this package whose modules are imported."""
    from triton.runtime.jit import JITFunction

    modules = [m for name, m in sys.modules.items() if name.startswith("dsv4.kernels.") and m is not None]
    every = [f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)]
    return list({id(f): f for f in every}.values())


COMPILATIONS = Compilations()


def _mark(spec: Specialisation) -> Path:
    """The file that says that it lies in Triton's cache, inside of it, so that both go together."""
    return cache_dir() / "dsv4" / spec.digest()


def cache_dir() -> Path:
    """Triton's cache on disk."""
    from triton import knobs

    return Path(knobs.cache.dir)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time, so that ranks do not compile the same."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / "dsv4.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compiled_already(found: Iterable[Specialisation]) -> bool:
    """Whether the cache on disk has all of it."""
    return all(_mark(spec).exists() for spec in found)


def compile_all(found: list[Specialisation], progress: Progress | None = None, processes: int | None = None) -> int:  # fmt: skip
    """Compiles what the cache on disk lacks, in `processes` (default: one a processor) beside each other. Gives their number. Raises what
    the compiler raises."""
    if compiled_already(found):
        return 0
    with _alone():
        missing = [spec for spec in found if not _mark(spec).exists()]
        workers = min(processes or len(os.sched_getaffinity(0)), len(missing))
        if workers <= 1:
            for i, spec in enumerate(missing):
                spec.compile()
                _tell(progress, i + 1, missing)
            return len(missing)
        done, lock = 0, threading.Lock()

        def one_more() -> None:
            nonlocal done
            with lock:
                done += 1
                _tell(progress, done, missing)

        rest = deque(sorted(missing, key=_short))
        with ThreadPoolExecutor(workers) as pool:
            try:
                for each in [pool.submit(_in_a_process, rest, one_more) for _ in range(workers)]:
                    each.result()
            finally:
                rest.clear()  # after a failure, or Ctrl-C, nobody begins another
    return len(missing)


def _short(spec: Specialisation) -> bool:
    """Whether a kernel is compiled in a moment. Those of Gluon take longest, so they come first: else all would wait for the last of them."""
    return ".gluon." not in spec.module


def _in_a_process(rest: deque[Specialisation], one_more: Callable[[], None]) -> None:
    """Compiles one after the other of `rest`, from which others take too, in a process of their own, which gets them on standard input and
    says a line for each."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", "from dsv4.kernels.compiling import _worker; _worker()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(IndexError, BrokenPipeError):  # nothing is left, or it has ended
            while True:
                pickle.dump(rest.popleft(), process.stdin)
                process.stdin.flush()
                if not process.stdout.readline():
                    break
                one_more()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    if process.returncode:
        raise RuntimeError(f"a process that compiles kernels ended with {process.returncode}")


def _worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    with contextlib.suppress(EOFError, BrokenPipeError):  # no more is asked for, or nobody asks any more
        while True:
            pickle.load(sys.stdin.buffer).compile()
            print(flush=True)


def _tell(progress: Progress | None, done: int, missing: list[Specialisation]) -> None:
    if progress is not None:
        progress(done, len(missing), "compiling kernels")
