"""What the model writes in a chat, as it comes: reasoning, content and tool calls (DSML, spec 9.3).

    content

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="F">
    <｜DSML｜parameter name="k" string="true">raw text</｜DSML｜parameter>
    <｜DSML｜parameter name="n" string="false">JSON</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

Models damage this, so it is read tolerantly, the way DeepSeek's own hosts do. However the text is cut, the pieces joined
are the same.

    thoughts ──</think>──▶ answer        text: shown; `</think>` and `<think>` are not (at the answer's start the
       │ ▲                  │ ▲          latter opens thoughts), nor newlines at the start and before `</think>`
       ▼ └── block's end ── ▼ ┘          `<｜DSML｜`, with the newlines before it, begins the block; a closing tag alone
    block, between calls ◀─────────┐     is left out. In the block everything but a call is left out; its end leads
       │ invoke name="F"           │     back to the text only while there was no call: text after a call is dropped
       ▼                           │
    invoke, between parameters ────┘     ends at `</｜DSML｜` + anything but parameter, or at the next invoke
       │ parameter name="k"   ▲
       ▼                      │
    value ────────────────────┘          ends at `</｜DSML｜`, or where a parameter or an invoke opens

- Markup is never shown: not where it is unreadable, not where tools are off (then calls are read and left out).
- Tags: the block's name does not matter, quotes may be single or missing, `>` may be missing, `/>` closes. A name goes up
  to its quote. What a call holds beside its parameters is passed over. Of a repeated parameter the first counts.
- Without `string=` a value is JSON where the tool's schema asks for something that is no string and the value is such
  JSON; otherwise it is a string. JSON that is none is a string.
- A call without parameters has the arguments `{}`, or its body where that is a JSON object; with any other body it is no
  call.
- Arguments that were sent cannot be taken back. So nothing of a call is given before its first parameter or its end, and
  what is given becomes JSON whatever follows: when the model ends its turn inside a call, the call is closed. Only where
  it was cut short (`finish(cut=True)`) the last call's arguments stay open.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dsv4.text.tools import Schemas, takes_text

_BAR, _THINK, _END_THINK = "｜DSML｜", "<think>", "</think>"
_MARK = re.compile(f"{_BAR}|{_THINK}|{_END_THINK}")
_TAG = re.compile(
    rf"(?P<lead><{{0,2}}/?){_BAR}[ \n]{{0,2}}(?P<word>[A-Za-z_]{{0,32}})"
    r"|<?(?P<plain>invoke|parameter)(?=\s{1,8}name\s{0,8}=)"
    rf"|</(?P<end>invoke|[a-z_]{{0,24}}calls)>|{_END_THINK}"
)
"""What has a meaning inside the block. Tags that lost their marker are read as well."""
_TAG_LENGTH = 64
"""No `_TAG` is longer, its lookahead included."""
_WORD, _ATTACHED_WORD = re.compile(r"[ \n]{0,2}([A-Za-z_]{0,32})"), re.compile("([A-Za-z_]{0,32})")
_VALUE_END = re.compile(rf"</{_BAR}|<{_BAR} ?(?:parameter|invoke)[\s=>]")
_VALUE_ENDS = (
    f"</{_BAR}",
    *(f"<{_BAR}{gap}{word}>" for gap in ("", " ") for word in ("parameter", "invoke")),
)
_HALF_TAG = re.compile(rf"</?(?:｜[DSML]*|{_BAR} ?[a-z]*)")
_SPACE, _TAG_END = re.compile(r"\s*"), re.compile(r"/?>")
_KEY = r"(?P<key>[\w-]*)\s*=+\s*"
_ATTRIBUTE = re.compile(
    rf"""{_KEY}(?:"(?P<double>[^"\n]*)"|'(?P<single>[^'\n]*)'|(?P<bare>[^\s"'<>/=]+)(?=[\s/>]))"""
)
_UNQUOTED_END = re.compile(rf"""{_KEY}["'](?P<bare>[^\s"'<>]+)(?=>)""")
_UNFINISHED = re.compile(r"""/|[\w-]*\s*(?:=+\s*(?:"[^"\n]*|'[^'\n]*|[^\s"'<>/=]*))?""")
_DOUBLED = re.compile(r"name(?=\s)")
_MAX_HEAD = 1024
"""Longest tag, in characters, that is waited for; what is longer is unreadable."""


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


