"""Pieces of grammars for llguidance, and what it says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits

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
    words = schema if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    return {"json_schema": {**words, "x-guidance": {"whitespace_pattern": SPACES}}}


def fault_of(grammar: Mapping[str, Any]) -> str | None:
    """Why it is no grammar, in one line; None where it is one, as far as that shows without a vocabulary. Milliseconds; known texts
    cost nothing."""
    return _fault(listed([grammar]))


@lru_cache(4096)
def _fault(text: str) -> str | None:
    failed, messages = LLMatcher.validate_grammar_with_warnings(text, limits=LIMITS)
    return " ".join(messages[0].split()) if failed else None
