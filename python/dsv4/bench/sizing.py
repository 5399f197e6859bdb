"""How many words make how many tokens, as the server counts them."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLE = 1024
"""Words that are counted to learn it."""
MOST_PER_WORD = 8.0
"""More tokens a word than that, or fewer than one in four, is no count of the words that were sent."""


@dataclass(frozen=True, slots=True)
class Sizing:
    """Tokens of texts."""

    per_word: float
    source: str
    """`tokenize`: the server's /tokenize; `usage`: its count of a first request; `guess`: nothing was said, a word is a token."""

    @property
    def told(self) -> str:
        """In words."""
        how = {
            "tokenize": "counted by the server's /tokenize",
            "usage": "an estimate from the server's count of one request, as it has no /tokenize",
            "guess": "a guess, as the server counts nothing: lengths of prompts may be far off",
        }
        return f"{self.per_word:.3f} tokens a word, {how[self.source]}"

    def words(self, tokens: float) -> int:
        """Words that make about so many tokens, at least one."""
        return max(1, round(tokens / self.per_word))


GUESS = Sizing(1.0, "guess")


def counted(words: int, tokens: object, source: str) -> Sizing | None:
    """From a count of a server; None where that is none."""
    if (
        isinstance(tokens, bool)
        or not isinstance(tokens, int)
        or not words / 4 <= tokens <= MOST_PER_WORD * words
    ):
        return None
    return Sizing(tokens / words, source)
