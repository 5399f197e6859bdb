"""The files in `deploy/`: what they name is there, and what they promise fits what the server does."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from dsv4.api.app import MONITORING, OPEN_PATHS
from dsv4.cli import build_parser
from dsv4.config import ServerConfig

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
CONTAINER = (DEPLOY / "Containerfile").read_text()
UNIT = (DEPLOY / "dsv4.service").read_text()


def setting(name: str) -> str:
    """Of the unit."""
    found = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    assert len(found) == 1, name
    return found[0]


def test_the_container_copies_what_is_there() -> None:
    copied = [w for line in re.findall(r"^COPY (.+)$", CONTAINER, re.MULTILINE) for w in line.split()[:-1]]
    ignored = (DEPLOY / "Containerfile.dockerignore").read_text().splitlines()
    assert copied
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in ignored
    needed = re.findall(r'(?:readme = |license-files = \[)"([^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert set(needed) <= set(copied)
    newest = re.findall(r"Rust (\d+\.\d+) or newer", (ROOT / "README.md").read_text())
    assert re.findall(r"^ARG RUST=(.+)$", CONTAINER, re.MULTILINE) == newest


def test_both_kinds_run_as_an_ordinary_user() -> None:
    stages = re.split(r"^FROM ", CONTAINER, flags=re.MULTILINE)[1:]
    last = {stage.split("\n")[0].split(" AS ")[1]: stage for stage in stages}
    assert list(last) == ["wheel", "base", "cpu", "cuda"]
    for kind in ("cpu", "cuda"):
        users = re.findall(r"^USER (\S+)$", last[kind], re.MULTILINE)
        assert users == ["10001:10001"] and last[kind].rstrip().endswith(f"USER {users[0]}")
    assert "--uid 10001" in last["base"] and "/health" in OPEN_PATHS and "/health" in last["base"]


@pytest.mark.parametrize(
    "command", [line.split("dsv4 ", 1)[1] for line in [setting("ExecStart")]] + ["serve --host 0.0.0.0"]
)
def test_commands_are_ones_of_ours(command: str) -> None:
    build_parser().parse_args(command.split())


def test_the_unit_waits_longer_than_the_server_drains() -> None:
    assert int(setting("TimeoutStopSec")) > ServerConfig().drain_timeout + 40  # and for the step at hand
    assert setting("KillMode") == "mixed" and "-HUP" in setting("ExecReload")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    program = tmp_path / "dsv4"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "dsv4.service"
    unit.write_text(UNIT.replace("/opt/dsv4/bin/dsv4", str(program)))
    ran = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    # It also tells of other units of the machine.
    told = [line for line in ran.stderr.splitlines() if unit.name in line]
    assert ran.returncode == 0 and not told, ran.stderr


@pytest.mark.parametrize("name", ["Caddyfile", "nginx.conf"])
def test_proxies_stream_and_keep_figures_inside(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert {"Caddyfile": "flush_interval -1", "nginx.conf": "proxy_buffering off"}[name] in text
    for path in {*MONITORING, "/admin"}:
        assert path.strip("/") in text.split("stay inside")[1], path
    assert re.search(r"max_size 64MiB$|client_max_body_size 64m;", text, re.MULTILINE)
    assert ServerConfig().max_body_bytes == 64 * 2**20
