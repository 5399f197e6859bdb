"""Dynamo's requests and answers, in terms of the engine. Nothing here needs Dynamo.

Its frontend renders the chat, tokenizes, and looks for stop strings, tool calls and thoughts: tokens come in, tokens go out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dsv4.api.fields import Fields
from dsv4.api.generation import Job, jobs_for
from dsv4.api.grammar import openai_format
from dsv4.api.params import MAX_CHOICES
from dsv4.engine.request import RequestOutput, Sampled
from dsv4.engine.routing import Routing
from dsv4.errors import RequestError, show
from dsv4.sampling import Grammar, SamplingParams
from dsv4.text.form import chat_grammar
from dsv4.text.tokenizer import Tokenizer

FINISH_REASONS = {"stop": "stop", "length": "length", "abort": "cancelled"}
"""Ours and Dynamo's. An `error` is raised."""

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
_FORMS = ("json", "regex", "choice", "grammar", "structural_tag")


class Translator:
    """What of a model the translation needs."""

    def __init__(
        self, tokenizer: Tokenizer | None, eos_ids: frozenset[int], defaults: Mapping[str, Any]
    ) -> None:
        """`defaults`: sampling where a request says nothing."""
        self._tokenizer, self._eos_ids, self._defaults = tokenizer, eos_ids, dict(defaults)
        find = (lambda text: None) if tokenizer is None else tokenizer.find
        self._think, self._end_think = find("<think>"), find("</think>")

    def jobs(self, request: Mapping[str, Any]) -> list[Job]:
        """The choices that a request asks for, numbered from 0. Raises RequestError naming the field."""
        sampling = _part(request, "sampling_options")
        n = sampling.get("n")
        n = 1 if n is None else n
        if type(n) is not int or not 1 <= n <= MAX_CHOICES:
            raise _refused("n", n, f"a whole number from 1 to {MAX_CHOICES}")
        if sampling.get("best_of") not in (None, n):
            raise _refused("best_of", sampling["best_of"], f"the value of n ({n}), or leave it out")
        if sampling.get("use_beam_search"):
            raise _refused("use_beam_search", True, "false")
        prompt = np.asarray(request["token_ids"], np.int32)
        return jobs_for([prompt], self._params(request, prompt), n, routing_of(request))

    def _params(self, request: Mapping[str, Any], prompt: np.ndarray) -> SamplingParams:
        sampling, ends = _part(request, "sampling_options"), _part(request, "stop_conditions")
        output = _part(request, "output_options")
        values = self._defaults | {
            name: sampling[name] for name in _SAMPLING if sampling.get(name) is not None
        }
        values |= {
            "max_tokens": ends.get("max_tokens"),
            "min_tokens": ends.get("min_tokens") or 0,
            "ignore_eos": bool(ends.get("ignore_eos")),
            "stop": tuple(ends.get("stop") or ()),
            "logprobs": output.get("logprobs"),
            "prompt_logprobs": output.get("prompt_logprobs"),
        }
        ids = [*(ends.get("stop_token_ids") or ())]
        if not values["ignore_eos"]:  # the model's own ends are among these
            ids += [i for i in ends.get("stop_token_ids_hidden") or () if i not in self._eos_ids]
        try:
            return SamplingParams(
                **values, stop_token_ids=tuple(ids), grammar=self._grammar(sampling, prompt)
            )
        except ValueError as e:
            raise RequestError(str(e), str(e).split(" ", 1)[0], "invalid_value", 400) from None

    def _grammar(self, sampling: Mapping[str, Any], prompt: np.ndarray) -> Grammar | None:
        """What holds the answer to its form: from the first token on, or after the thoughts in which the prompt ends."""
        guided = sampling.get("guided_decoding")
        if not guided:
            return None
        if guided.get("whitespace_pattern") is not None:
            raise _refused("guided_decoding.whitespace_pattern", guided["whitespace_pattern"], "nothing")
        asked = {name: guided[name] for name in _FORMS if guided.get(name) is not None}
        form = openai_format(Fields({"structured_outputs": asked}))
        if form is None:
            return None
        if self._tokenizer is None:
            raise RequestError(
                f"{form.field} needs a tokenizer, and the model has none",
                form.field,
                "unsupported_field",
                400,
            )
        last = int(prompt[-1]) if prompt.size else None
        if last is None or last not in (self._think, self._end_think):
            return Grammar(form.text(), form.field)
        try:
            text = chat_grammar(self._tokenizer, thinking=last == self._think, format=form)
        except ValueError as e:
            raise RequestError(
                f"{form.field} cannot be honoured: {e}", form.field, "unsupported_field", 400
            ) from None
        return None if text is None else Grammar(text, form.field, chat=True)


