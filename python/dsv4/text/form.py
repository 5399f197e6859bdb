"""The form that an answer is to have, as a grammar for llguidance: JSON by a schema, a regular expression, Lark, one of several texts;
in a chat after the thoughts, and beside the calls of tools.

A chat in which tools are shown always has a grammar, so no call can be malformed: the answer is text up to the first `<｜DSML｜`, and
from there on what `call_grammar.py` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher

from dsv4.text.call_grammar import Calls
from dsv4.text.lark import TEXT_RULES, Grammars, fault_of, json_grammar, listed, quoted
from dsv4.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Format:
    """What a whole answer, or what comes after its thoughts, is to be."""

    kind: Literal["json", "regex", "lark", "choice"]
    value: Any
    """A JSON schema, a pattern, a Lark grammar that begins at `start`, or a list of texts."""
    field: str
    """Of the request."""

    def grammar(self) -> dict[str, Any]:
        """As an entry of llguidance's list of grammars."""
        if self.kind == "json":
            return json_grammar(self.value)
        if self.kind == "regex":
            made = json.loads(LLMatcher.grammar_from_regex(self.value))
            return {"lark_grammar": made["grammars"][0]["lark_grammar"]}
        if self.kind == "choice":
            # One terminal: as rules some two thousand are more than the parser takes.
            return {"lark_grammar": "start: CHOICE\nCHOICE: " + " | ".join(map(quoted, self.value))}
        return {"lark_grammar": self.value}

    def fault(self) -> str | None:
        """Why it is no grammar; None where it is one. It may take milliseconds."""
        return fault_of(self.grammar())

    def spelled(self) -> Iterator[tuple[str, str]]:
        """Texts that it spells out, as an answer has them, each with the field that it stands in."""
        if self.kind == "choice":
            yield from ((f"{self.field}[{i}]", text) for i, text in enumerate(self.value))
        elif self.kind == "json":
            yield from _values(self.value, self.field)

    def text(self) -> str:
        """For an answer that is nothing else."""
        return listed([self.grammar()])


_NAMES = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Where the keys of an object in a schema are names, and no words of JSON Schema."""


def _values(schema: Any, where: str) -> Iterator[tuple[str, str]]:
    """The values that a JSON schema spells out, as JSON."""
    if isinstance(schema, list):
        for i, one in enumerate(schema):
            yield from _values(one, f"{where}[{i}]")
    if not isinstance(schema, dict):
        return
    for key, inside in schema.items():
        field = f"{where}.{key}"
        if key in _NAMES and isinstance(inside, dict):
            for name, one in inside.items():
                yield from _values(one, f"{field}.{name}")
        elif key == "const":
            yield field, json.dumps(inside, ensure_ascii=False)
        elif key == "enum" and isinstance(inside, list):
            yield from (
                (f"{field}[{i}]", json.dumps(one, ensure_ascii=False)) for i, one in enumerate(inside)
            )
        elif key not in ("default", "examples"):
            yield from _values(inside, field)


def chat_grammar(
    tokenizer: Tokenizer, *, thinking: bool, format: Format | None = None, calls: Calls | None = None
) -> str | None:
    """The grammar of an answer that begins in thoughts or not; None where every answer will do. Raises ValueError where the tokenizer
    has no token for what must come."""
    marker, end_think = tokenizer.find("｜DSML｜"), tokenizer.find("</think>")
    if calls is not None and (marker is None or not calls.functions()):
        if calls.must:
            raise ValueError("the model's tokenizer has no token for calls")
        calls = None
    if format is None and calls is None:
        return None
    if thinking and end_think is None:
        raise ValueError("the model's tokenizer has no token that ends thoughts")
    ways, grammars, rules = list[str](), Grammars(), TEXT_RULES
    if format is not None:
        grammars.append({"name": "form", **format.grammar()})
        ways.append("@form")
    elif calls is not None and not calls.must:
        ways.append("TEXT")
    if calls is not None:
        ways.append("calls")
        rules, named = calls.rules(f"<[{marker}]>", "HEAD")
        rules += '\nHEAD: (ANY "<") & ~MARKED' if "TEXT" in ways else "\nHEAD: /\\n{0,2}</"
        grammars += named
    answer = f"({' | '.join(ways)})"
    if thinking:  # where the answer may be empty the thoughts may be all there is
        answer = f"TEXT <[{end_think}]> {answer}" + (" | TEXT" if "TEXT" in ways else "")
    return listed([{"lark_grammar": f"start: {answer}\n{rules}"}, *grammars])
