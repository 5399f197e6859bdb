"""The files of `dsv4 connect` in the clients that they are for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.shell_model import DONE
from tests.clients.test_clients import ROOT, TURNS, loops, pytestmark, run, server  # noqa: F401
from tests.support.scripted import environment
from tests.support.serving import RunningServer


def write(client: str, at: RunningServer, home: Path, *more: str) -> None:
    """As the user does it."""
    command = [
        sys.executable,
        "-m",
        "dsv4.cli",
        "connect",
        client,
        "--url",
        at.url,
        "--key",
        "k",
        "--write",
    ]
    subprocess.run([*command, *more], check=True, env=environment() | {"HOME": str(home)})


def found(pattern: str) -> str:
    paths = list(ROOT.glob(pattern))
    if not paths:
        pytest.skip(f"no {pattern} in {ROOT}")
    return str(paths[0])


def test_codex(server: RunningServer, tmp_path: Path) -> None:  # noqa: F811
    write("codex", server, tmp_path)
    binary = found("sdks/lib/*/site-packages/codex_cli_bin/bin/codex")
    how = ("--profile", "dsv4", "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", "run it")
    assert DONE in run(server, tmp_path, binary, *how, DSV4_KEY="k")
    assert TURNS + 1 in loops(server)


def test_claude_code(server: RunningServer, tmp_path: Path) -> None:  # noqa: F811
    write("claude", server, tmp_path, "--model", "claude-v4")
    binary = found("sdks/lib/*/site-packages/claude_agent_sdk/_bundled/claude")
    how = ("--settings", f"{tmp_path}/.claude/dsv4.json", "--allowedTools", "Bash", "-p", "run it")
    assert DONE in run(server, tmp_path, binary, *how, DISABLE_AUTOUPDATER="1")
    assert TURNS + 1 in loops(server)


def test_aider(server: RunningServer, tmp_path: Path) -> None:  # noqa: F811
    write("aider", server, tmp_path)
    quiet = (
        "--no-check-update",
        "--analytics-disable",
        "--no-git",
        "--yes-always",
        "--no-pretty",
        "--message",
        "run it",
    )
    run(server, tmp_path, found("aider/bin/aider"), "--config", f"{tmp_path}/.aider.dsv4.yml", *quiet)
    assert server.engine.seen and os.listdir(tmp_path)
