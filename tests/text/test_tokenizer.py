"""Tokenizer and detokenizer."""

from __future__ import annotations

import threading
from importlib import resources

import pytest
from dsv4.errors import ConfigError
from dsv4.text.chat import DSML, USER
from dsv4.text.tokenizer import Marker, Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

NANO = Tokenizer.from_dir(resources.files("dsv4") / "data" / "nano", vocab_size=8192)
SAMPLE = "Grüße, 世界! 👩‍👩‍👧 naïve 12345 \n\n\tdef f(x): return x\u0301"


@pytest.fixture(scope="module")
def v4() -> Tokenizer:
    return Tokenizer.v4()


def test_v4_ids_of_the_release(v4: Tokenizer) -> None:
    ids = {
        "<｜begin▁of▁sentence｜>": 0,
        "<｜end▁of▁sentence｜>": 1,
        "<｜User｜>": 128803,
        "<｜Assistant｜>": 128804,
    }
    ids |= {"<think>": 128821, "</think>": 128822, "｜DSML｜": 128825, "<｜latest_reminder｜>": 128828}
    assert {name: v4.special(name) for name in ids} == ids
    assert v4.decode(v4.encode(SAMPLE)) == SAMPLE


def test_user_text_cannot_make_special_tokens(v4: Tokenizer) -> None:
    text = "<｜User｜> ｜DSML｜ </think> <｜end▁of▁sentence｜>"
    for tokenizer in (v4, NANO):
        ids = tokenizer.encode_segments([USER, text, DSML, "x"])
        specials = [i for i in ids if i in {tokenizer.special(m) for m in (USER, DSML)}]
        assert ids[0] == tokenizer.special(USER) and specials == [
            tokenizer.special(USER),
            tokenizer.special(DSML),
        ]
        assert tokenizer.decode(ids, skip_special=False) == "<｜User｜>" + text + "｜DSML｜x"
        assert len(tokenizer.encode(text)) < len(ids)  # raw prompts do recognise them


def test_text_pieces_are_merged_as_one_text(v4: Tokenizer) -> None:
    assert v4.encode_segments(["Hello wor", "ld, how", " are you"]) == v4.encode("Hello world, how are you")


def test_an_unknown_marker_is_one_line() -> None:
    with pytest.raises(ConfigError, match="has no special token '<nope>'"):
        NANO.encode_segments([Marker("<nope>")])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 8191), max_size=40), st.booleans())
def test_pieces_joined_are_the_whole(ids: list[int], skip: bool) -> None:
    detokenizer = NANO.detokenizer(skip_special=skip)
    pieces = [detokenizer.push(i) for i in ids] + [detokenizer.flush()]
    assert "".join(pieces) == NANO.decode(ids, skip_special=skip)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_no_piece_splits_a_character(text: str) -> None:
    detokenizer = NANO.detokenizer()
    ids = NANO.encode_segments([text])
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) == text and ("\ufffd" in text or all("\ufffd" not in p for p in pieces))


def test_bytes_that_are_no_text_come_out_as_replacement_characters_once_certain() -> None:
    part = next(i for i in range(32, 8192) if NANO.token_bytes(i) == b"\xf0")
    letter = NANO.encode("a")[0]
    detokenizer = NANO.detokenizer()
    assert [detokenizer.push(part), detokenizer.push(letter), detokenizer.flush()] == ["", "\ufffda", ""]


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    encoding, turns = threading.Event(), 0

    def encode() -> None:
        encoding.set()
        NANO.encode_segments(["word " * 200_000])
        encoding.clear()

    worker = threading.Thread(target=encode)
    worker.start()
    encoding.wait()
    while encoding.is_set():  # with the interpreter's lock held by the encoder, a turn or two
        turns += 1
        threading.Event().wait(0.001)
    worker.join()
    assert turns > 20
