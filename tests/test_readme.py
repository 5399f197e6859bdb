"""What the README shows works: its commands exist, its Python runs, its links lead somewhere."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dsv4.text.chat import EOS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def fenced(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make (\w+)", README))
    assert {"serve", "test"} <= targets
    assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets), targets


def test_its_python_runs() -> None:
    [code] = fenced("python")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stderr
    stored = json.loads((ROOT / "tests/data/nano_golden.json").read_text())["hello"]["text"]
    assert run.stdout.startswith(stored.removesuffix(EOS)) and "history_matched" in run.stdout


def test_its_benchmark_runs() -> None:
    [script] = set(re.findall(r"`python (benches/\S+\.py)`", README))
    command = [sys.executable, script, "--prompt", "64", "--decode", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r"tokens/s", run.stdout)) == 3


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`dsv4 (\w+)`", README))))
def test_its_commands_exist(command: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "dsv4.cli", command, "--help"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0 and "usage: dsv4" in run.stdout


def test_three_commands_lead_from_a_trace_to_a_server(tmp_path: Path) -> None:
    [block] = [b for b in fenced("console") if "recommend" in b]
    made, recommended, served = [line.split("#")[0].split()[2:] for line in block.splitlines()]
    dsv4 = [sys.executable, "-m", "dsv4.cli"]
    subprocess.run([*dsv4, *made], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    run = subprocess.run(
        [*dsv4, *recommended], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=110
    )
    assert run.stdout.rstrip().endswith(f"dsv4 serve MODEL {' '.join(served[1:])}"), run.stdout
    command = [*dsv4, *served, "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            lines = list(itertools.takewhile(lambda line: not line.startswith("ready"), server.stderr))
        finally:
            server.terminate()
        assert any(line.startswith("settings   from profile rollout:") for line in lines), lines
        server.stderr.read()
    assert server.returncode == 0


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
