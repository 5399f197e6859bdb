"""`dsv4 chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.cli.common import add_settings, dim, model_of, note, read_settings
from dsv4.cli.generate import add_sampling, sampling_of
from dsv4.cli.remote import Server, add_server, answerer
from dsv4.config import EngineConfig
from dsv4.errors import ConfigError, RequestError, kind
from dsv4.quantities import counted
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
        description=f"Talks to a model in the terminal, or line by line from a pipe. With --url it is one of a running server,\n"
        f"dsv4's or another of OpenAI's API, and MODEL its name there.\n\n{HELP}",
    )
    add_server(parser, url=None)
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
    if arguments.url is not None:
        return run_remote(arguments)
    if arguments.key is not None:
        raise ConfigError(
            "key is for --url, the address of a server; without it the model runs in this process"
        )
    (config,) = read_settings(arguments, EngineConfig)
    params = sampling_of(arguments, None)
    tools = read_tools(arguments.tools) if arguments.tools else []
    from dsv4.cli.talking import load_model

    llm = load_model(config)
    if llm.tokenizer is None:
        raise RequestError(
            "this model's directory has no tokenizer; chat needs one", "model", "no_tokenizer", 400
        )
    title = f"{llm.model_config.name}, {llm.max_model_len:,} tokens of context"
    help = HELP if config.model else f"{TRY}\n{HELP}"
    return talk(Session(local(llm, params(llm)), arguments, tools), title, help)


def run_remote(arguments: argparse.Namespace) -> int:
    """The same with a server's model."""
    for f in dataclasses.fields(EngineConfig):
        if f.name not in ("model", "seed") and getattr(arguments, f.name, None) is not None:
            raise ConfigError(f"{f.name} is a setting of the engine; with --url that is the server's")
    if arguments.yaml is not None:
        raise ConfigError("config holds settings of the engine; with --url those are the server's")
    given = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "top_p")}
    given["seed"] = arguments.seed and int(arguments.seed)
    tools = read_tools(arguments.tools) if arguments.tools else []
    server = Server.of(arguments.url, arguments.key)
    model = server.model(model_of(arguments))
    length = model.get("max_model_len")
    title = f"{model['id']} at {server.url}" + (f", {length:,} tokens of context" if length else "")
    sampling = {name: value for name, value in given.items() if value is not None}
    return talk(Session(answerer(server, model["id"], sampling), arguments, tools), title, HELP)


def talk(session: Session, title: str, help: str) -> int:
    """Line after line. `title`: whom one talks to. The exit code: 1 where lines came from a script and one got no answer."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing for input())
        note(title)
        note(dim(help))
    while (line := read_line("\n> ")) is not None:
        if not session.handle(line):
            break
    return 1 if session.unanswered and not sys.stdin.isatty() else 0


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


Answerer = Callable[[list[dict[str, Any]], list[dict[str, Any]], bool], "Reply"]
"""Shows the answer to messages as it comes: (messages, tools, whether to think first). Raises RequestError."""


def local(llm: LLM, params: SamplingParams) -> Answerer:
    """Answers of a model in this process."""
    from dsv4.cli.talking import Printer, answer
    from dsv4.text.stream import Reading

    def reply_to(messages: list[dict[str, Any]], tools: list[dict[str, Any]], think: bool) -> Reply:
        prompt = llm.chat_ids(messages, thinking=think, tools=tools or None)
        reading = Reading.of_chat(messages, tools, thinking=think)
        return answer(llm, prompt, params, reading=reading, show=Printer().show)

    return reply_to


class Session:
    """A conversation and its settings."""

    def __init__(self, answer: Answerer, arguments: argparse.Namespace, tools: list[dict[str, Any]]) -> None:
        """`answer`: gives the next answer to messages, with tools, after thoughts or not."""
        self.answer, self.system, self.think = answer, arguments.system, arguments.think
        self.tools, self.attached = tools, ""
        self.unanswered = 0
        """Messages that were refused, or whose answer failed."""
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
        note(dim(f"before your next message: {counted(len(text), 'character')}"))

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
        from dsv4.cli.talking import write

        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            reply = self.answer([*system, *self.turns], self.tools, self.think)
        except RequestError as e:
            note(f"{e.message} (/reset starts anew)")
            self.unanswered += 1
            return None
        write("\n")
        note(dim(reply.speed()))
        return reply
