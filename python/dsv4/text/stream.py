"""From the tokens of one answer to what its reader gets: text, and in a chat reasoning and tool calls.

    token ─▶ detokenizer ─▶ parser (chats) ─▶ stop strings (plain text, or a chat's content) ─▶ pieces

It knows nothing of the engine, so it can run in another process than that: what the engine has to hear of is
`ended`, upon which the owner ends the request, and what it has to say is which token ended it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsv4.sampling import SamplingParams
from dsv4.text.chat import Ending, starts_in_thought
from dsv4.text.output import Content, OutputParser, Piece
from dsv4.text.stop import StopStrings
from dsv4.text.tokenizer import Tokenizer
from dsv4.text.tools import Schemas, schemas_of, shown_tools


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answer of a chat is to be read; the fields are `OutputParser`'s."""

    thinking: bool = False
    tools: bool = False
    schemas: Schemas = field(default_factory=dict)
    most_calls: int | None = None
    continues: bool = False

    @classmethod
    def of_chat(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        thinking: bool,
        ending: Ending = "opened",
        most_calls: int | None = None,
    ) -> Reading:
        """For a prompt that `encode_chat` made of the same."""
        shown = shown_tools(messages, tools)
        thoughts = starts_in_thought(messages, ending, thinking=thinking)
        return cls(thoughts, bool(shown), schemas_of(shown), most_calls, ending == "continued")


class TextStream:
    """Tokens in, pieces out. A chat's special tokens are never text, whatever `skip_special_tokens` says."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, reading: Reading | None = None) -> None:
        """`reading`: the answer is a chat's; without it all text is content."""
        self._detokenizer = tokenizer.detokenizer(
            skip_special=params.skip_special_tokens, chat=reading is not None
        )
        self._parser = None
        if reading is not None:
            self._parser = OutputParser(
                thinking=reading.thinking,
                tools=reading.tools,
                schemas=reading.schemas,
                most_calls=reading.most_calls,
                continues=reading.continues,
            )
        self._stops = (
            StopStrings(params.stop, include=params.include_stop_str_in_output) if params.stop else None
        )
        self._tokens, self._min_tokens = 0, params.min_tokens
        self.reasoning_tokens = 0
        """Tokens up to and with the one that ended the thoughts."""
        self.stop_string: str | None = None
        """The stop string that was found; nothing more comes then."""

    @property
    def ended(self) -> bool:
        """Nothing more comes, though the model has not ended: a stop string was found, or the last call that may come is
        whole."""
        return self.stop_string is not None or (self._parser is not None and self._parser.full)

    def push(self, token: int, *, ends: bool = False) -> list[Piece]:
        """What became certain with this token. `ends`: it ended the answer and is no text."""
        self._tokens += 1
        self.reasoning_tokens += self._parser is not None and self._parser.in_thoughts
        return [] if ends else self._pieces(self._detokenizer.push(token))

    def finish(self, *, cut: bool) -> list[Piece]:
        """What was held back for an unfinished character, tag or stop string. `cut`: the model did not end by itself."""
        pieces = self._pieces(self._detokenizer.flush())
        if self._parser is not None and self.stop_string is None:
            pieces += self._stopped(self._parser.finish(cut=cut))
        if self._stops is not None and self.stop_string is None:
            pieces += _content(self._stops.flush())
        return pieces

    def _pieces(self, text: str) -> list[Piece]:
        if not text or self.stop_string is not None:
            return []
        return self._stopped([Content(text)] if self._parser is None else self._parser.push(text))

    def _stopped(self, pieces: list[Piece]) -> list[Piece]:
        return pieces if self._stops is None else list(self._up_to_stop(pieces, self._stops))

    def _up_to_stop(self, pieces: list[Piece], stops: StopStrings) -> Iterator[Piece]:
        # min_tokens holds for stop strings as well: one that completes too early is plain text.
        armed = self._tokens >= self._min_tokens
        for piece in pieces:
            if not isinstance(piece, Content):
                yield from _content(stops.flush())
                yield piece
                continue
            yield from _content(stops.push(piece.text, armed=armed))
            self.stop_string = stops.matched
            if self.stop_string is not None:
                return


def _content(text: str) -> list[Piece]:
    return [Content(text)] if text else []
