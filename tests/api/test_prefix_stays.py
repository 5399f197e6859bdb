"""Conversations as agents send them again: each prompt begins with the one before and with what the model wrote after it, token
for token, so that all of it is found in the prefix cache."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import httpx
import pytest
from dsv4.text.tokenizer import Tokenizer

from tests.support.fake_engine import EOS, FakeEngine
from tests.support.serving import RunningServer, running

HTTP = httpx.Client(timeout=60)
"""One for all: to make one takes longer than a request."""

MARKS = ("<think>", "</think>", "｜DSML｜")
SHELL = {"type": "object", "properties": {"cmd": {"type": "string"}, "n": {}, "env": {"type": "object"}}}
ROUNDS = 10


class Writer:
    """A model whose answers no encoder would write the same way: tokens are not merged, markup and JSON are odd."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer, self.random = tokenizer, random.Random(seed)
        self.thinking = self.last = False
        self.wrote: list[int] = []

    def __call__(self, prompt: Any) -> list[int]:
        self.wrote = self.ids(self.text())
        return self.wrote

    def text(self) -> str:
        pick = self.random.choice
        said = pick(["", "Look.", " Look — é, 你好.\n", "1  2\tx "])
        thought = pick(["Hm.", "\nHm, tests? ", "No.\n\n"]) + "</think>" if self.thinking else ""
        if self.last:
            return f"{thought}{said}Done. "
        value = pick(["ls -a", 'echo "a b"\n\n', "x</y> 2>&1", "ünï"])
        first = f'<｜DSML｜parameter name="n" string="false">{pick(["1.0", " [1, 2]", "1e2"])}</｜DSML｜parameter>\n'
        env = '<｜DSML｜parameter name="env" string="false">{"b":1,"a": {"z":2}}</｜DSML｜parameter>\n'
        shell = f'<｜DSML｜parameter name="cmd" string="true">{value}</｜DSML｜parameter>\n'
        one = f'<｜DSML｜invoke name="sh">\n{first}{shell}{env}</｜DSML｜invoke>\n'
        one = pick([one, one.replace('"', "'"), one.replace(' string="true"', "")])
        block = f"{pick(['', chr(10), chr(10) * 2])}<｜DSML｜tool_calls>\n{one * pick([1, 2])}</｜DSML｜tool_calls>"
        return f"{thought}{said}{block}{pick(['', chr(10), ' ok'])}"

    def ids(self, text: str) -> list[int]:
        """Characters one by one where they are no marks, as often as not."""
        found: list[int] = []
        for mark in MARKS:
            text = text.replace(mark, f"\0{mark}\0")
        for part in filter(None, text.split("\0")):
            whole = part in MARKS or self.random.random() < 0.5
            pieces = [part] if whole else list(part)
            found += [i for piece in pieces for i in self.tokenizer.encode(piece)]
        return found


class Agent:
    """A client's side of a conversation: what it sends, and what it keeps of an answer."""

    def __init__(self, url: str, seed: int, *, thinking: bool) -> None:
        self.url, self.random, self.thinking, self.round = url, random.Random(seed), thinking, 0

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = HTTP.post(self.url + path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()


class ClaudeCode(Agent):
    """Blocks as they came, input as a JavaScript client writes it; the first line and the cache marks move about."""

    def __init__(self, url: str, seed: int, *, thinking: bool) -> None:
        super().__init__(url, seed, thinking=thinking)
        self.talk: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "Go"}]}]

    def turn(self) -> int:
        self.round += 1
        talk = copy.deepcopy(self.talk)
        if isinstance(talk[-1]["content"], list):
            talk[-1]["content"][-1]["cache_control"] = {"type": "ephemeral"}
        line = f"x-anthropic-billing-header: cc_version=2.1.330.{self.random.random()}; cch={self.round};"
        system = [{"type": "text", "text": line}, {"type": "text", "text": "You are C."}]
        body = {"model": "default", "max_tokens": 900, "system": system, "messages": talk}
        body["tools"] = [{"name": "sh", "input_schema": SHELL}]
        body["metadata"] = {"user_id": json.dumps({"device_id": "d", "session_id": "s"})}
        if self.thinking:
            body["thinking"] = {"type": "adaptive", "display": self.random.choice(["omitted", "summarized"])}
        got = self.post("/v1/messages", body)
        content = [
            {**b, "input": javascript(b["input"])} if b["type"] == "tool_use" else b for b in got["content"]
        ]
        results = [
            {"type": "tool_result", "tool_use_id": b["id"], "content": f"out {self.round}", "is_error": False}
            for b in content
            if b["type"] == "tool_use"
        ]
        self.talk.append({"role": "assistant", "content": content})
        self.talk.append({"role": "user", "content": results or "More?"})
        return got["usage"]["output_tokens"]


