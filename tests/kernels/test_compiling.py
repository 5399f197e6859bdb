"""What is compiled at start is all that is needed; it is compiled once, and what comes later is counted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from dsv4.kernels import compiling
from dsv4.kernels.compiling import Compilations, build_launcher, compile_all
from dsv4.kernels.known import Known
from triton.runtime.jit import JITFunction


@pytest.mark.parametrize(
    "world", [["1"], ["2"], ["1", "deterministic"], ["2", "deterministic"]], ids=" ".join
)
def test_the_start_finds_every_kernel_that_random_steps_need(world: list[str]) -> None:
    """With the kernels for Hopper, which are collected and neither compiled nor run, in a process that does not interpret them."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.dry_run", *world],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    first, again, *missed = run.stdout.splitlines()
    assert int(first.split()[0]) > 40 and missed == []
    assert again.startswith("0 of them"), "what a process has already is needed all the same"


KEYS = """
import sys
from dsv4.kernels.compiling import name_callees_first
from dsv4.kernels.triton import compressor, moe, moe_few, quantise, route, rows
from triton.runtime.jit import JITFunction
found = [f for m in (compressor, moe, moe_few, quantise, route, rows) for _, f in sorted(vars(m).items()) if isinstance(f, JITFunction)]
for function in found[:: int(sys.argv[1])]:
    name_callees_first(function)
print(len(found), {f.fn.__qualname__: f.cache_key for f in found})
"""


def test_keys_of_kernels_do_not_depend_on_which_come_first() -> None:
    """So that what another process compiled is found. With Triton 3.6 a kernel's own key does; `make test-lowest` has that."""
    said = []
    for order in ("1", "-1"):
        command = [sys.executable, "-c", KEYS, order]
        run = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
        )
        assert run.returncode == 0, run.stderr
        said.append(run.stdout)
    assert int(said[0].split()[0]) > 20 and said[0] == said[1]


def test_later_compilations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(JITFunction, "_do_compile", lambda function, *args: made.append(args) or "kernel")
    counted = Compilations()
    counted.watch()
    compiled = JITFunction._do_compile
    counted.watch()
    assert JITFunction._do_compile is compiled  # once
    assert compiled(SimpleNamespace(hash="of it"), "key") == "kernel" and counted.count == 1
    counted.all_ready()
    assert counted.count == 0
    compiled(SimpleNamespace(hash="of it"), "key")
    assert counted.count == 1 and len(made) == 2


