"""`dsv4 chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.cli.common import add_settings, dim, note, read_settings
from dsv4.cli.generate import add_sampling, sampling_of
from dsv4.config import EngineConfig
from dsv4.errors import ConfigError, RequestError, kind
from dsv4.spelling import nearest

if TYPE_CHECKING:
    from dsv4.cli.talking import Reply
    from dsv4.engine.llm import LLM
    from dsv4.sampling import SamplingParams

HELP = """/file PATH      put a file before your next message   /think on|off   let the model think first
/system TEXT    set the system message                /reset          forget the conversation
/help           this                                  /exit           leave (so does Ctrl-D)
A line that ends in \\ goes on in the next. Ctrl-C interrupts an answer; what came of it stays."""

TRY = 'It knows little. Try "What is a snapshot?", "Repeat: ..." or "Define river."'
"""Said with the small model that ships."""


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk in the terminal",
        usage="%(prog)s [MODEL] [flags]",
        description=f"Talks to a model in the terminal, or line by line from a pipe.\n\n{HELP}",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--think", action="store_true", help="let the model think first")
    parser.add_argument(
        "--tools", metavar="FILE", help="JSON list of tools in OpenAI's form; you type what a call gives back"
    )
    add_sampling(parser, max_tokens="what the context holds")
    add_settings(parser, EngineConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Reads lines until /exit or the end of input."""
    (config,) = read_settings(arguments, EngineConfig)
    params = sampling_of(arguments, None)
    tools = read_tools(arguments.tools) if arguments.tools else []
    from dsv4.cli.talking import load_model

    llm = load_model(config)
    if llm.tokenizer is None:
        raise RequestError(
            "this model's directory has no tokenizer; chat needs one", "model", "no_tokenizer", 400
        )
    session = Session(llm, params(llm), system=arguments.system, think=arguments.think, tools=tools)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing for input())
        note(f"{llm.model_config.name}, {llm.max_model_len:,} tokens of context")
        note(dim(HELP if config.model else f"{TRY}\n{HELP}"))
    while (line := read_line("\n> ")) is not None:
        if not session.handle(line):
            break
    return 0


def read_tools(path: str) -> list[dict[str, Any]]:
    """The tools of a file. Raises ConfigError."""
    try:
        tools = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"tools file {path}: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"tools file {path} is no JSON: {e}") from None
    if not isinstance(tools, list):
        raise ConfigError(f"tools file {path} holds {kind(tools)}; it must be a list of tools")
    return tools


def read_line(prompt: str) -> str | None:
    """The next line, with those that a backslash at the end joins to it; None at the end of input. Ctrl-C at the
    prompt clears the line."""
    lines: list[str] = []
    try:
        while True:
            if sys.stdin.isatty():
                line = input("  " if lines else prompt)
            else:
                line = sys.stdin.readline()
                if not line:
                    return "\n".join(lines) or None
            lines.append(line.rstrip("\n").removesuffix("\\"))
            if not line.rstrip("\n").endswith("\\"):
                return "\n".join(lines)
    except EOFError:
        note("")
        return None
    except KeyboardInterrupt:
        note("")
        return ""


class Session:
    """A conversation and its settings."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        *,
        system: str | None,
        think: bool,
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        self.llm, self.params, self.system, self.think = llm, params, system, think
        self.tools, self.attached = tools or [], ""
        self.turns: list[dict[str, Any]] = []

    def handle(self, line: str) -> bool:
        """One line: a command or a message. False when the session should end."""
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self._answer(line)
            return True
        command, _, rest = line.partition(" ")
        commands = {
            "/exit": None,
            "/quit": None,
            "/file": self._file,
            "/reset": self._reset,
            "/think": self._think,
            "/system": self._system,
            "/help": lambda _: note(HELP),
        }
        if command not in commands:
            note(f"{command} is no command{nearest(command, commands)}; /help lists them")
            return True
        action = commands[command]
        if action is None:
            return False
        action(rest.strip())
        return True

    def _file(self, path: str) -> None:
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            note(f"/file {path}: {getattr(e, 'strerror', None) or e}")
            return
        self.attached += f"{text.rstrip()}\n\n"
        note(dim(f"{len(text):,} characters go before your next message"))

    def _reset(self, _: str) -> None:
        self.turns.clear()
        self.attached = ""
        note(dim("forgotten"))

    def _think(self, rest: str) -> None:
        if rest not in ("on", "off"):
            note(f"/think is {rest!r}; it takes on or off")
            return
        self.think = rest == "on"
        note(dim(f"thinking is {rest}"))

    def _system(self, rest: str) -> None:
        self.system = rest or None
        self.turns.clear()
        note(dim("the conversation starts anew with this system message" if rest else "no system message"))

    def _answer(self, text: str) -> None:
        """One turn of the user: with tools, as many answers as it takes until one calls none."""
        before = len(self.turns)
        self.turns.append({"role": "user", "content": self.attached + text})
        while (reply := self._reply()) is not None:
            said: dict[str, Any] = {"role": "assistant", "content": reply.blocks.content}
            calls = [
                {"id": f"call_{len(self.turns)}_{n}", "type": "function", "function": call}
                for n, call in enumerate(reply.calls())
            ]
            self.turns.append(said | ({"tool_calls": calls} if calls else {}))
            self.attached = ""
            if not calls or not self._results(calls):
                return
        del self.turns[before:]

    def _results(self, calls: list[dict[str, Any]]) -> bool:
        """Asks for what each call gave back. False without tools or when the user leaves it."""
        if not self.tools:
            return False
        for call in calls:
            result = read_line(f"{call['function']['name']} gives: ")
            if not result:
                return False
            self.turns.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        return True

    def _reply(self) -> Reply | None:
        """The next answer, shown as it comes; None when it was refused."""
        from dsv4.cli.talking import Printer, answer, write
        from dsv4.text.stream import Reading

        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            messages = [*system, *self.turns]
            prompt = self.llm.chat_ids(messages, thinking=self.think, tools=self.tools or None)
            reading = Reading.of_chat(messages, self.tools, thinking=self.think)
            reply = answer(self.llm, prompt, self.params, reading=reading, show=Printer().show)
        except RequestError as e:
            note(f"{e.message} (/reset starts anew)")
            return None
        write("\n")
        note(dim(reply.speed()))
        return reply
