"""Messages to a V4 prompt.

The released models have no template language; their prompt is BOS, system text, then turns between markers (spec 9.3,
release file encoding/encoding_dsv4.py). User text never becomes a marker: the result is a list of segments in which
only `Marker`s are special tokens.

    BOS system ⟨User⟩question⟨Assistant⟩</think>answer EOS ⟨User⟩…⟨Assistant⟩<think>

It differs from the released encoder where that one leaves the model without an instruction or without a turn to write
in; DeepSeek's own API differs in the same places:

- Every assistant turn is opened, in the history and at the end. The released encoder opens one only after a user's.
- `developer` is another name of `system`, as OpenAI's clients mean it. In the released encoder it is an internal role,
  and thinking mode drops it.
- System messages that follow each other become one, with a blank line between them. A later one stands at its place,
  without a marker (V4 has none), after a blank line where text goes before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsv4.errors import RequestError, kind, show
from dsv4.spelling import nearest
from dsv4.text.chat_format import GA, PREVIEW, ChatFormat
from dsv4.text.markers import Marker, Prompt, Segments
from dsv4.text.recall import Recall
from dsv4.text.tools import MAX_KEY, MAX_NAME, can_be_called, properties_of

__all__ = [
    "EFFORTS",
    "GA",
    "PREFIX_FIELDS",
    "PREVIEW",
    "ROLES",
    "TASKS",
    "ChatFormat",
    "Ending",
    "encode_chat",
    "ending_of",
    "starts_in_thought",
]

BOS, EOS = Marker("<｜begin▁of▁sentence｜>"), Marker("<｜end▁of▁sentence｜>")
USER, ASSISTANT = Marker("<｜User｜>"), Marker("<｜Assistant｜>")
THINK, END_THINK = Marker("<think>"), Marker("</think>")
REMINDER, DSML = Marker("<｜latest_reminder｜>"), Marker("｜DSML｜")
TASKS = {t: Marker(f"<｜{t}｜>") for t in ("action", "query", "authority", "domain", "title", "read_url")}
"""Quick tasks the model was trained on: a message's `task` asks for a short verdict on it."""

FIM = tuple(Marker(f"<｜fim▁{name}｜>") for name in ("begin", "hole", "end"))
"""A text with a hole: begin, what is before, hole, what is after, end; the model writes what is in it."""

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
EFFORTS = ("low", "high", "max")

TEXT_PARTS = ("text", "input_text", "output_text", "refusal")

Ending = Literal["opened", "closed", "continued"]
"""What follows the last message: the opening of a new assistant turn, nothing, or the rest of that message itself."""

PREFIX_FIELDS = ("prefix", "partial", "wo_eos")
"""What marks the last message as one to continue: the names that DeepSeek, Moonshot and Qwen, and SGLang have for it."""

_RESPONSE_FORMAT = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


@dataclass(slots=True)
class _Turn:
    """A message after merging: tool results and neighbouring user messages form one user turn, system messages one
    system turn."""

    role: str
    blocks: list[tuple[str | None, Segments]]
    """(Tool call id or None, text). Only user and system turns have more than one."""
    message: Mapping[str, Any]
    where: str = ""
    """Path of an assistant's message, for errors."""


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    effort: str = "low",
    drop_thinking: bool = True,
    response_schema: Mapping[str, Any] | None = None,
    ending: Ending | None = None,
    format: ChatFormat = GA,
    recall: Recall | None = None,
) -> Prompt:
    """The prompt up to the place where the model goes on.

    `ending`: what follows the last message; by default what the messages say (see `ending_of`). Reasoning of earlier
    turns is dropped unless there are tools (then the transcript only grows) or `drop_thinking` is off. `recall`: turns that
    it knows are as the model wrote them. Raises RequestError naming the message and field.
    """
    if effort not in format.efforts:
        raise RequestError(
            f"reasoning effort is {effort!r}; valid are {', '.join(format.efforts)}", "reasoning_effort"
        )
    turns = _merge(messages, format)
    ending = ending or ending_of(messages)
    keep = not drop_thinking or bool(tools) or any(m.get("tools") for m in messages)
    _attach(turns, {"tools": tools, "response_schema": response_schema}, format)
    _sort_results(turns)
    last_user = max((i for i, t in enumerate(turns) if t.role == "user"), default=-1)
    out: Prompt = [BOS, format.efforts[effort] if thinking else ""]
    task = None
    for i, turn in enumerate(turns):
        if turn.role == "assistant":
            reasoning = thinking and not task and (keep or i > last_user)
            out += _opening(task, thinking=thinking, reasoning=reasoning)
            open_ended = ending == "continued" and i == len(turns) - 1
            known = None
            if recall is not None and not open_ended:
                text = str(turn.blocks[0][1][0])
                known = recall.find(out, text, turn.message, reasoning=reasoning)
            out += _answer(turn, reasoning, open_ended=open_ended) if known is None else known
        else:
            out += _render(turn, turns[i - 1].role if i else None)
        if turn.role != "latest_reminder":
            task = turn.message.get("task")
    if ending == "opened":
        out += _opening(task, thinking=thinking, reasoning=thinking)
    if recall is not None:
        recall.close(out)
    return [s for s in out if s]


