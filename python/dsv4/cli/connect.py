"""`dsv4 connect CLIENT`: the configuration with which a client uses a server, printed or written.

What is written is a file of our own that the client is told to read beside its settings, so nothing of the user's is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsv4.cli.common import note
from dsv4.cli.remote import KEY_VARIABLE, Server, Unreachable, add_server
from dsv4.cli.words import count, one_of
from dsv4.errors import ConfigError, RequestError

URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Target:
    """What a client is to use."""

    url: str
    """Without /v1."""
    model: str
    key: str | None
    context: int | None
    """Tokens of prompt and answer together, where the server says so."""

    @property
    def any_key(self) -> str:
        """For clients that send one in any case."""
        return self.key or "none"


@dataclass(frozen=True, slots=True)
class Client:
    """How a client is configured."""

    text: Callable[[Target], str]
    place: str | None
    """Where the configuration goes; None where it takes no file."""
    start: Callable[[str], str]
    """The command that begins it, with the file's name quoted for a shell."""
    note: str = ""


def codex(t: Target) -> str:
    """A profile of Codex. A provider's key comes from the environment only."""
    lines = [f"model = {json.dumps(t.model)}", 'model_provider = "dsv4"']
    if t.context:
        lines.append(f"model_context_window = {t.context}")
    lines += ["", "[model_providers.dsv4]", 'name = "dsv4"', f"base_url = {json.dumps(t.url + '/v1')}"]
    lines += ['wire_api = "responses"', *([f'env_key = "{KEY_VARIABLE}"'] if t.key else [])]
    return "\n".join(lines) + "\n"


def claude(t: Target) -> str:
    """Settings of Claude Code. Every model that it asks for by itself is this one."""
    names = ("ANTHROPIC_MODEL", "ANTHROPIC_SMALL_FAST_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL")
    env = {"ANTHROPIC_BASE_URL": t.url, "ANTHROPIC_AUTH_TOKEN": t.any_key, **dict.fromkeys(names, t.model)}
    return _json({"env": env | {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}})


def aider(t: Target) -> str:
    return _yaml(
        {
            "model": f"openai/{t.model}",
            "openai-api-base": f"{t.url}/v1",
            "openai-api-key": t.any_key,
            "show-model-warnings": False,
        }
    )


def opencode(t: Target) -> str:
    model: dict[str, Any] = {"name": t.model, "reasoning": True, "tool_call": True}
    if t.context:
        model["limit"] = {"context": t.context, "output": t.context // 4}
    options = {"baseURL": f"{t.url}/v1", "apiKey": t.any_key}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "dsv4",
        "options": options,
        "models": {t.model: model},
    }
    return _json(
        {
            "$schema": "https://opencode.ai/config.json",
            "model": f"dsv4/{t.model}",
            "provider": {"dsv4": provider},
        }
    )


def continue_(t: Target) -> str:
    model: dict[str, Any] = {
        "name": t.model,
        "provider": "openai",
        "model": t.model,
        "apiBase": f"{t.url}/v1",
    }
    model |= {"apiKey": t.any_key, "roles": ["chat", "edit", "apply"], "capabilities": ["tool_use"]}
    if t.context:
        model["defaultCompletionOptions"] = {"contextLength": t.context}
    return _yaml({"name": "dsv4", "version": "1.0.0", "schema": "v1", "models": [model]})


def cline(t: Target) -> str:
    """What to choose in the panel: Cline keeps it in the editor's own store."""
    shown = [
        ("API Provider", "OpenAI Compatible"),
        ("Base URL", f"{t.url}/v1"),
        ("API Key", t.any_key),
        ("Model ID", t.model),
    ]
    if t.context:
        shown.append(("Context Window Size", str(t.context)))
    return "".join(f"{name + ':':<21}{value}\n" for name, value in shown)