@dataclass(frozen=True, slots=True)
class _Head:
    """The attributes of a tag, where it ends, and whether it closes itself."""

    attributes: Mapping[str, str]
    end: int
    empty: bool = False

    @property
    def name(self) -> str | None:
        return self.attributes.get("name", self.attributes.get(""))


class OutputParser:
    """Feed it text as it comes; text in a parameter streams, JSON comes at the parameter's end."""

    def __init__(
        self,
        *,
        thinking: bool,
        tools: bool,
        schemas: Schemas | None = None,
        most_calls: int | None = None,
        continues: bool = False,
    ) -> None:
        """`thinking`: the text starts inside the thinking part. `tools`: calls are given, at most `most_calls` of them.
        `schemas`: what the tools' parameters are, for values that do not say it. `continues`: the text goes on with an
        answer that has begun, so newlines at its start belong to it."""
        self._thoughts = thinking
        self._most = 0 if not tools else most_calls
        self._schemas = schemas or {}
        self._buffer, self._at, self._final = "", 0, False
        self._newlines: list[str] | None = None  # what came after a buffer that holds newlines alone
        self._state: Callable[[], bool] = self._text
        self._leading = not continues
        self._last: Reasoning | Content = Content("")  # the end of what was shown last
        self._out: list[Piece] = []
        self._calls = 0  # calls given so far
        self.full = False
        """As many calls as there may be are whole: nothing more is given, so the answer can end."""
        self._name = ""
        self._given = self._muted = False  # the call at hand: it has begun for the caller; it is left out
        self._keys: set[str] = set()
        self._body: list[str] = []  # what the call holds beside parameters
        self._json: list[str] | None = None  # the value so far of a parameter that claims to be JSON
        self._repeated = False

    @property
    def in_thoughts(self) -> bool:
        """Whether the text stands in the thinking part."""
        return self._thoughts and self._state == self._text

    def push(self, text: str) -> list[Piece]:
        """The pieces that became certain."""
        if self._newlines is not None and not text.strip("\n"):
            self._newlines.append(text)  # so that a long run of them costs no more than other text
            return []
        self._begin(text)
        pieces = self._run()
        waiting = self._state == self._text and self._buffer.endswith("\n", self._at)
        self._newlines = [] if waiting and not self._buffer[self._at :].strip("\n") else None
        return pieces

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """The rest, once no more text comes. `cut`: the model did not end by itself, so a call at hand stays open."""
        self._begin("")
        self._final = True
        pieces = self._run()
        rest = _without_half_tag(self._buffer[self._at :])
        if self._state == self._text:
            self._show(rest)
        elif self._state == self._value and not cut:
            self._end_value(rest)
        if not cut and self._state in (self._value, self._invoke):
            self._end_call()
        self._buffer, self._at = "", 0
        return _joined(pieces + self._out)

    def _begin(self, text: str) -> None:
        self._buffer = "".join([self._buffer[self._at :], *(self._newlines or ()), text])
        self._at, self._newlines = 0, None

    def _run(self) -> list[Piece]:
        """Lets states consume the buffer until one of them needs more text."""
        self._out = []
        while self._state():
            pass
        pieces, self._out = _joined(self._out), []
        return pieces

    # Text

    def _text(self) -> bool:
        """Thoughts and answer, up to the next mark. True when there may be more to do."""
        mark = _MARK.search(self._buffer, self._at)
        if mark is None:
            self._show(self._take(self._unsure()))
            return False
        if mark[0] == _BAR:
            return self._markup(mark.start())
        before = self._take(mark.start())
        self._show(before.rstrip("\n") if self._thoughts and mark[0] == _END_THINK else before)
        self._at = mark.end()
        if mark[0] == _END_THINK and self._thoughts:
            self._thoughts, self._leading = False, True
        elif mark[0] == _THINK and self._leading:
            self._thoughts = True
        return True

    def _markup(self, bar: int) -> bool:
        """A DSML tag in the text: an opening one begins the block, any other is left out."""
        start, lead = self._lead(bar)
        self._show(self._take(start))
        word = (_WORD if lead else _ATTACHED_WORD).match(self._buffer, bar + len(_BAR))
        assert word is not None  # it may be empty
        opens = lead == "<" or (not lead and word[1] == "invoke")
        if word.end() == len(self._buffer) and not self._final and not (opens and lead):
            return False
        if opens:
            self._at, self._state = bar, self._block
            return True
        head = self._head(word.end()) if lead or word[1] else _Head({}, word.end())
        if head is not None:
            self._at = head.end
        return head is not None or self._drop_unfinished()

    def _lead(self, bar: int) -> tuple[int, str]:
        """Where the markup before a marker starts, newlines included, and what it is: `<`, `</` or nothing."""
        before = self._buffer[self._at : bar]
        tag = before.removesuffix("/")
        lead = ("</" if len(tag) < len(before) else "<") if tag.endswith("<") else ""
        before = tag.removesuffix("<").removesuffix("<") if lead else before  # it may be doubled
        return self._at + len(before.rstrip("\n")), lead

    def _unsure(self) -> int:
        """From where on the text may still become markup."""
        text, end = self._buffer, len(self._buffer)
        tail = text[max(self._at, end - len(_END_THINK)) :]
        half = next((n for n in range(min(len(_BAR) - 1, len(tail)), 0, -1) if _BAR.startswith(tail[-n:])), 0)
        if not half and (at := tail.rfind("<")) >= 0:
            half = len(tail) - at if any(m.startswith(tail[at:]) for m in (_THINK, _END_THINK)) else 0
        if not half and not tail.endswith("\n"):
            return end
        return self._lead(end - half)[0]

    def _show(self, text: str) -> None:
        if self._leading:
            text = text.lstrip("\n")
            self._leading = not text
        if not text:
            return
        kind = Reasoning if self._thoughts else Content
        before = self._last.text if type(self._last) is kind else ""
        text = before + text
        while (mark := _MARK.search(text)) is not None:  # what is left out had parted it
            text = text[: mark.end() - 1] + text[mark.end() :]
        self._out.append(kind(text[len(before) :]))
        self._last = kind(text[1 - len(_END_THINK) :])

    # Calls

    def _block(self) -> bool:
        """Between calls: another one, or the block's end."""
        tag = self._next_tag()
        if tag is None:
            return False
        word, closing = _kind(tag)
        if tag[0] == _END_THINK or (closing and not word.startswith(("invoke", "param"))):
            head = self._head(tag.end()) if tag["lead"] is not None else _Head({}, tag.end())
            if head is None:
                return self._drop_unfinished()
            self._at = head.end
            if not self._calls:
                self._state = self._text
                if tag[0] == _END_THINK:
                    self._thoughts, self._leading = False, True
            return True
        if closing or word.startswith("param") or word.endswith("calls"):
            self._at = tag.end()
            return True
        head = self._head(tag.end())
        if head is None:
            return self._drop_unfinished()
        if not head.name:
            self._at = tag.end()
            return True
        self._at, self._state = head.end, self._invoke
        self._name, self._given, self._muted = head.name, False, False
        self._keys, self._body = set(), []
        if head.empty:
            self._end_call()
        return True

    def _invoke(self) -> bool:
        """Inside a call: another parameter, or the call's end."""
        tag = self._next_tag()
        if tag is None:
            return False
        word, closing = _kind(tag)
        if closing and not word.startswith("param"):
            if not word.endswith("calls"):
                self._at = tag.end()
            self._end_call()
            return True
        if not closing and word == "invoke":
            self._end_call()
            return True
        if closing or tag[0] == _END_THINK or word.endswith("calls"):
            self._at = tag.end() + (self._buffer[tag.end() : tag.end() + 1] == ">")
            return True
        head = self._head(tag.end())
        if head is None:
            return self._drop_unfinished()
        if head.name is None:
            self._skip(tag.end())
            return True
        self._at, self._state = head.end, self._value
        self._begin_value(head.name, head.attributes.get("string", "").lower())
        if head.empty:
            self._end_value("")
        return True

    def _value(self) -> bool:
        """Inside a parameter, up to its closing tag."""
        end = _VALUE_END.search(self._buffer, self._at)
        if end is None:
            self._more_value(self._take(self._sure_value()))
            return False
        word = _WORD.match(self._buffer, end.end())
        closing = end[0] == f"</{_BAR}"
        if closing and word is not None and word.end() == len(self._buffer) and not self._final:
            self._more_value(self._take(self._before_newline(end.start())))
            return False
        value = self._take(end.start())
        if not closing or (word is not None and word[1].endswith(("invoke", "calls"))):
            value = value.removesuffix("\n")  # the closing tag is missing, and this is the newline after it
        elif word is not None:
            self._at = word.end() + self._buffer.startswith(">", word.end())
        self._end_value(value)
        return True

    def _sure_value(self) -> int:
        """Up to where the text is the value's, whatever follows."""
        end = len(self._buffer)
        tail = self._buffer.rfind("<", max(self._at, end - len(_VALUE_ENDS[-1]) - 1))
        if tail >= 0 and any(full.startswith(self._buffer[tail:]) for full in _VALUE_ENDS):
            end = tail
        return self._before_newline(end)

    def _before_newline(self, end: int) -> int:
        return end - (end > self._at and self._buffer[end - 1] == "\n")

    def _begin_value(self, key: str, said: str) -> None:
        self._repeated = key in self._keys
        if not self._repeated:
            self._open_call()
            self._argue(f"{', ' if self._keys else '{'}{json.dumps(key, ensure_ascii=False)}: ")
            self._keys.add(key)
        text = takes_text(self._schemas, self._name, key) if said not in ("true", "false") else said == "true"
        self._json = None if text else []
        if text and not self._repeated:
            self._argue('"')

    def _more_value(self, text: str) -> None:
        if self._json is not None:
            self._json.append(text)
        else:
            self._string(text)

    def _string(self, text: str) -> None:
        """Text inside a JSON string."""
        if not self._repeated:
            self._argue(json.dumps(text, ensure_ascii=False)[1:-1])

    def _end_value(self, rest: str) -> None:
        self._more_value(rest)
        if not self._repeated:
            self._argue('"' if self._json is None else _as_json("".join(self._json)))
        self._state = self._invoke

    def _open_call(self) -> None:
        """The call at hand is one: from here on it is given, unless there are enough."""
        if self._given or self._muted:
            return
        self._muted = self._most is not None and self._calls >= self._most
        if not self._muted:
            self._given, self._thoughts = True, False
            self._out.append(ToolStart(self._calls, self._name))
            self._calls += 1

    def _argue(self, text: str) -> None:
        if self._given:
            self._out.append(ToolArguments(self._calls - 1, text))

    def _end_call(self) -> None:
        body = "".join(self._body).strip()
        arguments = "}" if self._keys else _object(body) if body else "{}"
        if arguments is not None:
            self._open_call()
            self._argue(arguments)
        self.full = bool(self._most) and self._calls >= (self._most or 0)
        self._state = self._block

    # Reading

    def _take(self, to: int) -> str:
        taken, self._at = self._buffer[self._at : to], max(to, self._at)
        return taken

    def _skip(self, to: int) -> None:
        """Passes over text inside the block; what a call without parameters holds may be its arguments."""
        skipped = self._take(to)
        if self._state == self._invoke and not self._keys:
            self._body.append(skipped)

    def _next_tag(self) -> re.Match[str] | None:
        """Passes over text up to the next tag that has a meaning; None when more text is needed."""
        tag = _TAG.search(self._buffer, self._at)
        if tag is None:
            self._skip(max(self._at, len(self._buffer) - (0 if self._final else _TAG_LENGTH)))
            return None
        self._skip(tag.start())
        return None if tag.end() == len(self._buffer) and not self._final else tag

    def _head(self, start: int) -> _Head | None:
        """The rest of a tag from behind its word; None when more text is needed."""
        text, end = self._buffer, min(len(self._buffer), start + _MAX_HEAD)
        open_end, at, found = len(text) < start + _MAX_HEAD, start, dict[str, str]()
        while True:
            space = _SPACE.match(text, at, end)
            here = space.end() if space is not None else at
            if here == end:
                return None if open_end else _Head(found, at)
            if close := _TAG_END.match(text, here, end):
                return _Head(found, close.end(), close[0] == "/>")
            attribute = _ATTRIBUTE.match(text, here, end)
            if attribute is None or _BAR in attribute[0]:
                if _UNFINISHED.fullmatch(text, here, end) and _BAR not in text[here:end]:
                    return None if open_end else _Head(found, at)
                attribute = _UNQUOTED_END.match(text, here, end)
                attribute = None if attribute is not None and _BAR in attribute[0] else attribute
            if attribute is not None:
                groups = attribute.groupdict()
                value = next(v for k in ("double", "single", "bare") if (v := groups.get(k)) is not None)
                found.setdefault(groups["key"].lower(), value)
                at = attribute.end()
            elif not found and (doubled := _DOUBLED.match(text, here, end)):
                at = doubled.end()
            else:
                return _Head(found, at)

    def _drop_unfinished(self) -> bool:
        """A tag that is not whole: waits for the rest; at the end of all text it is dropped."""
        if self._final:
            self._skip(len(self._buffer))
        return False