class Codex(Agent):
    """Items as they came; `reasoning` with its text or with what is encrypted alone."""

    one_call = False

    def __init__(self, url: str, seed: int, *, thinking: bool) -> None:
        super().__init__(url, seed, thinking=thinking)
        text = [{"type": "input_text", "text": "Go"}]
        self.items: list[dict[str, Any]] = [{"type": "message", "role": "user", "content": text}]

    def turn(self) -> int:
        self.round += 1
        tool = {"type": "function", "name": "sh", "strict": False, "parameters": SHELL}
        body = {
            "model": "default",
            "input": self.items,
            "tools": [tool, {"type": "web_search"}],
            "store": False,
        }
        body |= {
            "instructions": "You are X.",
            "parallel_tool_calls": not self.one_call,
            "prompt_cache_key": "k",
        }
        if self.thinking:
            body |= {"reasoning": {"summary": "auto"}, "include": ["reasoning.encrypted_content"]}
        got = self.post("/v1/responses", body)
        for item in got["output"]:
            if item["type"] == "reasoning" and self.random.random() < 0.5:
                item = {**item, "content": None}
            self.items.append(item)
        calls = [item for item in got["output"] if item["type"] == "function_call"]
        self.items += [
            {"type": "function_call_output", "call_id": c["call_id"], "output": f"out {self.round}"}
            for c in calls
        ] or [{"role": "user", "content": "More?"}]
        return got["usage"]["output_tokens"]


class CodexOneByOne(Codex):
    """One call at most: the answer is stopped at its end."""

    one_call = True


class Cline(Agent):
    """Chat completions without thoughts, text without its ends, arguments written anew."""

    tools: ClassVar[Any] = [{"type": "function", "function": {"name": "sh", "parameters": SHELL}}]

    def __init__(self, url: str, seed: int, *, thinking: bool) -> None:
        super().__init__(url, seed, thinking=thinking)
        self.talk: list[dict[str, Any]] = [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "Go"},
        ]

    def turn(self) -> int:
        self.round += 1
        body = {"model": "default", "messages": self.talk, "tools": self.tools}
        body |= {"thinking": {"type": "enabled" if self.thinking else "disabled"}}
        got = self.post("/v1/chat/completions", body)
        message = got["choices"][0]["message"]
        kept = {"role": "assistant", "content": (message["content"] or "").strip()}
        if calls := message.get("tool_calls"):
            for call in calls:
                arguments = javascript(json.loads(call["function"]["arguments"]))
                call["function"]["arguments"] = json.dumps(arguments, separators=(",", ":"))
            kept["tool_calls"] = calls
        self.talk.append(kept)
        self.talk += [
            {"role": "tool", "tool_call_id": c["id"], "content": f"out {self.round}"} for c in calls or ()
        ] or [{"role": "user", "content": "More?"}]
        return got["usage"]["completion_tokens"]


class Aider(Cline):
    """Chat completions without tools: edits are in the text."""

    tools = None


