"""From the bytes of a body to values: lists of token ids as arrays, everything else as the parser has it, nothing without
a bound."""

from __future__ import annotations

import json
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from dsv4._core import scan_json
from dsv4.api import http
from dsv4.api.http import parse_object
from dsv4.errors import RequestError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.serving import RunningServer

NUMBERS = st.integers(-(2**31), 2**31 - 1) | st.integers(0, 9)
IDS = st.lists(NUMBERS, max_size=5)
SCALARS = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.integers(2**31, 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(["prompt", "tokens", "other", 'quo"te', "back\\", "pr\u00f6mpt"])
OBJECTS = st.dictionaries(KEYS, VALUES | IDS | st.lists(IDS, max_size=4), max_size=5)
SPACES = st.sampled_from(["", " ", "\n\t", "  "])


def plain(value: Any) -> Any:
    """With lists in place of arrays, each of which must be one of int32."""
    if isinstance(value, np.ndarray):
        assert value.dtype == np.int32 and value.ndim == 1 and value.flags.c_contiguous and len(value)
        return value.tolist()
    return [plain(v) for v in value] if isinstance(value, list) else value


def arrays_in(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (isinstance(value, list) and any(map(arrays_in, value)))


@settings(max_examples=300, deadline=None)
@given(value=OBJECTS, comma=SPACES, colon=SPACES)
def test_values_are_those_of_the_parser(value: dict, comma: str, colon: str) -> None:
    body = json.dumps(value, separators=(f"{comma},{comma}", f"{colon}:{colon}")).encode()
    parsed = parse_object(body)
    assert {k: plain(v) for k, v in parsed.items()} == orjson.loads(body)
    small = lambda v: type(v) is list and v and all(type(t) is int and -(2**31) <= t < 2**31 for t in v)  # noqa: E731
    for name, v in value.items():
        listed = small(v) or (type(v) is list and bool(v) and all(map(small, v)))
        assert arrays_in(parsed[name]) == (listed and name in http.ID_LISTS), (name, v)


@settings(max_examples=600, deadline=None)
@given(value=OBJECTS, place=st.integers(0, 400), junk=st.binary(max_size=3), drop=st.integers(0, 3))
def test_damaged_bodies_are_refused_or_read_as_the_parser_reads_them(
    value: dict, place: int, junk: bytes, drop: int
) -> None:
    whole = orjson.dumps(value)
    body = whole[: place % (len(whole) + 1)] + junk + whole[place % (len(whole) + 1) + drop :]
    try:
        expected = orjson.loads(body)
    except orjson.JSONDecodeError:
        expected = None
    if type(expected) is not dict:
        with pytest.raises(RequestError):
            parse_object(body)
    elif body.count(b'"prompt"') < 2 and body.count(b'"tokens"') < 2:
        assert {k: plain(v) for k, v in parse_object(body).items()} == expected


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt":[1,2],"prompt":"x"}',
        b'{"prompt":"x","prompt":[1,2]}',
        b'{"prompt":[1],"prompt":[2]}',
        b'{"a":{"prompt":[1,2]},"b":[{"tokens":[1]}]}',
        b'{"prompt":[-0]}',
        b'{"prompt":[1.0]}',
        b'{"prompt":[2147483648]}',
        b'{"prompt":[[1],[]]}',
        b'{"prompt":[]}',
    ],
)
def test_what_is_left_to_the_parser(body: bytes) -> None:
    parsed = parse_object(body)
    assert not any(map(arrays_in, parsed.values())) and parsed == orjson.loads(body)


@pytest.mark.parametrize(
    "body", [b'{"prompt":[01]}', b'{"prompt":[1,]}', b'{"prompt":[1 2]}', b'{"prompt":[1]', b'{"prompt":[-]}']
)
def test_lists_that_are_no_json(body: bytes) -> None:
    with pytest.raises(RequestError, match="no valid JSON"):
        parse_object(body)


def test_many_ids_and_many_lists() -> None:
    ids = list(range(1_000_000))
    parsed = parse_object(orjson.dumps({"prompt": ids, "max_tokens": 1}))
    assert parsed["prompt"].tolist() == ids and parsed["max_tokens"] == 1
    assert len(parse_object(orjson.dumps({"prompt": [[1, 2]] * 1024}))["prompt"]) == 1024
    left = parse_object(orjson.dumps({"prompt": [[1, 2]] * 1025}))["prompt"]
    assert left == [[1, 2]] * 1025


