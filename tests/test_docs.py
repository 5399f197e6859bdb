"""What README and docs name exists: links, paths, commands, flags and make targets; and imports go the way they say."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python/dsv4"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md"), ROOT / "benches/README.md"]
PAGES += [PACKAGE / "kernels/README.md", ROOT / "examples/train_nano/README.md"]
BASES = [
    ROOT,
    PACKAGE,
    PACKAGE / "kernels",
    ROOT / "rust/core/src",
    ROOT / "rust/sim/src",
    ROOT / "benches",
    ROOT / "docs",
]
"""Where a path in a text may begin, beside the page's own folder."""

COMMANDS = (
    "serve",
    "dynamo",
    "chat",
    "generate",
    "connect",
    "completion",
    "profiles",
    "plan",
    "simulate",
    "calibrate",
    "trace",
    "bench",
    "key",
    "warmup",
    "doctor",
)
KINDS = {
    "trace": ("agents", "chat", "rollouts", "documents", "mixed"),
    "bench": ("serve", "compare"),
    "profiles": ("show", "diff", "recommend"),
}
"""Commands that have commands of their own."""
OTHERS_FLAGS = {
    "--restart",
    "--features",
    "--release",
    "--num",
    "--from",
    "--seeds",
    "--workspace",
    "--bench",
    "--migration-limit",
}
"""Flags of docker, of Dynamo's frontend, of cargo and of our own binaries that a text may name."""


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def code(text: str) -> list[str]:
    """What stands between backticks, and every line of a fenced block."""
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return inline + [line for block in fenced for line in block.splitlines()]


@cache
def flags_of(command: str) -> frozenset[str]:
    """Of a command and of all its kinds."""
    below = (flags_of(f"{command} {kind}") for kind in KINDS.get(command, ()))
    return frozenset().union(own_flags_of(command), *below)


def own_flags_of(command: str) -> frozenset[str]:
    run = subprocess.run(
        [sys.executable, "-m", "dsv4.cli", *command.split(), "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return frozenset(re.findall(r"--[a-z][a-z0-9-]*", run.stdout))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_paths_exist(page: Path) -> None:
    for text in code(page.read_text()):
        for path in re.findall(
            r"(?<![\w/.<>$*-])[\w.-]+(?:/[\w.-]+)*\.(?:py|rs|md|toml|sh|svg)\b(?![/<*])", text
        ):
            bases = [page.parent, *BASES]
            found = any((base / path).exists() for base in bases)
            # A bare file name stands for a file of that name anywhere.
            found = found or ("/" not in path and any(ROOT.glob(f"*/**/{path}")))
            assert found, path


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for text in code(page.read_text()):
        for target in re.findall(r"\bmake ([a-z][\w-]*)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", [p for p in PAGES if "examples" not in p.parts], ids=named)
def test_commands_and_flags_exist(page: Path) -> None:
    every = frozenset.union(*map(flags_of, COMMANDS)) | OTHERS_FLAGS
    for text in code(page.read_text()):
        if text.lstrip("$ ").startswith(("cargo", "make", "python", "pytest", "pip", "git")):
            continue
        command = re.match(r"\$? ?dsv4 ([a-z]+)", text)
        if command:
            assert command[1] in COMMANDS, text
        known = flags_of(command[1]) if command else every
        for flag in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", text):
            assert flag in known or flag.replace("--no-", "--") in known, f"{flag} in {text!r}"


def order() -> list[str]:
    """The parts of the package from top to bottom, as docs/architecture.md has them."""
    text = (ROOT / "docs/architecture.md").read_text()
    [block] = re.findall(r"## Which way imports go.*?```text\n(.*?)```", text, re.DOTALL)
    return block.split()


def imports(file: Path) -> set[str]:
    """Parts of the package that a file imports, in functions and for type checking, too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dsv4":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dsv4."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("dsv4.")}
    return found


def test_imports_go_down() -> None:
    parts = order()
    here = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    here -= {"__init__", "__main__"}
    assert here <= set(parts), f"docs/architecture.md lacks {here - set(parts)}"
    assert len(parts) == len(set(parts))
    for file in PACKAGE.rglob("*.py"):
        inside = file.relative_to(PACKAGE).parts
        if inside[0] in ("__init__.py", "__main__.py"):
            continue
        part = inside[0].removesuffix(".py")
        for other in imports(file) - {part}:
            assert parts.index(part) < parts.index(other), f"{file.relative_to(ROOT)} imports {other}"


@pytest.mark.parametrize(
    "package",
    [p for p in sorted((ROOT / "python/dsv4").glob("*/__init__.py")) if "| ---" in p.read_text()],
    ids=lambda p: p.parent.name,
)
def test_a_table_of_files_has_them_all(package: Path) -> None:
    rows = "\n".join(line for line in package.read_text().splitlines() if line.startswith("|"))
    named = re.findall(r"`(\w+\.py)`", rows)
    there = {file.name for file in package.parent.glob("*.py")} - {package.name}
    assert set(named) == there and len(named) == len(there), set(named) ^ there


def test_decisions_are_short() -> None:
    for page in ROOT.glob("docs/decisions/*.md"):
        assert page.read_text().count("\n") <= 40, page.name
