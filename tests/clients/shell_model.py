"""A model for real clients: it calls their shell tool so many times and then says that all is done."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dsv4.text.tokenizer import Tokenizer

SHELLS = {"Bash": "command", "exec_command": "cmd", "get_weather": "city"}
"""Tools by the name that the model sees, and the parameter that the command goes to."""

MARK = "dsv4-was-here"
SAID, THOUGHT, DONE = "I will run it.", "Let me think.", "All done."


class ShellModel:
    """In its second turn it calls twice."""

    def __init__(self, tokenizer: Tokenizer, turns: int) -> None:
        """`turns`: answers with calls before the last one."""
        self.tokenizer, self.turns, self.shells = tokenizer, turns, SHELLS

    def __call__(self, prompt: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(prompt), skip_special=False)
        thought = f"{THOUGHT}</think>" if text.endswith("<think>") else ""
        shell = next((name for name in self.shells if re.search(rf'"name": "{name}"', text)), None)
        turn = text.count(SAID)
        if shell is None or turn >= self.turns:
            return thought + DONE
        # A form that no encoder writes.
        calls = "".join(
            f'<｜DSML｜invoke name=\'{shell}\'>\n<｜DSML｜parameter name="{self.shells[shell]}" string="true">echo {MARK} '
            f"{turn}.{n}</｜DSML｜parameter>\n</｜DSML｜invoke>\n"
            for n in range(2 if turn == 1 else 1)
        )
        return f"{thought}{SAID}\n<｜DSML｜tool_calls>\n{calls}</｜DSML｜tool_calls>"
