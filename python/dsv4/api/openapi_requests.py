"""Bodies of requests as JSON Schema, for `/openapi.json`. null is the same as leaving a field out, and fields that are not here are
passed over (or refused by name: `known_fields.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from dsv4.api.admin import MOST_STEPS
from dsv4.api.conversation import EFFORTS, MAX_MESSAGES, MAX_TOOLS
from dsv4.api.known_fields import CHAT, COMPLETIONS, HARMLESS, HARMLESS_BY_ENDPOINT, RESPONSES
from dsv4.api.openai_chat import MAX_TOP_LOGPROBS
from dsv4.api.openai_completions import MAX_LOGPROBS, MAX_PROMPTS
from dsv4.api.params import MAX_CHOICES
from dsv4.api.routing import TTLS
from dsv4.api.schema import FLAG, INT32, Schema, any_of, array, fields, integer, number, one_of, ref, text
from dsv4.sampling import MAX_BIASES, MAX_STOP_LENGTH, MAX_STOPS, RANGES
from dsv4.text.chat import TASKS

NAME, ANY_TEXT, OBJECT = text(1024, 1), text(), {"type": "object"}
EFFORT = one_of(*EFFORTS)
JSON_SCHEMA: Schema = {"type": ["object", "boolean"], "description": "A JSON schema, 64 levels deep at most."}


def _ranges() -> dict[str, Schema]:
    found: dict[str, Schema] = {}
    for name, (low, high) in RANGES.items():
        found[name] = integer(int(low), int(high)) if isinstance(low, int) else number(low, high)
    del found["max_tokens"], found["logprobs"], found["prompt_logprobs"]
    found["top_p"] = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    return found


_STOP = text(MAX_STOP_LENGTH, 1)
CACHE_CONTROL = fields({}, {"type": one_of("ephemeral"), "ttl": one_of(*TTLS)})
SAMPLING: dict[str, Schema] = {
    "model": text(512),
    "stream": FLAG,
    **_ranges(),
    "ignore_eos": FLAG,
    "include_stop_str_in_output": FLAG,
    "stop": any_of(_STOP, array(_STOP, MAX_STOPS)),
    "stop_token_ids": array(integer(0, INT32), 1024),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": number(-100, 100),
        "maxProperties": MAX_BIASES,
        "description": "By token id.",
    },
    "cache_salt": text(512) | {"description": "Cached prefixes are shared under an equal one only."},
    "priority": integer(-(2**31), INT32) | {"description": "Higher goes first."},
    "user": text(512) | {"description": "The tenant, unless the header x-dsv4-tenant names one."},
    "deadline_ms": number(0, 1e9) | {"description": "Milliseconds until the first token is wanted."},
    "prompt_cache_key": text(512) | {"description": "The session."},
    "cache_control": CACHE_CONTROL | {"description": "How long the prompt is kept after its last use."},
    "retention_priority": integer(-100, 100),
}
"""In every body that generates."""

_JSON_FORMAT = fields({"schema": JSON_SCHEMA}, {"name": ANY_TEXT, "strict": FLAG, "description": ANY_TEXT})
_NO_FORMAT: Schema = {"type": "object", "additionalProperties": {"type": "null"}}
_FORMAT = any_of(
    _NO_FORMAT,
    fields({"type": one_of("text")}),
    fields({"type": one_of("json_object")}, {"schema": JSON_SCHEMA}),
    fields({"type": one_of("json_schema"), "json_schema": _JSON_FORMAT}),
    fields({"type": one_of("json_schema"), "schema": JSON_SCHEMA}, {"name": ANY_TEXT, "strict": FLAG}),
)
_GRAMMAR = text(2**18) | {"description": "A grammar in Lark or GBNF."}
_PATTERN = text(2**18) | {"description": "A regular expression that the whole answer matches."}
_CHOICES = array(ANY_TEXT, 4096, 1) | {"description": "Texts of which the answer is one."}
_VLLM = {"json": JSON_SCHEMA, "regex": _PATTERN, "choice": _CHOICES, "grammar": _GRAMMAR, "json_object": FLAG}
_SINGLE = {
    **{f"guided_{name}": schema for name, schema in _VLLM.items()},
    "json_schema": JSON_SCHEMA,
    "regex": _PATTERN,
    "ebnf": _GRAMMAR,
    "grammar": _GRAMMAR,
    "format": any_of(one_of("json"), JSON_SCHEMA),
}
_NOTHING: Schema = {"enum": ["", False], "description": "Nothing is asked for."}
FORMS: dict[str, Schema] = {
    "response_format": _FORMAT,
    "structured_outputs": fields({}, {name: any_of(schema, _NOTHING) for name, schema in _VLLM.items()}),
    **{name: any_of(schema, _NOTHING) for name, schema in _SINGLE.items()},
}
"""One at most is taken of these."""

_OPENAI: dict[str, Schema] = {
    **SAMPLING,
    **FORMS,
    "max_tokens": integer(0, INT32),
    "max_completion_tokens": integer(0, INT32),
    "n": integer(1, MAX_CHOICES),
    "best_of": integer(1, MAX_CHOICES) | {"description": "The value of n, or left out."},
    "stream_options": fields({}, {"include_usage": FLAG, "continuous_usage_stats": FLAG}),
    "return_token_ids": FLAG,
    "return_tokens_as_token_ids": FLAG,
    "request_id": text(128),
    "rid": text(128),
}

_TEXT_PART = any_of(
    fields(
        {"type": one_of("text", "input_text", "output_text"), "text": ANY_TEXT},
        {"cache_control": CACHE_CONTROL},
    ),
    fields({"type": one_of("refusal"), "refusal": ANY_TEXT}),
)
_CONTENT = any_of(ANY_TEXT, array(ref("TextPart"), MAX_MESSAGES))
_FUNCTION = fields({"name": NAME}, {"description": ANY_TEXT, "parameters": OBJECT, "strict": FLAG}) | {
    "description": "`parameters` is a JSON schema."
}
_CALL = fields(
    {"function": fields({"name": NAME}, {"arguments": any_of(ANY_TEXT, OBJECT)})},
    {"id": ANY_TEXT, "type": one_of("function")},
)
_CUSTOM_CALL = fields(
    {"type": one_of("custom"), "custom": fields({"name": NAME}, {"input": ANY_TEXT})}, {"id": ANY_TEXT}
)
_CUSTOM_FORMAT = any_of(
    fields({"type": one_of("text")}),
    fields({"type": one_of("grammar"), "syntax": one_of("lark", "regex"), "definition": ANY_TEXT}),
    fields(
        {
            "type": one_of("grammar"),
            "grammar": fields({"syntax": one_of("lark", "regex"), "definition": ANY_TEXT}),
        }
    ),
)
_CUSTOM = fields({"name": NAME}, {"description": ANY_TEXT, "format": _CUSTOM_FORMAT})
_MESSAGE = any_of(
    fields({"role": one_of("tool")}, {"content": _CONTENT, "tool_call_id": text(1024)}),
    fields({"role": one_of("user", "latest_reminder"), "content": _CONTENT}, {"tool_call_id": text(1024)}),
    fields(
        {"role": one_of("system", "developer"), "content": _CONTENT},
        {"tools": array(ref("ChatTool"), MAX_TOOLS)},
    ),
    fields(
        {"role": one_of("assistant")},
        {
            "content": _CONTENT,
            "reasoning_content": ANY_TEXT,
            "reasoning": ANY_TEXT,
            "refusal": ANY_TEXT,
            "tool_calls": array(any_of(_CALL, _CUSTOM_CALL), MAX_TOOLS),
            "prefix": FLAG,
        },
    ),
)
_NAMED = fields({"name": NAME}, {"type": one_of("function", "custom")})
_NAMED_INSIDE = fields({"type": one_of("function"), "function": fields({"name": NAME})})
_TOOL_CHOICE = any_of(
    one_of("none", "auto", "required"),
    _NAMED_INSIDE,
    fields({"type": one_of("custom"), "custom": fields({"name": NAME})}),
    _NAMED,
    fields({"type": one_of("allowed_tools"), "allowed_tools": OBJECT}),
    fields(
        {"type": one_of("allowed_tools"), "tools": array(OBJECT, 1024, 1)},
        {"mode": one_of("auto", "required")},
    ),
)
_TEMPLATE = {name: FLAG for name in ("thinking", "enable_thinking", "drop_thinking")}
_CHAT: dict[str, Schema] = {
    "tools": array(ref("ChatTool"), MAX_TOOLS),
    "tool_choice": _TOOL_CHOICE,
    "parallel_tool_calls": FLAG,
    "reasoning_effort": EFFORT,
    "thinking": any_of(FLAG, fields({}, {"type": one_of("enabled", "disabled", "adaptive", "auto")})),
    "enable_thinking": FLAG,
    "reasoning": fields({}, {"effort": EFFORT, "enabled": FLAG, "exclude": FLAG}),
    "task": one_of(*TASKS),
    "add_generation_prompt": FLAG,
    "continue_final_message": FLAG,
    "chat_template_kwargs": fields(
        {},
        {
            **_TEMPLATE,
            "reasoning_effort": EFFORT,
            "add_generation_prompt": FLAG,
            "continue_final_message": FLAG,
        },
    ),
}
"""What shapes a chat's prompt, apart from its messages."""
_MESSAGES = {"messages": array(ref("ChatMessage"), MAX_MESSAGES, 1)}
_TOKENS: Schema = {"type": "array", "items": integer(0, INT32), "minItems": 1}