def shown(answer: str) -> str:
    """What a chat shows of a whole answer."""
    if _MARK.search(answer) is None and not answer.startswith("\n"):
        return answer  # as most are
    parser = OutputParser(thinking=False, tools=False)
    pieces = [*parser.push(answer), *parser.finish()]
    return "".join(piece.text for piece in pieces if isinstance(piece, Content))


def _kind(tag: re.Match[str]) -> tuple[str, bool]:
    """A tag's word, and whether it closes."""
    word = tag["word"] or tag["plain"] or tag["end"] or ""
    return word.lower(), tag["end"] is not None or "/" in (tag["lead"] or "")


def _as_json(value: str) -> str:
    """A value that claims to be JSON, as it was written; as a JSON string where it is none (NaN and Infinity are none)."""
    try:
        json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):  # the latter: nested deeper than any reader follows
        return json.dumps(value, ensure_ascii=False)
    return value


def _object(body: str) -> str | None:
    """A call's body as its arguments, where it is a JSON object; of a repeated key the first counts."""
    repeated = False

    def first(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        values: dict[str, Any] = {}
        for key, value in pairs:
            repeated |= key in values
            values.setdefault(key, value)
        return values

    try:
        value = json.loads(body, parse_constant=_refuse, object_pairs_hook=first)
        if not isinstance(value, dict):
            return None
        return json.dumps(value, allow_nan=False) if repeated else body
    except (ValueError, RecursionError):
        return None


def _without_half_tag(rest: str) -> str:
    """What was held back, at the end of all text, less the beginning of a tag."""
    at = rest.rfind("<")
    if at >= 0 and _HALF_TAG.fullmatch(rest, at):
        return rest[:at].removesuffix("<").rstrip("\n")
    return rest


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _joined(pieces: list[Piece]) -> list[Piece]:
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
