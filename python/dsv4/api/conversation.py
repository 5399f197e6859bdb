"""A chat request's messages, tools and thinking settings, checked and encoded as a prompt. Dialects share
it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsv4.api.custom_tools import as_function, read_custom
from dsv4.api.fields import Fields, refuse
from dsv4.api.grammar import ANY, Choice, of_chat, openai_choice, openai_format
from dsv4.api.http import Call
from dsv4.api.noise import without_noise
from dsv4.api.reply import Reply
from dsv4.engine.routing import Routing
from dsv4.errors import RequestError, show
from dsv4.sampling import Grammar
from dsv4.text.chat import TASKS, Ending, encode_chat, ending_of
from dsv4.text.draft import Bound, Draft
from dsv4.text.form import Format
from dsv4.text.recall import Recall
from dsv4.text.stream import Reading
from dsv4.text.tokenizer import Tokenizer
from dsv4.text.tools import shown_tools

MAX_MESSAGES = 65536
MAX_TOOLS = 1024

EFFORTS = {
    "none": "none",
    "minimal": "low",
    "low": "low",
    "medium": "high",
    "high": "high",
    "xhigh": "high",
    "max": "max",
    "ultra": "max",
}
"""What clients call an effort, and which of V4's it is: DeepSeek's own mapping. `none` turns thinking off."""

DEFAULT_EFFORT = "low"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What `encode` needs."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    """The request's. A system message may bring its own."""
    thinking: bool
    effort: str
    ending: Ending = "opened"
    drop_thinking: bool = True
    parallel_calls: bool = True
    """False: the answer has at most one call."""
    choice: Choice = ANY
    format: Format | None = None
    """What the answer is to be, if it calls nothing."""
    inputs: Mapping[str, Format | None] = field(default_factory=dict)
    """Custom tools by name, and what holds their text."""
    left_out: tuple[str, ...] = ()
    """What of the request cannot be done."""

    def reading(self) -> Reading:
        """How the answer is to be read; once `encode` has taken the messages."""
        return Reading.of_chat(
            self.messages,
            self.tools,
            thinking=self.thinking,
            ending=self.ending,
            most_calls=None if self.parallel_calls else 1,
        )

    def grammar(self, tokenizer: Tokenizer, reading: Reading) -> Grammar | None:
        """What holds the answer to its form. Raises RequestError."""
        choice, format = self.choice, self.format
        parallel = self.parallel_calls
        return of_chat(
            tokenizer,
            reading,
            self.messages,
            self.tools,
            choice,
            format,
            parallel=parallel,
            inputs=self.inputs,
        )


def read_conversation(fields: Fields) -> Conversation:
    """Messages, tools, thinking and what follows the last message, out of a body in OpenAI's shape. Raises RequestError."""
    messages = fields.get("messages")
    if messages is None:
        raise RequestError(
            "messages is missing; it takes a list of messages", "messages", "missing_field", 400
        )
    messages = without_noise(fields.items("messages", dict, MAX_MESSAGES))
    for i, message in enumerate(messages):
        messages[i] = message = _without_customs(message, f"messages[{i}].")
        _check_message(Fields(message, f"messages[{i}]."))
    template = fields.nested("chat_template_kwargs")
    ending = ending_of(
        messages,
        add_generation_prompt=_switch(fields, template, "add_generation_prompt"),
        continue_final_message=_switch(fields, template, "continue_final_message"),
    )
    thinking, effort = _thinking(fields, template, messages[-1] if ending == "continued" else {})
    if task := fields.choice("task", tuple(TASKS)):
        if ending != "opened":
            raise refuse(
                "task", task, "a prompt whose last message is not continued", "; leave one of them out"
            )
        messages = [*messages[:-1], {**messages[-1], "task": task}]
    tools, inputs, left_out = _tools(fields)
    choice = openai_choice(fields)
    if not choice.tools:
        messages = [{k: v for k, v in m.items() if k != "tools"} for m in messages]
    drop = template.boolean("drop_thinking", True)
    parallel = fields.boolean("parallel_tool_calls", True)
    choice = choice.among(shown_tools(messages, tools))
    tools = tools if choice.tools else []
    form = openai_format(fields)
    return Conversation(
        messages, tools, thinking, effort, ending, drop, parallel, choice, form, inputs, tuple(left_out)
    )


