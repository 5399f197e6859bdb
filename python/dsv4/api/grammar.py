"""Where requests ask for an answer of a certain form: formats by many names, and calls that must be made.

Every dialect comes through these functions. What a form is that no answer can be held to is refused here, by the field's name; only
what depends on the vocabulary is found out where it is compiled, in the engine's process.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark

from dsv4.api.fields import Fields, refuse
from dsv4.errors import RequestError, kind, show
from dsv4.sampling import Grammar, SamplingParams
from dsv4.text.call_grammar import Calls
from dsv4.text.form import Format, chat_grammar
from dsv4.text.output import shown
from dsv4.text.stream import Reading
from dsv4.text.tokenizer import Tokenizer
from dsv4.text.tools import shown_tools

MOST = 2**18
"""Bytes of a schema, pattern or grammar."""

DEEPEST = 64
"""Levels of a schema. The library reads 128 levels of JSON, and a grammar has some around it."""

MOST_CHOICES = 4096

_OBJECT = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Choice:
    """A request's `tool_choice`."""

    tools: bool = True
    """The model gets to see the tools."""
    must: bool = False
    """It has to call one."""
    only: tuple[str, ...] | None = None
    """Those that it may call; None for all."""
    field: str = "tool_choice"

    def among(self, tools: Sequence[Mapping[str, Any]]) -> Choice:
        """Itself. Raises RequestError where it asks for tools that are not there."""
        names = [function["name"] for function in Calls(tools).functions()]
        for name in self.only or ():
            if name not in names:
                known = ", ".join(map(show, names[:8])) or "there are none"
                raise refuse(self.field, name, f"the name of one of the tools ({known})")
        if self.must and not names:
            text = f"{self.field} asks for a call, but there are no tools; send some"
            raise RequestError(text, self.field, "invalid_value", 400)
        return self


ANY = Choice()


def openai_choice(fields: Fields) -> Choice:
    """OpenAI's `tool_choice` in a chat or in the Responses API."""
    choice = fields.get("tool_choice")
    if type(choice) is not dict:
        given = fields.choice("tool_choice", ("none", "auto", "required"), "auto")
        return Choice(given != "none", given == "required")
    chosen = fields.nested("tool_choice")
    given = chosen.choice("type", ("function", "custom", "allowed_tools"), "function")
    if given != "allowed_tools":
        name, field = _name_in(chosen)
        return Choice(True, True, (name,), field)
    holder = chosen.nested("allowed_tools") if chosen.get("allowed_tools") is not None else chosen
    must = holder.choice("mode", ("auto", "required"), "auto") == "required"
    tools = holder.items("tools", dict, 1024)
    if not tools:
        raise refuse(f"{holder.where}tools", tools, "at least one tool")
    allowed = [_name_in(Fields(tool, f"{holder.where}tools[{i}]."))[0] for i, tool in enumerate(tools)]
    return Choice(True, must, tuple(allowed), f"{holder.where}tools")


def _name_in(chosen: Fields) -> tuple[str, str]:
    """The tool that an object names, at its top or in `function`, as the model knows it, and the field."""
    inner = next((chosen.nested(k) for k in ("function", "custom") if type(chosen.get(k)) is dict), chosen)
    name, space = inner.text("name"), inner.text("namespace")
    if not name:
        raise RequestError(f"{inner.where}name is missing", f"{inner.where}name", "missing_field", 400)
    return shown_name(name, space), f"{inner.where}name"


def shown_name(name: str, namespace: str | None) -> str:
    """A tool's name for the model, which knows no namespaces."""
    return f"{namespace.rstrip('_')}__{name}" if namespace else name


def anthropic_choice(choice: Fields) -> Choice:
    """The same of Anthropic's, which is an object."""
    given = choice.choice("type", ("auto", "none", "any", "tool"), "auto")
    if given != "tool":
        return Choice(given != "none", given == "any", field=f"{choice.where}type")
    if not (name := choice.text("name")):
        raise RequestError(f"{choice.where}name is missing", f"{choice.where}name", "missing_field", 400)
    return Choice(True, True, (name,), f"{choice.where}name")


