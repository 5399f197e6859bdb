"""What the model writes, as it comes: reasoning, content and tool calls.

Tool calls are DSML (spec 9.3). Markers never leak: text that may still become one is held back. Nothing is lost: what
turns out to be no valid block is content.

    content
    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="F">
    <｜DSML｜parameter name="k" string="true">raw text</｜DSML｜parameter>
    <｜DSML｜parameter name="n" string="false">JSON</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsv4.text.stop import held_back

_END_THINK = "</think>"
_OPEN, _CLOSE = "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"
_NAME = r'"([^"<>\n]{1,256})"'
_INVOKE = re.compile(rf"\s*<｜DSML｜invoke name={_NAME}>")
_PARAMETER = re.compile(rf'\s*<｜DSML｜parameter name={_NAME} string="(true|false)">')
_INVOKE_CLOSE, _PARAMETER_CLOSE = "</｜DSML｜invoke>", "</｜DSML｜parameter>"
_INVOKE_HEAD, _PARAMETER_HEAD = "<｜DSML｜invoke name=", "<｜DSML｜parameter name="
_MAX_HEAD = 512
"""Longest unfinished tag, in characters, that is waited for; no valid one is longer."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text inside the thinking part."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A tool call begins; calls are numbered from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    """A further piece of a call's arguments; the pieces of a call that is whole, joined, are a JSON object."""

    index: int
    text: str


Piece = Reasoning | Content | ToolStart | ToolArguments