def _switch(fields: Fields, template: Fields, name: str) -> bool | None:
    """A switch of the chat template, which vLLM takes at the top and SGLang among the template's arguments."""
    given = [f.boolean(name) for f in (fields, template) if f.get(name) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise refuse(name, given[0], f"the same value as {template.where}{name}", "; leave one of them out")
    return given[0] if given else None


_NOT_IN_MESSAGES = {
    "function_call": "send it as tool_calls",
    "audio": "this model reads text only",
    "images": "this model reads text only",
    "response_format": "send it beside the messages",
}
"""What other servers read there, and what to do instead."""


def _check_message(message: Fields) -> None:
    """What the encoder takes for granted; roles and contents it checks itself."""
    message.text("reasoning_content", longest=2**31)
    message.text("reasoning", longest=2**31)
    message.text("tool_call_id")
    message.text("refusal", longest=2**31)
    for name, remedy in _NOT_IN_MESSAGES.items():
        if message.get(name):
            text = f"{message.where}{name} is {show(message.get(name))}; it is not supported: {remedy}"
            raise RequestError(text, message.where + name, "unsupported_field", 400)
    for j, call in enumerate(message.items("tool_calls", dict, MAX_TOOLS)):
        function = Fields(call, f"{message.where}tool_calls[{j}].").nested("function")
        if not function.text("name"):
            raise RequestError(
                f"{function.where}name is missing", f"{function.where}name", "missing_field", 400
            )
        arguments = function.get("arguments")
        if arguments is not None and type(arguments) not in (str, dict):
            raise refuse(f"{function.where}arguments", arguments, "a JSON object as text")


def _without_customs(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message whose calls of custom tools are those of functions."""
    calls = message.get("tool_calls")
    if type(calls) is not list or not any(type(c) is dict and c.get("type") == "custom" for c in calls):
        return message
    return message | {
        "tool_calls": [
            as_function(c, f"{where}tool_calls[{i}].") if type(c) is dict and c.get("type") == "custom" else c
            for i, c in enumerate(calls)
        ]
    }


def _tools(fields: Fields) -> tuple[list[dict[str, Any]], dict[str, Format | None], list[str]]:
    """The request's tools, checked: as functions, what holds the texts of custom ones, and what of them cannot be done."""
    tools, inputs, left_out = (
        list(fields.items("tools", dict, MAX_TOOLS)),
        dict[str, Format | None](),
        list[str](),
    )
    for i, tool in enumerate(tools):
        if tool.get("type", "function") == "custom":
            made, form, unheld = read_custom(Fields(tool, f"tools[{i}].").nested("custom"))
            inputs[made["name"]], tools[i] = form, {"type": "function", "function": made}
            left_out += [unheld] if unheld else []
            continue
        if tool.get("type", "function") != "function":
            raise refuse(f"tools[{i}].type", tool["type"], "'function' or 'custom'")
        function = Fields(tool, f"tools[{i}].").nested("function")
        if not function.text("name"):
            raise RequestError(
                f"{function.where}name is missing", f"{function.where}name", "missing_field", 400
            )
        function.text("description", longest=2**31)
        function.nested("parameters")
        function.boolean("strict")
    return tools, inputs, left_out


def reasoning_of(fields: Fields) -> bool:
    """Whether the answer is to hold the thoughts: `include_reasoning` of vLLM, `reasoning.exclude` of OpenRouter."""
    return fields.boolean("include_reasoning", True) and not fields.nested("reasoning").boolean("exclude")


def _thinking(fields: Fields, template: Fields, continued: dict[str, Any]) -> tuple[bool, str]:
    """(thinking, effort) from DeepSeek's `thinking`, OpenAI's `reasoning_effort`, the template arguments of vLLM, Qwen's
    `enable_thinking` and OpenRouter's `reasoning`.

    Off unless asked for; naming an effort asks for it, and so does the wish to continue a message with thoughts. The
    most explicit wins: a switch before an effort before the message.
    """
    reasoning, efforts = fields.nested("reasoning"), tuple(EFFORTS)
    name = fields.choice("reasoning_effort", efforts) or template.choice("reasoning_effort", efforts)
    name = name or reasoning.choice("effort", efforts)
    effort = EFFORTS[name] if name is not None else None
    switch = fields.get("thinking")
    if type(switch) is not bool:
        mode = fields.nested("thinking").choice("type", ("enabled", "disabled", "adaptive", "auto"))
        switch = None if mode in (None, "auto") else mode != "disabled"
    for place, key in (
        (fields, "enable_thinking"),
        (template, "thinking"),
        (template, "enable_thinking"),
        (reasoning, "enabled"),
    ):
        if switch is None and place.get(key) is not None:
            switch = place.boolean(key)
    thought = bool(continued.get("reasoning_content") or continued.get("reasoning"))
    thinking, effort = settled(switch, effort, thought)
    if thought and not thinking and not continued.get("content"):
        text = "is to be continued, but thinking is off; ask for it, or send the content to continue"
        raise RequestError(f"the last message's reasoning_content {text}", "thinking", "invalid_value", 400)
    return thinking, effort


def settled(switch: bool | None, effort: str | None, thought: bool = False) -> tuple[bool, str]:
    """(thinking, effort) of a request: a `switch` goes before an `effort` (V4's, or `none`), and that before the `thought`
    of a message to continue."""
    asked = thought if effort is None else effort != "none"
    thinking = asked if switch is None else switch
    return thinking, effort if effort not in (None, "none") else DEFAULT_EFFORT


@dataclass(frozen=True, slots=True)
class Asked:
    """What a chat asks of the engine."""

    prompt: np.ndarray
    """int32 [tokens]."""
    recall: Recall
    """Keeps the answer as it was sampled."""
    reading: Reading
    grammar: Grammar | None = None
    """What holds the answer to its form."""

    def keep(self, reply: Reply) -> None:
        """Keeps an answer for when it is sent back, if it is a whole turn as the client sees it."""
        cut = reply.finish_reason == "length" and (reply.call_ids or not reply.blocks.content)
        if reply.finish_reason == "error" or reply.stop_reason is not None or cut or self.reading.continues:
            return
        self.recall.keep(reply.token_ids, reply.blocks, reply.call_ids, thinking=self.reading.thinking)


async def encode(call: Call, chat: Conversation, bound: Bound, routing: Routing) -> Asked:
    """The prompt and how its answer is to be read; long chats are encoded off the event loop. RequestError for a chat beyond
    `bound`, unread where its length says so."""
    service = call.service
    tokenizer = service.tokenizer("messages")
    recall = Recall(tokenizer, f"{routing.tenant}\0{routing.salt}")

    def begin() -> Draft:
        segments = encode_chat(
            chat.messages,
            thinking=chat.thinking,
            tools=chat.tools or None,
            effort=chat.effort,
            drop_thinking=chat.drop_thinking,
            ending=chat.ending,
            format=service.engine.chat_format,
            recall=recall,
        )
        return tokenizer.draft(segments, salt=routing.salt, bound=bound)

    try:
        prompt = await service.lanes.encode(begin, size=call.size)
        reading = await call.aside(chat.reading)
        grammar = await call.aside(lambda: chat.grammar(tokenizer, reading))
        return Asked(prompt, recall, reading, grammar)
    except RecursionError:
        raise RequestError(
            "messages hold JSON that nests too deep", "messages", "invalid_value", 400
        ) from None