def format_of(wanted: Fields) -> Format | None:
    """An object with a `type` that says what form the answer is to have, with the schema in it or in `json_schema`."""
    given, field = wanted.text("type"), f"{wanted.where}type"
    if given is None:
        if any(value is not None for value in wanted.body.values()):
            raise RequestError(f"{field} is missing; it takes {_TYPES}", field, "missing_field", 400)
        return None
    if given == "text":
        return None
    if given == "json_object":
        if wanted.get("schema") is not None:  # llama.cpp and others
            return _schema(wanted.get("schema"), f"{wanted.where}schema")
        return Format("json", _OBJECT, wanted.where.rstrip("."))
    if given == "json_schema":
        holder = wanted.nested("json_schema") if wanted.get("json_schema") is not None else wanted
        holder.boolean("strict")
        holder.text("name", longest=2**31)
        holder.text("description", longest=2**31)
        where = f"{holder.where}schema"
        if holder.get("schema") is None:
            raise RequestError(f"{where} is missing", where, "missing_field", 400)
        return _schema(holder.get("schema"), where)
    raise refuse(field, given, _TYPES)


_TYPES = "'text', 'json_object' or 'json_schema'"


def openai_format(fields: Fields) -> Format | None:
    """The form that a body in OpenAI's shape asks for, in the words of OpenAI, vLLM, SGLang, llama.cpp or Ollama. RequestError for
    two of them."""
    found = [format_of(fields.nested("response_format"))]
    found += [_read(reader, fields.get(name), name) for name, reader in _READERS.items()]
    if fields.get("structured_outputs") is not None:
        inside = fields.nested("structured_outputs")
        if inside.get("structural_tag") is not None:
            raise refuse(
                "structured_outputs.structural_tag", inside.get("structural_tag"), "nothing", _NO_TAGS
            )
        found += [_read(read, inside.get(name), inside.where + name) for name, read in _IN_VLLM.items()]
    forms = [form for form in found if form is not None]
    if len(forms) > 1:
        first, second = forms[0].field, forms[1].field
        raise RequestError(
            f"{second} asks for a form, and so does {first}; send one of them", second, "invalid_value", 400
        )
    return forms[0] if forms else None


_NO_TAGS = "; calls are held to their form where tools are given"


_Reader = Callable[[Any, str], Format | None]
"""Of a value and its field."""


def _read(reader: _Reader, value: Any, field: str) -> Format | None:
    return None if value is None or value == "" or value is False else reader(value, field)


def _schema(value: Any, field: str) -> Format:
    """A JSON schema, as an object or as its text."""
    if type(value) is str:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise refuse(field, value, "a JSON schema", f"; as text it is no JSON: {str(e)[:100]}") from None
    if type(value) not in (dict, bool):
        raise refuse(field, value, "a JSON schema, which is an object")
    if (depth := _depth(value)) > DEEPEST:
        raise RequestError(
            f"{field} nests {depth} levels deep; the limit is {DEEPEST}", field, "invalid_value", 400
        )
    return _checked(Format("json", value, field), len(json.dumps(value)))


def _regex(value: Any, field: str) -> Format:
    return _checked(Format("regex", _text(value, field, "a regular expression"), field), len(value))


def _choices(value: Any, field: str) -> Format:
    texts = Fields({field: value}).items(field, str, MOST_CHOICES)
    if not texts:
        raise refuse(field, value, "a list with at least one text")
    return _checked(Format("choice", texts, field), sum(map(len, texts)))


def _grammar(value: Any, field: str) -> Format:
    """Lark, or the GBNF of llama.cpp, which xgrammar calls EBNF."""
    text = _text(value, field, "a grammar in Lark or GBNF")
    try:
        lark = any_to_lark(text)
    except Exception as e:  # the library raises it bare
        raise refuse(
            field, text, "a grammar in Lark or GBNF", f"; {' '.join(str(e).split())[:200]}"
        ) from None
    return _checked(Format("lark", lark, field), len(text))


def _object(value: Any, field: str) -> Format | None:
    return Format("json", _OBJECT, field) if Fields({field: value}).boolean(field) else None


