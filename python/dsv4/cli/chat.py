"""`dsv4 chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from dsv4.cli.common import add_settings, dim, note, read_settings
from dsv4.cli.generate import add_sampling, sampling_of
from dsv4.config import EngineConfig, nearest
from dsv4.errors import RequestError

if TYPE_CHECKING:
    from dsv4.engine.llm import LLM
    from dsv4.sampling import SamplingParams

HELP = """/reset          forget the conversation      /think on|off   let the model think first
/system TEXT    set the system message       /exit           leave (so does Ctrl-D)
Ctrl-C interrupts an answer; what came of it stays in the conversation."""


def add(commands: Any) -> None:
    parser = commands.add_parser("chat", help="talk in the terminal", description="Talk to a model. " + HELP)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("--think", action="store_true", help="let the model think first")
    add_sampling(parser, max_tokens="what the context holds")
    add_settings(parser, EngineConfig)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Reads lines until /exit or the end of input."""
    (config,) = read_settings(arguments, EngineConfig)
    params = sampling_of(arguments, None, keep_markers=True)
    from dsv4.cli.talking import load_model

    llm = load_model(config)
    if llm.tokenizer is None:
        raise RequestError(
            "this model's directory has no tokenizer; chat needs one", "model", "no_tokenizer", 400
        )
    session = Session(llm, params, system=arguments.system, think=arguments.think)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing for input())
        note(dim(HELP))
    while (line := _read_line()) is not None:
        if not session.handle(line):
            break
    return 0


def _read_line() -> str | None:
    """The next line; None at the end of input. Ctrl-C at the prompt clears the line."""
    try:
        if sys.stdin.isatty():
            return input("\n> ")
        return sys.stdin.readline() or None
    except EOFError:
        note("")
        return None
    except KeyboardInterrupt:
        return ""


class Session:
    """A conversation and its settings."""

    def __init__(self, llm: LLM, params: SamplingParams, *, system: str | None, think: bool) -> None:
        self.llm, self.params, self.system, self.think = llm, params, system, think
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
            "/reset": self._reset,
            "/think": self._think,
            "/system": self._system,
            "/help": lambda _: note(HELP),
        }
        if command not in commands:
            note(f"{command} is no command{nearest(command, tuple(commands))}; /help lists them")
            return True
        action = commands[command]
        if action is None:
            return False
        action(rest.strip())
        return True

    def _reset(self, _: str) -> None:
        self.turns.clear()
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
        from dsv4.cli.talking import Printer, answer, write

        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        try:
            prompt = self.llm.chat_ids([*system, *self.turns, question], thinking=self.think)
            reply = answer(self.llm, prompt, self.params, thinking=self.think, show=Printer().show)
        except RequestError as e:
            note(f"{e.message} (/reset starts anew)")
            return
        write("\n")
        said: dict[str, Any] = {"role": "assistant", "content": reply.content}
        if reply.calls:
            said["tool_calls"] = [{"type": "function", "function": call} for call in reply.calls]
        self.turns += [question, said]
        note(dim(reply.speed()))
