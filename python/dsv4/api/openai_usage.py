"""The `usage` object of OpenAI's dialects, with DeepSeek's two counters and our explanation of the prefix
hit.

`usage.prompt_tokens_details.dsv4` says what of the prompt's prefix was known, where the computation was
resumed, what was replayed, and why not more was reused. It is a list, in the prompts' order, when a request
had several.
"""

from __future__ import annotations

from typing import Any

from dsv4.api.generation import UsageSum

_EXPLAINED = ("history_matched", "resumed_at", "replayed", "reason", "preemptions")


def usage_body(usage: UsageSum, reasoning_tokens: int | None = None) -> dict[str, Any]:
    """The JSON of a request's token counts."""
    body: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "dsv4": _explanation(usage.explanation()),
        },
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
    }
    if reasoning_tokens is not None:
        body["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return body


def _explanation(found: Any) -> Any:
    if isinstance(found, list):
        return [_explanation(one) for one in found]
    return {key: found[key] for key in _EXPLAINED if key in found}


def usage_so_far(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The usage of one choice in the midst of a stream (`continuous_usage_stats`)."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