class OutputParser:
    """Feed it text as it comes; whatever the cuts, the pieces joined are the same.

    `thinking`: the text starts inside the thinking part. `tools`: tool calls are looked for; otherwise DSML is content.
    Text in a parameter streams; JSON comes at the parameter's end, when it is known to be JSON.

        reasoning -> content -> calls <-> invoke <-> value
                                  |         |
                                  +-> after <
    """

    def __init__(self, *, thinking: bool, tools: bool) -> None:
        self._tools, self._buffer = tools, ""
        self._state: Callable[[], Iterator[Piece]] = self._reasoning if thinking else self._content
        self._call = -1
        self._keys = 0
        self._block = ""  # what was read of the tool block since its last valid part
        self._json: list[str] | None = None  # the value so far of a parameter that claims to be JSON

    def push(self, text: str) -> list[Piece]:
        """The pieces that became certain."""
        self._buffer += text
        return _joined(self._run())

    def finish(self) -> list[Piece]:
        """The rest, once no more text comes. The arguments of a call that was cut short stay open JSON; other remains are
        text."""
        pieces = list(self._run())
        rest, self._buffer = self._buffer, ""
        if self._state == self._reasoning:
            pieces.append(Reasoning(rest))
        elif self._state in (self._content, self._after):
            pieces.append(Content(rest))
        elif self._state == self._value:
            pieces += self._some(rest) if self._json is None else [self._more("".join([*self._json, rest]))]
        elif self._state == self._invoke:
            pieces += self._left_open()
        elif self._call < 0:  # a block without any call
            pieces.append(Content(self._block + rest))
        return _joined(pieces)

    def _run(self) -> Iterator[Piece]:
        """Lets states consume the buffer until one of them needs more text."""
        while True:
            before = (self._state, len(self._buffer))
            yield from self._state()
            if (self._state, len(self._buffer)) == before:
                return

    def _take(self, n: int) -> str:
        taken, self._buffer = self._buffer[:n], self._buffer[n:]
        return taken

    def _more(self, text: str) -> ToolArguments:
        return ToolArguments(self._call, text)

    def _left_open(self) -> list[Piece]:
        """Shows in the arguments that the call is not whole: to run it with half its parameters could do harm."""
        return [] if self._keys else [self._more("{")]

    def _some(self, text: str) -> list[Piece]:
        """Text inside a JSON string."""
        return [self._more(json.dumps(text, ensure_ascii=False)[1:-1])]

    def _reasoning(self) -> Iterator[Piece]:
        at = self._buffer.find(_END_THINK)
        if at < 0:
            yield Reasoning(self._take(len(self._buffer) - held_back(self._buffer, [_END_THINK])))
            return
        yield Reasoning(self._take(at))
        self._take(len(_END_THINK))
        self._state = self._content

    def _content(self) -> Iterator[Piece]:
        if not self._tools:
            yield Content(self._take(len(self._buffer)))
            return
        at = self._buffer.find(_OPEN)
        if at < 0:
            hold = held_back(self._buffer, ["\n\n" + _OPEN, _OPEN])
            yield Content(self._take(len(self._buffer) - hold))
            return
        content = self._take(at)
        yield Content(content.removesuffix("\n\n"))
        self._block = content[len(content.removesuffix("\n\n")) :] + self._take(len(_OPEN))
        self._state = self._calls

    def _calls(self) -> Iterator[Piece]:
        """Between calls: another one, or the block's end."""
        if match := _INVOKE.match(self._buffer):
            self._take(match.end())
            self._block, self._keys = "", 0
            self._call += 1
            yield ToolStart(self._call, match[1])
            self._state = self._invoke
        elif (rest := self._buffer.lstrip()).startswith(_CLOSE):
            self._take(len(self._buffer) - len(rest) + len(_CLOSE))
            if self._call < 0:
                yield Content(self._block + _CLOSE)
            self._state = self._after
        elif not _may_become(rest, _CLOSE, _INVOKE_HEAD):
            yield from self._give_up()

    def _invoke(self) -> Iterator[Piece]:
        """Inside a call: another parameter, or the call's end."""
        rest = self._buffer.lstrip()
        if match := _PARAMETER.match(self._buffer):
            self._take(match.end())
            yield self._more(f"{', ' if self._keys else '{'}{json.dumps(match[1], ensure_ascii=False)}: ")
            self._keys += 1
            self._json = [] if match[2] == "false" else None
            if self._json is None:
                yield self._more('"')
            self._state = self._value
        elif rest.startswith(_INVOKE_CLOSE):
            self._take(len(self._buffer) - len(rest) + len(_INVOKE_CLOSE))
            yield self._more("}" if self._keys else "{}")
            self._state = self._calls
        elif not _may_become(rest, _INVOKE_CLOSE, _PARAMETER_HEAD):
            yield from self._left_open()
            yield from self._give_up()

    def _value(self) -> Iterator[Piece]:
        """Inside a parameter, up to its closing tag and nothing else."""
        at = self._buffer.find(_PARAMETER_CLOSE)
        closed = at >= 0
        value = self._take(at if closed else len(self._buffer) - held_back(self._buffer, [_PARAMETER_CLOSE]))
        if self._json is None:
            yield from self._some(value)
        else:
            self._json.append(value)
        if closed:
            self._take(len(_PARAMETER_CLOSE))
            yield self._more('"' if self._json is None else _as_json("".join(self._json)))
            self._state = self._invoke

    def _after(self) -> Iterator[Piece]:
        """Text after the block; an end of sentence usually follows at once."""
        yield Content(self._take(len(self._buffer)))

    def _give_up(self) -> Iterator[Piece]:
        """This is no valid DSML: everything from its last valid part on is content."""
        yield Content(self._block + self._take(len(self._buffer)))
        self._block = ""
        self._state = self._after


def _may_become(text: str, *heads: str) -> bool:
    """Whether more text can make `text` start with one of the heads (an unfinished tag included)."""
    if any(head.startswith(text) for head in heads):
        return True
    return any(text.startswith(head) and ">" not in text and len(text) < _MAX_HEAD for head in heads[1:])


def _as_json(value: str) -> str:
    """A value that claims to be JSON, as it was written; as a JSON string where it is none (NaN and Infinity are none)."""
    try:
        json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):  # the latter: nested deeper than any reader follows
        return json.dumps(value, ensure_ascii=False)
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _joined(pieces: Iterator[Piece] | list[Piece]) -> list[Piece]:
    """Neighbours of a kind as one, empty ones left out."""
    out: list[Piece] = []
    for piece in pieces:
        if not isinstance(piece, ToolStart) and not piece.text:
            continue
        last = out[-1] if out else None
        if isinstance(piece, ToolArguments) and isinstance(last, ToolArguments) and last.index == piece.index:
            out[-1] = ToolArguments(piece.index, last.text + piece.text)
        elif type(last) is type(piece) and isinstance(piece, (Reasoning, Content)):
            out[-1] = type(piece)(last.text + piece.text)  # type: ignore[union-attr]
        else:
            out.append(piece)
    return out
