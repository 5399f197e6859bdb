"""A tokenizer for the small random models of tests: their vocabulary of 256 holds special tokens and single letters."""

from __future__ import annotations

from tests.support.fake_engine import small_tokenizer

VOCABULARY = 256


class Letters:
    """The first 256 tokens of the small model's tokenizer, as far as grammars read it."""

    def __init__(self) -> None:
        whole = small_tokenizer()
        self.token_bytes, self.find = whole.token_bytes, whole.find
        self.control = frozenset(token for token in whole.control if token < VOCABULARY)
        ids = [token for token in range(VOCABULARY) if token not in self.control]
        self._ids = {whole.token_bytes(token): token for token in ids}

    def encode_letters(self, text: str) -> list[int]:
        return [self._ids[bytes([byte])] for byte in text.encode()]
