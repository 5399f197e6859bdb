"""Bodies of answers as JSON Schema, for `/openapi.json`."""

from __future__ import annotations

from typing import Any

from dsv4.api.schema import FLAG, Schema, answer, any_of, one_of, optional, ref

COUNT: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
OBJECT: Schema = {"type": "object"}


def _all(items: Schema) -> Schema:
    return {"type": "array", "items": items}


_TOKENS = _all(COUNT)
_EXPLANATION = {
    **dict.fromkeys(("history_matched", "resumed_at", "replayed", "preemptions"), COUNT),
    "reason": TEXT,
}
_COUNTS = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), COUNT)
_USAGE = answer(
    {
        **_COUNTS,
        "prompt_tokens_details": answer(
            {"cached_tokens": COUNT, "dsv4": any_of(ref("PrefixHit"), _all(ref("PrefixHit")))}
        ),
        "prompt_cache_hit_tokens": COUNT,
        "prompt_cache_miss_tokens": COUNT,
    },
    {"completion_tokens_details": answer({"reasoning_tokens": COUNT})},
)
_REASON = one_of("stop", "length", "tool_calls")
_STOP_REASON = {
    "type": ["string", "integer", "null"],
    "description": "The stop string or token that ended it.",
}
_END = {"finish_reason": _REASON, "stop_reason": _STOP_REASON}
_STRICT = {"strict_error": TEXT | {"description": "What of a call does not fit the schema of a strict tool."}}
_JUDGED = {"token": TEXT, "logprob": NUMBER, "bytes": optional(_TOKENS)}
_LOGPROBS = answer(
    {"content": _all(answer({**_JUDGED, "top_logprobs": _all(answer(_JUDGED))})), "refusal": {"type": "null"}}
)
_CALL = any_of(
    answer(
        {"id": TEXT, "type": one_of("function"), "function": answer({"name": TEXT, "arguments": TEXT})},
    ),
    answer({"id": TEXT, "type": one_of("custom"), "custom": answer({"name": TEXT, "input": TEXT})}),
)
_MESSAGE = answer(
    {"role": one_of("assistant"), "content": optional(TEXT)},
    {"reasoning_content": TEXT, "tool_calls": _all(_CALL)},
)
_HEAD = {"id": TEXT, "created": COUNT, "model": TEXT}
_CHAT = answer(
    {
        **_HEAD,
        "object": one_of("chat.completion"),
        "choices": _all(
            answer(
                {"index": COUNT, "message": _MESSAGE, "logprobs": optional(_LOGPROBS), **_END},
                {"token_ids": _TOKENS, **_STRICT},
            )
        ),
        "usage": ref("Usage"),
    },
    {"prompt_token_ids": _TOKENS},
)
_PARALLEL = answer(
    {
        "tokens": _all(TEXT),
        "token_logprobs": _all(optional(NUMBER)),
        "top_logprobs": optional(_all({"type": ["object", "null"], "additionalProperties": NUMBER})),
        "text_offset": _all(COUNT),
    }
)
_COMPLETION = answer(
    {
        **_HEAD,
        "object": one_of("text_completion"),
        "choices": _all(
            answer(
                {"index": COUNT, "text": TEXT, "logprobs": optional(_PARALLEL), **_END},
                {"token_ids": _TOKENS, "prompt_token_ids": _TOKENS},
            )
        ),
        "usage": ref("Usage"),
    }
)
_STATUS = one_of("in_progress", "completed", "incomplete")
_ITEM_HEAD = {"id": TEXT, "status": _STATUS}
_NAMED = {"call_id": TEXT, "name": TEXT}
_TEXT_PART = answer(
    {"type": one_of("output_text"), "text": TEXT, "annotations": _all(OBJECT), "logprobs": _all(OBJECT)}
)
_ITEM = any_of(
    answer(
        {**_ITEM_HEAD, "type": one_of("message"), "role": one_of("assistant"), "content": _all(_TEXT_PART)}
    ),
    answer(
        {
            **_ITEM_HEAD,
            "type": one_of("reasoning"),
            "summary": _all(OBJECT),
            "content": _all(answer({"type": one_of("reasoning_text"), "text": TEXT})),
            "encrypted_content": optional(TEXT),
        }
    ),
    answer({**_ITEM_HEAD, **_NAMED, "type": one_of("function_call"), "arguments": TEXT}, {"namespace": TEXT}),
    answer({**_ITEM_HEAD, **_NAMED, "type": one_of("custom_tool_call"), "input": TEXT}, {"namespace": TEXT}),
)
_RESPONSES_USAGE = answer(
    {
        "input_tokens": COUNT,
        "input_tokens_details": answer({"cached_tokens": COUNT}),
        "output_tokens": COUNT,
        "output_tokens_details": answer({"reasoning_tokens": COUNT}),
        "total_tokens": COUNT,
    }
)
_RESPONSE = answer(
    {
        "id": TEXT,
        "object": one_of("response"),
        "created_at": COUNT,
        "status": one_of("completed", "incomplete"),
        "error": {"type": "null"},
        "incomplete_details": optional(answer({"reason": one_of("max_output_tokens")})),
        "model": TEXT,
        "output": _all(_ITEM),
        "usage": _RESPONSES_USAGE,
        "store": FLAG,
    },
    _STRICT,
)
_BLOCK = any_of(
    answer({"type": one_of("text"), "text": TEXT}),
    answer({"type": one_of("thinking"), "thinking": TEXT, "signature": TEXT}),
    answer({"type": one_of("tool_use"), "id": TEXT, "name": TEXT, "input": OBJECT}),
)
_INPUT_COUNTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")
_ANTHROPIC = answer(
    {
        "id": TEXT,
        "type": one_of("message"),
        "role": one_of("assistant"),
        "model": TEXT,
        "content": _all(_BLOCK),
        "stop_reason": one_of("end_turn", "max_tokens", "stop_sequence", "tool_use"),
        "stop_sequence": optional(TEXT),
        "usage": answer(
            {
                **dict.fromkeys(_INPUT_COUNTS, COUNT),
                "output_tokens_details": answer({"thinking_tokens": COUNT}),
            }
        ),
    },
    _STRICT,
)
_OPENAI_MODEL = answer(
    {
        "id": TEXT,
        "object": one_of("model"),
        "created": COUNT,
        "owned_by": TEXT,
        "root": TEXT,
        "max_model_len": COUNT,
    }
)
_ANTHROPIC_MODEL = answer(
    {
        "type": one_of("model"),
        "id": TEXT,
        "display_name": TEXT,
        "created_at": {"type": "string", "format": "date-time"},
        "max_input_tokens": COUNT,
        "max_tokens": COUNT,
    }
)

