"""A server for real clients: `python -m tests.clients.scripted --record DIR` prints its address and serves until it is
killed. Its model calls a shell tool where it is shown one and has no result yet, and says `All done.` after that."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv4.api import http

from tests.support.fake_engine import FakeEngine, small_tokenizer
from tests.support.serving import running

SHELLS = {
    "Bash": "command",
    "exec_command": "cmd",
    "shell_command": "command",
    "bash": "command",
    "run": "command",
}
"""Shell tools of clients, and the parameter that is the command."""

COMMAND = "echo dsv4-was-here"


class Model:
    """`turns`: calls before the last answer."""

    def __init__(self, turns: int) -> None:
        self.tokenizer, self.turns = small_tokenizer(), turns

    def __call__(self, prompt: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(prompt), skip_special=False)
        thought = "Let me think." if text.endswith("<think>") else ""
        end = "</think>" if thought else ""
        shell = next((name for name in SHELLS if re.search(rf'"name": "{name}"', text)), None)
        done = text.count("<tool_result>")
        if shell is None or done >= self.turns:
            return f"{thought}{end}All done."
        return (
            f'{thought}{end}I will run it.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{shell}">\n<｜DSML｜parameter '
            f'name="{SHELLS[shell]}" string="true">{COMMAND} {done}</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
            "</｜DSML｜tool_calls>"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, help="a directory for the bodies of all requests")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--name", action="append", default=[])
    arguments = parser.parse_args()
    if arguments.record:
        _record(arguments.record)
    model = Model(arguments.turns)
    engine = FakeEngine(model, tokenizer=model.tokenizer, max_model_len=262144)
    names = tuple(arguments.name) or ("dsv4",)
    with running(engine, served_model_name=names) as server:
        print(server.url, flush=True)
        while True:
            time.sleep(1)


def _record(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    parse, count = http.parse_object, 0

    def parse_object(body: bytes) -> dict[str, Any]:
        nonlocal count
        count += 1
        parsed = parse(body)
        (directory / f"{count:03}.json").write_text(
            json.dumps(json.loads(body), indent=1, ensure_ascii=False)
        )
        return parsed

    http.parse_object = parse_object


if __name__ == "__main__":
    main()
