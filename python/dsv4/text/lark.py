"""Pieces of grammars for llguidance, and what it says of them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from dsv4.text.json_schema import without_foreign_formats

Grammars = list[dict[str, Any]]
"""Grammars that others name; each has `lark_grammar` or `json_schema`."""

LIMITS = LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=500_000,
    step_max_items=100_000,
    max_lexer_states=50_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""Some hundred milliseconds for a grammar, some tens for a mask, and some ten megabytes for the states of one's lexer, at most."""

SPACES = r" |\n {0,20}"
"""Blanks between two tokens of JSON: none, one, or a new line that is indented. Without a bound a model may write nothing else."""

TEXT_RULES = r"""
TEXT: ANY & ~MARKED
ANY: /(?s:.*)/
MARKED: /(?s:.*)｜DSML｜(?s:.*)/
"""
"""`TEXT` is any text; the marker spelled in letters is none."""


def listed(grammars: Sequence[Mapping[str, Any]]) -> str:
    """The text of a list of grammars, the first of which begins."""
    return json.dumps({"grammars": list(grammars)}, ensure_ascii=False)


def quoted(text: str) -> str:
    """A literal."""
    return json.dumps(text, ensure_ascii=False)


def json_grammar(schema: Any) -> dict[str, Any]:
    """JSON that fits a schema. `true` and `false` are schemas as well."""
    words = without_foreign_formats(schema) if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    return {"json_schema": {**words, "x-guidance": {"whitespace_pattern": SPACES}}}


def pattern(regex: str) -> str:
    """A regular expression that matches as a whole, as Lark writes one."""
    inner = regex.removeprefix("^")
    if inner.endswith("$") and (len(inner) - len(inner[:-1].rstrip("\\"))) % 2:
        inner = inner[:-1]
    made = json.loads(LLMatcher.grammar_from_regex(f"(?:{inner})"))["grammars"][0]["lark_grammar"]
    return str(made).removeprefix("start: ")


_WALKS, _LONGEST_WALK = 8, 400


@lru_cache(256)
def ends_before(lark: str, text: str) -> bool:
    """Whether a text of this grammar can be told from `text` after it. A terminal that takes the latter as well goes on over it, as the
    lexer never goes back, and no answer would end. Found out with texts drawn at random; true where none of them is whole."""
    bytes_of = LLTokenizer("byte")
    for seed in range(_WALKS):
        if (found := _drawn(bytes_of, lark, random.Random(seed))) is not None:
            both = listed(
                [{"lark_grammar": f"start: @form {quoted(text)}"}, {"name": "form", "lark_grammar": lark}]
            )
            matcher = LLMatcher(bytes_of, both, log_level=0, limits=LIMITS)
            if not matcher.consume_tokens([*found, *text.encode()]) or not matcher.is_accepting():
                return False
    return True


def _drawn(bytes_of: LLTokenizer, lark: str, rng: random.Random) -> list[int] | None:
    """A text of a grammar as bytes; None where none was found."""
    matcher = LLMatcher(bytes_of, listed([{"lark_grammar": lark}]), log_level=0, limits=LIMITS)
    drawn: list[int] = []
    while len(drawn) < _LONGEST_WALK and not matcher.is_error():
        if drawn and matcher.is_accepting() and rng.random() < 0.3:
            return drawn
        mask = matcher.compute_bitmask()
        may = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
        if not may:
            return drawn if matcher.is_accepting() else None
        usual = [byte for byte in may if 32 <= byte < 127]
        byte = 10 if 10 in may and rng.random() < 0.3 else rng.choice(usual or may)
        if not matcher.consume_token(byte):
            return None
        drawn.append(byte)
    return None


def fault_of(grammar: Mapping[str, Any]) -> str | None:
    """Why it is no grammar, in one line; None where it is one, as far as that shows without a vocabulary. Milliseconds; known texts
    cost nothing."""
    return _fault(listed([grammar]))


@lru_cache(4096)
def _fault(text: str) -> str | None:
    failed, messages = LLMatcher.validate_grammar_with_warnings(text, limits=LIMITS)
    if not failed:
        return None
    return _ONE_OF if "coerce_one_of" in messages[0] else " ".join(messages[0].split())


_ONE_OF = (
    "alternatives of oneOf must exclude each other by type, or by a required property with a const or enum "
    "of its own; write anyOf, or require that property"
)
"""In place of what the library says, which is about a setting of its own."""
