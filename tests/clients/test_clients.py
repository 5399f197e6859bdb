"""Unmodified clients against a scripted model: a conversation with tool calls to its end, and each prompt begins with the one
before and what was sampled after it. `make test-clients` installs the clients and runs this; without them it is skipped."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dsv4.engine.grammars import Grammars

from tests.clients.shell_model import DONE, EXTRACT, MARK, ShellModel
from tests.support.fake_engine import EOS, FakeEngine, small_tokenizer
from tests.support.serving import RunningServer, running

ROOT = Path(os.environ.get("CLIENTS", "/nonexistent"))
"""Where the virtual environments are: `sdks`, `frameworks`, `tools`, `llm` and `aider`."""

pytestmark = pytest.mark.skipif(not ROOT.exists(), reason="run by make test-clients")
HERE = Path(__file__).parent
TURNS = 10


@pytest.fixture
def server() -> Iterator[RunningServer]:
    tokenizer = small_tokenizer()
    engine = FakeEngine(ShellModel(tokenizer, TURNS), tokenizer=tokenizer, max_model_len=2**20)
    with running(engine, served_model_name=("dsv4", "claude-*")) as server:
        yield server


def run(server: RunningServer, home: Path, *command: str, **env: str) -> str:
    """Runs a client that sees nothing of this machine but its own home; what it says."""
    (home / "work").mkdir(parents=True, exist_ok=True)
    env = {"HOME": str(home), "PATH": os.environ["PATH"], "LITELLM_LOCAL_MODEL_COST_MAP": "True", **env}
    done = subprocess.run(
        command,
        cwd=home / "work",
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def loops(server: RunningServer) -> list[int]:
    """Lengths of the conversations in which each prompt begins with the one before and its answer."""
    engine, found, before = server.engine, [], None
    for seen in engine.seen:
        goes_on = before is not None and seen.prompt[: len(before)] == before
        found = [*found[:-1], found[-1] + 1] if goes_on else [*found, 1]
        before = [*seen.prompt, *engine.tokenizer.encode(engine.script(seen.prompt)), EOS]
    return found


@pytest.mark.parametrize(
    ("home", "name", "count", "structured"),
    [
        ("sdks", "openai", 4, 0),
        ("sdks", "anthropic", 2, 0),
        ("sdks", "litellm", 4, 0),
        ("frameworks", "frameworks", 6, 0),
        ("tools", "llama_index", 2, 3),
        ("llm", "llm", 2, 2),
        ("tools", "instructor", 0, 10),
        ("tools", "smolagents", 0, 1),
    ],
)
def test_sdk(
    server: RunningServer, tmp_path: Path, home: str, name: str, count: int, structured: int
) -> None:
    """`count`: conversations with tools, each prompt beginning with the one before (smolagents writes calls as text of its own).
    `structured`: answers that were held to the client's schema."""
    run(server, tmp_path, str(ROOT / home / "bin/python"), str(HERE / f"sdk_{name}.py"), server.url)
    assert sum(n == TURNS + 1 for n in loops(server)) == count, loops(server)
    assert held(server) == structured


def held(server: RunningServer) -> int:
    """Structured answers that had a grammar, each of which takes what the client got."""
    engine, found = server.engine, 0
    grammars = Grammars(lambda: engine.tokenizer, engine.model_config.vocab_size, [EOS])
    for seen in engine.seen:
        if EXTRACT not in engine.tokenizer.decode(seen.prompt) or seen.params.grammar is None:
            continue
        matcher = grammars.constraint(seen.params.grammar, ends=[EOS], least=0).matcher
        tokens = engine.tokenizer.encode(engine.script(seen.prompt))
        assert matcher.validate_tokens([*tokens, EOS]) == len(tokens) + 1
        found += 1
    return found


def test_claude_code(server: RunningServer, tmp_path: Path) -> None:
    (binary,) = ROOT.glob("sdks/lib/*/site-packages/claude_agent_sdk/_bundled/claude")
    settings = {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": "k",
        "ANTHROPIC_MODEL": "claude-v4",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    how = ("--output-format", "stream-json", "--verbose", "--allowedTools", "Bash")
    lines = [
        json.loads(line)
        for line in run(server, tmp_path, str(binary), "-p", "run it", *how, **settings).splitlines()
    ]
    last = lines[-1]
    assert (last["type"], last["is_error"], last["result"]) == ("result", False, DONE)
    _called(json.dumps(lines))
    assert TURNS + 1 in loops(server), loops(server)


def codex(server: RunningServer, home: Path) -> list[dict[str, Any]]:
    """Runs a task; the events of it."""
    (binary,) = ROOT.glob("sdks/lib/*/site-packages/codex_cli_bin/bin/codex")
    (home / ".codex").mkdir()
    (home / ".codex/config.toml").write_text(
        f'model = "dsv4"\nmodel_provider = "dsv4"\n[model_providers.dsv4]\nname = "dsv4"\nbase_url = "{server.url}/v1"\n'
        'env_key = "DSV4_KEY"\nwire_api = "responses"\n'
    )
    how = ("exec", "--json", "--skip-git-repo-check", "--sandbox", "danger-full-access")
    said = run(server, home, str(binary), *how, "run it", DSV4_KEY="k", CODEX_HOME=str(home / ".codex"))
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_codex(server: RunningServer, tmp_path: Path) -> None:
    items = [e["item"] for e in codex(server, tmp_path) if e["type"] == "item.completed"]
    assert (items[-1]["type"], items[-1]["text"]) == ("agent_message", DONE)
    _called("".join(i["aggregated_output"] for i in items if i["type"] == "command_execution"))
    assert TURNS + 1 in loops(server), loops(server)


def test_codex_finds_a_tool_of_a_namespace(server: RunningServer, tmp_path: Path) -> None:
    model = server.engine.script
    model.shells, model.turns = {"multi_agent_v1__close_agent": "target"}, 1
    codex(server, tmp_path)
    last = model.tokenizer.decode(server.engine.seen[-1].prompt)
    assert "<tool_result>invalid agent id echo" in last


def test_aider(server: RunningServer, tmp_path: Path) -> None:
    quiet = (
        "--no-show-model-warnings",
        "--no-check-update",
        "--analytics-disable",
        "--no-git",
        "--yes-always",
    )
    where = {"OPENAI_API_BASE": f"{server.url}/v1", "OPENAI_API_KEY": "k"}
    aider = str(ROOT / "aider/bin/aider")
    said = run(
        server,
        tmp_path,
        aider,
        "--model",
        "openai/dsv4",
        *quiet,
        "--no-pretty",
        "--message",
        "a task",
        **where,
    )
    assert DONE in said


def _called(said: str) -> None:
    """Every call was made."""
    for turn in range(TURNS):
        for n in range(2 if turn == 1 else 1):
            assert f"{MARK} {turn}.{n}" in said
