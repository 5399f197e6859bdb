"""Stop strings: the same end however the text was cut, nothing of them shown, nothing else kept."""

from __future__ import annotations

import time

from dsv4.text.stop import StopStrings
from hypothesis import given, settings
from hypothesis import strategies as st

TEXTS = st.text(alphabet="ab\n", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """What is shown and what matched, by trying every end in turn."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=600, deadline=None)
@given(TEXTS, STOPS, st.booleans(), st.data())
def test_the_cuts_do_not_matter(text: str, stops: list[str], include: bool, data: st.DataObject) -> None:
    matcher, shown, rest = StopStrings(stops, include=include), "", text
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        shown, rest = shown + matcher.push(rest[:n]), rest[n:]
        assert expected(text, stops, include)[0].startswith(shown)
    assert (shown + matcher.flush(), matcher.matched) == expected(text, stops, include)


@settings(max_examples=300, deadline=None)
@given(TEXTS, STOPS)
def test_no_more_is_held_back_than_needed(text: str, stops: list[str]) -> None:
    matcher, shown = StopStrings(stops), ""
    for i, char in enumerate(text):
        shown += matcher.push(char)
        if matcher.matched is not None:
            return
        held = text[len(shown) : i + 1]
        assert held == "" or any(s.startswith(held) and s != held for s in stops)


def test_the_one_complete_first_wins() -> None:
    matcher = StopStrings(["abc", "b"])
    assert matcher.push("xabc") == "xa" and matcher.matched == "b"
    matcher = StopStrings(["b", "ab"])
    assert matcher.push("xabc") == "x" and matcher.matched == "ab"


def test_below_the_minimum_length_a_stop_string_is_text() -> None:
    matcher = StopStrings(["ab"])
    assert matcher.push("xab", armed=False) == "xab" and matcher.matched is None
    assert matcher.push("ya", armed=False) == "y"
    assert matcher.push("b z") == "" and matcher.matched == "ab"  # it ends after the minimum


def test_long_stop_strings_cost_no_more_per_character() -> None:
    matcher = StopStrings([("ab" * 512)[: 1023 - i] + "c" for i in range(16)])
    start = time.perf_counter()
    for _ in range(2000):
        matcher.push("abab")
    assert time.perf_counter() - start < 10  # takes about 0.05 s
