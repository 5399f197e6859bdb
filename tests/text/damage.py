"""Tool calls as models damage them: well-formed answers with a token or a character missing, doubled, swapped with the
next, or with the rest missing, or with something between two tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "clock"}},
]
WELL_FORMED = (
    "Let me look.\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">São "Paulo"\n</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">[1, {"a": null}]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="clock">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
    "I will call.</think>\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="sh">\n'
    '<｜DSML｜parameter name="command" string="true">ls 2>&1 | a <b && </parameter></｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    'Hm\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n{"city": "Oslo", "days": 2}\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>\n</think>\nIt is late.",
)
_TOKENS = re.compile(r"｜DSML｜|</?think>|</|[A-Za-z_]+|[ \n]+|.", re.DOTALL)


def tokens(text: str) -> list[str]:
    """Roughly as the model's tokenizer cuts it: the marker is one token."""
    return _TOKENS.findall(text)


def damaged(units: Sequence[str]) -> Iterator[str]:
    """Every deletion, doubling and swap of a unit, and every truncation."""
    for i, unit in enumerate(units):
        yield "".join([*units[:i], *units[i + 1 :]])
        yield "".join([*units[:i], unit, *units[i:]])
        yield "".join(units[:i])
        if i + 1 < len(units) and unit != units[i + 1]:
            yield "".join([*units[:i], units[i + 1], unit, *units[i + 2 :]])


STRAY = ("</think>", "<think>", "x", "</｜DSML｜")


def shapes() -> list[str]:
    """Every damage by token, and by character, of every well-formed answer."""
    found: dict[str, None] = {}
    for text in WELL_FORMED:
        units = tokens(text)
        found |= dict.fromkeys(
            "".join([*units[:i], stray, *units[i:]]) for i in range(len(units) + 1) for stray in STRAY
        )
        for units in (tokens(text), list(text)):
            found |= dict.fromkeys(damaged(units))
    return list(found)
