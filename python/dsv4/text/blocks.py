"""Pieces of an answer put together: blocks of text, thoughts and tool calls, in the order they came."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsv4.text.output import Content, Piece, Reasoning, ToolStart


@dataclass(slots=True)
class Text:
    """A part of the answer."""

    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass(slots=True)
class Thinking(Text):
    """A part of the thoughts."""


@dataclass(slots=True)
class Call:
    """A tool call. `arguments` is JSON; unfinished where the answer was cut short in it."""

    name: str
    parts: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        return "".join(self.parts)


Block = Text | Thinking | Call


def _words(block: Block) -> str:
    return f"{block.name!r}, {block.arguments!r}" if isinstance(block, Call) else repr(block.text)


class Blocks:
    """Grows piece by piece."""

    def __init__(self) -> None:
        self.all: list[Block] = []

    def __repr__(self) -> str:
        """What a notebook shows of an answer: `[Thinking('Hm.'), Text('Hello!')]`."""
        shown = (f"{type(b).__name__}({_words(b)})" for b in self.all)
        return f"[{', '.join(shown)}]"

    def add(self, piece: Piece) -> bool:
        """Whether a new block begins with this piece; it belongs to the last one in any case."""
        if isinstance(piece, ToolStart):
            self.all.append(Call(piece.name))
            return True
        kind = Text if isinstance(piece, Content) else Thinking if isinstance(piece, Reasoning) else Call
        begins = not self.all or type(self.all[-1]) is not kind
        if begins:
            self.all.append(Text() if kind is Text else Thinking())
        self.all[-1].parts.append(piece.text)
        return begins

    @property
    def content(self) -> str:
        """All text of the answer."""
        return "".join(b.text for b in self.all if type(b) is Text)

    @property
    def reasoning(self) -> str:
        """All thoughts."""
        return "".join(b.text for b in self.all if isinstance(b, Thinking))

    @property
    def calls(self) -> list[Call]:
        return [b for b in self.all if isinstance(b, Call)]
