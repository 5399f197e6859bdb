"""What all handlers of one server share: the engine, the settings, the names it answers to, and its threads."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dsv4.api.caller import Callers
from dsv4.api.connections import connections_for
from dsv4.api.fields import Fields
from dsv4.api.lanes import Lanes
from dsv4.api.metrics import Metrics, describe_build
from dsv4.api.recent import Recent
from dsv4.api.tracing import Tracer
from dsv4.api.turnstile import Turnstile
from dsv4.config import LONGEST_NAME, ServerConfig
from dsv4.errors import RequestError, show
from dsv4.text.chat import BOS, FIM
from dsv4.text.draft import Bound
from dsv4.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from dsv4.engine.async_engine import AsyncEngine

DEFAULT_NAME = "default"
"""A model name that every server answers to."""


class Service:
    """One engine as the HTTP side sees it."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig, name: str) -> None:
        """`name`: the model's name in the API where the settings give none."""
        self.engine, self.config = engine, config
        given = config.served_model_name
        self.patterns = tuple(n for n in given if "*" in n)
        """Names with `*` for any characters, such as `claude-*`: other names that clients may ask for."""
        names = tuple(n for n in given if n not in self.patterns) or (name,)
        self.name, self.names = names[0], tuple(dict.fromkeys((*names, DEFAULT_NAME)))
        self.callers = Callers(config)
        queue = engine.config.max_num_seqs + engine.config.max_num_waiting
        self.connections = connections_for(config.max_connections, queue)
        info = describe_build(engine.config, engine.stats().get("pages"))
        counts, process = self.connections.counts, lambda: (engine.pid, engine.restarts)
        self.metrics = Metrics(
            engine.stats, self.name, engine.tenants, counts, info, process, self.callers.refused
        )
        self.recent = Recent()
        endpoint = config.otlp_traces_endpoint
        self.tracer = None if endpoint is None else Tracer(endpoint, self.name)
        self.started = int(time.time())
        self.draining = self.ending = False
        """No new requests are taken; and the server is about to end, so that it is not ready any more."""
        self.pins: dict[int, str] = {}
        """By number, the tenant that made it."""
        self.lanes, self.turnstile = Lanes(), Turnstile()

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self.engine.max_model_len

    @property
    def vocab_size(self) -> int:
        return self.engine.model_config.vocab_size

    def tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer. RequestError naming `param` when the model directory has none."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            text = f"{param} is text, but the model has no tokenizer; send token ids to /v1/completions"
            raise RequestError(text, param, "no_tokenizer", 400)
        return tokenizer

    def check_model(self, fields: Fields) -> str:
        """The name under which a request asks for the model, which is what its answer calls it; the first one where it
        gives none or `default`. RequestError 404 for a name that is not served."""
        model = fields.text("model", longest=LONGEST_NAME) or DEFAULT_NAME
        if not (model in self.names or self.config.any_model_name or self._is_alias(model)):
            names = (*self.names[:-1], *self.patterns, self.names[-1])
            served = " and ".join(filter(None, (", ".join(map(repr, names[:-1])), repr(names[-1]))))
            raise RequestError(
                f"model {show(model)} is not served here; this server has {served}",
                "model",
                "model_not_found",
                404,
            )
        return self.name if model == DEFAULT_NAME else model

    def _is_alias(self, model: str) -> bool:
        parts = ([re.escape(part) for part in pattern.split("*")] for pattern in self.patterns)
        return any(re.fullmatch(".*".join(part), model, re.DOTALL) for part in parts)

    def refuse_while_draining(self) -> None:
        """RequestError 503 once no new requests are taken."""
        if self.draining:
            raise RequestError(f"{self.going} and takes no new requests", None, "draining", 503)

    @property
    def going(self) -> str:
        """What it does where it drains: for good, or until an operator has it go on."""
        return "the server is shutting down" if self.ending else "the server is drained by /admin/drain"

    def bound(self, param: str) -> Bound:
        """What a prompt in the field `param` may have."""
        return Bound(self.max_model_len, param)

    async def encode(self, text: str, bound: Bound, *, salt: str = "") -> np.ndarray:
        """Raw text as token ids, int32 [tokens]. RequestError for a text beyond `bound`, unread where its length says
        so."""
        tokenizer = self.tokenizer(bound.param)
        return await self.lanes.encode(
            lambda: tokenizer.draft_text(text, salt=salt, bound=bound), size=len(text)
        )

    async def fill_in(self, before: str, after: str, bound: Bound, *, salt: str = "") -> np.ndarray:
        """The prompt for what goes between two texts, int32 [tokens]. RequestError for texts beyond `bound`, or a tokenizer
        without the tokens for it."""
        tokenizer = self.tokenizer(bound.param)
        if any(tokenizer.find(mark) is None for mark in FIM):
            text = "the model's tokenizer has no tokens for fill-in-the-middle; leave suffix out"
            raise RequestError(text, "suffix", "unsupported_field", 400)
        begin, hole, end = FIM
        segments = [BOS, begin, before, hole, after, end]
        return await self.lanes.encode(
            lambda: tokenizer.draft(segments, salt=salt, bound=bound), size=len(before) + len(after)
        )

    def piece(self, token: int, *, as_id: bool = False) -> str:
        """One token as text, for log-probabilities; bytes that are no character alone are shown as
        `bytes:\\xe2`. `as_id`: as `token_id:N`, as it is without a tokenizer."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None or as_id:
            return f"token_id:{token}"
        text = tokenizer.decode([token], skip_special=False)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{b:02x}" for b in tokenizer.token_bytes(token))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        return [self.piece(t) for t in tokens]

    def close(self) -> None:
        self.lanes.close()
        if self.tracer is not None:
            self.tracer.close()
