"""Masks against trying every token, and answers that are drawn from masks alone: the worst that a model can do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from dsv4.engine.grammars import Grammars
from dsv4.engine.masks import Constraint
from dsv4.sampling import Grammar
from dsv4.text.call_grammar import Calls
from dsv4.text.chat import END_THINK, encode_chat
from dsv4.text.form import Format, chat_grammar
from dsv4.text.output import OutputParser, ToolArguments, ToolStart
from dsv4.text.tools import MAX_KEY

from tests.support.fake_engine import EOS, small_tokenizer
from tests.support.schemas import random_schema

VOCAB = 8192
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
STRICT = {
    "type": "function",
    "function": {
        "name": "book",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "seats": {"type": "integer", "minimum": 1, "maximum": 9},
                "class": {"enum": ["first", "second"]},
                "names": {"type": "array", "items": {"$ref": "#/$defs/name"}, "maxItems": 2},
                "note": {"type": "string"},
            },
            "required": ["class", "names"],
            "additionalProperties": False,
            "$defs": {"name": {"type": "string", "maxLength": 4}},
        },
    },
}
BARE = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, STRICT, BARE]


@cache
def grammars() -> Grammars:
    return Grammars(small_tokenizer, VOCAB, [EOS])


def form_of(text: str) -> Constraint:
    return grammars().constraint(Grammar(text, "x"), ends=[EOS], least=0)


def allowed(form: Constraint, output: list[int], of: Grammars | None = None) -> np.ndarray:
    """Tokens that may follow."""
    masks, failed = (of or grammars()).maker.masks([(0, form, output)])
    assert not failed
    return np.flatnonzero(np.unpackbits(masks.bits[0].view(np.uint8), bitorder="little")[:VOCAB])


def written(text: str, seed: int, most: int = 250) -> tuple[list[int], bool]:
    """An answer of tokens that the masks allow, and whether it has ended. Tokens that lead on are likelier, so that it does."""
    tokenizer, r, output = small_tokenizer_once(), np.random.default_rng(seed), list[int]()
    form = form_of(text)
    while len(output) < most:
        may = allowed(form, output)
        leading = [t for t in may if leads_on(int(t))]
        token = int(r.choice(leading if leading and r.random() < 0.6 else may))
        if token == EOS:
            return output, True
        output.append(token)
    assert tokenizer
    return output, False


@cache
def small_tokenizer_once():  # noqa: ANN201
    return small_tokenizer()


@cache
def leads_on(token: int) -> bool:
    text = small_tokenizer_once().token_bytes(token)
    return token == EOS or text in (
        b"\xef\xbd\x9cDSML\xef\xbd\x9c",
        b"</think>",
        b'"',
        b"<",
        b"</",
        b"\n",
        b"}",
        b"]",
    )


CASES = {
    "auto": Calls(TOOLS),
    "required": Calls(TOOLS, must=True),
    "named": Calls(TOOLS, must=True, only=("book",)),
    "one": Calls(TOOLS, must=True, several=False),
}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_calls_always_parse(name: str, thinking: bool) -> None:
    calls, parsed = CASES[name], 0
    text = chat_grammar(small_tokenizer_once(), thinking=thinking, calls=calls)
    assert text is not None
    for seed in range(40):
        output, ended = written(text, seed)
        if not ended:
            continue
        said = small_tokenizer_once().decode(output, skip_special=False)
        found = list(calls_in(said, thinking))
        parsed += bool(found)
        assert found or not calls.must
        assert calls.several or len(found) == 1
        assert all(tool in (calls.only or ("get_weather", "book", "now")) for tool, _ in found)
        block = said.partition("<｜DSML｜")[2]
        assert block.count("｜DSML｜invoke name=") == len(found), said
        assert not found or said.endswith("</｜DSML｜invoke>\n</｜DSML｜tool_calls>"), said
        for tool, arguments in found:
            if tool == "book":
                assert arguments["class"] in ("first", "second") and len(arguments["names"]) <= 2, arguments
                assert 1 <= arguments.get("seats", 1) <= 9 and isinstance(arguments.get("note", ""), str)
    assert parsed >= (0 if name == "auto" else 5), parsed


def calls_in(said: str, thinking: bool) -> Iterator[tuple[str, dict]]:
    parser = OutputParser(thinking=thinking, tools=True, schemas={}, most_calls=None, continues=False)
    names, bodies = list[str](), list[str]()
    for piece in parser.push(said) + parser.finish(cut=False):
        if isinstance(piece, ToolStart):
            names.append(piece.name)
            bodies.append("")
        elif isinstance(piece, ToolArguments):
            bodies[piece.index] += piece.text
    return zip(names, map(json.loads, bodies), strict=True)


@pytest.mark.parametrize("seed", range(6))
def test_masks_are_what_trying_every_token_gives(seed: int) -> None:
    """One form of several steps, and each token by itself in a copy of the matcher."""
    text = Format("json", random_schema(seed), "x").text()
    if seed % 2:
        text = chat_grammar(small_tokenizer_once(), thinking=seed % 4 == 1, calls=CASES["auto"]) or ""
    output, _ = written(text, seed, 40)
    form, slow = form_of(text), form_of(text).matcher
    for n in range(0, len(output), 5):
        assert slow.consume_tokens(output[max(0, n - 5) : n]) or not n
        one_by_one = [t for t in range(VOCAB) if t != EOS and slow.validate_tokens([t])]
        one_by_one += [EOS] * slow.is_accepting()
        mask = allowed(form, output[:n]).tolist()
        if mask != sorted(
            one_by_one
        ):  # where the next letters are certain they come as the tokenizer cuts them
            certain = slow.compute_ff_bytes()
            assert len(mask) == 1 and mask[0] in one_by_one
            assert certain.startswith(small_tokenizer_once().token_bytes(mask[0])), (mask, certain)


def test_an_answer_ends_where_its_form_does_and_not_before() -> None:
    tokenizer = small_tokenizer_once()
    form = form_of(Format("choice", ["yes"], "x").text())
    assert EOS not in allowed(form, [])
    assert allowed(form, tokenizer.encode("yes")).tolist() == [EOS]


def test_min_tokens_bars_the_end_unless_nothing_else_may_come() -> None:
    text, tokenizer = Format("regex", "(ab)*", "x").text(), small_tokenizer_once()
    assert EOS in allowed(form_of(text), [])
    longer = grammars().constraint(Grammar(text, "x"), ends=[EOS], least=3)
    assert EOS not in allowed(longer, []) and len(allowed(longer, []))
    over = grammars().constraint(Grammar(Format("choice", ["yes"], "x").text(), "x"), ends=[EOS], least=50)
    assert allowed(over, tokenizer.encode("yes")).tolist() == [EOS]


def test_the_marker_in_letters_is_no_text() -> None:
    tokenizer = small_tokenizer_once()
    matcher = form_of(chat_grammar(tokenizer, thinking=False, calls=CASES["auto"]) or "").matcher
    letters = tokenizer.encode_segments(["<｜DSML｜"])
    assert tokenizer.find("｜DSML｜") not in letters
    assert 0 < matcher.validate_tokens(letters) < len(letters)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("key", ["a<b", "size>", "a｜b", "filter[a]", "x" * MAX_KEY, "a'b=", "é "])
def test_every_parameter_that_is_taken_can_be_written(key: str, strict: bool) -> None:
    """Names with `<`, `>` and `｜` could be asked for and not be given."""
    schema = {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]}
    function = {"name": "f", "parameters": schema, "strict": strict}
    tokenizer = small_tokenizer_once()
    text = chat_grammar(
        tokenizer, thinking=False, calls=Calls([{"type": "function", "function": function}], must=True)
    )
    call = {"function": {"name": "f", "arguments": json.dumps({key: "v"})}}
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"type": "function", "function": function}]
    said = encode_chat(messages, tools=tools)
    tokens = tokenizer.encode_segments(said[max(i for i, s in enumerate(said) if s == END_THINK) + 1 :])
    matcher = form_of(text or "").matcher
    assert matcher.validate_tokens(tokens) == len(tokens), tokenizer.decode(tokens, skip_special=False)


@pytest.mark.parametrize("mark", ["｜DSML｜", "<think>", "</think>"])
@pytest.mark.parametrize("cut", ["tokens", "letters"])
def test_markup_in_letters_is_never_completed_in_a_chat(mark: str, cut: str) -> None:
    """Within a string of JSON too, where the grammar lets any text stand; what reads the answer would take it for the token."""
    tokenizer = small_tokenizer_once()
    text = Format("json", {"type": "object", "properties": {"a": {"type": "string"}}}, "x").text()
    begun = tokenizer.encode('{"a": "')
    pieces = [f"b {mark} c"] if cut == "tokens" else list(f"b {mark} c")
    letters = [token for piece in pieces for token in tokenizer.encode_letters(piece)]
    assert tokenizer.find(mark) not in letters
    for chat in (False, True):
        form = grammars().constraint(Grammar(text, "x", chat=chat), ends=[EOS], least=0)
        output, stopped = list(begun), None
        for token in letters:
            if token not in allowed(form, output):
                stopped = tokenizer.decode(output)
                break
            output.append(token)
        assert (stopped is not None) == chat
        assert not chat or (mark not in stopped and stopped.startswith('{"a": "b'))


def test_what_must_be_spelled_is() -> None:
    """A form that asks for markup itself is kept."""
    text = Format("choice", ["<think>"], "x").text()
    form, output = grammars().constraint(Grammar(text, "x", chat=True), ends=[EOS], least=0), list[int]()
    for token in small_tokenizer_once().encode_letters("<think>"):
        assert token in allowed(form, output)
        output.append(token)


def test_rows_beside_each_other_are_what_each_is_alone() -> None:
    """With one token more, with several, ended, gone, and with one that its form does not have."""
    tokenizer = small_tokenizer_once()
    texts = [Format("json", random_schema(seed), "x").text() for seed in range(4)]
    outputs = [written(text, seed, 12)[0] for seed, text in enumerate(texts)]
    yes = Format("choice", ["yes"], "x").text()
    texts, outputs = [*texts, yes, yes], [*outputs, [*tokenizer.encode("yes"), EOS], tokenizer.encode("no")]
    forms = [form_of(text) for text in texts]
    for upto in (0, 1, 2, 3, 5, 30):
        rows = [
            (2 * i, form, output[:upto]) for i, (form, output) in enumerate(zip(forms, outputs, strict=True))
        ]
        masks, failed = grammars().maker.masks([*rows, (99, None, ())])
        assert masks.places.tolist() == [0, 2, 4, 6, 8, 10, 99] and set(failed) == ({10} if upto else set())
        for i, (text, output) in enumerate(zip(texts[:4], outputs[:4], strict=True)):
            may = np.flatnonzero(np.unpackbits(masks.bits[i].view(np.uint8), bitorder="little")[:VOCAB])
            assert may.tolist() == allowed(form_of(text), output[:upto]).tolist()
        everything = [4] * (upto > len(outputs[4]) - 1) + [5] * bool(upto) + [6]
        assert [i for i in range(4, 7) if (masks.bits[i] == -1).all()] == everything


def test_letters_that_must_come_are_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows come by: a mask would wait for the tokenizer, and rows for each other."""
    tokenizer, asked = small_tokenizer(), list[str]()
    encode = tokenizer.encode_letters
    monkeypatch.setattr(tokenizer, "encode_letters", lambda text: asked.append(text) or encode(text))
    own = Grammars(lambda: tokenizer, VOCAB, [EOS])
    text, answer = Format("choice", ["a certain answer"], "x").text(), tokenizer.encode("a certain answer")
    for _ in range(3):
        form, output = own.constraint(Grammar(text, "x"), ends=[EOS], least=0), list[int]()
        for token in answer:
            assert token in allowed(form, output, own)
            output.append(token)
    assert asked and len(asked) == len(set(asked)), asked


def test_what_one_answer_makes_of_a_lexer_ends_no_other() -> None:
    """Requests of one grammar share its lexer, whose states are bounded. Some dozen answers to this form fill it."""
    form = Grammar(Format("regex", "(a|b)*a(a|b){24}", "x").text(), "x")
    own, rng = Grammars(small_tokenizer, VOCAB, [EOS]), np.random.default_rng(0)
    beside, output = own.constraint(form, ends=[EOS], least=0), list[int]()
    for _ in range(60):
        one, answer = own.constraint(form, ends=[EOS], least=0), list[int]()
        while len(answer) < 300:
            rows = [(0, one, answer), (1, beside, output)][: 1 + (len(answer) % 10 == 0)]
            masks, failed = own.maker.masks(rows)
            assert not failed
            for (*_, into), bits in zip(rows, masks.bits, strict=True):
                may = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[:VOCAB])
                into.append(int(rng.choice(may[may != EOS])))
    assert len(output) == 60 * 30
