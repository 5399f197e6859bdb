"""dsv4 behind Ray Serve: each replica is an engine with the whole HTTP API of `dsv4 serve`, and their number follows queue and cache.

    pip install dsv4 "ray[serve]"
    python examples/ray_serve.py                                             # the small model, http://127.0.0.1:8000
    serve run examples.ray_serve:build model=/models/DeepSeek-V4-Flash num_gpus=1 max_replicas=4

What imports dsv4 stands inside functions, as they run in the processes of replicas.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import threading
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

TARGET_LOAD = 0.8
"""Requests of a replica that run or wait, for each that it may run at once, which it is meant to have."""

TARGET_CACHE = 0.9
"""Share of a replica's pages that requests and pins are meant to hold; what could be evicted counts as free."""


def wanted(loads: list[float], caches: list[float]) -> int:
    """Replicas that the work of these needs: each counts by what it has more of, requests or held cache."""
    needs = (max(x / TARGET_LOAD, y / TARGET_CACHE) for x, y in zip(loads, caches, strict=True))
    return max(1, math.ceil(sum(needs) - 1e-6))


def by_queue_and_cache(context: Any) -> tuple[int, dict[str, Any]]:
    """A policy of Ray Serve: replicas wanted, from what `record_autoscaling_stats` of each tells."""
    told = context.aggregated_metrics or {}
    loads, caches = told.get("load", {}), told.get("cache", {})
    both = sorted(loads.keys() & caches.keys(), key=str)
    if not both:  # none has told anything yet
        return context.target_num_replicas, {}
    count = wanted([loads[r] for r in both], [caches[r] for r in both])
    most, least = context.capacity_adjusted_max_replicas, context.capacity_adjusted_min_replicas
    return min(max(count, least), most), {}


class TheReplicas:
    """The ASGI application of whichever replica it runs in."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        replica = serve.get_replica_context().servable_object
        if scope["type"] == "http":
            await replica.api(scope, receive, send)
        else:  # the start and the end of the process: `__init__` and `__del__` have done what is to be done
            await answer_lifespan(receive, send)


async def answer_lifespan(receive: Any, send: Any) -> None:
    """Says that all is well at start and end."""
    for _ in range(2):
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})


@serve.deployment
@serve.ingress(TheReplicas())
class Dsv4:
    """One replica."""

    def __init__(self, **settings: Any) -> None:
        """Loads the model. `settings` are those of `dsv4 serve`, as `--max-num-seqs` is max_num_seqs. Raises ConfigError."""
        from dsv4.api.app import create_app
        from dsv4.api.service import Service
        from dsv4.config import EngineConfig, ServerConfig, load
        from dsv4.engine.async_engine import AsyncEngine

        engine_config, server_config = load([EngineConfig, ServerConfig], settings, {})
        self.engine = AsyncEngine.from_config(engine_config)
        self.service = Service(self.engine, server_config, self.engine.name)
        self.api = create_app(self.service)

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if self.engine.died is not None:  # one that is only started again comes back by itself
            raise RuntimeError(f"the engine has stopped for good: {self.engine.died}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `by_queue_and_cache` reads."""
        stats = self.engine.stats()
        pages = stats["pages"]
        return {
            "load": (stats["running"] + stats["waiting"]) / self.engine.config.max_num_seqs,
            "cache": 1 - stats["available_pages"] / pages,
        }

    async def __del__(self) -> None:
        """Ray has waited for the requests that ran. Also called of what did not come into being."""
        if hasattr(self, "service"):
            await self.engine.drain(0)
            await self.engine.shutdown()
            self.service.close()


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application for `serve run`. Of `arguments`, min_replicas, max_replicas, num_gpus, num_cpus and upscale_delay_s are Ray's; the others are
    settings of `dsv4 serve`."""
    rest = dict(arguments)
    scaling = AutoscalingConfig(
        min_replicas=int(rest.pop("min_replicas", 1)),
        max_replicas=int(rest.pop("max_replicas", 2)),
        upscale_delay_s=float(rest.pop("upscale_delay_s", 10)),
        policy=AutoscalingPolicy(policy_function=by_queue_and_cache),
    )
    options = {name: float(rest.pop(name)) for name in ("num_gpus", "num_cpus") if name in rest}
    deployment = Dsv4.options(
        # The queue is the engine's, which knows priorities, deadlines and prefixes.
        max_ongoing_requests=4096,
        autoscaling_config=scaling,
        ray_actor_options=options,
        graceful_shutdown_timeout_s=60,
    )
    return deployment.bind(**{name: str(value) for name, value in rest.items()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="as `serve run` takes them")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    arguments = dict(pair.split("=", 1) for pair in given.settings)
    ray.init(include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    serve.run(build(arguments), route_prefix="/")
    print(f"ready      http://127.0.0.1:{given.port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    serve.shutdown()  # replicas end what they are doing
    ray.shutdown()


if __name__ == "__main__":
    main()
