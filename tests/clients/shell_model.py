"""A model for real clients: it calls their shell tool so many times and then says that all is done; asked to extract, it fills in what the
client wants to read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dsv4.text.tokenizer import Tokenizer

SHELLS = {"Bash": "command", "exec_command": "cmd", "get_weather": "city"}
"""Tools by the name that the model sees, and the parameter that the command goes to."""

MARK = "dsv4-was-here"
SAID, THOUGHT, DONE = "I will run it.", "Let me think.", "All done."
EXTRACT, CITIES, EXTRACTED = "Extract the city.", ("City", "PartialCity"), '{"city": "Paris"}'
"""What asks for a structured answer, tools by which some clients ask for it, and the answer."""
LAST_TOOL = "final_answer"
"""The tool by which smolagents' agents end."""


class ShellModel:
    """In its second turn it calls twice."""

    def __init__(self, tokenizer: Tokenizer, turns: int) -> None:
        """`turns`: answers with calls before the last one."""
        self.tokenizer, self.turns, self.shells = tokenizer, turns, SHELLS

    def __call__(self, prompt: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(prompt), skip_special=False)
        thought = f"{THOUGHT}</think>" if text.endswith("<think>") else ""
        if EXTRACT in text:
            city = next((name for name in CITIES if _has(text, name)), None)
            return thought + (_call(city, "city", "Paris") if city else EXTRACTED)
        shell = next((name for name in self.shells if _has(text, name)), None)
        turn = text.count(SAID)
        if shell is None or turn >= self.turns:
            return thought + (_call(LAST_TOOL, "answer", DONE) if _has(text, LAST_TOOL) else DONE)
        # A form that no encoder writes.
        calls = "".join(
            f'<｜DSML｜invoke name=\'{shell}\'>\n<｜DSML｜parameter name="{self.shells[shell]}" string="true">echo {MARK} '
            f"{turn}.{n}</｜DSML｜parameter>\n</｜DSML｜invoke>\n"
            for n in range(2 if turn == 1 else 1)
        )
        return f"{thought}{SAID}\n<｜DSML｜tool_calls>\n{calls}</｜DSML｜tool_calls>"


def _has(text: str, tool: str) -> bool:
    return re.search(rf'"name": "{tool}"', text) is not None


def _call(tool: str, parameter: str, value: str) -> str:
    """A call as the encoder writes it, before which nothing is said."""
    return (
        f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{tool}">\n<｜DSML｜parameter name="{parameter}" string="true">{value}'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )
