"""Which steps are captured as CUDA graphs: decode steps (dsv4.engine.graphs) by batch size and context, and steps with chunks of prompts
(dsv4.engine.extends) by tokens, rows and context; of several ranks longer ones by what a rank has of them (dsv4.engine.dealt)."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4.model.parallel import UNIT

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of captured steps. Padding rows are alike, so together they cost the experts that one row reads."""

SHORTEST = 2048
"""Tokens of the shortest context. What is longer is captured by powers of two."""

EXTENDS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Tokens of captured steps with prompts. In longer ones the GPU works longer than the host takes to launch them."""

EXTEND_ROWS = (33, 257)
"""Their rows, one of them for padding. Kernels take a step with as many rows as tokens for a decode step, so none is in EXTENDS."""

DEALT = (512, 1024, 2048, 3072, 4096, 6144, 8192)
"""Tokens of captured steps whose prompts are dealt out over ranks. Few, as each takes a start of several ranks seconds."""


def sizes_of(running: int, chosen: Sequence[int] = ()) -> tuple[int, ...]:
    """Sizes that steps of up to `running` rows take, of `chosen` ones in ascending order (default: SIZES); larger steps than the
    largest run without a graph."""
    sizes = chosen or SIZES
    return tuple(n for i, n in enumerate(sizes) if i == 0 or sizes[i - 1] < running)


def contexts_of(max_len: int) -> tuple[int, ...]:
    """Contexts in tokens that steps up to `max_len` take."""
    powers = (SHORTEST << i for i in range(max_len.bit_length()))
    return (*(n for n in powers if n < max_len), max_len)


def extends_of(step_tokens: int, max_len: int, ranks: int = 1) -> tuple[int, ...]:
    """Sizes in tokens of captured steps with prompts in which every rank has every token, of an engine with steps of up to `step_tokens`: with
    several ranks up to a run of UNIT for each."""
    most = step_tokens if ranks == 1 else min(step_tokens, ranks * UNIT)
    needed = (n for i, n in enumerate(EXTENDS) if i == 0 or EXTENDS[i - 1] < most)
    return tuple(n for n in needed if n <= max_len)


def dealt_of(step_tokens: int, ranks: int) -> tuple[int, ...]:
    """Sizes in tokens of captured steps whose prompts are dealt out over ranks: those beyond `extends_of`."""
    sizes = [n for n in DEALT if n > ranks * UNIT]
    if ranks == 1 or step_tokens <= ranks * UNIT:
        return ()
    return tuple(n for i, n in enumerate(sizes) if i == 0 or sizes[i - 1] < step_tokens)


def owned_of(step_tokens: int, ranks: int) -> tuple[int, ...]:
    """Tokens of prompts that a rank has in such steps, in runs of UNIT: of one prompt; and a run more in the longest, as several prompts
    are not dealt out as evenly."""
    owned = [-(-n // (ranks * UNIT)) * UNIT for n in dealt_of(step_tokens, ranks)]
    return (*owned, owned[-1] + UNIT) if owned else ()


def captured_tokens(running: int, max_len: int, step_tokens: int, ranks: int = 1) -> int:
    """Tokens of the largest captured step, padding included."""
    dealt = [ranks * owned + extend_rows_of(running)[-1] for owned in owned_of(step_tokens, ranks)]
    return max(running, *extends_of(step_tokens, max_len, ranks), *dealt)


def cut_sizes_of(step_tokens: int, max_len: int, ranks: int = 1) -> tuple[int, ...]:
    """To which of these the scheduler cuts pieces of prompts (the core's `step_sizes`). The last is no longer than a step may be: a step of
    as many tokens is padded, not cut to the size before."""
    sizes = (*extends_of(step_tokens, max_len, ranks), *dealt_of(step_tokens, ranks))
    return tuple(sorted({min(n, step_tokens) for n in sizes}))


def extend_rows_of(running: int) -> tuple[int, ...]:
    """Rows of captured steps with prompts, of up to `running` requests; steps with more run without a graph."""
    return tuple(n for i, n in enumerate(EXTEND_ROWS) if i == 0 or EXTEND_ROWS[i - 1] <= running)


def extend_contexts_of(max_len: int, ranks: int = 1) -> tuple[int, ...]:
    """Contexts in tokens of captured steps with prompts: powers of four, as there are more sizes of them and a context that is too long
    costs a smaller share of a step; of several ranks those in which each has as many entries as one has, as it is that number by which kernels
    change: above 32,768 tokens a rank no row of scores is written whole (dsv4.kernels.triton.indexer), which takes longer."""
    powers = (SHORTEST * ranks << 2 * i for i in range(max_len.bit_length()))
    return (*(n for n in powers if n < max_len), max_len)


def at_start(contexts: Sequence[int], capture_context: int | None) -> tuple[int, ...]:
    """Of ascending contexts those that are captured at start, the longest first, so that later captures find room in the memory of
    earlier ones: what requests of up to `capture_context` tokens take (None: all)."""
    most = contexts[-1] if capture_context is None else capture_context
    return tuple(reversed([n for i, n in enumerate(contexts) if (contexts[i - 1] if i else 0) < most]))


def dealt_contexts_of(max_len: int, owned: int, ranks: int) -> tuple[int, ...]:
    """Contexts in tokens of captured steps whose prompts are dealt out, of which a rank has `owned` tokens: those of others that are no shorter
    than the step."""
    contexts = extend_contexts_of(max_len, ranks)
    return tuple(n for n in contexts if n >= min(owned * ranks, max_len))


def steps_of(running: int, max_len: int, step_tokens: int, ranks: int = 1, chosen: Sequence[int] = ()) -> int:
    """Steps that are captured at most."""
    extends = len(extends_of(step_tokens, max_len, ranks)) * len(extend_contexts_of(max_len, ranks))
    ordinary = (
        len(sizes_of(running, chosen)) * len(contexts_of(max_len)) + len(extend_rows_of(running)) * extends
    )
    return ordinary + dealt_steps_of(running, max_len, step_tokens, ranks)


def dealt_steps_of(running: int, max_len: int, step_tokens: int, ranks: int) -> int:
    """Those of them whose prompts are dealt out over ranks."""
    dealt = sum(len(dealt_contexts_of(max_len, owned, ranks)) for owned in owned_of(step_tokens, ranks))
    return len(extend_rows_of(running)) * dealt
