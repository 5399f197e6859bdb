"""Thoughts in the opaque fields that dialects have for them (`signature`, `encrypted_content`), which clients keep and send
back unread: what a client was not to see still comes back with its next turn.

It is the thought itself in base64, not encrypted: it belongs to the client.
"""

from __future__ import annotations

import base64
import binascii

_PREFIX = "dsv4."


def sealed(thought: str) -> str:
    """The thought as an opaque text."""
    return _PREFIX + base64.urlsafe_b64encode(thought.encode("utf-8", "replace")).decode()


def unsealed(text: object) -> str:
    """The thought of such a text; nothing for one that another server made."""
    if not isinstance(text, str) or not text.startswith(_PREFIX):
        return ""
    try:
        return base64.b64decode(text[len(_PREFIX) :], altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