def javascript(value: Any) -> Any:
    """An object as JavaScript has it, and in another order."""
    if isinstance(value, dict):
        return {k: javascript(value[k]) for k in sorted(value)}
    if isinstance(value, list):
        return [javascript(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.fixture(scope="module")
def server(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    with running(FakeEngine(tokenizer=tokenizer, max_model_len=65536)) as server:
        yield server


CASES = [(kind, thinking) for kind in (ClaudeCode, Codex, CodexOneByOne, Cline) for thinking in (False, True)]


@pytest.mark.parametrize(("kind", "thinking"), [*CASES, (Aider, False)])
@pytest.mark.parametrize("seed", range(2))
def test_ten_turns_reuse_all_but_the_new_text(
    server: RunningServer, tokenizer: Tokenizer, kind: Callable[..., Any], thinking: bool, seed: int
) -> None:
    writer = server.engine.script = Writer(tokenizer, seed)
    writer.thinking = thinking
    agent = kind(server.url, seed, thinking=thinking)
    before: list[int] = []
    for round in range(ROUNDS):
        writer.last = kind is Aider or round in (4, ROUNDS - 1)
        count = agent.turn()
        prompt = server.engine.seen[-1].prompt
        assert prompt[: len(before)] == before, (round, shown(tokenizer, prompt, before))
        before = prompt + [*writer.wrote, EOS][:count]


def shown(tokenizer: Tokenizer, prompt: list[int], before: list[int]) -> tuple[str, str]:
    """Where they part."""
    at = next(i for i, (a, b) in enumerate(zip([*prompt, -1], before, strict=False)) if a != b)
    decode = tokenizer.decode
    return decode(prompt[at - 5 : at + 20], skip_special=False), decode(
        before[at - 5 : at + 20], skip_special=False
    )


class Chat:
    """One answer with a call and thoughts, and what the model reads when it is sent back."""

    def __init__(self, server: RunningServer, tokenizer: Tokenizer, **more: Any) -> None:
        self.server, self.tokenizer, self.more = server, tokenizer, {"thinking": {"type": "enabled"}} | more
        text = "Secret.</think>Look.<｜DSML｜tool_calls>\n<｜DSML｜invoke name='sh'>\n<｜DSML｜parameter name='cmd'>ls"
        text += "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
        server.engine.script = lambda prompt: text
        self.question = {"role": "user", "content": "Go"}
        answer = self.post([self.question], self.more)
        message = answer["choices"][0]["message"]
        self.call = message["tool_calls"][0]
        self.message = {"role": "assistant", "content": "Look.", "tool_calls": [self.call]}

    def post(self, messages: list[dict[str, Any]], more: dict[str, Any]) -> dict[str, Any]:
        body = {"model": "default", "messages": messages, "tools": Cline.tools} | more
        answer = HTTP.post(self.server.url + "/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def read(self, message: dict[str, Any] | None = None, after: Any = (), **more: Any) -> str:
        result = {"role": "tool", "tool_call_id": self.call["id"], "content": "out"}
        self.post([self.question, self.message | (message or {}), result, *after], self.more | more)
        return self.tokenizer.decode(self.server.engine.seen[-1].prompt, skip_special=False)


def test_what_was_sampled_is_read_again_with_its_thoughts(
    server: RunningServer, tokenizer: Tokenizer
) -> None:
    chat = Chat(server, tokenizer)
    assert "<think>Secret.</think>Look.<｜DSML｜tool_calls>\n<｜DSML｜invoke name='sh'>" in chat.read()
    assert "<think>Secret." in chat.read(after=[{"role": "user", "content": "And?"}])  # tools keep thoughts
    off = chat.read(thinking={"type": "disabled"})
    assert "Secret" not in off and "</think>Look.<｜DSML｜tool_calls>\n<｜DSML｜invoke name='sh'>" in off
    dropped = chat.read(after=[{"role": "user", "content": "And?"}], tools=None)
    assert (
        "Secret" not in dropped and "</think>Look.<｜DSML｜tool_calls>\n<｜DSML｜invoke name='sh'>" in dropped
    )
    kept = {"chat_template_kwargs": {"drop_thinking": False}}
    assert "Secret" in chat.read(after=[{"role": "user", "content": "And?"}], tools=None, **kept)


def test_what_the_client_changed_is_taken_as_it_is_sent(server: RunningServer, tokenizer: Tokenizer) -> None:
    chat = Chat(server, tokenizer)

    def function(name: str, arguments: str) -> dict[str, Any]:
        return {"tool_calls": [{**chat.call, "function": {"name": name, "arguments": arguments}}]}

    for changed, shown in (
        ({"content": "Looked."}, "</think>Looked.\n\n<｜DSML｜"),
        (function("sh", '{"cmd": "rm"}'), ">rm</｜DSML｜parameter>"),
        (function("sh2", '{"cmd": "ls"}'), 'invoke name="sh2"'),
        ({"tool_calls": [{**chat.call, "id": "other"}]}, '<｜DSML｜invoke name="sh"'),
    ):
        read = chat.read(changed)
        assert shown in read and "Secret" not in read, changed
    assert "<think>Other.</think>Look.\n\n<｜DSML｜" in chat.read({"reasoning_content": "Other."})
    assert "<think>Secret.</think>Look.<｜DSML｜" in chat.read({"reasoning_content": "Secret.\n"})


@pytest.mark.parametrize("field", ["user", "cache_salt"])
def test_what_was_sampled_is_one_tenants(server: RunningServer, tokenizer: Tokenizer, field: str) -> None:
    chat = Chat(server, tokenizer, **{field: "a"})
    assert "Secret" in chat.read() and "Secret" not in chat.read(**{field: "b"})
    assert "Secret" not in chat.read(**{field: "turns"}) and "Secret" in chat.read()


def test_what_was_sampled_is_bounded_with_the_texts(tokenizer: Tokenizer) -> None:
    engine = FakeEngine(tokenizer=tokenizer)
    with running(engine) as server:
        chat = Chat(server, tokenizer)
        capacity, tokenizer.store.capacity = tokenizer.store.capacity, 4000
        try:
            for n in range(50):
                tokenizer.store.put("", f"filler {n}", b"1234")
            assert tokenizer.store.bytes <= 4000 and "Secret" not in chat.read()
        finally:
            tokenizer.store.capacity = capacity
