"""`GET /stats`: what the server does now, as JSON for the page and for scripts. The counters are those of `/metrics`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import dsv4
from dsv4.api.info import json_response, service_of
from dsv4.api.metrics import bytes_by_kind
from dsv4.api.service import Service


async def stats(request: Request) -> Response:
    """Levels and counters. Two answers make a rate."""
    service = service_of(request)
    return json_response(state_of(service))


def state_of(service: Service) -> dict[str, Any]:
    """See docs/http-api.md."""
    core, metrics = service.engine.stats(), service.metrics
    return {
        "model": service.name,
        "version": dsv4.__version__,
        "uptime_s": round(time.time() - service.started, 1),
        "max_model_len": service.max_model_len,
        "requests": {
            "running": core.get("running", 0),
            "waiting": core.get("waiting", 0),
            "parked": core.get("parked", 0),
            "most_running": service.engine.config.max_num_seqs,
            "preemptions": core.get("preemptions", 0),
            "ended": metrics.ended(),
        },
        "tokens": metrics.tokens(),
        "cache": _cache(core),
        "steps": {
            "count": core.get("steps", 0),
            "busy_s": core.get("busy_us", 0) / 1e6,
            "last_s": core.get("step_measured_us", 0) / 1e6,
            "budget_s": core.get("step_budget_us", 0) / 1e6,
            "predicted_s": core.get("step_predicted_us", 0) / 1e6,
        },
        "connections": service.connections.counts(),
        "recent": service.recent.shown(),
    }


def _cache(core: Mapping[str, int]) -> dict[str, Any]:
    return {
        "pages": core.get("pages", 0),
        "page_bytes": core.get("page_bytes", 0),
        "bytes": bytes_by_kind(core),
        "state_bytes": (core.get("slabs", 0) - core.get("free_slabs", 0)) * core.get("slab_bytes", 0),
        "looked_up_tokens": core.get("prompt_tokens", 0),
        "reused_tokens": core.get("resumed_tokens", 0),
        "replayed_tokens": core.get("replayed_tokens", 0),
        "evicted_blocks": core.get("evicted_blocks", 0),
        "snapshots": core.get("snapshots", 0),
        "lost": {name.removeprefix("lost_"): n for name, n in core.items() if name.startswith("lost_")},
    }