_RESPONSE_TEXT = fields({"type": one_of("input_text", "output_text", "text"), "text": ANY_TEXT})
_RESPONSE_CONTENT = any_of(ANY_TEXT, array(_RESPONSE_TEXT, MAX_MESSAGES))
_ITEM = any_of(
    fields(
        {"role": one_of("user", "assistant", "system", "developer"), "content": _RESPONSE_CONTENT},
        {"type": one_of("message")},
    ),
    fields(
        {"type": one_of("reasoning")},
        {
            "content": array(fields({"type": one_of("reasoning_text"), "text": ANY_TEXT}), MAX_MESSAGES),
            "encrypted_content": ANY_TEXT,
        },
    ),
    fields(
        {"type": one_of("function_call"), "call_id": NAME, "name": NAME},
        {"arguments": ANY_TEXT, "namespace": text(1024)},
    ),
    fields({"type": one_of("custom_tool_call"), "call_id": NAME, "name": NAME}, {"input": ANY_TEXT}),
    fields(
        {
            "type": one_of("function_call_output", "custom_tool_call_output"),
            "call_id": NAME,
            "output": _RESPONSE_CONTENT,
        }
    ),
)
_RESPONSE_FUNCTION = {"description": ANY_TEXT, "parameters": OBJECT, "strict": FLAG}
_RESPONSE_TOOL = any_of(
    fields({"type": one_of("function"), "name": NAME}, _RESPONSE_FUNCTION),
    fields({"type": one_of("custom"), "name": NAME}, {"description": ANY_TEXT, "format": _CUSTOM_FORMAT}),
    fields({"type": one_of("namespace"), "name": NAME, "tools": array(OBJECT, MAX_TOOLS)}),
    fields({"type": one_of("web_search", "file_search", "code_interpreter", "image_generation", "mcp")}),
)
_RESPONSES: dict[str, Schema] = {
    "instructions": ANY_TEXT,
    "tools": array(_RESPONSE_TOOL, MAX_TOOLS),
    "tool_choice": _TOOL_CHOICE,
    "parallel_tool_calls": FLAG,
    "include": array(ANY_TEXT, 64),
    "reasoning": fields({}, {"effort": EFFORT, "summary": one_of("auto", "concise", "detailed", "none")}),
    "text": fields({}, {"format": _FORMAT, "verbosity": ANY_TEXT}),
    "chat_template_kwargs": fields({}, {"drop_thinking": FLAG}),
}

