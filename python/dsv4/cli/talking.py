"""One answer in the terminal: streams text as it comes, keeps the figures, ends early when asked to."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4.cli.common import LoadProgress, PrefillProgress, dim
from dsv4.config import EngineConfig
from dsv4.quantities import counted
from dsv4.text.blocks import Blocks

if TYPE_CHECKING:
    from types import FrameType

    from dsv4.engine.llm import LLM
    from dsv4.engine.request import RequestOutput, Usage
    from dsv4.sampling import SamplingParams
    from dsv4.text.stream import Reading


def load_model(config: EngineConfig) -> LLM:
    """The model in this process, with progress."""
    from dsv4.engine.checks import check

    check(config)  # before torch is imported
    from dsv4.engine.llm import LLM

    with LoadProgress() as progress:
        settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        return LLM(settings.pop("model"), progress=progress, **settings)


@dataclass(slots=True)
class Reply:
    """What came, and how fast."""

    blocks: Blocks = field(default_factory=Blocks)
    token_ids: list[int] = field(default_factory=list)
    tokens: int = 0
    """How many came; a server gives no ids."""
    finish_reason: str = "abort"
    usage: Usage | None = None
    began: float = field(default_factory=time.monotonic)
    first: float = 0.0
    last: float = 0.0

    def calls(self) -> list[dict[str, str]]:
        """The tool calls as OpenAI's clients write them."""
        return [{"name": call.name, "arguments": call.arguments} for call in self.blocks.calls]

    def speed(self) -> str:
        """`12 prompt tokens (0 cached), first token after 0.31 s; 40 tokens, 21.3 tokens/s`."""
        if self.usage is None:
            return f"interrupted after {counted(self.tokens, 'token')}" if self.tokens else "interrupted"
        if not self.tokens:
            return f"{counted(self.usage.prompt_tokens, 'prompt token')}, no token asked for"
        seconds, further = self.last - self.first, self.tokens - 1
        rate = f", {further / seconds:.1f} tokens/s" if further > 0 and seconds > 0 else ""
        prompt = f"{counted(self.usage.prompt_tokens, 'prompt token')} ({self.usage.cached_tokens:,} cached)"
        wait = f"first token after {self.first - self.began:.2f} s"
        return f"{prompt}, {wait}; {counted(self.tokens, 'token')}{rate}"


class Printer:
    """Content and tool calls to standard output, reasoning dimly to standard error, so that a pipe gets the
    answer only."""

    def __init__(self) -> None:
        self._in_reasoning = False

    def show(self, piece: Any) -> None:
        """Prints one piece of an answer."""
        from dsv4.text.output import Reasoning, ToolStart

        if isinstance(piece, Reasoning):
            sys.stderr.write(dim(piece.text))
            sys.stderr.flush()
            self._in_reasoning = True
            return
        if self._in_reasoning:
            sys.stderr.write("\n")
            self._in_reasoning = False
        write(f"\n{piece.name} " if isinstance(piece, ToolStart) else piece.text)


def answer(
    llm: LLM,
    prompt: list[int],
    params: SamplingParams,
    *,
    reading: Reading | None,
    show: Callable[[Any], None],
) -> Reply:
    """Generates and calls `show(piece)` for every piece of reasoning, content or tool call. `reading`: the prompt is a
    chat's. Ctrl-C ends it early.

    Raises RequestError when the request is refused or fails.
    """
    reply, progress = Reply(), PrefillProgress(len(prompt))
    stream = _stream(llm, prompt, params, reading)
    with interrupts() as interrupted, contextlib.closing(stream) as outputs:
        for output in outputs:
            if (failure := output.failure) is not None:
                raise failure
            if output.prefilled is not None:
                progress.update(output.prefilled)
            if output.token_ids:
                progress.clear()
                reply.last = time.monotonic()
                reply.first = reply.first or reply.last
                reply.token_ids += output.token_ids
                reply.tokens = len(reply.token_ids)
            for piece in output.pieces:
                reply.blocks.add(piece)
                show(piece)
            if output.finished:
                reply.finish_reason, reply.usage = output.finish_reason or "stop", output.usage
            if interrupted.is_set():
                break
    progress.clear()
    return reply


def _stream(
    llm: LLM, prompt: list[int], params: SamplingParams, reading: Reading | None
) -> Generator[RequestOutput, None, None]:
    yield from llm.stream(prompt, params, reading=reading)


@contextlib.contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Turns Ctrl-C into a flag: an exception in the middle of a step would leave the engine half-way. A
    second one is an exception again, for a step that never ends."""
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def write(text: str) -> None:
    """Text on standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
