"""A model directory is data: nothing in it is ever run, imported, unpickled or rendered. Shown twice, by what the package's source says and by
what the interpreter does while a directory full of traps is served."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "python" / "dsv4"
FILES = sorted(PACKAGE.rglob("*.py"))

MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
    "jinja2",
    "mako",
    "code",
    "runpy",
    "imp",
}
"""That make code or objects of data."""

CALLS = {"eval", "exec", "compile", "__import__", "breakpoint"}
ATTRIBUTES = {
    "torch.load",
    "numpy.load",
    "np.load",
    "np.fromregex",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "importlib.util.spec_from_file_location",
    "torch.hub.load",
    "torch.jit.load",
    "AutoModel.from_pretrained",
    "AutoTokenizer.from_pretrained",
    "AutoConfig.from_pretrained",
}
STARTERS = {"run", "Popen", "call", "check_call", "check_output"}
WORDS = {"trust_remote_code", "allow_pickle"}

ALLOWED: dict[str, set[str]] = {
    # What kernels to compile, from this process to one that it has just started, over that one's standard input.
    "kernels/compiling.py": {"pickle"},
    # The same list, in the user's own cache of compiled kernels.
    "kernels/known.py": {"pickle"},
}
"""By file, what it may do in spite of all."""


def named(node: ast.AST) -> str:
    """`a.b.c` of an attribute, as far as it is names."""
    if isinstance(node, ast.Attribute):
        return f"{named(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def found_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            name = named(node.func)
            if name in CALLS or name in ATTRIBUTES:
                yield name
            yield from (k.arg for k in node.keywords if k.arg in WORDS)
            if name.rpartition(".")[2] in STARTERS:
                yield from ("shell=True" for k in node.keywords if k.arg == "shell")


def test_the_scan_finds_what_it_is_for() -> None:
    text = "import pickle\nfrom dill import loads\neval('1')\ntorch.load(f)\nnp.load(f, allow_pickle=True)\nrun(x, shell=True)"
    wanted = {"pickle", "dill", "eval", "torch.load", "np.load", "allow_pickle", "shell=True"}
    assert set(found_in(ast.parse(text))) == wanted


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_source_makes_code_of_data(file: Path) -> None:
    name = str(file.relative_to(PACKAGE))
    assert set(found_in(ast.parse(file.read_text(encoding="utf-8")))) <= ALLOWED.get(name, set())


WATCHED = """
import json, os, sys
events, folder = [], sys.argv[1]

def about(argument):
    if isinstance(argument, (str, bytes, os.PathLike)):
        return os.fsdecode(argument)
    return getattr(argument, "co_filename", "")

def hook(event, arguments):
    # Code, imports and processes that come from the directory; objects made of pickles at all.
    if event.startswith(("pickle.", "marshal.loads")) and loading:
        events.append((event, "" if event != "pickle.find_class" else ".".join(map(str, arguments))))
    elif event in ("exec", "compile", "import", "os.system", "subprocess.Popen", "os.exec", "ctypes.dlopen"):
        if any(folder in about(a) for a in arguments):
            events.append((event, [about(a) for a in arguments]))
    elif event == "open" and folder in about(arguments[0]) and not about(arguments[0]).endswith(DATA):
        if not os.path.isdir(about(arguments[0])):
            events.append((event, about(arguments[0])))

DATA = (".json", ".safetensors", "encoding_dsv4.py")  # the last is read as text: it says which chat format the model has
loading = False
from dsv4 import LLM, SamplingParams
import dsv4.engine.llm, dsv4.engine.build, torch  # what is imported is compiled code of its own
LLM(sys.argv[2], num_pages=8, max_num_seqs=1)  # and what comes late with a first model
sys.addaudithook(hook)
loading = True
llm = LLM(folder, num_pages=8, max_num_seqs=1)
(out,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
print(json.dumps({"events": events, "tokens": len(out.token_ids)}))
"""


class Boom:
    """Writes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def set_traps(folder: Path, mark: Path) -> None:
    """Everything that other loaders run, render or unpickle."""
    code = f"import os\nos.makedirs({str(mark)!r}, exist_ok=True)\n"
    for name in (
        "modeling_deepseek.py",
        "configuration_deepseek.py",
        "__init__.py",
        "setup.py",
        "conftest.py",
        "sitecustomize.py",
    ):
        (folder / name).write_text(code)
    for name in ("encoding_dsv4.py", "tokenization_deepseek.py"):
        (folder / name).write_text(code)
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "training_args.bin",
        "scheduler.pkl",
        "tokenizer.pkl",
        "weights.npy",
    ):
        (folder / name).write_bytes(pickle.dumps(Boom(mark)))
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": {"x": "pytorch_model.bin"}})
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        name: "modeling_deepseek.Model" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    }
    config["trust_remote_code"] = True
    (folder / "config.json").write_text(json.dumps(config))
    template = "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}"
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "modeling_deepseek"}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"chat_template": template}))


def test_a_directory_full_of_traps_is_served_as_data(tmp_path: Path) -> None:
    from tests.support.engines import write_tiny

    plain, trapped, mark = (
        write_tiny(tmp_path / "plain"),
        write_tiny(tmp_path / "trapped"),
        tmp_path / "sprung",
    )
    set_traps(trapped, mark)
    with pytest.raises(FileNotFoundError):
        os.rmdir(mark)
    pickle.loads((trapped / "model.pt").read_bytes())
    os.rmdir(mark)  # so a trap that is touched would show
    ran = subprocess.run(
        [sys.executable, "-c", WATCHED, str(trapped), str(plain)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told == {"events": [], "tokens": 3} and not mark.exists()
