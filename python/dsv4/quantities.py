"""Sizes and counts as people write them: 2GiB, 500MB, 64k, 1M."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?I?)B?", re.ASCII)
_COUNTS = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
"""As vLLM reads them: a small letter is a decimal thousand, a capital one a binary."""
_COUNT = re.compile(r"([+-]?)(\d[\d_]*)(\.\d+)?\s*([kKmMgG]?)", re.ASCII)


def count_expected(text: str) -> str:
    """What a count takes, for the error about `text`; units are told to those who tried one."""
    tried = text.strip()[:1].isdigit() and text.strip()[-1:].isalpha()
    return f"a whole number{', or such as 64k (64,000), 64K (65,536) or 1M (1,048,576)' if tried else ''}"


def parse_bytes(text: str) -> int:
    """'2GiB', '500 MB', '1048576' -> bytes. Raises ValueError."""
    found = _SIZE.fullmatch(text.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size; write for example 2GiB, 500MB or 1048576")
    return int(float(found[1]) * _UNITS[found[2]])


def parse_count(text: str) -> int:
    """'64k' -> 64000, '64K' -> 65536, '1M' -> 1048576, '1.5k' -> 1500, '1_000' -> 1000. Raises ValueError."""
    found = _COUNT.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no count; it takes {count_expected(text)}")
    sign, whole, part, unit = found.groups()
    value = int(whole) * _COUNTS.get(unit, 1)
    if part is not None:
        # Only thousands have parts that are counts: 25.6k is 25,600, and 1.5K would be a guess.
        if unit not in ("k", "m", "g"):
            raise ValueError(f"{text!r} is no whole number")
        more = round(float(part) * _COUNTS[unit], 6)
        if more != int(more):
            raise ValueError(f"{text!r} is no whole number")
        value += int(more)
    return -value if sign == "-" else value