_CACHED = {"cache_control": CACHE_CONTROL}
_ANTHROPIC_TEXT = fields({"type": one_of("text"), "text": ANY_TEXT}, _CACHED)
_TEXTS = any_of(
    ANY_TEXT, array(fields({"type": one_of("text"), "text": ANY_TEXT}, {"cache_control": {}}), MAX_MESSAGES)
)
_BLOCK = any_of(
    _ANTHROPIC_TEXT,
    fields(
        {"type": one_of("tool_result"), "tool_use_id": NAME}, {"content": _TEXTS, "is_error": {}, **_CACHED}
    ),
    fields(
        {"type": one_of("document"), "source": fields({"type": one_of("text"), "data": ANY_TEXT})}, _CACHED
    ),
)
_ANSWER_BLOCK = any_of(
    _ANTHROPIC_TEXT,
    fields({"type": one_of("thinking")}, {"thinking": ANY_TEXT, "signature": {}}),
    fields({"type": text(1024) | {"not": {"enum": ["text", "thinking", "tool_use", "image", "document"]}}}),
    fields({"type": one_of("tool_use"), "id": NAME, "name": NAME}, {"input": OBJECT, **_CACHED}),
)
_ANTHROPIC_MESSAGE = any_of(
    fields({"role": one_of("user"), "content": any_of(ANY_TEXT, array(_BLOCK, MAX_MESSAGES))}),
    fields({"role": one_of("assistant"), "content": any_of(ANY_TEXT, array(_ANSWER_BLOCK, MAX_MESSAGES))}),
    fields({"role": one_of("system"), "content": _TEXTS}),
)
_ANTHROPIC_TOOL = any_of(
    fields(
        {"name": NAME},
        {
            "type": one_of("custom"),
            "description": ANY_TEXT,
            "input_schema": OBJECT,
            "strict": FLAG,
            **_CACHED,
        },
    ),
    fields({"type": text(1024) | {"not": {"enum": ["custom"]}}}, {"name": text(1024)}),
)
_ANTHROPIC: dict[str, Schema] = {
    "system": _TEXTS,
    "tools": array(_ANTHROPIC_TOOL, MAX_TOOLS),
    "tool_choice": any_of(
        fields({}, {"type": one_of("auto", "none", "any"), "disable_parallel_tool_use": FLAG}),
        fields({"type": one_of("tool"), "name": NAME}, {"disable_parallel_tool_use": FLAG}),
    ),
    "thinking": fields(
        {}, {"type": one_of("enabled", "adaptive", "disabled"), "budget_tokens": {}, "display": text(1024)}
    ),
    "output_config": fields({}, {"effort": EFFORT, "format": _FORMAT}),
    "output_format": _FORMAT,
    "metadata": fields({}, {"user_id": text(4096)}),
    "chat_template_kwargs": fields({}, {"drop_thinking": FLAG}),
}
_ANTHROPIC_MESSAGES = {"messages": array(_ANTHROPIC_MESSAGE, MAX_MESSAGES, 1)}
_ANTHROPIC_SAMPLING = {k: v for k, v in SAMPLING.items() if k != "stop"}