def ending_of(
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | None = None,
) -> Ending:
    """What is to follow the last message, from a mark on that message (`PREFIX_FIELDS`) and from the switches of vLLM and
    transformers; None is not said. Raises RequestError for wishes that contradict each other."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        text = f"messages is {show(messages)}; it must be a list of messages"
        raise RequestError(text, "messages")
    last = len(messages) - 1
    for i, message in enumerate(messages):
        mark = next((f for f in PREFIX_FIELDS if isinstance(message, Mapping) and message.get(f)), None)
        if mark is None:
            continue
        where = f"messages[{i}].{mark}"
        if i != last or message.get("role") != "assistant":
            text = "it is for the last message, and only for an assistant's, which the model then continues"
            raise RequestError(f"{where} is {show(message[mark])}; {text}", where)
        if continue_final_message is False:
            raise RequestError(f"{where} is true, but continue_final_message is false; leave one out", where)
        continue_final_message = True
    if not continue_final_message:
        return "closed" if add_generation_prompt is False else "opened"
    if add_generation_prompt:
        text = "a prompt opens a new turn or continues the last one; set add_generation_prompt to false"
        raise RequestError(
            f"add_generation_prompt and the wish to continue the last message are both true: {text}",
            "add_generation_prompt",
        )
    message = messages[last] if messages and isinstance(messages[last], Mapping) else {}
    if message.get("role") != "assistant":
        text = "only an assistant's can be continued; leave it out, and a new turn is opened"
        raise RequestError(
            f"continue_final_message is true, but the last message's role is {show(message.get('role'))}; {text}",
            "continue_final_message",
        )
    if message.get("tool_calls"):
        text = (
            "that has tool calls ends its turn and cannot be continued; send their results as tool messages"
        )
        raise RequestError(f"messages[{last}] is to be continued, but a message {text}", f"messages[{last}]")
    return "continued"


def starts_in_thought(messages: Sequence[Mapping[str, Any]], ending: Ending, *, thinking: bool) -> bool:
    """Whether what the model writes after `encode_chat`'s prompt begins inside the thinking part, for the output parser.

    A continued message is inside it when it has no content yet. The answer to a quick task has no thoughts.
    """
    if (
        not thinking
        or ending == "closed"
        or _final_task(messages[:-1] if ending == "continued" else messages)
    ):
        return False
    return ending == "opened" or not _text(messages[-1], len(messages) - 1)


def _final_task(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The quick task that the last turn asks for."""
    i = len(messages) - 1
    while i >= 0 and messages[i]["role"] == "latest_reminder":
        i -= 1
    while i > 0 and messages[i]["role"] == "tool" and messages[i - 1]["role"] in ("tool", "user"):
        i -= 1  # results go into the user's turn
    return messages[i].get("task") if i >= 0 and messages[i]["role"] != "tool" else None


def _opening(task: str | None, *, thinking: bool, reasoning: bool) -> Segments:
    """What an assistant turn begins with. A quick task's marker stands in its place, or after it (`action`)."""
    if task is None:
        return [ASSISTANT, THINK if reasoning else END_THINK]
    opening = [ASSISTANT, THINK if thinking else END_THINK] if task == "action" else []
    return [*opening, TASKS[task]]


