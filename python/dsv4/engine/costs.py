"""What ways to resume cost before any step was measured."""

from __future__ import annotations

from dsv4.errors import ConfigError

COST_MODELS = {
    # Measured with the model that ships on two CPU cores; a GPU replays at some 10,000 tokens a second.
    "cpu": {
        "token_us": 800.0,
        "context_us_per_1k": 5.0,
        "replay_factor": 0.6,
        "restore_us": 2000.0,
        "base_us": 20_000.0,
        "decode_us": 3000.0,
        "copy_us": 2000.0,
    },
    "cuda": {
        "token_us": 100.0,
        "context_us_per_1k": 0.1,
        "replay_factor": 0.6,
        "restore_us": 200.0,
        "base_us": 10_000.0,
        "decode_us": 50.0,
        "copy_us": 200.0,
    },
}
"""What ways to resume cost, by device (see docs/architecture.md); replay is about half the work per token, as layer l
needs only the last (window - 1) * (layers - l) tokens."""


def parse_costs(text: str | None) -> dict[str, float]:
    """`token_us=800,base_us=20000` -> numbers by name. Raises ConfigError."""
    known = COST_MODELS["cpu"]
    costs: dict[str, float] = {}
    for part in (text or "").split(","):
        key, _, value = part.strip().partition("=")
        if not part.strip():
            continue
        try:
            costs[key] = float(value)
        except ValueError:
            raise ConfigError(f"cost_model has {part!r}; write NAME=NUMBER") from None
        if key not in known or costs[key] < 0:
            raise ConfigError(f"cost_model has {part!r}; it takes {', '.join(known)}, each at least 0")
    return costs
