"""Turns of the assistant as the model wrote them, for when clients send them back.

A client sends back what it understood of an answer: calls as JSON, thoughts or none, text without its last newline. Written
anew from that, a turn has other tokens than were sampled, and everything from there on is computed again. So turns are
kept as their ids, and one that comes back with the same calls and text is replayed:

| the turn | is found by |
| --- | --- |
| has calls | the ids of its calls, their names and arguments (as JSON values) and the text |
| has none | the whole prompt before it, and the text |

Thoughts that the client left out come back with it where the release's rules keep thoughts; where they drop them they
are left out of the ids. Thoughts that the client changed, like text or arguments, are taken as they are sent. What is
kept is one tenant's under one salt, and as bounded as the store of encoded texts, whose part it is.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from dsv4.text.markers import Marker, Prompt, Segments

if TYPE_CHECKING:
    from dsv4.text.blocks import Blocks
    from dsv4.text.tokenizer import Tokenizer

_END_THINK, _EOS, _DSML = Marker("</think>"), Marker("<｜end▁of▁sentence｜>"), Marker("｜DSML｜")
_LAST_CALL = f"</{_DSML}invoke>"
_HEAD = struct.Struct("=i?16s")
"""Of a kept turn: where its answer begins among the ids, whether it began in thoughts, and the digest of these."""
_SECRET = os.urandom(32)
"""No text that a client sends can be taken for the key of a turn."""


class Recall:
    """The kept turns as one request finds them, and its own answer when it is whole."""

    def __init__(self, tokenizer: Tokenizer, owner: str) -> None:
        """`owner`: whose turns these are."""
        self._tokenizer, self._owner = tokenizer, owner
        self._prompt, self._read = blake2b(key=_SECRET, digest_size=16), 0

    def find(
        self, before: Sequence[str | bytes], text: str, message: Mapping[str, Any], *, reasoning: bool
    ) -> Prompt | None:
        """What stands after the opening of an assistant's turn, where it is known as it was sampled. `before`: the prompt up
        to there, with that opening. `reasoning`: the opening is that of thoughts."""
        self._follow(before)
        kept = self._tokenizer.store.get("", self._key(text, message.get("tool_calls") or ()))
        if kept is None:
            return None
        answer, thinking, thought = _HEAD.unpack_from(kept)
        ids = kept[_HEAD.size :]
        if not reasoning:
            return [ids[4 * answer :]] if answer >= 0 else None
        sent = str(message.get("reasoning_content") or message.get("reasoning") or "")
        if sent.strip() and _digest(sent.strip()) != thought:
            return None
        return [ids] if thinking else [_END_THINK, ids]

    def close(self, prompt: Sequence[str | bytes]) -> None:
        """The prompt is whole; what `keep` gets follows it."""
        self._follow(prompt)

    def keep(self, ids: Sequence[int], blocks: Blocks, call_ids: Sequence[str], *, thinking: bool) -> None:
        """Keeps an answer that the model ended. `ids`: all that was sampled. `thinking`: it began in thoughts."""
        whole = self._whole(list(ids), bool(call_ids))
        if whole is None or (blocks.reasoning and not thinking):
            return
        answer = self._answer(whole) if thinking else 0
        calls = [
            {"id": id, "function": {"name": call.name, "arguments": call.arguments}}
            for id, call in zip(call_ids, blocks.calls, strict=True)
        ]
        head = _HEAD.pack(answer, thinking, _digest(blocks.reasoning.strip()))
        self._tokenizer.store.put("", self._key(blocks.content, calls), head + array("i", whole).tobytes())

    def _answer(self, ids: list[int]) -> int:
        """Where the answer begins after the thoughts; -1 where their end is not plain: the model called from within."""
        marks = (self._tokenizer.special(_END_THINK), self._tokenizer.special(_DSML))
        first = next((i for i, token in enumerate(ids) if token in marks), None)
        return -1 if first is None or ids[first] != marks[0] else first + 1

    def _whole(self, ids: list[int], called: bool) -> list[int] | None:
        """The ids of a turn up to its end, which the model need not have written: it was stopped after its last call, or
        by `max_tokens`. None for what is no whole turn."""
        eos = self._tokenizer.special(_EOS)
        if not ids or ids[-1] == eos:
            return ids or None
        if not called:
            return None if self._tokenizer.special(_DSML) in ids else [*ids, eos]
        tail = self._tokenizer.decode(ids[-16:], skip_special=False)
        if not tail.rstrip("\n").endswith(_LAST_CALL):
            return None
        line: Segments = [] if tail.endswith("\n") else ["\n"]
        return ids + self._tokenizer.encode_segments([*line, "</", _DSML, "tool_calls>", _EOS])

    def _follow(self, prompt: Sequence[str | bytes]) -> None:
        for segment in prompt[self._read :]:
            kind = b"\0i" if isinstance(segment, bytes) else b"\0m" if isinstance(segment, Marker) else b""
            raw = segment if isinstance(segment, bytes) else segment.encode("utf-8", "surrogatepass")
            self._prompt.update(kind + raw)
        self._read = len(prompt)

    def _key(self, text: str, calls: Sequence[Mapping[str, Any]]) -> str:
        """Where a turn is kept. Calls without an id are not told apart from others of the same prompt."""
        ids = [str(c.get("id") or "") for c in calls]
        place: Any = ids if calls and all(ids) else self._prompt.hexdigest()
        said = [[c["function"]["name"], _plain(c["function"].get("arguments"))] for c in calls]
        about = json.dumps([self._owner, place, text.strip(), said], sort_keys=True)
        return blake2b(about.encode(), key=_SECRET, digest_size=32).hexdigest()


def _plain(arguments: Any) -> Any:
    """Arguments as a JSON value, whatever its spelling: as text or not, in any order, 1.0 or 1."""
    text = arguments if isinstance(arguments, str) else json.dumps({} if arguments is None else arguments)
    try:
        return json.loads(text, parse_float=_number)
    except (ValueError, RecursionError):
        return text


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
