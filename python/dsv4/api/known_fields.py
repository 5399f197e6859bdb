"""Every field that OpenAI, vLLM, SGLang and other servers document for chat and text completions, and what becomes of it.

Nothing that changes what the client gets back is ignored: a field is honoured, or harmless (the answer is the same without
it), or refused by name. A field that nobody documents is ignored, as clients send more than any server knows, and named in
a debug line of the log. Dotted names are fields of an object.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv4.api.fields import Fields
from dsv4.errors import RequestError, show

log = logging.getLogger("dsv4.api")

CHAT, COMPLETIONS, RESPONSES = "chat", "completions", "responses"

_SHARED = """
    model stream stream_options stream_options.include_usage stream_options.continuous_usage_stats n best_of
    max_tokens max_completion_tokens min_tokens temperature top_p top_k min_p presence_penalty frequency_penalty
    repetition_penalty seed logit_bias logprobs stop stop_token_ids include_stop_str_in_output ignore_eos response_format
    return_token_ids return_tokens_as_token_ids request_id rid cache_salt priority user deadline_ms prompt_cache_key
    cache_control retention_priority
"""
HONOURED: Mapping[str, frozenset[str]] = {
    CHAT: frozenset(
        f"""{_SHARED} messages tools tool_choice parallel_tool_calls top_logprobs reasoning_effort include_reasoning
        thinking thinking.type enable_thinking reasoning reasoning.effort reasoning.enabled reasoning.exclude task
        return_prompt_token_ids add_generation_prompt continue_final_message chat_template_kwargs
        chat_template_kwargs.thinking chat_template_kwargs.enable_thinking chat_template_kwargs.reasoning_effort
        chat_template_kwargs.drop_thinking chat_template_kwargs.add_generation_prompt
        chat_template_kwargs.continue_final_message
        """.split()
    ),
    COMPLETIONS: frozenset(f"{_SHARED} prompt echo skip_special_tokens".split()),
    RESPONSES: frozenset(
        [
            "model",
            "stream",
            "input",
            "instructions",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "max_output_tokens",
            "include",
            "reasoning",
            "reasoning.effort",
            "reasoning.summary",
            "text",
            "text.format",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "seed",
            "logit_bias",
            "stop",
            "stop_token_ids",
            "include_stop_str_in_output",
            "min_tokens",
            "ignore_eos",
            "cache_salt",
            "priority",
            "user",
            "deadline_ms",
            "prompt_cache_key",
            "cache_control",
            "retention_priority",
        ]
    ),
}
"""What is read, by endpoint."""

_ACCOUNTS = "for the accounts, logs and stores of a hosted service"
_SPEED = "a hint where or how fast to compute; the answer is the same"
_NO_IMAGES = "acts on images, audio or video, which are refused themselves"
_ONLY_WITH = "acts together with a field that is refused itself"

HARMLESS: Mapping[str, str] = {
    "metadata": _ACCOUNTS,
    "store": _ACCOUNTS,
    "service_tier": _ACCOUNTS,
    "safety_identifier": _ACCOUNTS,
    "custom_labels": _ACCOUNTS,
    "prompt_cache_retention": _SPEED,
    "prompt_cache_options": _SPEED,
    "prediction": _SPEED,
    "session_id": _SPEED,
    "extra_key": _SPEED,
    "stream_interval": _SPEED,
    "stream_reasoning": _SPEED,
    "routed_dp_rank": _SPEED,
    "disagg_prefill_dp_rank": _SPEED,
    "data_parallel_rank": _SPEED,
    "ngram_corpus_id": _SPEED,
    "stream_options.include_obfuscation": "padding against eavesdroppers, without a meaning",
    "add_special_tokens": "V4's tokenizer adds none by itself",
    "spaces_between_special_tokens": "V4's tokenizer puts none",
    "return_cached_tokens_details": "usage has them always",
    "return_token_offsets": "of render endpoints only",
    "return_assistant_tokens_mask": "of render endpoints only",
    "media_io_kwargs": _NO_IMAGES,
    "mm_processor_kwargs": _NO_IMAGES,
    "images_config": _NO_IMAGES,
    "max_dynamic_patch": _NO_IMAGES,
    "min_dynamic_patch": _NO_IMAGES,
    "use_audio_in_video": _NO_IMAGES,
    "guided_decoding_backend": _ONLY_WITH,
    "guided_whitespace_pattern": _ONLY_WITH,
    "truncation_side": _ONLY_WITH,
    "custom_params": _ONLY_WITH,
    "routed_experts_start_len": _ONLY_WITH,
    "routed_experts_prompt_start": _ONLY_WITH,
}
HARMLESS_BY_ENDPOINT: Mapping[str, Mapping[str, str]] = {
    CHAT: {
        "skip_special_tokens": "the text of a chat never shows special tokens",
        "thinking.budget_tokens": "a bound that V4 cannot keep, nor does DeepSeek's own API; max_tokens bounds all",
        "reasoning.summary": "thoughts are given as they are, not in summary",
    },
    COMPLETIONS: {},
    RESPONSES: {
        "client_metadata": _ACCOUNTS,
        "access_programs": _ACCOUNTS,
        "background_options": _ONLY_WITH,
        "max_tool_calls": "bounds calls of hosted tools, which are left out",
        "text.verbosity": "unknown to V4; the answer has a warning",
    },
}


@dataclass(frozen=True, slots=True)
class Refused:
    """`remedy`: what to do instead. `neutral`: values that ask for nothing, besides null, false and what is empty."""

    remedy: str
    neutral: tuple[Any, ...] = ()


_GRAMMAR = "answers are not forced into a format here; ask for it in a message and check the answer"
_NOT_RETURNED = "it is not given out; leave it out"
_ONE_HOST = "prompt and answer are computed by this one server; leave it out"
_SAMPLER = (
    "the sampler has temperature, top_k, top_p, min_p, and presence, frequency and repetition penalties"
)
_MAX_TOKENS = "the field is max_tokens"

REFUSED: Mapping[str, Refused] = {
    "structured_outputs": Refused(_GRAMMAR),
    "guided_json": Refused(_GRAMMAR),
    "guided_regex": Refused(_GRAMMAR),
    "guided_choice": Refused(_GRAMMAR),
    "guided_grammar": Refused(_GRAMMAR),
    "guided_json_object": Refused(_GRAMMAR),
    "structural_tag": Refused(_GRAMMAR),
    "json_schema": Refused(_GRAMMAR),
    "regex": Refused(_GRAMMAR),
    "ebnf": Refused(_GRAMMAR),
    "grammar": Refused(_GRAMMAR),
    "format": Refused(_GRAMMAR),
    "stop_regex": Refused("stop takes texts"),
    "no_stop_trim": Refused("the field is include_stop_str_in_output"),
    "use_beam_search": Refused("answers are sampled; n gives several"),
    "length_penalty": Refused("it is for beam search, which is not here", (1, 0)),
    "allowed_token_ids": Refused("logit_bias favours tokens"),
    "bad_words": Refused("logit_bias of -100 forbids tokens"),
    "logprob_token_ids": Refused(
        "top_logprobs of a chat and logprobs of a completion give up to 20 alternatives"
    ),
    "prompt_logprobs": Refused("/v1/completions with echo and logprobs judges a prompt's tokens"),
    "truncate_prompt_tokens": Refused("prompts are not cut; send a shorter one", (-1,)),
    "repetition_detection": Refused("stop and max_tokens end an answer"),
    "thinking_token_budget": Refused("reasoning_effort is low, high or max; max_tokens bounds all", (-1,)),
    "thinking_budget": Refused("reasoning_effort is low, high or max; max_tokens bounds all", (-1,)),
    "custom_logit_processor": Refused(_SAMPLER),
    "vllm_xargs": Refused("no extension takes them here"),
    "lora_path": Refused("this server has no adapters"),
    "session_params": Refused("send the whole conversation; what is cached of it is found by itself"),
    "prompt_embeds": Refused("prompts are text or token ids"),
    "kv_transfer_params": Refused(_ONE_HOST),
    "ec_transfer_params": Refused(_ONE_HOST),
    "bootstrap_host": Refused(_ONE_HOST),
    "bootstrap_port": Refused(_ONE_HOST),
    "bootstrap_room": Refused(_ONE_HOST),
    "return_hidden_states": Refused(_NOT_RETURNED),
    "return_routed_experts": Refused(_NOT_RETURNED),
    "return_meta_info": Refused(_NOT_RETURNED),
    # Samplers and names of other servers that clients send along.
    "top_a": Refused(_SAMPLER, (0,)),
    "typical_p": Refused(_SAMPLER, (1, 0)),
    "tfs": Refused(_SAMPLER, (1, 0)),
    "tfs_z": Refused(_SAMPLER, (1, 0)),
    "mirostat": Refused(_SAMPLER, (0,)),
    "mirostat_mode": Refused(_SAMPLER, (0,)),
    "dry_multiplier": Refused(_SAMPLER, (0,)),
    "xtc_probability": Refused(_SAMPLER, (0,)),
    "dynatemp_range": Refused(_SAMPLER, (0,)),
    "smoothing_factor": Refused(_SAMPLER, (0,)),
    "no_repeat_ngram_size": Refused(_SAMPLER, (0,)),
    "max_new_tokens": Refused(_MAX_TOKENS),
    "max_output_tokens": Refused(_MAX_TOKENS),
    "n_predict": Refused(_MAX_TOKENS, (-1,)),
    "num_predict": Refused(_MAX_TOKENS, (-1,)),
}
_STATELESS = "answers are not stored here; send the whole conversation as input"
_MAX_OUTPUT = "the field is max_output_tokens"
_TOOLS = "tools and tool_choice have taken its place"
REFUSED_BY_ENDPOINT: Mapping[str, Mapping[str, Refused]] = {
    CHAT: {
        "reasoning.max_tokens": Refused("reasoning_effort is low, high or max; max_tokens bounds all"),
        "functions": Refused(_TOOLS),
        "function_call": Refused(_TOOLS, ("auto", "none")),
        "audio": Refused("answers are text"),
        "modalities": Refused("answers are text", (["text"],)),
        "moderation": Refused("nothing is moderated here"),
        "web_search_options": Refused("nothing is searched here; give the model a tool that does"),
        "verbosity": Refused("say in a message how long the answer is to be", ("medium",)),
        "echo": Refused("the answer holds only what is new; put it after the message that it continues"),
        "documents": Refused("put them into a message"),
        "chat_template": Refused("V4's prompt has one form; /v1/completions takes any text"),
        "input_ids": Refused("/v1/completions takes token ids"),
        "separate_reasoning": Refused(
            "thoughts come as reasoning_content; include_reasoning false leaves them out", (True,)
        ),
        "return_prompt_text": Refused("POST /tokenize shows a chat's prompt"),
        "suffix": Refused("fill-in-the-middle is not supported"),
        "think": Refused('the field is thinking: {"type": "enabled"}'),
    },
    COMPLETIONS: {
        "suffix": Refused("fill-in-the-middle is not supported"),
    },
    RESPONSES: {
        "previous_response_id": Refused(_STATELESS),
        "conversation": Refused(_STATELESS),
        "prompt": Refused("prompts are not stored here; send instructions and input"),
        "background": Refused("answers are not stored here; stream it"),
        "truncation": Refused("prompts are not cut; send a shorter one", ("disabled",)),
        "context_management": Refused("prompts are not cut; send a shorter one"),
        "image": Refused("answers are text"),
        "top_logprobs": Refused("chat completions have log-probabilities", (0,)),
        "moderation": Refused("nothing is moderated here"),
        "n": Refused("a request has one answer; chat completions have n", (1,)),
        "max_tokens": Refused(_MAX_OUTPUT),
        "max_completion_tokens": Refused(_MAX_OUTPUT),
        "messages": Refused("the field is input"),
        "response_format": Refused(_GRAMMAR, ({"type": "text"},)),
        "reasoning_effort": Refused('the field is reasoning: {"effort": "high"}'),
    },
}


_ALL_REFUSED = {
    e: {name: r for name, r in {**REFUSED, **own}.items() if name not in HONOURED[e]}
    for e, own in REFUSED_BY_ENDPOINT.items()
}
_KNOWN = {
    e: HONOURED[e] | HARMLESS.keys() | HARMLESS_BY_ENDPOINT[e].keys() | _ALL_REFUSED[e].keys()
    for e in HONOURED
}
_WITH_FIELDS = {
    e: frozenset(name.split(".")[0] for name in known if "." in name) for e, known in _KNOWN.items()
}
"""Objects whose fields are looked at."""


def check_known(fields: Fields, endpoint: str) -> None:
    """RequestError for the first field that asks for what is not done here. `endpoint`: CHAT, COMPLETIONS or RESPONSES."""
    known, refused = _KNOWN[endpoint], _ALL_REFUSED[endpoint]
    given = dict(fields.body)
    for name in _WITH_FIELDS[endpoint]:
        if type(inner := given.get(name)) is dict:
            given |= {f"{name}.{key}": value for key, value in inner.items()}
    for name, value in given.items():
        if name in refused:
            _refuse(name, value, refused[name])
    if log.isEnabledFor(logging.DEBUG) and (unknown := [name for name in given if name not in known]):
        shown = ", ".join(map(show, unknown[:8]))
        log.debug("%s: %d unknown fields of the request were ignored: %s", endpoint, len(unknown), shown)


def _refuse(name: str, value: Any, refused: Refused) -> None:
    if value is None or value is False or (type(value) in (str, list, dict) and not value):
        return
    if type(value) in (bool, int, float, str, list, dict) and value in refused.neutral:
        return
    raise RequestError(
        f"{name} is {show(value)}; it is not supported: {refused.remedy}", name, "unsupported_field", 400
    )