def test_a_count_bounds_what_is_made_of_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_VALUES", 1000)
    fits = {"messages": [{"role": "user", "content": "a,b,[c:"}] * 150, "prompt": list(range(5000))}
    assert parse_object(orjson.dumps(fits))["messages"] == fits["messages"]
    for many in ([[]] * 999, [{}] * 999, [0] * 999, {str(i): 0 for i in range(500)}, [""] * 999):
        for body in (orjson.dumps({"a": many}), orjson.dumps({"a": many})[:-2]):  # valid or not
            with pytest.raises(RequestError, match="more than 1000 values and keys") as e:
                parse_object(body)
            assert e.value.status == 413


@settings(max_examples=200, deadline=None)
@given(value=OBJECTS)
def test_the_count_is_of_values_and_keys(value: dict) -> None:
    def count(value: Any) -> tuple[int, int]:
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        below = [count(v) for v in inner]
        own = (
            len(inner) + len(inner) * isinstance(value, dict) + (value in ([], {}))
        )  # empty ones count twice
        return own + sum(n for n, _ in below), max((d for _, d in below), default=0) + isinstance(
            value, (list, dict)
        )

    values, depth, ids, rest = scan_json(orjson.dumps(value), [])
    assert ((values, depth), ids, rest) == (count(value), {}, orjson.dumps(value))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_byte_order_mark_is_passed_over(served: RunningServer, path: str) -> None:
    body = {"prompt": "Hi", "max_tokens": 1} if "chat" not in path else None
    body = body or {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    body = {"tokens": [5, 6]} if path == "/detokenize" else body
    response = httpx.post(served.url + path, content=b"\xef\xbb\xbf" + orjson.dumps(body))
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (
            "/v1/completions",
            {"prompt": [5, 6, 7], "max_tokens": 1, "return_token_ids": True},
            200,
            '"prompt_token_ids":[5,6,7]',
        ),
        ("/v1/completions", {"prompt": [[5, 6], [7]], "max_tokens": 1}, 200, '"prompt_tokens":3'),
        ("/v1/completions", {"prompt": [[5, 6], "Hi"], "max_tokens": 1}, 200, '"index":1'),
        (
            "/v1/completions",
            {"prompt": [5, 8192]},
            400,
            "prompt[1] is 8192; it takes token ids from 0 to 8191",
        ),
        ("/v1/completions", {"prompt": [5, -3]}, 400, "prompt[1] is -3"),
        ("/v1/completions", {"prompt": [5, 2**40]}, 400, f"prompt[1] is {2**40}"),
        ("/v1/completions", {"prompt": [[5], [6, 7, -3]]}, 400, "prompt[1][2] is -3"),
        ("/v1/completions", {"prompt": [5, 2**70]}, 400, f"prompt[1] is {2**70}"),
        ("/v1/completions", {"prompt": ["a", ""]}, 400, "prompt[1] is empty"),
        ("/v1/completions", {"prompt": [[5], [6, None]]}, 400, "it holds null"),
        ("/v1/completions", {"prompt": [5] * 5000}, 400, "prompt has 5000 tokens"),
        ("/v1/prefixes", {"prompt": [5, 6]}, 200, '"prompt_tokens":2'),
        ("/v1/prefixes", {"prompt": [5, 8192]}, 400, "prompt[1] is 8192"),
        ("/v1/prefixes", {"prompt": {"a": 1}}, 400, "an object of 1; it takes a list of token ids"),
        ("/tokenize", {"prompt": [5, 6]}, 400, "prompt is a list of 2; it takes text"),
        ("/tokenize", {"prompt": "Hi there"}, 200, '"tokens":['),
        ("/detokenize", {"tokens": [5, 8192]}, 400, "tokens[1] is 8192"),
        ("/detokenize", {"tokens": "x"}, 400, "tokens is 'x'; it takes a list of token ids"),
        ("/detokenize", {}, 200, '"prompt":""'),
    ],
)
def test_ids_on_every_way_in(served: RunningServer, path: str, body: dict, status: int, words: str) -> None:
    response = httpx.post(served.url + path, json=body)
    assert response.status_code == status and words in response.text, response.text


def test_a_long_list_of_ids_is_answered(served: RunningServer) -> None:
    body = b'{"prompt":[' + b",".join([b"7"] * 3_000_000) + b"]}"
    response = httpx.post(served.url + "/v1/completions", content=body, timeout=60)
    assert response.status_code == 400 and "3000000 tokens" in response.text
