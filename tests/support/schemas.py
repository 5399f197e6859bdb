"""Random JSON schemas, all with answers of bounded length."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("name", "count", "tags", "x", "is_open", "größe", "a b", 'q"t', "z9")


def random_schema(seed: int) -> dict[str, Any]:
    """An object, or now and then something else."""
    r = random.Random(seed)
    return _object(r, 2) if r.random() < 0.8 else _any(r, 2)


def _any(r: random.Random, depth: int) -> dict[str, Any]:
    makers = [_integer, _number, _string, _enum, _const, _boolean, _null, _format]
    if depth:
        makers += [_object, _array, _tuple, _union]
    return r.choice(makers)(r, depth - 1)


def _object(r: random.Random, depth: int) -> dict[str, Any]:
    names = r.sample(_WORDS, r.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {n: _any(r, depth) for n in names}}
    schema["required"] = r.sample(names, r.randint(0, len(names)))
    schema["additionalProperties"] = False
    return schema


def _array(r: random.Random, depth: int) -> dict[str, Any]:
    low = r.randint(0, 2)
    return {"type": "array", "items": _any(r, depth), "minItems": low, "maxItems": low + r.randint(0, 2)}


def _tuple(r: random.Random, depth: int) -> dict[str, Any]:
    items = [_any(r, depth) for _ in range(r.randint(1, 3))]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}


def _union(r: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(r, depth) for _ in range(r.randint(2, 3))]}


def _integer(r: random.Random, depth: int) -> dict[str, Any]:
    low = r.randint(-1000, 1000)
    schema = {"type": "integer", "minimum": low, "maximum": low + r.randint(0, 2000)}
    return schema | ({"multipleOf": r.choice((1, 2, 5))} if low <= 0 and r.random() < 0.2 else {})


def _number(r: random.Random, depth: int) -> dict[str, Any]:
    low = r.randint(-9, 9)
    return {
        "type": "number",
        r.choice(("minimum", "exclusiveMinimum")): low,
        "maximum": low + r.randint(1, 50),
    }


def _string(r: random.Random, depth: int) -> dict[str, Any]:
    if r.random() < 0.4:
        return {
            "type": "string",
            "pattern": r.choice(("^[a-f]{2,5}$", "^[A-Z][0-9]{1,3}$", r"^\d{4}-\d{2}$", "^(yes|no)$")),
        }
    low = r.randint(0, 3)
    return {"type": "string", "minLength": low, "maxLength": low + r.randint(0, 6)}


def _format(r: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "string", "format": r.choice(("date", "time", "ipv4", "uuid"))}


def _enum(r: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": r.sample(["a", "größer", 'say "hi"', 1, 2.5, None, True, "x\ny"], r.randint(1, 4))}


def _const(r: random.Random, depth: int) -> dict[str, Any]:
    return {"const": r.choice(("fixed", 7, False, None))}


def _boolean(r: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _null(r: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "null"}
