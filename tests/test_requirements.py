"""Lowest versions: one truth in pyproject.toml, what is pinned for `make test-lowest`, and what users are told."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest
from dsv4 import doctor, requirements
from dsv4.cli import main
from dsv4.errors import ConfigError

ROOT = Path(__file__).parent.parent
PINS = dict(line.split("==") for line in (ROOT / "tests/lowest.txt").read_text().split() if "==" in line)


def numbers(version: str) -> list[int]:
    return [int(n) for n in version.split(".")]


def test_the_bounds_of_the_package_are_the_versions_that_are_tested() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = text.split("\ndependencies = [")[1].split("]")[0]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)[";]', listed))
    assert len(bounds) == listed.count('    "') == len(PINS)
    for name, lowest in bounds.items():
        pinned = numbers(PINS[name])
        assert numbers(lowest) == pinned[: len(numbers(lowest))] and not any(pinned[len(numbers(lowest)) :])


def test_every_dependency_has_a_reason() -> None:
    reasons = (ROOT / "docs/dependencies.md").read_text()
    assert [name for name in PINS if name not in reasons] == []


@pytest.fixture
def torch_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that are said to be installed; None is not at all."""
    said: dict[str, str | None] = {"torch": "2.15.0", "triton": "3.9.0", "rich": "15.0.0"}
    version = metadata.version

    def of(name: str) -> str:
        if name not in said:
            return version(name)
        if said[name] is None:
            raise metadata.PackageNotFoundError(name)
        return said[name]

    lines = [
        "torch>=2.10",
        "triton>=3.6 ; platform_system == 'Linux'",
        "matplotlib>=99 ; extra == 'plot'",
        "rich",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(metadata, "version", of)
    return said


@pytest.mark.parametrize(
    "version", ["2.10.0", "2.10", "2.10.1+cu130", "2.10.0+cpu", "2.15.0a0+git1234", "3.0"]
)
def test_these_are_new_enough(torch_of: dict[str, str | None], version: str) -> None:
    torch_of["torch"] = version
    assert list(requirements.unmet()) == []
    requirements.check()


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cpu", "2.1", "1.13.1", "2.9.0rc1"])
def test_an_old_torch_is_told_in_one_line_before_it_is_imported(
    torch_of: dict[str, str | None],
    version: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch_of["torch"] = version
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    words = (f"torch is {version}; dsv4 needs 2.10 or newer", "pip install --upgrade 'torch>=2.10'")
    for command in (["serve"], ["generate", "hi"], ["chat"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(w in err for w in words), err
    assert ("missing", words[0]) in [(f.level, f.text) for f in doctor._packages()]


def test_a_package_that_is_not_there_is_told(torch_of: dict[str, str | None]) -> None:
    torch_of["rich"] = None
    with pytest.raises(
        ConfigError, match="rich is not installed; dsv4 needs it: pip install --upgrade 'rich'"
    ):
        requirements.check()


@pytest.mark.parametrize("name", ["python_version", "python_full_version"])
@pytest.mark.parametrize(("below", "found"), [("3.1", []), ("99.0", ["nothing-such"])])
def test_what_other_interpreters_need(
    monkeypatch: pytest.MonkeyPatch, name: str, below: str, found: list[str]
) -> None:
    line = f"nothing-such>=1.0 ; {name} < '{below}'"
    monkeypatch.setattr(metadata, "requires", lambda _: [line])
    assert [unmet.name for unmet in requirements.unmet()] == found


def test_a_source_tree_that_was_never_installed_has_no_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert requirements.lowest() == {}
    requirements.check()
