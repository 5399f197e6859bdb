"""Grammars of requests, compiled with llguidance for the model's vocabulary, and the last ones kept.

Compiling is bounded: the text in bytes, the grammar in symbols, what is done at once in steps of the library's lexer and parser,
and what is kept in bytes of text. What does not fit, or is no grammar, is refused with one line that names the field.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from dsv4.engine.bars import Bars
from dsv4.engine.masks import Constraint, MaskMaker
from dsv4.errors import RequestError
from dsv4.sampling import Grammar
from dsv4.text.lark import LIMITS
from dsv4.text.tokenizer import Tokenizer

MOST_TEXT = 2**20
"""Bytes of a grammar."""

KEPT = 8 * 2**20
"""Bytes of the texts of compiled grammars that are kept."""

_OVERHEAD = 16384
"""Counted beside the text of each, so that there are no more than 512."""

_LETTERS = r"[^\"\\\x00-\x1F\x7F｜<]"

SLICES = (*(f"{_LETTERS}{{1,{n}}}" for n in (3, 6, 10, 16, 30)), f"{_LETTERS}+", r"[^｜<]+")
"""Sets of tokens that are taken as a whole where the grammar takes all of them, as within strings and free text. Where a string may have no
more than a few letters, only tokens longer than the next smaller set's are tried one by one."""

_SHORT, _REMEMBERED = 256, 8192
"""Letters of a text whose tokens are remembered, and how many texts are: some megabytes."""


class _Vocabulary:
    """The tokenizer as llguidance reads it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab: int, end: int) -> None:
        self._tokenizer, self.eos_token_id = tokenizer, end
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab)]
        self.special_token_ids = sorted(token for token in tokenizer.control if token < vocab)
        self._remembered = lru_cache(_REMEMBERED)(tokenizer.encode_letters)

    def __call__(self, text: bytes | str) -> list[int]:
        """Asked in the middle of a mask, with the interpreter's lock, for letters that must come: a few texts, again and
        again."""
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return (self._remembered if len(text) <= _SHORT else self._tokenizer.encode_letters)(text)


class Grammars:
    """The compiled grammars of one model. Thread-safe."""

    def __init__(
        self,
        load: Callable[[], Tokenizer | None],
        vocab: int,
        ends: Iterable[int],
        *,
        pinned: bool = False,
    ) -> None:
        """`load`: reads the tokenizer, slowly, once it is needed; None for a model without one, which takes no grammar. `ends`: tokens
        that end an answer. `pinned`: of `MaskMaker`."""
        self._load, self._vocab = load, vocab
        self._ends = sorted(token for token in ends if token < vocab)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._held = 0
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self.maker = MaskMaker(vocab, pinned=pinned)
        self._bars: Bars | None = None

    @cached_property
    def _vocabulary(self) -> LLTokenizer | None:
        tokenizer = self._load()
        if tokenizer is None or not self._ends:
            return None
        vocabulary = _Vocabulary(tokenizer, self._vocab, self._ends[0])
        self._bars = Bars(vocabulary.tokens, vocabulary.special_token_ids)
        wrapped = TokenizerWrapper(vocabulary)
        return LLTokenizer(wrapped, n_vocab=self._vocab, eos_token=self._ends, slices=list(SLICES))

    def vocabulary(self) -> LLTokenizer | None:
        """The vocabulary as the library has it, or None where answers cannot be held to a form; read when it is first asked for, which
        takes a second or two."""
        with self._loading:
            return self._vocabulary

    def knows(self, grammar: Grammar) -> bool:
        """Whether it is compiled."""
        with self._lock:
            return grammar.text in self._compiled

    def constraint(self, grammar: Grammar, *, ends: Iterable[int], least: int) -> Constraint:
        """The grammar for one request (see `Constraint`). Raises RequestError for what is none, or too large."""
        matcher = self._matcher(grammar)
        bars = self._bars if grammar.chat else None
        return Constraint(
            matcher.deep_copy(),
            grammar.field,
            ends=tuple(ends),
            least=least,
            bars=bars,
            anew=lambda: self._anew(grammar),
        )

    def compile(self, grammar: Grammar) -> None:
        """So that it is known. Raises RequestError."""
        self._matcher(grammar)

    def _anew(self, grammar: Grammar) -> LLMatcher:
        """A copy of the grammar as it is kept, compiled once more if its lexer, which all copies share, has failed."""
        matcher = self._matcher(grammar)
        copy = matcher.deep_copy()
        if any(copy.compute_bitmask()) and not copy.is_error():
            return copy
        with self._lock:
            if self._compiled.get(grammar.text) is matcher:
                del self._compiled[grammar.text]
                self._held -= _size(grammar.text)
        return self._matcher(grammar).deep_copy()

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        with self._lock:
            if (found := self._compiled.get(grammar.text)) is not None:
                self._compiled.move_to_end(grammar.text)
                return found
        matcher = self._made(grammar)
        with self._lock:
            if grammar.text not in self._compiled:
                self._held += _size(grammar.text)
            self._compiled[grammar.text] = matcher
            while self._held > KEPT and len(self._compiled) > 1:
                text, _ = self._compiled.popitem(last=False)
                self._held -= _size(text)
        return matcher

    def _made(self, grammar: Grammar) -> LLMatcher:
        if (size := len(grammar.text.encode())) > MOST_TEXT:
            raise _refused(grammar, f"makes a grammar of {size} bytes; the limit is {MOST_TEXT}")
        vocabulary = self.vocabulary()
        if vocabulary is None:
            raise _refused(
                grammar, "asks for a form, but this model has no tokenizer, or no token that ends an answer"
            )
        matcher = LLMatcher(vocabulary, grammar.text, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise _refused(grammar, f"is no form that an answer can be held to: {_line(matcher.get_error())}")
        # The first mask makes the lexer's first states, which the copies share; a grammar without any answer shows here,
        # by an error too: a mask then still lets the answer end.
        if not any(matcher.compute_bitmask()) or matcher.is_error():
            raise _refused(grammar, "is a form that no answer has")
        self._try(grammar, matcher.deep_copy())
        return matcher

    def _try(self, grammar: Grammar, matcher: LLMatcher) -> None:
        """Takes one step. Raises RequestError where the library gives up: much that is too large it does not notice before."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        may = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        further = may[~np.isin(may, self._ends)]
        if not matcher.is_error() and len(further) and matcher.consume_token(int(further[0])):
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refused(grammar, f"is no form that an answer can be held to: {_line(matcher.get_error())}")


def _size(text: str) -> int:
    return len(text) + _OVERHEAD


def _line(error: str) -> str:
    text = " ".join(error.removesuffix("<non-verbose/>").split())
    return text if len(text) <= 300 else text[:300] + "…"


def _refused(grammar: Grammar, text: str) -> RequestError:
    return RequestError(f"{grammar.field} {text}", grammar.field, "invalid_value", 400)
