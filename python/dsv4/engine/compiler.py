"""Requests whose grammar is not compiled yet wait here, while threads compile it; steps go on meanwhile.

All but the threads' work is on the thread that carries out messages. Requests with the same grammar go on in their order, so a fork
finds its parent.
"""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv4.engine.grammars import Grammars
from dsv4.engine.messages import Submit
from dsv4.sampling import Grammar

THREADS = 4


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar is there, or what it failed of."""

    text: str
    error: Exception | None


class Compiler:
    """What waits, by the text of its grammar."""

    def __init__(self, grammars: Grammars | None, inbox: queue.SimpleQueue[Any]) -> None:
        """`inbox` gets a `Compiled` for each grammar."""
        self._grammars, self._inbox = grammars, inbox
        self._waiting: dict[str, list[tuple[Submit, np.ndarray]]] = {}
        self._threads = ThreadPoolExecutor(THREADS, "dsv4-grammar")
        if grammars is not None:
            self._threads.submit(grammars.vocabulary)

    @property
    def busy(self) -> bool:
        """Whether requests wait."""
        return bool(self._waiting)

    def takes(self, m: Submit, prompt: np.ndarray) -> bool:
        """Whether a request waits here from now on; False where it has no grammar, or one that is known."""
        grammar = m.params.grammar
        if grammar is None or self._grammars is None or self._grammars.knows(grammar):
            return False
        if (waiting := self._waiting.get(grammar.text)) is not None:
            waiting.append((m, prompt))
        else:
            self._waiting[grammar.text] = [(m, prompt)]
            self._threads.submit(self._compile, grammar)
        return True

    def waiting(self, text: str) -> list[tuple[Submit, np.ndarray]]:
        """What has waited for a grammar, in the order in which it came; it waits no longer."""
        return self._waiting.pop(text, [])

    def forget(self, key: int) -> None:
        """A request that nobody waits for any more."""
        for waiting in self._waiting.values():
            waiting[:] = [(m, prompt) for m, prompt in waiting if m.key != key]

    def close(self) -> None:
        """Nothing is compiled any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: Grammar) -> None:
        error: Exception | None = None
        try:
            assert self._grammars is not None
            self._grammars.compile(grammar)
        except Exception as e:
            error = e
        self._inbox.put(Compiled(grammar.text, error))