def _ollama(value: Any, field: str) -> Format:
    return Format("json", _OBJECT, field) if value == "json" else _schema(value, field)


def text_form(syntax: str, text: str, field: str) -> Format:
    """A form of text in one of the syntaxes of custom tools. Raises RequestError."""
    return _regex(text, field) if syntax == "regex" else _grammar(text, field)


_READERS: Mapping[str, _Reader] = {
    "guided_json": _schema,
    "guided_regex": _regex,
    "guided_choice": _choices,
    "guided_grammar": _grammar,
    "guided_json_object": _object,
    "json_schema": _schema,
    "regex": _regex,
    "ebnf": _grammar,
    "grammar": _grammar,
    "format": _ollama,
}
_IN_VLLM: Mapping[str, _Reader] = {
    "json": _schema,
    "regex": _regex,
    "choice": _choices,
    "grammar": _grammar,
    "json_object": _object,
}

_ASKING = ("response_format", "structured_outputs", *_READERS, "text", "output_format", "output_config")


def asks_for_form(fields: Fields) -> bool:
    """Whether a body, of any dialect, may ask for a form of the answer."""
    tools = fields.get("tools")
    custom = type(tools) is list and any(
        type(tool) is dict and tool.get("type") == "custom" for tool in tools
    )
    return custom or any(fields.get(name) is not None for name in _ASKING)


def _text(value: Any, field: str, what: str) -> str:
    if type(value) is not str:
        raise refuse(field, value, f"{what} as text, not {kind(value)}")
    return value


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level:
        depth += 1
        level = [x for v in level if type(v) in (dict, list) for x in (v.values() if type(v) is dict else v)]
    return depth


def _checked(form: Format, size: int) -> Format:
    """Itself. Raises RequestError for what is too long or no grammar."""
    if size > MOST:
        raise RequestError(
            f"{form.field} has {size} characters; the limit is {MOST}", form.field, "invalid_value", 400
        )
    try:
        fault = form.fault()
    except (ValueError, RecursionError) as e:
        fault = str(e)
    if fault is not None:
        text = f"{form.field} is no form that an answer can be held to: {fault[:300]}"
        raise RequestError(text, form.field, "invalid_value", 400)
    return form


def of_chat(
    tokenizer: Tokenizer,
    reading: Reading,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    choice: Choice,
    format: Format | None,
    *,
    parallel: bool,
    inputs: Mapping[str, Format | None],
) -> Grammar | None:
    """What holds a chat's answer to its form; `tools`: the request's; `inputs`: what holds the text of custom tools, by name."""
    shown = shown_tools(messages, tools)
    calls = (
        Calls(shown, choice.must, choice.only, parallel, _grammars(inputs))
        if shown and reading.tools
        else None
    )
    field = format.field if format is not None else choice.field if choice.must else "tools"
    if format is not None and reading.continues:
        text = f"{field} is about a whole answer, but the last message is to be continued; send it without that message"
        raise RequestError(text, field, "invalid_value", 400)
    if format is not None:
        _check_shown(format)
    try:
        text = chat_grammar(tokenizer, thinking=reading.thinking, format=format, calls=calls)
    except ValueError as e:
        raise RequestError(f"{field} cannot be honoured: {e}", field, "unsupported_field", 400) from None
    return None if text is None else Grammar(text, field, chat=True)


def _check_shown(format: Format) -> None:
    """Raises RequestError for a text that a chat's answer cannot be: the client would get another one."""
    for field, text in format.spelled():
        if (left := shown(text)) != text:
            why = (
                f"{field} is {show(text)}, of which a chat shows {show(left)}: tags of thoughts and calls, and newlines at the start, "
                "are no part of its answer; send a text without them, or use /v1/completions"
            )
            raise RequestError(why, field, "invalid_value", 400)


def _grammars(inputs: Mapping[str, Format | None]) -> dict[str, tuple[str, str] | None]:
    return {name: None if form is None else (form.kind, form.value) for name, form in inputs.items()}


def held_to(params: SamplingParams, grammar: Grammar | None) -> SamplingParams:
    """The parameters with a grammar."""
    return params if grammar is None else dataclasses.replace(params, grammar=grammar)
