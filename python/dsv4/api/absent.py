"""Endpoints of OpenAI, Anthropic and other servers that are not here, so that who asks for one is told so by name."""

from __future__ import annotations

_TEXT_ONLY = "the model reads and writes text only"
_STATELESS = "nothing is stored here"
_NO_SCORES = "the model generates text; it gives no vectors and no scores"

ABSENT = {
    "/v1/embeddings": ("embeddings", _NO_SCORES),
    "/embeddings": ("embeddings", _NO_SCORES),
    "/v1/rerank": ("reranking", _NO_SCORES),
    "/v2/rerank": ("reranking", _NO_SCORES),
    "/rerank": ("reranking", _NO_SCORES),
    "/v1/score": ("scoring", _NO_SCORES),
    "/score": ("scoring", _NO_SCORES),
    "/pooling": ("pooling", _NO_SCORES),
    "/classify": ("classification", _NO_SCORES),
    "/v1/moderations": ("moderation", "nothing is moderated here"),
    "/v1/images": ("images", _TEXT_ONLY),
    "/v1/audio": ("audio", _TEXT_ONLY),
    "/v1/videos": ("videos", _TEXT_ONLY),
    "/v1/realtime": ("realtime sessions", _TEXT_ONLY),
    "/v1/files": ("files", _STATELESS),
    "/v1/uploads": ("uploads", _STATELESS),
    "/v1/batches": ("batches", _STATELESS),
    "/v1/messages/batches": ("batches", _STATELESS),
    "/v1/assistants": ("assistants", _STATELESS),
    "/v1/threads": ("threads", _STATELESS),
    "/v1/vector_stores": ("vector stores", _STATELESS),
    "/v1/conversations": ("conversations", _STATELESS),
    "/v1/containers": ("containers", _STATELESS),
    "/v1/chat/completions": ("stored completions", _STATELESS),
    "/v1/responses": ("stored responses", _STATELESS),
    "/v1/fine_tuning": ("fine-tuning", "this server only generates"),
    "/v1/complete": ("Anthropic's text completions", "POST /v1/messages has taken their place"),
}
"""By the path, or the beginning of it up to a slash: what is asked for, and why it is not here."""


def why_absent(path: str) -> str | None:
    """What to say of a path at which there is nothing; None where no other server has anything either."""
    at = path.rstrip("/")
    while at:
        if at in ABSENT:
            what, why = ABSENT[at]
            return f"this server has no {what} ({path[:200]}): {why}; GET / lists the endpoints"
        at = at.rpartition("/")[0]
    return None
