"""What ways to resume cost before any step was measured."""

from __future__ import annotations

from dsv4._core import default_options
from dsv4.errors import ConfigError

_GROUPS = ("cost", "step_cost")
"""Options of the core that hold the costs."""
_DEFAULTS: dict[str, dict[str, float]] = {group: default_options()[group] for group in _GROUPS}
COST_MODELS = {
    # Measured with the model that ships on two CPU cores.
    "cpu": {
        "token_us": 800.0,
        "context_us_per_1k": 5.0,
        "replay_factor": 1.0,
        "restore_us": 2000.0,
        "base_us": 20_000.0,
        "decode_us": 3000.0,
        "copy_us": 2000.0,
    },
    # The core's own: a GPU computes some 10,000 tokens a second.
    "cuda": {name: cost for group in _DEFAULTS.values() for name, cost in group.items()},
}
"""What ways to resume cost, by device (see docs/architecture.md). A replayed token is as much work as a computed one."""


def parse_costs(text: str | None) -> dict[str, float]:
    """`token_us=800,base_us=20000` -> numbers by name. Raises ConfigError."""
    known = COST_MODELS["cuda"]
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


def core_costs(text: str | None) -> dict[str, dict[str, float]]:
    """The same as options of the core."""
    costs = parse_costs(text)
    return {
        group: {name: costs[name] for name in names if name in costs} for group, names in _DEFAULTS.items()
    }
