"""What somebody meant who wrote a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import takewhile

ALIKE = 0.75
"""Share of letters in common from which a known name is worth a suggestion: `prot` is `port`; `4090` is no `h200`."""
SAME = {
    "bf16": "bfloat16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "gpu": "cuda",
    "nvidia": "cuda",
    "warn": "warning",
    "fp8": "fp8_ds_mla",
    "fp4": "mxfp4",
    "jsonl": "json",
    "all": "auto",
}
"""Other words for a name, which are nothing like it."""
SHORTEST = 3
"""Letters of a beginning that stand for the whole name."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing, also for a word that is known: what is wrong then is something else. Names that begin
    with `word` come first, then the one most like it. Dashes in front, `_` for `-` and upper case do not count."""
    plain = {_plain(name): name for name in known}
    if word in plain.values():
        return ""
    meant = _plain(word)
    if SAME.get(meant) in plain.values():
        return f"; did you mean {SAME[meant]!r}?"
    begun = sorted((n for n in plain if n.startswith(meant)), key=len) if len(meant) >= SHORTEST else []
    close = begun[:3]
    if plain and not close:
        best = max(plain, key=lambda name: _likeness(meant, name))
        close = [best] if _likeness(meant, best)[0] >= ALIKE else []
    return f"; did you mean {' or '.join(repr(plain[n]) for n in close)}?" if close else ""


def _likeness(a: str, b: str) -> tuple[float, int]:
    """Share of letters in common; of equals the one that begins alike comes first."""
    return difflib.SequenceMatcher(None, a, b).ratio(), sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    )


def _plain(name: str) -> str:
    return name.lstrip("-").lower().replace("_", "-")
