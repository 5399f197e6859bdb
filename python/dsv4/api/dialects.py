"""The dialects that are served. A new one is a file with a `Dialect`, and its name here."""

from __future__ import annotations

from dsv4.api import anthropic, openai_chat, openai_completions, responses
from dsv4.api.dialect import Dialect

DIALECTS: tuple[Dialect, ...] = (
    openai_chat.DIALECT,
    openai_completions.DIALECT,
    responses.DIALECT,
    anthropic.DIALECT,
)
"""In the order in which `GET /` lists their endpoints."""