ANSWERS: dict[str, Schema] = {
    "Error": answer(
        {"error": answer({"message": TEXT, "type": TEXT, "param": optional(TEXT), "code": optional(TEXT)})}
    ),
    "AnthropicError": answer(
        {"type": one_of("error"), "error": answer({"type": TEXT, "message": TEXT}), "request_id": TEXT}
    ),
    "Event": answer({"data": TEXT}, {"event": TEXT, "id": TEXT}),
    "PrefixHit": answer({}, _EXPLANATION),
    "Usage": _USAGE,
    "ChatAnswer": _CHAT,
    "CompletionAnswer": _COMPLETION,
    "ResponsesAnswer": _RESPONSE,
    "InputTokens": answer({"object": one_of("response.input_tokens"), "input_tokens": COUNT}),
    "MessagesAnswer": _ANTHROPIC,
    "TokenCount": answer({"input_tokens": COUNT}),
    "Model": any_of(_OPENAI_MODEL, _ANTHROPIC_MODEL),
    "Models": any_of(
        answer({"object": one_of("list"), "data": _all(ref("Model"))}),
        answer({"data": _all(ref("Model")), "has_more": FLAG, "first_id": TEXT, "last_id": TEXT}),
    ),
    "Pinned": answer(
        {"id": TEXT, "object": one_of("prefix"), "prompt_tokens": COUNT, "cached_tokens": COUNT}
    ),
    "Unpinned": answer({"id": TEXT, "object": one_of("prefix"), "deleted": FLAG}),
    "SessionOver": answer({"id": TEXT, "object": one_of("session"), "deleted": FLAG, "cached": FLAG}),
    "Tokens": answer({"count": COUNT, "max_model_len": COUNT, "tokens": _TOKENS}, {"token_strs": _all(TEXT)}),
    "Text": answer({"prompt": TEXT}),
    "TokenizerInfo": answer(
        {"tokenizer_class": TEXT, **dict.fromkeys(("bos_token", "eos_token", "pad_token"), optional(TEXT))}
    ),
    "Health": answer({"status": TEXT}),
    "Version": answer({"version": TEXT}),
    "Root": answer({"name": TEXT, "version": TEXT, "model": TEXT, "endpoints": _all(TEXT)}),
    "Dump": OBJECT,
    "Object": OBJECT,
    "Flushed": answer({"object": one_of("cache"), "flushed": FLAG, "freed_pages": COUNT}),
    "Draining": answer({"draining": FLAG, **dict.fromkeys(("running", "waiting", "parked"), COUNT)}),
    "Explained": answer(
        {"id": TEXT, "object": one_of("explanation"), "generations": _all(OBJECT), "ended": optional(OBJECT)}
    ),
    "Profiled": answer({"object": one_of("profile"), "file": TEXT, "steps": COUNT}),
}
"""By name. `Event` is one of a stream; what its data holds is told where the stream is."""


def error_of(shape: str) -> dict[str, Any]:
    """The content of an error whose schema is `shape`; Anthropic's too, as the header `anthropic-version` asks for that one."""
    shapes = [ref(name) for name in dict.fromkeys((shape, "AnthropicError"))]
    return {"application/json": {"schema": shapes[0] if len(shapes) == 1 else any_of(*shapes)}}
