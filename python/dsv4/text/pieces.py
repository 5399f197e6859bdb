"""Where a long text may be cut so that its pieces, encoded one by one, have the ids of the whole.

V4's pre-tokenizer splits a text into words with three patterns, one after the other, and merges never cross a word. So a
cut is exact where a word ends whatever stands further left or right. `_CUT` has such places; each is one that no
alternative of the patterns can match across, and no pattern looks behind:

| between | why a word ends there |
| --- | --- |
| anything but white space, and a space | a space only begins a match, or stands in a match of white space alone |
| a line feed, and anything but white space | a line feed only ends a match |
| an ASCII letter, and ASCII punctuation | letters end with the last letter; punctuation begins a match |
| an ASCII digit, and an ASCII letter or punctuation | the first pattern takes runs of digits out |
| Chinese or Japanese, and anything else | the second pattern takes such runs out |

Places depend on the text before them alone (and the character after), so texts that begin alike are cut alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

PIECE = 8192
"""Characters of a piece, at least; a few milliseconds of work."""

_WINDOW = 16384
"""Characters that are searched for a place at once: Python's `re` lets no other thread run meanwhile."""

_CJK = "\u4e00-\u9fa5\u3040-\u30ff"
_CUT = re.compile(
    r"(?<=\S)(?= )|(?<=\n)(?=\S)"
    r"|(?<=[A-Za-z0-9])(?=[!-/:-@\[-`{-~])|(?<=[0-9])(?=[A-Za-z])"
    rf"|(?<=[{_CJK}])(?=[^{_CJK}])|(?<=[^{_CJK}])(?=[{_CJK}])"
)

_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)


def cuttable(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json has the pre-tokenizer that the places above are made for, and nothing that sees more than
    a word."""
    steps = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers") or []
    known = [{"type": "Split", "pattern": p, "behavior": "Isolated", "invert": False} for p in _SPLITS]
    known.append({"type": "ByteLevel", "add_prefix_space": False, "use_regex": False})
    found = [{**s, "pattern": _plain(s["pattern"]["Regex"])} if "pattern" in s else s for s in steps]
    normalizer = tokenizer.get("normalizer")
    return (
        [{k: v for k, v in s.items() if k != "trim_offsets"} for s in found] == known
        and (not normalizer or normalizer == {"type": "Sequence", "normalizers": []})
        and not tokenizer.get("truncation")
        and tokenizer["model"]["type"] == "BPE"
        and not tokenizer["model"].get("dropout")
    )


def _plain(pattern: str) -> str:
    """A pattern as `_SPLITS` spells it: files have line ends in both spellings, and an escape that means nothing."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n").replace(r"\"", '"')


def pieces_of(text: str) -> Iterator[str]:
    """A text in pieces of a little over `PIECE` characters; longer where it has no place to cut."""
    begin, end = 0, len(text)
    while begin < end:
        place, at = None, begin + PIECE
        while place is None and at < end:
            place = _CUT.search(text, at, min(at + _WINDOW, end))
            at += _WINDOW
        cut = end if place is None else place.start()
        yield text[begin:cut]
        begin = cut