@pytest.mark.parametrize(("gpu", "by_signature"), [(True, True), (False, True), (True, False)])
def test_launchers_are_built_where_triton_has_one_for_each_signature(
    gpu: bool, by_signature: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.nvidia import driver

    built: list[Any] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(driver, "CudaLauncher", lambda *about: built.append(about))
    monkeypatch.delattr(driver, "make_launcher", raising=False)
    if by_signature:
        monkeypatch.setattr(driver, "make_launcher", None, raising=False)
    build_launcher("source", "metadata")
    assert built == ([("source", "metadata")] if gpu and by_signature else [])


def test_a_list_that_is_cut_or_of_other_settings_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, needed = Known("a model", tmp_path / "new"), [("a kernel", ("its", "call"))]
    assert known.recall() is None
    known.keep(needed)  # type: ignore[arg-type]
    assert Known("a model", tmp_path / "new").recall() == needed
    assert Known("another", tmp_path / "new").recall() is None
    monkeypatch.setattr("torch.__version__", "another")
    assert Known("a model", tmp_path / "new").recall() is None
    known.path.write_bytes(known.path.read_bytes()[:-3])
    assert known.recall() is None
    assert list((tmp_path / "new").iterdir()) == [known.path]


def test_a_layer_that_reads_anothers_history_is_a_kind_of_its_own() -> None:
    """Its input has fewer products."""
    from dsv4.engine.warmup import _kinds

    def layer(ratio: int, *, stores: bool, table: bool = False) -> Any:
        attn = SimpleNamespace(compressor=object() if stores else None)
        return SimpleNamespace(ratio=ratio, attn=attn, moe=SimpleNamespace(table=object() if table else None))

    layers = [
        layer(4, stores=True),
        layer(4, stores=False),
        layer(4, stores=True),
        layer(4, stores=False, table=True),
    ]
    assert list(_kinds(layers)) == [layers[0], layers[1], layers[3]]


def test_a_folder_that_takes_no_list_costs_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    Known("a model", tmp_path / "file").keep([])
    assert "the list of needed kernels is not kept" in caplog.text


def test_old_lists_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv4.kernels.known.MOST", 2)
    for i, model in enumerate("abc"):
        Known(model, tmp_path).keep([])
        os.utime(Known(model, tmp_path).path, (i, i))
    assert Known("a", tmp_path).recall() is None and Known("c", tmp_path).recall() == []
    assert len(list(tmp_path.iterdir())) == 2


class _Agreeing:
    """As much of a device as is asked whether all ranks know."""

    def __init__(self, others: bool) -> None:
        self.others = others

    def all_agree(self, yes: bool) -> bool:
        return yes and self.others


@pytest.mark.parametrize(
    ("compiled", "others", "again"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_a_start_takes_an_earlier_ones_list_if_all_is_compiled_and_every_rank_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, others: bool, again: bool
) -> None:
    from dsv4.engine.warmup import _found_before
    from dsv4.kernels.compiling import COMPILATIONS
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(COMPILATIONS, "needed", [])
    known = Known("a model", tmp_path)
    device: Any = _Agreeing(others)
    assert _found_before(device, known) == []
    specs: list[Any] = [_Spec("a"), _Spec("b")]
    known.keep([(spec, ()) for spec in specs])
    if compiled:
        compile_all(specs, processes=1)
    found: list[Any] = list(_found_before(device, known))
    assert [spec.name for spec in found] == (["a", "b"] if again else [])
    assert len(COMPILATIONS.needed) == len(found)


class _Spec:
    """A kernel that a file stands for."""

    def __init__(self, name: str, module: str = "dsv4.kernels.triton.rows") -> None:
        self.name, self.module = name, module

    def digest(self) -> str:
        return self.name

    def compile(self) -> None:
        from triton import knobs

        marks = Path(knobs.cache.dir) / "dsv4"
        marks.mkdir(parents=True, exist_ok=True)
        with (marks / self.name).open("a") as file:
            file.write("compiled\n")


def test_what_the_cache_holds_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    told: list[tuple[int, int, str]] = []
    specs: list[Any] = [_Spec("a"), _Spec("b")]
    assert compile_all(specs, lambda *said: told.append(said), processes=1) == 2
    assert told == [(1, 2, "compiling kernels"), (2, 2, "compiling kernels")]
    assert compile_all([*specs, _Spec("c")], processes=1) == 1 and compile_all(specs) == 0
    assert (tmp_path / "dsv4" / "a").read_text() == "compiled\n"


class _Wrong(_Spec):
    def compile(self) -> None:
        raise ValueError("it cannot be compiled")


def test_processes_take_the_long_ones_first_and_stop_at_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    told: list[int] = []
    specs: list[Any] = [*map(_Spec, "abcd"), _Spec("long", "dsv4.kernels.gluon.moe")]
    assert compile_all(specs, lambda done, *_: told.append(done), processes=2) == 5
    assert told == [1, 2, 3, 4, 5] and {f.name for f in (tmp_path / "dsv4").iterdir()} == {*"abcd", "long"}
    assert capfd.readouterr().err == ""
    with pytest.raises(RuntimeError, match="a process that compiles kernels ended with 1"):
        compile_all([_Wrong("wrong", "dsv4.kernels.gluon.moe"), *map(_Spec, "efg")], processes=2)  # type: ignore[list-item]
    assert "it cannot be compiled" in capfd.readouterr().err
    first = compiling.deque(sorted(specs, key=compiling._short))
    assert [spec.name for spec in first] == ["long", *"abcd"]


def test_processes_that_need_the_same_compile_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the ranks of a model do. The second looks at the cache again when it is its turn."""
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    looked = threading.Barrier(2, timeout=60)

    class Meeting(_Spec):
        """No one begins before both have seen that there is something to do."""

        met = threading.local()

        def digest(self) -> str:
            if not getattr(self.met, "yes", False):
                self.met.yes = True
                looked.wait()
            return self.name

    specs: list[Any] = [Meeting(name) for name in "abc"]
    with ThreadPoolExecutor(2) as pool:
        counts = [x.result(60) for x in [pool.submit(compile_all, specs, None, 1) for _ in range(2)]]
    assert sorted(counts) == [0, 3]
    assert {(tmp_path / "dsv4" / name).read_text() for name in "abc"} == {"compiled\n"}
