"""Forms that ask for much, or for nothing: each is refused with one line that names its field, or its masks let an answer go on; nothing raises
anything else, and the form beside it is untouched. How much work that may be is bounded by the library's fuel (`text/lark.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from dsv4.api.fields import Fields
from dsv4.api.grammar import MOST_CHOICES, openai_format
from dsv4.engine.grammars import Grammars
from dsv4.errors import RequestError
from dsv4.sampling import Grammar

from tests.support.fake_engine import EOS, small_tokenizer

VOCAB = 8192


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


FORMS: Mapping[str, dict[str, Any]] = {
    "an automaton of 2^200 states": {"guided_regex": "(a|b)*a(a|b){200}"},
    "repeats in repeats": {"guided_regex": "((((a{1,99}){1,99}){1,99}){1,99}){1,99}"},
    "a million letters": {"guided_regex": "a{1000000}"},
    "every letter many times": {"guided_regex": r"(\p{L}{1,500}\s){1,500}"},
    "twenty stars": {"guided_regex": "(.*a){20}"},
    "nothing at all": {"guided_regex": "[^\\s\\S]"},
    "an empty text": {"guided_regex": "()"},
    "letters of other alphabets": {"guided_regex": "[^a-z]{3}｜{2}\\x00"},
    "4,096 choices": {"guided_choice": [f"{'x' * (i % 50)}{i}" for i in range(4096)]},
    "one empty choice": {"guided_choice": ["", ""]},
    "choices of special tokens": {"guided_choice": ["<｜DSML｜", "<think>", "</think>"]},
    "an ambiguous rule": {"guided_grammar": 'start: s\ns: s s | "a" | s s s'},
    "a rule that is itself": {"guided_grammar": "start: s\ns: s"},
    "rules without an end": {"guided_grammar": 'start: "a" start'},
    "300 terminals": {
        "guided_grammar": "start: "
        + " | ".join(f"T{i}" for i in range(300))
        + "".join(f"\nT{i}: /[a-z]{{{i + 1}}}x/" for i in range(300))
    },
    "everything ignored": {"guided_grammar": 'start: "a"+\n%ignore /(?s:.)/'},
    "special tokens by number": {"guided_grammar": "start: <[1]> <[0-8000]> <[99999999]>"},
    "GBNF that recurs": {"guided_grammar": 'root ::= root "a" | "b"'},
    "63 levels": {"guided_json": nested(31)},
    "1,000 optional properties": {
        "guided_json": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1000)}}
    },
    "1,000 alternatives": {
        "guided_json": {
            "anyOf": [
                {"type": "object", "properties": {"k": {"const": i}, "v": nested(3)}} for i in range(1000)
            ]
        }
    },
    "all of what excludes itself": {"guided_json": {"allOf": [{"type": "string"}, {"type": "integer"}]}},
    "a list of a million": {
        "guided_json": {"type": "array", "items": {"type": "string", "maxLength": 10**6}, "minItems": 10**6}
    },
    "numbers without a middle": {
        "guided_json": {
            "type": "number",
            "exclusiveMinimum": 1,
            "exclusiveMaximum": 1.0000000001,
            "multipleOf": 3,
        }
    },
    "a reference to itself": {"guided_json": {"$ref": "#"}},
    "references in a ring": {
        "guided_json": {
            "$ref": "#/$defs/a",
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
        }
    },
    "references that double": {
        "guided_json": {
            "$ref": "#/$defs/d20",
            "$defs": {
                f"d{i}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i - 1}"}] * 2}
                if i
                else {"type": "null"}
                for i in range(21)
            },
        }
    },
    "a pattern that doubles": {
        "guided_json": {"type": "string", "pattern": "^" + "(a?){200}" + "a" * 200 + "$"}
    },
    "a schema of false": {"guided_json": {"type": "object", "properties": {"a": False}, "required": ["a"]}},
    "keys with quotes": {
        "guided_json": {"type": "object", "properties": {'"\n｜<': {"type": "null"}}, "required": ['"\n｜<']}
    },
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(small_tokenizer, VOCAB, [EOS])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a rule that is itself", "is a form that no answer has"),
        ("a reference to itself", "is a form that no answer has"),
        ("references in a ring", "is a form that no answer has"),
        ("nothing at all", "is a form that no answer has"),
        ("rules without an end", "parser error: Too many items"),
        ("a million letters", "lexer error: too many expressions constructed"),
        ("1,000 optional properties", "Current row has"),
        ("1,000 alternatives", "Current row has"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused_before_it_runs(
    grammars: Grammars, name: str, why: str
) -> None:
    (field,) = FORMS[name]
    form = openai_format(Fields(FORMS[name]))
    with pytest.raises(RequestError, match=f"^{field} .*{why}") as told:
        grammars.constraint(Grammar(form.text(), field, chat=True), ends=[EOS], least=0)
    assert told.value.status == 400 and told.value.param == field and "verbose" not in told.value.message


def test_as_many_choices_as_a_body_may_have(grammars: Grammars) -> None:
    choices = [f"number {i}" for i in range(MOST_CHOICES)]
    form = openai_format(Fields({"guided_choice": choices}))
    for chosen in (choices[0], choices[-1]):
        held = grammars.constraint(Grammar(form.text(), "x"), ends=[EOS], least=0)
        ids = [*small_tokenizer().encode(chosen), EOS]
        for at, token in enumerate(ids):
            masks, failed = grammars.maker.masks([(0, held, ids[:at])])
            assert not failed and masks.bits[0].view(np.uint8)[token // 8] >> token % 8 & 1


@pytest.mark.parametrize("name", FORMS)
def test_a_hostile_form(grammars: Grammars, name: str) -> None:
    (field,) = FORMS[name]
    plain = grammars.constraint(
        Grammar('{"grammars": [{"lark_grammar": "start: /[a-z]+/"}]}', "x"), ends=[EOS], least=0
    )
    try:
        form = openai_format(Fields(FORMS[name]))
        held = grammars.constraint(Grammar(form.text(), field, chat=True), ends=[EOS], least=0)
    except RequestError as e:
        assert (
            e.param == field
            and e.message.startswith(field)
            and "\n" not in e.message
            and len(e.message) < 500
        )
        return
    rng, output = np.random.default_rng(5), list[int]()
    for _ in range(12):
        masks, failed = grammars.maker.masks([(0, held, output), (1, plain, [])])
        assert 1 not in failed and masks.bits[1].any()
        if 0 in failed:  # it ends alone, with a line that names it
            assert failed[0].startswith(field) and "\n" not in failed[0]
            return
        may = np.flatnonzero(np.unpackbits(masks.bits[0].view(np.uint8), bitorder="little")[:VOCAB])
        output.append(int(rng.choice(may)))
        if output[-1] == EOS:
            return
