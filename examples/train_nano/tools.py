"""Conversations with tools: schemas, a call with typed arguments, its result, and the answer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """`arguments` draws typed arguments, `asks` are wordings with them, `result` and `answer` end the turn."""

    name: str
    description: str
    types: dict[str, str]
    asks: tuple[str, ...]
    arguments: Callable[[random.Random], dict[str, Any]]
    result: Callable[[random.Random, dict[str, Any]], tuple[str, str]]

    def schema(self) -> dict[str, Any]:
        """The OpenAI form."""
        properties = {
            n: {"type": "array", "items": {"type": "string"}} if t == "array" else {"type": t}
            for n, t in self.types.items()
        }
        parameters = {"type": "object", "properties": properties, "required": list(self.types)}
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


def catalogue(words: Sequence[str], names: Sequence[str], cities: Sequence[str]) -> list[Tool]:
    """The tools that the model is trained with."""
    return [
        Tool(
            "get_weather",
            "Get the current weather of a city",
            {"city": "string"},
            (
                "What is the weather in {city}?",
                "How is the weather in {city} today?",
                "Is it raining in {city}?",
            ),
            lambda r: {"city": r.choice(cities)},
            _weather,
        ),
        Tool(
            "get_time",
            "Get the local time of a city",
            {"city": "string"},
            ("What time is it in {city}?", "Tell me the time in {city}."),
            lambda r: {"city": r.choice(cities)},
            lambda r, a: (
                t := f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}",
                f"It is {t} in {a['city']}.",
            ),
        ),
        Tool(
            "search",
            "Search the documentation",
            {"query": "string", "limit": "integer"},
            ("Search for {query}, {limit} results.", "Find {limit} pages about {query}."),
            lambda r: {"query": " ".join(r.choices(words, k=r.randint(1, 3))), "limit": r.randint(1, 20)},
            lambda r, a: (
                json.dumps([{"title": a["query"]}]),
                f"I found one page with the title {a['query']}.",
            ),
        ),
        Tool(
            "send_message",
            "Send a message to a person",
            {"to": "string", "text": "string"},
            ("Send {to} the message: {text}", "Write to {to}: {text}"),
            lambda r: {"to": r.choice(names), "text": " ".join(r.choices(words, k=r.randint(2, 6)))},
            lambda r, a: ("ok", f"I sent the message to {a['to']}."),
        ),
        Tool(
            "set_timer",
            "Set a timer",
            {"minutes": "number"},
            ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."),
            lambda r: {"minutes": r.randint(1, 120)},
            lambda r, a: ("ok", f"The timer is set for {a['minutes']} minutes."),
        ),
        Tool(
            "set_light",
            "Switch the light of a room on or off",
            {"room": "string", "on": "boolean"},
            ("Switch the light in the {room} {state}.", "Turn {state} the light in the {room}."),
            lambda r: {"room": r.choice(_ROOMS), "on": r.random() < 0.5},
            lambda r, a: ("ok", f"The light in the {a['room']} is {'on' if a['on'] else 'off'}."),
        ),
        Tool(
            "add",
            "Add two numbers",
            {"a": "number", "b": "number"},
            ("Add {a} and {b}.", "What is {a} plus {b}?"),
            lambda r: {"a": r.randint(0, 999), "b": r.randint(0, 999)},
            lambda r, a: (str(a["a"] + a["b"]), f"The sum is {a['a'] + a['b']}."),
        ),
        Tool(
            "make_list",
            "Make a list of things",
            {"items": "array"},
            ("Make a list of {joined}.", "Put {joined} on a list."),
            lambda r: {"items": r.sample(words, r.randint(2, 4))},
            lambda r, a: ("ok", f"The list has {len(a['items'])} things."),
        ),
    ]


_ROOMS = ("kitchen", "bedroom", "office", "garden", "garage", "hall", "cellar", "bathroom")
_VERBS = (
    "open",
    "close",
    "delete",
    "create",
    "update",
    "show",
    "check",
    "start",
    "stop",
    "move",
    "copy",
    "read",
)


def _weather(r: random.Random, arguments: dict[str, Any]) -> tuple[str, str]:
    degrees, sky = r.randint(-5, 35), r.choice(("clear", "cloudy", "rainy"))
    result = json.dumps({"temperature": degrees, "sky": sky})
    return result, f"It is {degrees} degrees and {sky} in {arguments['city']}."


def invented(r: random.Random, words: Sequence[str]) -> Tool:
    """A tool with a name made up of two words, so that names are read from the schema."""
    verb, noun, name = r.choice(_VERBS), r.choice(words), r.choice(("name", "id", "path", "value", "target"))
    kind = "string" if name in ("name", "path", "target") else "integer"

    def arguments(r: random.Random) -> dict[str, Any]:
        return {name: r.choice(words) if kind == "string" else r.randint(1, 9999)}

    return Tool(
        f"{verb}_{noun}",
        f"{verb.capitalize()} the {noun}",
        {name: kind},
        (f"{verb.capitalize()} the {noun} {{{name}}}.", f"Please {verb} the {noun} {{{name}}}."),
        arguments,
        lambda r, a: ("done", f"Done: {verb} {noun} {a[name]}."),
    )


def ask(tool: Tool, r: random.Random) -> tuple[str, dict[str, Any]]:
    """(question, arguments)."""
    arguments = tool.arguments(r)
    shown = dict(arguments)
    if "on" in arguments:
        shown["state"] = "on" if arguments["on"] else "off"
    if "items" in arguments:
        *most, last = arguments["items"]
        shown["joined"] = f"{', '.join(most)} and {last}"
    return r.choice(tool.asks).format(**shown), arguments


def tool_chat(
    r: random.Random, words: Sequence[str], names: Sequence[str], cities: Sequence[str]
) -> tuple[list[Message], list[dict[str, Any]], bool]:
    """(messages, schemas, thinking): one or two questions, each with a call, its result and an answer."""
    known = catalogue(words, names, cities)
    offered = r.sample(known, r.randint(1, 3))
    offered += [invented(r, words) for _ in range(r.choice((0, 0, 1, 2)))]
    r.shuffle(offered)
    thinking = r.random() < 0.15
    messages: list[Message] = []
    if r.random() < 0.4:
        messages.append({"role": "system", "content": "You are a helpful assistant."})
    for turn in range(r.choice((1, 1, 2))):
        tool = r.choice(offered)
        question, arguments = ask(tool, r)
        result, answer = tool.result(r, arguments)
        call = {"id": f"call_{turn}", "type": "function"}
        call["function"] = {"name": tool.name, "arguments": arguments}
        thought = {"reasoning_content": f"I call {tool.name}."} if thinking else {}
        last = {"reasoning_content": "The tool answered."} if thinking else {}
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": None, "tool_calls": [call], **thought},
            {"role": "tool", "tool_call_id": call["id"], "content": result},
            {"role": "assistant", "content": answer, **last},
        ]
    return messages, [t.schema() for t in offered], thinking
