"""Every field that OpenAI, vLLM, SGLang, llama.cpp and other servers document for chat and text completions, and what becomes of it.

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

_SAMPLING = """
    min_tokens temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty seed logit_bias stop
    stop_token_ids include_stop_str_in_output ignore_eos cache_salt priority user deadline_ms prompt_cache_key cache_control
    retention_priority
"""
_FORMS = """
    response_format guided_json guided_regex guided_choice guided_grammar guided_json_object json_schema regex ebnf grammar format
    structured_outputs structured_outputs.json structured_outputs.regex structured_outputs.choice structured_outputs.grammar
    structured_outputs.json_object structured_outputs.structural_tag
"""
_SHARED = f"""
    {_SAMPLING} model stream stream_options stream_options.include_usage stream_options.continuous_usage_stats n best_of
    max_tokens max_completion_tokens logprobs {_FORMS} return_token_ids return_tokens_as_token_ids request_id rid
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
    COMPLETIONS: frozenset(f"{_SHARED} prompt suffix echo skip_special_tokens".split()),
    RESPONSES: frozenset(
        f"""{_SAMPLING} model stream input instructions tools tool_choice parallel_tool_calls max_output_tokens include
        reasoning reasoning.effort reasoning.summary text text.format top_logprobs
        """.split()
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
    "guided_decoding_backend": "there is one",
    "guided_whitespace_pattern": "blanks in JSON have one pattern, with a bound",
    "truncation_side": _ONLY_WITH,
    "custom_params": _ONLY_WITH,
    "routed_experts_start_len": _ONLY_WITH,
    "routed_experts_prompt_start": _ONLY_WITH,
    # llama.cpp, Ollama, OpenRouter
    "cache_prompt": _SPEED,
    "id_slot": _SPEED,
    "backend_sampling": _SPEED,
    "keep_alive": _SPEED,
    "provider": _SPEED,
    "route": _SPEED,
    "usage": "the answer has its usage always",
    "repeat_last_n": _ONLY_WITH,
    "dynatemp_exponent": _ONLY_WITH,
    "dry_base": _ONLY_WITH,
    "dry_allowed_length": _ONLY_WITH,
    "dry_penalty_last_n": _ONLY_WITH,
    "dry_sequence_breakers": _ONLY_WITH,
    "mirostat_tau": _ONLY_WITH,
    "mirostat_eta": _ONLY_WITH,
    "xtc_threshold": _ONLY_WITH,
    "adaptive_decay": _ONLY_WITH,
    "grammar_lazy": _ONLY_WITH,
    "grammar_triggers": _ONLY_WITH,
    "preserved_tokens": _ONLY_WITH,
    "return_text_in_logprobs": _ONLY_WITH,
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
    """`remedy`: what to do instead. `neutral`: values that ask for nothing, besides null, false and what is empty. `false_asks`:
    false is no such value, as true is what holds where nothing is said."""

    remedy: str
    neutral: tuple[Any, ...] = ()
    false_asks: bool = False


_GRAMMAR = "response_format, structured_outputs and guided_* hold an answer to a form"
_NOT_RETURNED = "it is not given out; leave it out"
_ONE_HOST = "prompt and answer are computed by this one server; leave it out"
_SAMPLER = (
    "the sampler has temperature, top_k, top_p, min_p, and presence, frequency and repetition penalties"
)
_MAX_TOKENS, _MIN_TOKENS = "the field is max_tokens", "the field is min_tokens"
_LOGPROBS = "the fields are logprobs and, in a chat, top_logprobs"
_UNCUT = "prompts are not cut; send a shorter one"
_AT_THE_TOP = "its fields stand beside model, at the top of the body"
_TEXT_ONLY = "this model reads text only"
_NO_SEARCH = "nothing is searched here; give the model a tool that does"

REFUSED: Mapping[str, Refused] = {
    "structural_tag": Refused(
        "calls are held to their form where tools are given; response_format holds whole answers"
    ),
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
    "max_tokens_to_sample": Refused(_MAX_TOKENS),
    "max_length": Refused(_MAX_TOKENS),
    "min_new_tokens": Refused(_MIN_TOKENS, (0,)),
    "min_length": Refused(_MIN_TOKENS, (0,)),
    "repeat_penalty": Refused("the field is repetition_penalty", (1,)),
    "sampling_seed": Refused("the field is seed"),
    "random_seed": Refused("the field is seed"),
    "stop_sequences": Refused("the field is stop"),
    "n_cmpl": Refused("the field is n", (1,)),
    "num_return_sequences": Refused("the field is n", (1,)),
    "num_beams": Refused("answers are sampled; n gives several", (1,)),
    "do_sample": Refused("temperature 0 always takes the likeliest token", (True,), false_asks=True),
    "samplers": Refused(_SAMPLER),
    "top_n_sigma": Refused(_SAMPLER, (-1, 0)),
    "adaptive_target": Refused(_SAMPLER, (-1,)),
    "penalize_nl": Refused(_SAMPLER),
    "logits_processors": Refused(_SAMPLER),
    "watermark": Refused("tokens are not marked; leave it out"),
    "n_probs": Refused(_LOGPROBS, (0,)),
    "return_logprob": Refused(_LOGPROBS),
    "top_logprobs_num": Refused(_LOGPROBS, (0,)),
    "top_n_tokens": Refused(_LOGPROBS, (0,)),
    "token_ids_logprob": Refused(_LOGPROBS),
    "post_sampling_probs": Refused(_LOGPROBS),
    "logprob_start_len": Refused("/v1/completions with echo and logprobs judges a prompt's tokens", (-1,)),
    "decoder_input_details": Refused("/v1/completions with echo and logprobs judges a prompt's tokens"),
    "return_tokens": Refused("the field is return_token_ids"),
    "return_full_text": Refused("/v1/completions has echo"),
    "details": Refused(_NOT_RETURNED),
    "timings_per_token": Refused("times are in the log and in GET /metrics"),
    "return_progress": Refused("comments of a stream tell how far its prompt is"),
    "response_fields": Refused("answers are given whole"),
    "raw_output": Refused(_NOT_RETURNED),
    "perf_metrics_in_response": Refused("times are in the log and in GET /metrics"),
    "t_max_predict_ms": Refused("stop and max_tokens end an answer", (0, -1)),
    "n_indent": Refused("stop and max_tokens end an answer", (0,)),
    "n_keep": Refused(_UNCUT, (0, -1)),
    "num_keep": Refused(_UNCUT, (0, -1)),
    "n_discard": Refused(_UNCUT, (0,)),
    "truncate": Refused(_UNCUT),
    "prompt_truncate_len": Refused(_UNCUT),
    "transforms": Refused(_UNCUT),
    "context_length_exceeded_behavior": Refused(
        "the server's --max-tokens-overflow decides it for all requests", ("truncate",)
    ),
    "num_ctx": Refused("--max-model-len sets the server's context"),
    "lora": Refused("this server has no adapters"),
    "adapter_id": Refused("this server has no adapters"),
    "guided_decoding": Refused(_GRAMMAR),
    "reasoning_budget": Refused("reasoning_effort is low, high or max; max_tokens bounds all", (-1,)),
    "options": Refused(_AT_THE_TOP),
    "parameters": Refused(_AT_THE_TOP),
    "sampling_params": Refused(_AT_THE_TOP),
    "extra_body": Refused(_AT_THE_TOP),
    "extra_headers": Refused("headers go before the body"),
    "images": Refused(_TEXT_ONLY),
    "image_data": Refused(_TEXT_ONLY),
    "search_parameters": Refused(_NO_SEARCH),
    "plugins": Refused(_NO_SEARCH),
    "mcp_servers": Refused(_NO_SEARCH),
    "container": Refused("nothing is executed here; give the model a tool that does"),
    "deferred": Refused("answers are not stored here; stream it"),
    "guardrails": Refused("nothing is moderated here"),
    "safe_prompt": Refused("nothing is added to prompts; send it as a message"),
}
_STATELESS = "answers are not stored here; send the whole conversation"
_THOUGHTS = "thoughts come as reasoning_content; include_reasoning false leaves them out"
_AS_SYSTEM = "send it as a message whose role is system"
_MAX_OUTPUT = "the field is max_output_tokens"
_TOOLS = "tools and tool_choice have taken its place"
_OF_RESPONSES = {
    "input": Refused("it is for /v1/responses"),
    "text": Refused("the field is response_format"),
    "include": Refused(_NOT_RETURNED),
    "previous_response_id": Refused(_STATELESS),
    "conversation": Refused(_STATELESS),
    "background": Refused("answers are not stored here; stream it"),
    "truncation": Refused(_UNCUT, ("disabled",)),
    "context_management": Refused(_UNCUT),
    "max_tool_calls": Refused("parallel_tool_calls false gives at most one call"),
}
"""What stands in a body of the Responses API, and acts there or is refused there."""
REFUSED_BY_ENDPOINT: Mapping[str, Mapping[str, Refused]] = {
    CHAT: {
        "reasoning.max_tokens": Refused("reasoning_effort is low, high or max; max_tokens bounds all"),
        "functions": Refused(_TOOLS),
        "function_call": Refused(_TOOLS, ("auto", "none")),
        "audio": Refused("answers are text"),
        "modalities": Refused("answers are text", (["text"],)),
        "moderation": Refused("nothing is moderated here"),
        "web_search_options": Refused(_NO_SEARCH),
        "verbosity": Refused("say in a message how long the answer is to be", ("medium",)),
        "echo": Refused("the answer holds only what is new; put it after the message that it continues"),
        "prefix": Refused("it belongs into the last message, whose role is assistant"),
        "documents": Refused("put them into a message"),
        "chat_template": Refused("V4's prompt has one form; /v1/completions takes any text"),
        "input_ids": Refused("/v1/completions takes token ids"),
        "separate_reasoning": Refused(_THOUGHTS, (True,), false_asks=True),
        "reasoning_format": Refused(_THOUGHTS, ("auto", "deepseek")),
        "reasoning_in_content": Refused(_THOUGHTS),
        "parse_tool_calls": Refused("calls come as tool_calls", (True,), false_asks=True),
        "thinking_forced_open": Refused('the field is thinking: {"type": "enabled"}'),
        "prompt_mode": Refused('the field is thinking: {"type": "enabled"}'),
        "output_config": Refused("the field is reasoning_effort"),
        "system": Refused(_AS_SYSTEM),
        "instructions": Refused(_AS_SYSTEM),
        "prompt": Refused("it is for /v1/completions; a chat has messages"),
        "inputs": Refused("a chat has messages"),
        "raw": Refused("/v1/completions takes a prompt as it stands"),
        "template": Refused("V4's prompt has one form; /v1/completions takes any text"),
        "context": Refused(_STATELESS),
        **_OF_RESPONSES,
        "return_prompt_text": Refused("POST /tokenize shows a chat's prompt"),
        "suffix": Refused("POST /v1/completions fills in the middle"),
        "think": Refused('the field is thinking: {"type": "enabled"}'),
    },
    COMPLETIONS: {
        "messages": Refused("they are for /v1/chat/completions; a completion has a prompt"),
        "tools": Refused("they are for /v1/chat/completions"),
        "inputs": Refused("the field is prompt"),
        "system": Refused("put it into the prompt, or use /v1/chat/completions"),
        "instructions": Refused("put it into the prompt, or use /v1/chat/completions"),
        "raw": Refused("prompts are taken as they stand; leave it out", (True,)),
        "template": Refused("prompts are taken as they stand"),
        "context": Refused("put the text so far into the prompt"),
        "echo_last": Refused("echo gives the whole prompt"),
        **_OF_RESPONSES,
    },
    RESPONSES: {
        **{name: Refused("the field is text.format") for name in _FORMS.split() if "." not in name},
        "previous_response_id": Refused(_STATELESS),
        "conversation": Refused(_STATELESS),
        "prompt": Refused("prompts are not stored here; send instructions and input"),
        "background": Refused("answers are not stored here; stream it"),
        "truncation": Refused("prompts are not cut; send a shorter one", ("disabled",)),
        "context_management": Refused("prompts are not cut; send a shorter one"),
        "image": Refused("answers are text"),
        "moderation": Refused("nothing is moderated here"),
        "n": Refused("a request has one answer; chat completions have n", (1,)),
        "max_tokens": Refused(_MAX_OUTPUT),
        "max_completion_tokens": Refused(_MAX_OUTPUT),
        "messages": Refused("the field is input"),
        "response_format": Refused("the field is text.format", ({"type": "text"},)),
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
    if value is None or (type(value) in (str, list, dict) and not value):
        return
    if value is False and not refused.false_asks:
        return
    if type(value) in (bool, int, float, str, list, dict) and value in refused.neutral:
        return
    raise RequestError(
        f"{name} is {show(value)}; it is not supported: {refused.remedy}", name, "unsupported_field", 400
    )
