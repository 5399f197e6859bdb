"""What the caller's side of an engine knows of a model: its texts, its defaults, and which requests can be taken.

No weights and no torch. The engine process knows nothing of it but the ids that end an answer.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dsv4.config import EngineConfig
from dsv4.engine.answers import Answer
from dsv4.engine.checks import check
from dsv4.engine.prompt import TokenIds, as_prompt
from dsv4.engine.routing import Routing
from dsv4.errors import RequestError, show
from dsv4.model.config import ModelConfig
from dsv4.model.generation_config import NO_END, Generation, read_generation
from dsv4.model.source import Source
from dsv4.plan.weights import assumed
from dsv4.quantities import numbered
from dsv4.sampling import SamplingParams
from dsv4.text.chat_format import ChatFormat, choose_format
from dsv4.text.stream import Reading, TextStream
from dsv4.text.tokenizer import Tokenizer

log = logging.getLogger("dsv4.engine")


@dataclass(frozen=True, slots=True)
class Frontend:
    """A model as its callers see it."""

    source: Source
    model_config: ModelConfig
    tokenizer: Tokenizer | None
    chat_format: ChatFormat
    chat_format_is: str
    """Which it is, and why."""
    generation: Generation

    @classmethod
    def load(cls, config: EngineConfig) -> Frontend:
        """Reads the small files of the model. Raises ConfigError and CheckpointError, also for settings and weights with which
        no engine can start."""
        source, found = check(config)
        tokenizer = Tokenizer.from_dir(source.path, vocab_size=found.config.vocab_size)
        chat_format, chat_format_is = choose_format(source.path, found.config)
        generation = read_generation(
            source.path,
            found.config,
            setting=config.generation_config,
            override=config.override_generation_config,
            find_token=tokenizer.find if tokenizer else lambda text: None,
        )
        if not generation.eos_ids:
            log.warning(NO_END)
        if found.seed is not None:
            for line in assumed(source.path):
                log.warning("%s", line)
        return cls(source, found.config, tokenizer, chat_format, chat_format_is, generation)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return frozenset(self.generation.eos_ids)

    def describe(self, engine: Iterable[str]) -> list[str]:
        """The lines of an engine (`BuiltEngine.describe`), and among them those of texts."""
        lines: list[str] = []
        for line in engine:
            lines.append(line)
            if line.startswith("device "):
                tokenizer = (
                    self.tokenizer.describe() if self.tokenizer else "none: token ids in, token ids out"
                )
                lines.append(f"tokenizer  {tokenizer}")
                lines.append(
                    f"chat       {self.chat_format_is}; efforts {', '.join(self.chat_format.efforts)}"
                )
                lines += self.generation.describe()
        return lines

    def answer(
        self,
        key: int,
        request_id: str,
        prompt: np.ndarray,
        params: SamplingParams,
        reading: Reading | None = None,
    ) -> Answer:
        """Of a request that is about to be made. `reading`: it is a chat, and how its answer is to be read."""
        stream = None if self.tokenizer is None else TextStream(self.tokenizer, params, reading)
        return Answer(key, request_id, prompt, params, stream, self.eos_ids)

    def admissible(
        self, ids: TokenIds, params: SamplingParams, config: EngineConfig, max_model_len: int
    ) -> tuple[np.ndarray, SamplingParams]:
        """The prompt as int32 [tokens], and `params` with max_tokens filled in. Raises RequestError for what an engine with
        these limits never takes."""
        check_params(params)
        prompt = as_prompt(ids)
        if not prompt.size:
            raise _refused("prompt", "prompt is empty; it needs at least one token")
        vocab = self.model_config.vocab_size
        if (highest := prompt.view(np.uint32).max()) >= vocab:  # a negative id is above all others then
            token = highest.view(np.int32)
            raise _refused("prompt", f"prompt holds token id {token}; valid ids are 0 to {vocab - 1}")
        for token in params.logit_bias:
            if token >= vocab:
                text = f"logit_bias has the token id {token}; valid ids are 0 to {vocab - 1}"
                raise _refused("logit_bias", text)
        room, wanted = max_model_len - len(prompt), params.max_tokens
        if room < (0 if wanted == 0 else 1):
            raise _too_long(
                "prompt",
                f"prompt has {numbered(len(prompt), 'token')}, but the context holds {max_model_len} with the answer",
            )
        if wanted is not None and wanted > room and config.max_tokens_overflow == "refuse":
            raise _too_long(
                "max_tokens",
                f"prompt has {numbered(len(prompt), 'token')} and max_tokens is {wanted}, but the context holds "
                f"{numbered(max_model_len, 'token')}; the most that max_tokens can be here is {room}",
            )
        if params.min_tokens > room:
            raise _too_long(
                "min_tokens",
                f"min_tokens is {params.min_tokens}; after this prompt the context holds {numbered(room, 'token')}",
            )
        if wanted is None:
            wanted = max(self.generation.sampling.get("max_tokens", room), params.min_tokens)
        return prompt, dataclasses.replace(params, max_tokens=min(room, wanted))


def check_params(params: SamplingParams) -> None:
    """Raises RequestError for what a caller passes in its place: a dict, or a list of them."""
    if not isinstance(params, SamplingParams):
        raise _refused("params", f"params is {show(params)}; it takes one SamplingParams(...)")


def check_routing(routing: Routing) -> None:
    """Raises RequestError for what a caller passes in its place."""
    if not isinstance(routing, Routing):
        raise _refused("routing", f"routing is {show(routing)}; it takes one Routing(...)")


def salted(salt: str) -> Routing:
    """The hints of a request that has a salt alone. Raises RequestError."""
    try:
        return Routing(salt=salt)
    except ValueError as e:
        raise _refused("cache_salt", f"cache_{e}") from None


def _refused(param: str, text: str) -> RequestError:
    return RequestError(text, param, "invalid_value", 400)


def _too_long(param: str, text: str) -> RequestError:
    return RequestError(text, param, "context_length_exceeded", 400)
