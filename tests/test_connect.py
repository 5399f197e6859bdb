"""`dsv4 connect`, `dsv4 chat --url` and `dsv4 completion`: what they write, and what they say to what cannot be."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from dsv4.cli import build_parser, main
from dsv4.cli.connect import CLIENTS

from tests.support.fake_engine import FakeEngine, small_tokenizer
from tests.support.serving import RunningServer, running

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CALL = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Ulm</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    tokenizer = small_tokenizer()

    def script(prompt: Any) -> str:
        text = tokenizer.decode(list(prompt), skip_special=False)
        if "weather" in text:
            return "It rains." if "<tool_result>" in text else CALL
        return "I weigh it.</think>Yes." if text.endswith("<think>") else "Hello there."

    with running(FakeEngine(script, tokenizer=tokenizer), name="v4", api_key="sesame") as found:
        yield found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DSV4_KEY", raising=False)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["connect", *words]) == 0
    return capsys.readouterr().out


READ = {
    "codex": tomllib.loads,
    "claude": json.loads,
    "opencode": json.loads,
    "aider": yaml.safe_load,
    "continue": yaml.safe_load,
}


def test_what_each_client_reads(
    server: RunningServer, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{server.url}/v1"
    found = {
        name: read(printed(capsys, name, "--url", url, "--key", "sesame")) for name, read in READ.items()
    }
    assert found["codex"] == {
        "model": "v4",
        "model_provider": "dsv4",
        "model_context_window": 4096,
        "model_providers": {
            "dsv4": {"name": "dsv4", "base_url": url, "wire_api": "responses", "env_key": "DSV4_KEY"}
        },
    }
    env = found["claude"]["env"]
    assert env["ANTHROPIC_BASE_URL"] == server.url and env["ANTHROPIC_AUTH_TOKEN"] == "sesame"
    assert env["ANTHROPIC_MODEL"] == env["ANTHROPIC_SMALL_FAST_MODEL"] == "v4"
    assert (
        found["aider"] | {"model": "openai/v4", "openai-api-base": url, "openai-api-key": "sesame"}
        == found["aider"]
    )
    provider = found["opencode"]["provider"]["dsv4"]
    assert (
        provider["options"] == {"baseURL": url, "apiKey": "sesame"}
        and found["opencode"]["model"] == "dsv4/v4"
    )
    assert provider["models"]["v4"]["limit"] == {"context": 4096, "output": 1024}
    (model,) = found["continue"]["models"]
    assert (model["provider"], model["apiBase"], model["model"], model["apiKey"]) == (
        "openai",
        url,
        "v4",
        "sesame",
    )
    assert found["continue"]["schema"] == "v1" and {"chat", "edit", "apply"} == set(model["roles"])
    shown = printed(capsys, "cline", "--url", url, "--key", "sesame")
    assert all(part in shown for part in ("OpenAI Compatible", url, "v4", "sesame", "4096"))
    assert set(READ) | {"cline"} == set(CLIENTS)


@pytest.mark.parametrize("name", READ)
def test_odd_names_stay_what_they_are(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = 'a"b\\c: #{d}\u00e9'
    text = printed(capsys, name, "--model", odd, "--context", "8192", "--key", odd)
    assert odd in str(READ[name](text)).replace("\\\\", "\\").replace("\\'", "'")


@pytest.mark.parametrize("name", READ)
def test_writing_keeps_what_was_there(name: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "v4", "--context", "4096", "--write")
    assert main(["connect", name, *flags]) == 0
    (file,) = [p for p in home.rglob("*") if p.is_file()]
    assert str(file) == CLIENTS[name].place.replace("~", str(home)) and file.stat().st_mode & 0o077 == 0
    said = capsys.readouterr().err
    assert f"wrote {file}" in said and CLIENTS[name].start(CLIENTS[name].place) in said
    text = file.read_text()
    assert main(["connect", name, *flags]) == 0 and "so already" in capsys.readouterr().err
    file.write_text("mine")
    for n in (1, 2):
        assert main(["connect", name, *flags]) == 0
        assert f"kept what was there as {file}.bak{n}" in capsys.readouterr().err
        assert file.read_text() == text
        file.write_text(f"mine {n}")
    assert [(p.name, p.read_text()) for p in sorted(home.rglob("*bak*"))] == [
        (f"{file.name}.bak1", "mine"),
        (f"{file.name}.bak2", "mine 1"),
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cursor"], "it takes codex, claude, aider"),
        (["codxe"], "did you mean 'codex'?"),
        (["cline", "--model", "x", "--context", "1", "--write"], "takes no file"),
        (["codex", "--url", "localhost:8000"], "such as http://127.0.0.1:8000"),
        (["codex", "--url", "ftp://x"], "such as http://127.0.0.1:8000"),
        (["codex", "--url", "http://127.0.0.1:1"], "cannot be reached"),
        (["codex", "--url", "SERVER"], "give --key"),
        (
            ["codex", "--url", "SERVER", "--key", "sesame", "--model", "v5"],
            "serves no model 'v5'; it has v4, default",
        ),
        (["codex", "--model", "x", "--context", "0"], "'0' will not do"),
        (["codex", "--model", "x", "--context", "1", "--write", "/proc/nothing/x"], "/proc/nothing/x"),
    ],
)
def test_mistakes(
    words: list[str], says: str, server: RunningServer, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [server.url if word == "SERVER" else word for word in words]
    try:
        code = main(["connect", *words])
    except SystemExit as e:
        code = e.code  # type: ignore[assignment]
    said = capsys.readouterr()
    assert code == 2 and says in said.err and said.err.count("\n") == 1 and not said.out


def test_an_alias_and_a_server_that_is_not_there_yet(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(FakeEngine(tokenizer=small_tokenizer()), served_model_name=("v4", "claude-*")) as found:
        env = json.loads(printed(capsys, "claude", "--url", found.url, "--model", "claude-v4"))["env"]
        assert env["ANTHROPIC_MODEL"] == "claude-v4"
    assert main(["connect", "codex", "--url", "http://127.0.0.1:1", "--model", "v4"]) == 0
    said = capsys.readouterr()
    assert "model_context_window" not in said.out and "--context" in said.err


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", *flags])


def test_chat_with_a_server(
    server: RunningServer, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSV4_KEY", "sesame")
    flags = (
        "--url",
        f"{server.url}/v1/",
        "--max-tokens",
        "50",
        "--temperature",
        "0.5",
        "--seed",
        "7",
        "--system",
        "Be brief.",
    )
    assert chat(monkeypatch, "Hi\n/think on\nSure?\n", *flags) == 0
    said = capsys.readouterr()
    assert said.out == "Hello there.\nYes.\n" and "I weigh it." in said.err and "cached" in said.err
    first, second = server.engine.seen[-2:]
    assert (first.params.max_tokens, first.params.temperature, first.params.seed) == (50, 0.5, 7)
    text = server.engine.tokenizer.decode(second.prompt)
    assert all(part in text for part in ("Be brief.", "Hi", "Hello there.", "Sure?"))


def test_chat_with_a_server_takes_tools(
    server: RunningServer, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = home / "tools.json"
    tools.write_text(
        json.dumps(
            [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
        )
    )
    flags = ("--url", server.url, "--key", "sesame", "--tools", str(tools))
    assert chat(monkeypatch, "The weather?\nrain\n", *flags) == 0
    assert 'get_weather {"city": "Ulm"}' in (out := capsys.readouterr().out) and out.endswith("It rains.\n")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--url", "SERVER"], "API key is missing"),
        (
            ["--url", "SERVER", "--key", "sesame", "--max-num-seqs", "3"],
            "max_num_seqs is a setting of the engine",
        ),
        (["--url", "SERVER", "--key", "sesame", "other"], "serves no model 'other'"),
        (["--url", "http://127.0.0.1:1"], "cannot be reached"),
        (["--key", "x"], "key is for --url"),
    ],
)
def test_chat_says_what_cannot_be(
    flags: list[str],
    says: str,
    server: RunningServer,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert chat(monkeypatch, "Hi\n", *[server.url if f == "SERVER" else f for f in flags]) != 0
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    (commands,) = [a.choices for a in build_parser()._actions if isinstance(a.choices, dict)]
    for name, parser in commands.items():
        assert name in script
        for action in parser._actions:
            for flag in action.option_strings:
                assert (flag if shell != "fish" else flag.lstrip("-")) in script, f"{name} {flag}"
    assert "opencode" in script and "zsh" in script  # values
    if (found := shutil.which(shell)) is not None:
        checked = subprocess.run([found, "-n"], input=script, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["co"], "completion connect"),
        (["connect", "op"], "opencode"),
        (["serve", "--max-num-s"], "--max-num-seqs"),
    ],
)
def test_bash_completes(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    script = capsys.readouterr().out
    ask = f'COMP_WORDS=(dsv4 {" ".join(words)}); COMP_CWORD={len(words)}; $(complete -p dsv4 | grep -o "\\-F [^ ]*" | cut -c4-); echo "${{COMPREPLY[@]}}"'
    ran = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True)
    assert sorted(ran.stdout.split()) == sorted(expected.split()), ran.stderr
