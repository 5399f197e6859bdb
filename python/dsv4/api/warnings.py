"""What of a request was left out rather than refused, told in a header of its answer."""

from __future__ import annotations

from collections.abc import Sequence

from dsv4.api.sse import Headers

NAME = b"x-dsv4-warning"
_LONGEST = 1024


def warning_headers(left_out: Sequence[str]) -> Headers:
    """A header that says what was left out; none where nothing was."""
    if not left_out:
        return ()
    text = "; ".join(dict.fromkeys(left_out))
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in text[:_LONGEST])
    return ((NAME, shown.encode()),)
