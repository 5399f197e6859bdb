"""Tools that take text in place of JSON, in chats and in Responses: what the model reads, what holds it, and what clients get."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from dsv4.engine.grammars import Grammars
from dsv4.text.lark import ends_before
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import EOS, FakeEngine, small_tokenizer
from tests.support.serving import RunningServer, running

PATCH = r"""start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?
hunk: "*** Add File: " filename LF add_line+
filename: /(.+)/
add_line: "+" /(.*)/ LF -> line
%import common.LF
"""
"""Of the form that Codex sends."""
LARK = {"syntax": "lark", "definition": PATCH}
DATE = {"syntax": "regex", "definition": r"^\d{4}-\d{2}$"}
GOOD = "*** Begin Patch\n*** Add File: a.py\n+x = '</y>' | \"z\"\n*** End Patch"


def written(name: str, text: str) -> str:
    return (
        f'\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="{name}">\n<｜DSML｜parameter name="input" string="true">{text}'
        "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )


class Served:
    """A server whose model says what it is told to, asked for tools in two dialects."""

    def __init__(self, server: RunningServer, tokenizer: Tokenizer) -> None:
        self.server, self.tokenizer = server, tokenizer
        self.client = openai.OpenAI(base_url=server.url + "/v1", api_key="k", max_retries=0)
        self.grammars = Grammars(small_tokenizer, 8192, [EOS])

    def ask(self, dialect: str, held: dict[str, Any] | None, **more: Any) -> httpx.Response:
        inside = {} if held is None else {"format": {"type": "grammar", **held}}
        if dialect == "chat/completions":
            inside = {} if held is None else {"format": {"type": "grammar", "grammar": held}}
            tool = {"type": "custom", "custom": {"name": "edit", "description": "Edits.", **inside}}
            body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
        else:
            body = {
                "input": "Hi",
                "tools": [{"type": "custom", "name": "edit", "description": "Edits.", **inside}],
            }
        return httpx.post(f"{self.server.url}/v1/{dialect}", json=body | more, timeout=60)

    def takes(self, text: str) -> bool:
        """Whether the grammar of the last request does."""
        ids = [*self.tokenizer.encode(text), EOS]
        form = self.grammars.constraint(self.server.engine.seen[-1].params.grammar, ends=[EOS], least=0)
        return form.matcher.validate_tokens(ids) == len(ids)


@pytest.fixture(scope="module")
def served(tokenizer: Tokenizer) -> Iterator[Served]:
    with running(FakeEngine(tokenizer=tokenizer)) as server:
        yield Served(server, tokenizer)


DIALECTS = pytest.mark.parametrize("dialect", ["chat/completions", "responses"])


@DIALECTS
@pytest.mark.parametrize(
    ("held", "good", "bad"),
    [
        (LARK, GOOD, "*** Begin Patch\nnothing\n*** End Patch"),
        (DATE, "2026-11", "2026-1"),
        ({"syntax": "regex", "definition": "a.*b|[x/]+$"}, "a </b", "a </c"),
        ({"syntax": "lark", "definition": 'start: NUM ("+" NUM)*\nNUM: /[0-9]+/'}, "1+22", "1+"),
        (None, "any </text> 'at' {all", "\n</｜DSML｜parameter>"),
    ],
)
def test_the_text_is_held_to_the_grammar(
    served: Served, dialect: str, held: Any, good: str, bad: str
) -> None:
    answer = served.ask(dialect, held)
    assert answer.status_code == 200 and "x-dsv4-warning" not in answer.headers, answer.text
    assert served.takes(written("edit", good)) and served.takes("No call.")
    assert not served.takes(written("edit", bad))
    read = served.tokenizer.decode(served.server.engine.seen[-1].prompt)
    assert "Edits." in read and (held is None or json.dumps(held["definition"])[1:-1] in read)


@DIALECTS
def test_a_grammar_whose_end_cannot_be_told_is_shown_and_a_warning_says_so(
    served: Served, dialect: str
) -> None:
    answer = served.ask(dialect, {"syntax": "lark", "definition": "start: /.+/"})
    assert (
        answer.status_code == 200
        and "the grammar of tool 'edit' is shown" in answer.headers["x-dsv4-warning"]
    )
    assert served.takes(written("edit", "any </text>"))


@DIALECTS
@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"syntax": "lark", "definition": "start: nothing"}, "definition is no form"),
        ({"syntax": "regex", "definition": "(?=a)b"}, "definition is no form"),
        ({"syntax": "xml", "definition": "a"}, "syntax is 'xml'"),
        ({"syntax": "lark"}, "definition is missing"),
    ],
)
def test_a_grammar_that_is_none_is_refused(served: Served, dialect: str, held: Any, says: str) -> None:
    answer = served.ask(dialect, held)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_gets_text_and_sends_it_back(served: Served, stream: bool) -> None:
    """OpenAI's SDK: the call is a custom one, and what comes back is what the model wrote."""
    script = f"I edit.{written('edit', GOOD)}"
    served.server.engine.script = lambda prompt: script
    tool = {"type": "custom", "custom": {"name": "edit"}}
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    ask = {"model": "default", "messages": messages, "tools": [tool], "tool_choice": "auto"}
    if stream:
        calls: dict[int, dict[str, Any]] = {}
        for chunk in served.client.chat.completions.create(**ask, stream=True):
            for part in chunk.choices[0].delta.tool_calls or ():
                raw = part.model_dump(exclude_none=True)
                held = calls.setdefault(raw.pop("index"), {"custom": {"input": ""}})
                held["custom"]["input"] += raw.get("custom", {}).pop("input", "")
                held["custom"] |= raw.pop("custom", {})
                held |= raw
        call = calls[0]
    else:
        (found,) = served.client.chat.completions.create(**ask).choices[0].message.tool_calls
        call = found.model_dump()
    assert call["type"] == "custom" and call["custom"] == {"name": "edit", "input": GOOD}
    prompt = served.server.engine.seen[-1].prompt
    messages += [
        {"role": "assistant", "content": "I edit.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "done"},
    ]
    served.client.chat.completions.create(**ask)
    again = served.server.engine.seen[-1].prompt
    before = [*prompt, *served.tokenizer.encode(script), EOS]
    assert again[: len(before)] == before


def test_a_forced_custom_tool_and_others_beside_it(served: Served) -> None:
    look = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    custom = {"type": "custom", "custom": {"name": "edit"}}
    choice = {"type": "custom", "custom": {"name": "edit"}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [look, custom], "tool_choice": choice}
    answer = httpx.post(f"{served.server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert served.takes(written("edit", "x")) and not served.takes(written("look", "x"))
    assert not served.takes("text")


def test_which_grammars_end() -> None:
    for lark in (PATCH, "start: /[a-z ]+/", 'start: "</" "a"', 'start: "a"*', 'start: /(.*)/ "\\n"'):
        assert ends_before(lark, "</"), lark
    for lark in ("start: /.+/", 'start: "a" /[^b]*/', "start: x\nx: /(?s:.*)/"):
        assert not ends_before(lark, "</"), lark