def _harmless(endpoint: str, taken: Mapping[str, Schema]) -> dict[str, Schema]:
    """Fields of the endpoint without which the answer is the same, and why; they take any value."""
    all_of = {**HARMLESS, **HARMLESS_BY_ENDPOINT[endpoint]}
    return {
        name: {"description": why} for name, why in all_of.items() if "." not in name and name not in taken
    }


def _body(endpoint: str, required: Mapping[str, Schema], others: Mapping[str, Schema]) -> Schema:
    made = fields(required, others)
    made["properties"] |= _harmless(endpoint, made["properties"])
    return made


def request_schemas(vocab: int) -> dict[str, Schema]:
    """By name. `vocab`: token ids are below it."""
    tokens = {**_TOKENS, "items": integer(0, vocab - 1)}
    prompts = any_of(text(least=1), tokens, array(any_of(text(least=1), tokens), MAX_PROMPTS, 1))
    completion = {"echo": FLAG, "skip_special_tokens": FLAG, "suffix": ANY_TEXT}
    completion["logprobs"] = any_of(FLAG, integer(0, MAX_LOGPROBS))
    chat = {"logprobs": FLAG, "top_logprobs": integer(0, MAX_TOP_LOGPROBS), "include_reasoning": FLAG}
    chat["return_prompt_token_ids"] = FLAG
    limit = {"max_output_tokens": integer(1, INT32), "top_logprobs": integer(0, MAX_TOP_LOGPROBS)}
    told = {"input": any_of(ANY_TEXT, array(ref("ResponseItem"), MAX_MESSAGES, 1))}
    counted = {name: SAMPLING[name] for name in ("model", "cache_salt", "user", "priority", "cache_control")}
    stops = {"max_tokens": integer(1, INT32), "stop_sequences": array(_STOP, MAX_STOPS)}
    positive = {"max_tokens": integer(1, INT32), "max_completion_tokens": integer(1, INT32)}
    strings = {"return_token_strs": FLAG}
    chats = fields(_MESSAGES, {**counted, **_CHAT}), fields(_MESSAGES, {**counted, **_CHAT, **strings})
    for one in chats:
        one["properties"]["prompt"] = {"enum": [None, "", False, [], {}]}
    no_chat = {"messages": {"type": "null"}}
    pinned = fields({"prompt": any_of(text(least=1), tokens)}, {**counted, **no_chat})
    return {
        "ChatRequest": _body(CHAT, _MESSAGES, {**_OPENAI, **_CHAT, **chat, **positive}),
        "ChatMessage": _MESSAGE,
        "ChatTool": any_of(
            fields({"function": _FUNCTION}, {"type": one_of("function"), **_CACHED}),
            fields({"type": one_of("custom"), "custom": _CUSTOM}),
        ),
        "TextPart": _TEXT_PART,
        "CompletionRequest": _body(COMPLETIONS, {"prompt": prompts}, {**_OPENAI, **completion}),
        "ResponsesRequest": _body(RESPONSES, told, {**SAMPLING, **_RESPONSES, **limit}),
        "ResponsesCountRequest": _body(RESPONSES, told, {**counted, **_RESPONSES}),
        "ResponseItem": _ITEM,
        "MessagesRequest": fields(_ANTHROPIC_MESSAGES, {**_ANTHROPIC_SAMPLING, **_ANTHROPIC, **stops}),
        "CountTokensRequest": fields(_ANTHROPIC_MESSAGES, {"model": text(512), **_ANTHROPIC}),
        "PrefixRequest": any_of(pinned, chats[0]),
        "TokenizeRequest": any_of(fields({"prompt": ANY_TEXT}, {**counted, **no_chat, **strings}), chats[1]),
        "ProfileRequest": fields({}, {"steps": integer(1, MOST_STEPS), "seconds": number(0.1, 600)}),
        "DetokenizeRequest": fields({}, {"model": text(512), "tokens": {**tokens, "minItems": 0}}),
    }