CLIENTS = {
    "codex": Client(codex, "~/.codex/dsv4.config.toml", lambda file: "codex --profile dsv4"),
    "claude": Client(claude, "~/.claude/dsv4.json", lambda file: f"claude --settings {file}"),
    "aider": Client(aider, "~/.aider.dsv4.yml", lambda file: f"aider --config {file}"),
    "opencode": Client(
        opencode, "~/.config/opencode/dsv4.json", lambda file: f"OPENCODE_CONFIG={file} opencode"
    ),
    "continue": Client(
        continue_,
        "~/.continue/dsv4.yaml",
        lambda file: f"cn --config {file}",
        "In an editor Continue reads ~/.continue/config.yaml: put the entry of models there.",
    ),
    "cline": Client(
        cline, None, lambda file: "", "Enter these in Cline's settings (the gear): it reads no file."
    ),
}


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "connect",
        help="how a coding agent uses a server",
        usage="%(prog)s CLIENT [flags]",
        description="Prints a client's configuration for a running server, or writes it into a file beside the client's own.",
        epilog='examples:\n  dsv4 connect codex --write\n  dsv4 connect claude --url https://llm.example.com --key "$KEY"\n'
        "  dsv4 connect opencode --model v4 --context 131072   without asking the server",
    )
    parser.add_argument("client", metavar="CLIENT", type=one_of(*CLIENTS), help=", ".join(CLIENTS))
    add_server(parser, url=URL)
    parser.add_argument("--model", metavar="NAME", help="one of the server's [its first]")
    parser.add_argument(
        "--context",
        type=count(1, such="131072"),
        metavar="N",
        help="tokens of context [what the server says]",
    )
    parser.add_argument(
        "--write",
        nargs="?",
        const="",
        metavar="FILE",
        help="write FILE, or the file that the client looks for",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    client, name = CLIENTS[arguments.client], arguments.client
    if arguments.write is not None and client.place is None:
        raise ConfigError(f"write: {name} takes no file; leave --write out to see what to enter where")
    target = target_of(arguments)
    text = client.text(target)
    place = arguments.write or client.place
    if arguments.write is None:
        print(text, end="")
        if place is not None:
            note(f"# goes into {place}; --write puts it there")
    else:
        assert place is not None
        for line in write(Path(place).expanduser(), text):
            note(line)
    if place is not None:
        if name == "codex" and target.key:
            note(f"# export {KEY_VARIABLE}=...   the key, which Codex takes from there alone")
        if name == "codex" and arguments.write and not place.endswith("/dsv4.config.toml"):
            note("# Codex finds a profile NAME as NAME.config.toml in ~/.codex or $CODEX_HOME")
        note(f"# {client.start(_quoted(place))}")
    if client.note:
        note(f"# {client.note}")
    return 0


def target_of(arguments: argparse.Namespace) -> Target:
    """What the flags and the server say. Raises ConfigError."""
    server, model, context = Server.of(arguments.url, arguments.key), arguments.model, arguments.context
    if model is None or context is None:
        try:
            found = server.model(model)
            model, context = found["id"], context or found.get("max_model_len")
        except RequestError as e:
            raise ConfigError(
                f"{server.url} says: {e.message}{'; give --key' if e.status == 401 else ''}"
            ) from None
        except Unreachable as e:
            if model is None:
                raise ConfigError(f"{e}; start it, or give --model and --context") from None
            note(f"# {e}: nothing is said of the context; --context does")
    return Target(server.url, model, server.key, context)


def write(path: Path, text: str) -> list[str]:
    """Puts a file there, for its owner alone as it may hold a key; what was there stays beside it. What was done, as lines.
    Raises ConfigError."""
    try:
        old = path.read_text(encoding="utf-8") if path.exists() else None
        if old == text:
            return [f"{path} is so already"]
        path.parent.mkdir(parents=True, exist_ok=True)
        said = []
        if old is not None:
            kept = next(
                p for n in range(1, 10**6) if not (p := path.with_name(f"{path.name}.bak{n}")).exists()
            )
            _put(kept, old)
            said.append(f"kept what was there as {kept}")
        _put(path, text)
        return [*said, f"wrote {path}"]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"write: {path}: {getattr(e, 'strerror', None) or e}") from None


def _put(path: Path, text: str) -> None:
    """Whole or not at all, also where two do it at once."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _quoted(place: str) -> str:
    """For a shell, which knows the tilde only without quotes."""
    return f"~/{shlex.quote(place[2:])}" if place.startswith("~/") else shlex.quote(place)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text
