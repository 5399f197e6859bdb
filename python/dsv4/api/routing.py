"""Hints of a request body and its headers: tenant, urgency, session, and how long its prefix is to be kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsv4.api.caller import TENANT_HEADER
from dsv4.api.fields import Fields, refuse
from dsv4.api.http import Call, header
from dsv4.engine.routing import Routing

TTLS = {"5m": 300.0, "1h": 3600.0}
"""`cache_control.ttl`, in seconds. Without it `ephemeral` means the first."""


def salt_of(fields: Fields) -> str:
    """`cache_salt`: what is cached is shared only under an equal one."""
    salt = fields.text("cache_salt", "", longest=512) or ""
    if "\0" in salt:  # stands between a tenant's name and its salts
        raise refuse("cache_salt", salt, "text without U+0000")
    return salt


def routing_of(call: Call) -> Routing:
    """Raises RequestError naming the field."""
    fields, own = call.fields, call.caller.tenant
    tenant = own.name or header(call.scope, TENANT_HEADER)
    if len(tenant) > 512:
        raise refuse("x-dsv4-tenant", tenant, "at most 512 characters", f"; this has {len(tenant)}")
    user = fields.text("user", "", longest=512) or ""
    return Routing(
        salt=own.salted(salt_of(fields)),
        priority=fields.integer("priority", -(2**31), 2**31 - 1, 0) or 0,
        tenant=tenant or user,
        deadline_ms=fields.number("deadline_ms", 0, 1e9),
        session=fields.text("prompt_cache_key", longest=512),
        ttl=_ttl(fields),
        retention=fields.integer("retention_priority", -100, 100, 0) or 0,
    )


def _ttl(fields: Fields) -> float | None:
    """The longest `cache_control` on the body, its messages and their parts, system blocks and tools. The whole prompt is
    kept that long: a prefix is worth nothing without what comes before it."""
    longest: float | None = None
    for control in _controls(fields):
        control.choice("type", ("ephemeral",), "ephemeral")
        ttl = TTLS[control.choice("ttl", tuple(TTLS), "5m") or "5m"]
        longest = ttl if longest is None else max(longest, ttl)
    return longest


def _controls(fields: Fields) -> Iterator[Fields]:
    found = [("", fields.body)]
    for name in ("system", "messages", "tools"):
        entries = fields.body.get(name)
        for i, entry in enumerate(entries if type(entries) is list else ()):
            if type(entry) is not dict:
                continue
            found.append((f"{name}[{i}].", entry))
            parts: Any = entry.get("content")
            for j, part in enumerate(parts if type(parts) is list else ()):
                if type(part) is dict:
                    found.append((f"{name}[{i}].content[{j}].", part))
    for where, holder in found:
        if holder.get("cache_control") is not None:
            yield Fields(holder, where).nested("cache_control")