def _merge(messages: Sequence[Mapping[str, Any]], format: ChatFormat) -> list[_Turn]:
    if not messages:
        raise RequestError("messages is empty; it needs at least one message", "messages")
    turns: list[_Turn] = []
    for i, message in enumerate(messages):
        role = _role(message, i)
        text: Segments = [_text(message, i)]
        _check_extras(message, i)
        last = turns[-1] if turns else None
        if role == "system":
            text += _instructions(message, format, f"messages[{i}].")
            if last is not None and last.role == "system":
                last.blocks.append((None, text))
            else:
                turns.append(_Turn(role, [(None, text)], message))
        elif role == "tool":
            block = (str(message.get("tool_call_id") or ""), text)
            if last is not None and last.role == "user":
                last.blocks.append(block)
            else:
                turns.append(_Turn("user", [block], {}))
        elif role == "user" and last is not None and last.role == "user" and not last.message.get("task"):
            last.blocks.append((None, text))
            last.message = message if message.get("task") else last.message
        else:
            turns.append(_Turn(role, [(None, text)], message, f"messages[{i}]."))
    return turns


def _role(message: Any, i: int) -> str:
    """The message's role, `developer` as `system`."""
    if not isinstance(message, Mapping):
        where = f"messages[{i}]"
        raise RequestError(f"{where} is {kind(message)}; it must be an object with role and content", where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        where = f"messages[{i}].role"
        raise RequestError(f"{where} is {show(role)}; valid are {', '.join(ROLES)}{hint}", where)
    return "system" if role == "developer" else role


def _check_extras(message: Mapping[str, Any], i: int) -> None:
    for key in ("tools", "tool_calls"):
        if not isinstance(message.get(key) or [], (list, tuple)):
            where = f"messages[{i}].{key}"
            raise RequestError(f"{where} is {kind(message[key])}; it must be a list", where)
    for key in PREFIX_FIELDS:
        if type(message.get(key)) not in (bool, type(None)):
            where = f"messages[{i}].{key}"
            raise RequestError(f"{where} is {show(message[key])}; it must be true or false", where)
    task = message.get("task")
    if task is not None and (not isinstance(task, str) or task not in TASKS):
        where = f"messages[{i}].task"
        raise RequestError(f"{where} is {show(task)}; valid are {', '.join(TASKS)}", where)


def _text(message: Mapping[str, Any], i: int) -> str:
    """The content as one text: a string, a list of text parts, or nothing for an assistant that only called tools, and for
    a tool that said nothing. A refusal is what the assistant said."""
    content, where = message.get("content"), f"messages[{i}].content"
    if isinstance(content, str):
        return content
    if content is None and message["role"] in ("assistant", "tool"):
        return str(message.get("refusal") or "")
    if not isinstance(content, list):
        raise RequestError(f"{where} is {kind(content)}; it must be text or a list of text parts", where)
    parts = []
    for j, part in enumerate(content):
        where = f"messages[{i}].content[{j}]"
        if not isinstance(part, Mapping):
            raise RequestError(f"{where} is {kind(part)}; it must be an object with type and text", where)
        if part.get("type") not in TEXT_PARTS:
            text = "this model reads text parts only"
            raise RequestError(f"{where} has type {show(part.get('type'))}; {text}", where)
        field = "refusal" if part["type"] == "refusal" else "text"
        if not isinstance(part.get(field), str):
            raise RequestError(
                f"{where}.{field} is {kind(part.get(field))}; it must be text", f"{where}.{field}"
            )
        parts.append(part[field])
    return "\n\n".join(parts)


def _attach(turns: list[_Turn], extra: Mapping[str, Any], format: ChatFormat) -> None:
    """The request's tools and response schema go after the system text; a system turn is made where there is none."""
    instructions = _instructions(extra, format, "")
    if not instructions:
        return
    if turns[0].role != "system":
        turns.insert(0, _Turn("system", [(None, [""])], {}))
    turns[0].blocks[-1][1].extend(instructions)


def _sort_results(turns: list[_Turn]) -> None:
    """Tool results in the order of the calls they answer; text between them stays where it is."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn.role == "assistant" and turn.message.get("tool_calls"):
            order = {
                str(c.get("id") or ""): n
                for n, c in enumerate(turn.message["tool_calls"])
                if isinstance(c, Mapping)
            }
        elif turn.role == "user" and order:
            slots = [n for n, (call, _) in enumerate(turn.blocks) if call is not None]
            results = sorted((turn.blocks[n] for n in slots), key=lambda b: order.get(b[0] or "", 0))
            for n, block in zip(slots, results, strict=True):
                turn.blocks[n] = block


def _render(turn: _Turn, before: str | None) -> Segments:
    """A turn that is no assistant's. `before`: the role of the turn in front of it."""
    if turn.role == "latest_reminder":
        return [REMINDER, *turn.blocks[0][1]]
    if turn.role == "system":
        out: Segments = []
        for _, text in turn.blocks:
            out += ["\n\n"] if text[0] and (any(out) or before in ("user", "latest_reminder")) else []
            out += text
        return out
    out = [USER]
    for n, (call, text) in enumerate(turn.blocks):
        out += ["\n\n"] if n else []
        out += text if call is None else ["<tool_result>", *text, "</tool_result>"]
    return out


def _answer(turn: _Turn, reasoning: bool, *, open_ended: bool) -> Segments:
    """An assistant turn after its opening; without its end when it is to be continued."""
    text = turn.blocks[0][1]
    thought = str(turn.message.get("reasoning_content") or turn.message.get("reasoning") or "")
    if open_ended:
        return [thought, END_THINK, *text] if reasoning and text[0] else [thought if reasoning else "", *text]
    calls = _tool_calls(turn.message.get("tool_calls") or (), turn.where)
    return [*([thought, END_THINK] if reasoning else ()), *text, *calls, EOS]


def _instructions(message: Mapping[str, Any], format: ChatFormat, where: str) -> Segments:
    out: Segments = []
    if message.get("tools"):
        schemas = [_schema(tool, f"{where}tools[{i}]", format) for i, tool in enumerate(message["tools"])]
        out += ["\n\n", *_trusted(format.tools_before), "\n".join(schemas), *_trusted(format.tools_after)]
    if message.get("response_schema"):
        out += [_RESPONSE_FORMAT, _json(message["response_schema"])]
    return out


def _schema(tool: Any, where: str, format: ChatFormat) -> str:
    function = _function(tool, where)
    names = [("tool", function["name"], MAX_NAME)]
    names += [("parameter", key, MAX_KEY) for key in properties_of(function) or ()]
    for what, name, most in names:
        if not can_be_called(name, most):
            text = f'it takes 1 to {most} characters without quotes ("), line feeds and the markers of calls and thoughts'
            raise RequestError(f"{where}: the {what}'s name is {show(name)}; {text}", where)
    return _json(tool if format.whole_schema else function)


def _function(holder: Any, where: str) -> Mapping[str, Any]:
    """The `function` of a tool or of a call."""
    for path in ("", ".function"):
        value = holder.get("function") if path else holder
        if not isinstance(value, Mapping):
            raise RequestError(
                f"{where} has no function with a name: {where}{path} is {kind(value)}; it must be an object",
                where,
            )
    function: Mapping[str, Any] = holder["function"]
    if not isinstance(function.get("name"), str):
        named = f"{where}.function.name is {kind(function.get('name'))}; it must be text"
        raise RequestError(f"{where} has no function with a name: {named}", where)
    return function


def _tool_calls(calls: Sequence[Mapping[str, Any]], where: str) -> Segments:
    if not calls:
        return []
    out: Segments = ["\n\n<", DSML, "tool_calls>\n"]
    for n, call in enumerate(calls):
        function = _function(call, f"{where}tool_calls[{n}]")
        out += ["\n" if n else "", "<", DSML, f'invoke name="{function["name"]}">\n']
        arguments = function.get("arguments")
        out += _parameters("{}" if arguments is None else arguments)
        out += ["\n</", DSML, "invoke>"]
    return [*out, "\n</", DSML, "tool_calls>"]


def _parameters(arguments: Any) -> Segments:
    """One DSML parameter per key. Arguments that are no JSON object become one parameter named `arguments`."""
    values = arguments
    if isinstance(arguments, str):
        try:
            values = json.loads(arguments)
        except (ValueError, RecursionError):  # the latter: nested deeper than any tool's arguments
            values = None
    if not isinstance(values, Mapping):
        values = {"arguments": arguments}  # as the release's encoder has it
    out: Segments = []
    for n, (key, value) in enumerate(values.items()):
        plain = isinstance(value, str)
        head = f'parameter name="{key}" string="{"true" if plain else "false"}">'
        out += ["\n<" if n else "<", DSML, head, value if plain else _json(value), "</", DSML, "parameter>"]
    return out


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _trusted(text: str) -> Segments:
    """Our own text, in which markers are markers."""
    return [
        Marker(p) if p in (DSML, THINK, END_THINK) else p
        for p in re.split("(｜DSML｜|<think>|</think>)", text)
        if p
    ]