def routing_of(request: Mapping[str, Any]) -> Routing:
    """Session, priority and salt, where a request has them. Raises RequestError naming the field."""
    session = _part(request, "agent_context").get("session_id")
    route = _part(request, "routing")
    try:
        return Routing(
            session=session if isinstance(session, str) and session else None,
            priority=route.get("priority") or 0,
            salt=str(route.get("cache_salt") or ""),
        )
    except ValueError as e:
        raise RequestError(f"routing: {e}", "routing", "invalid_value", 400) from None


class Whole:
    """The answer to a request, of which each choice has its tokens and one chunk has the end.

    Dynamo's runtime reads nothing after a chunk with a finish reason. Its frontend finds out by itself that a choice has ended
    with a stop token or string; so where several choices end, the end that is told is one by `length`, if there is any.
    """

    def __init__(self, choices: int) -> None:
        self._left = choices
        self._prompt = self._completion = self._cached = 0
        self._end: dict[str, Any] = {}

    @property
    def over(self) -> bool:
        """Every choice has ended."""
        return self._left == 0

    def chunks(
        self, index: int, output: RequestOutput, bytes_of: Callable[[int], bytes]
    ) -> Iterator[dict[str, Any]]:
        """What is told of an output of a choice. `bytes_of`: a token's."""
        chunk: dict[str, Any] = {"index": index, "token_ids": output.token_ids}
        if output.logprobs is not None:
            chunk["log_probs"] = [one.logprob for one in output.logprobs]
            chunk["top_logprobs"] = [_top(one, bytes_of) for one in output.logprobs]
        if output.finished:
            self._finish(index, output, bytes_of)
        if self.over and self._end["index"] == index:
            yield chunk | self._end
            return
        if output.token_ids:
            yield chunk
        if self.over:
            yield {"token_ids": [], **self._end}

    def _finish(self, index: int, output: RequestOutput, bytes_of: Callable[[int], bytes]) -> None:
        self._left -= 1
        reason = FINISH_REASONS[output.finish_reason or "stop"]
        if reason == "length" or self._end.get("finish_reason") != "length":
            self._end |= {"index": index, "finish_reason": reason}
        if output.prompt_logprobs is not None:
            judged = [_judged(one, bytes_of) for one in output.prompt_logprobs]
            self._end["engine_data"] = {"prompt_logprobs": judged}
        if (usage := output.usage) is None:
            return
        self._completion += usage.completion_tokens
        self._prompt = usage.prompt_tokens
        if index == 0:  # a prompt counts once, and so does what of it was cached
            self._cached = usage.cached_tokens
        self._end["completion_usage"] = {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _top(one: Sampled, bytes_of: Callable[[int], bytes]) -> list[dict[str, Any]]:
    """The best tokens, and the one that was taken, as frontends look for its text there."""
    best = [(rank, token, logprob) for rank, (token, logprob) in enumerate(one.top, 1)]
    if all(token != one.token for _, token, _ in best):
        best.append((one.rank, one.token, one.logprob))
    found = []
    for rank, token, logprob in best:
        raw = bytes_of(token)
        found.append(
            {"rank": rank, "token_id": token, "token": _text(raw), "logprob": logprob, "bytes": list(raw)}
        )
    return found


def _judged(one: Sampled | None, bytes_of: Callable[[int], bytes]) -> dict[str, Any] | None:
    """By token id as text, since it becomes JSON."""
    if one is None:
        return None
    best = [(rank, token, logprob) for rank, (token, logprob) in enumerate(one.top, 1)]
    return {
        str(token): {"logprob": logprob, "rank": rank, "decoded_token": _text(bytes_of(token))}
        for rank, token, logprob in [*best, (one.rank, one.token, one.logprob)]
    }


def _part(request: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = request.get(name)
    return part if isinstance(part, Mapping) else {}


def _refused(field: str, value: Any, takes: str) -> RequestError:
    return RequestError(f"{field} is {show(value)}; it takes {takes}", field, "invalid_value", 400)
