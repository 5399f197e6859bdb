"""Sizes and counts as people write them (2GiB, 500MB, 64k, 1M), and which of them a setting takes."""

from __future__ import annotations

import re
from dataclasses import dataclass

MOST = 2**31 - 1
"""Of a count."""

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


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from `low` to `high`, without `low` itself where it is `open`. `such`: examples; `unit`: of what."""

    low: float = -MOST
    high: float = MOST
    open: bool = False
    such: str = ""
    unit: str = ""

    def words(self, kind: type, text: str = "") -> str:
        """`a whole number from 1`. `kind`: int or float. `text`: what could not be read; units are told to those who tried
        one."""
        tried = kind is int and text.strip()[:1].isdigit() and text.strip()[-1:].isalpha()
        such = "64k (64,000), 64K (65,536) or 1M (1,048,576)" if tried else self.such
        bounds = f"{' above' if self.open else ' from'} {self.low:g}" if self.low > -MOST else ""
        if self.high < MOST:
            bounds += f"{' and up to' if self.open or not bounds else ' to'} {_short(self.high)}"
        return f"a {'whole ' * (kind is int)}number{self.unit and ' of ' + self.unit}{bounds}{such and ', such as ' + such}"

    def fault(self, value: float, kind: type, also: str = "") -> str | None:
        """What is wrong with a value: `it takes a whole number from 1; the nearest is 1`. None where nothing is. `also`: what else
        than numbers is taken."""
        if self.low <= value <= self.high and not (self.open and value == self.low):
            return None
        near = "" if self.open and not value > self.low else nearest_number(value, self.low, self.high)
        if self.high == 1 and 2 <= value <= 100:  # a share that was meant as one of a hundred
            near = f"; {value:g}% is {value / 100:g}"
        return f"it takes {self.words(kind)}{also}{near}"


def counted(n: int, noun: str, plural: str = "") -> str:
    """`1 request`, `1,040 requests`. `plural`: where it takes more than an s."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def numbered(n: int, noun: str) -> str:
    """As `counted`, but `1040 tokens`: for refusals, in which clients look for numbers."""
    return counted(n, noun).replace(",", "")


SHARE = Range(0, 1, open=True, such="0.9")


def nearest_number(value: float, low: float, high: float) -> str:
    """`; the nearest is 128`: of the numbers from `low` to `high`. Nothing for a NaN."""
    return f"; the nearest is {_short(min(max(value, low), high))}" if value == value else ""


def _short(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}".replace("e+0", "e").replace("e+", "e")


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
        raise ValueError(f"{text!r} is no count; it takes {Range().words(int, text)}")
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
