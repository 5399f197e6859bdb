"""A KV router of Dynamo's in a process of its own, which tells what it believes: `python -m tests.fleet.routers_picture ENDPOINT BLOCK`.

For each line of its input it prints one: as JSON, by worker, the prefixes that it has, each as the hashes of its blocks by Dynamo's function.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from dynamo.llm import KvRouter, KvRouterConfig
from dynamo.runtime import DistributedRuntime


def prefixes(events: list[dict[str, Any]]) -> dict[str, list[list[int]]]:
    """Of the events that make up an index."""
    found: dict[str, dict[int, list[int]]] = {}
    for told in events:
        known, data = found.setdefault(str(told["worker_id"]), {}), told["event"]["data"]["stored"]
        before = [] if data["parent_hash"] is None else known[data["parent_hash"]]
        for block in data["blocks"]:
            before = known[block["block_hash"]] = [*before, block["tokens_hash"]]
    return {worker: list(known.values()) for worker, known in found.items()}


async def main(endpoint: str, block: int) -> None:
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    router = KvRouter(runtime.endpoint(endpoint), block, KvRouterConfig(use_kv_events=True))
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(prefixes(json.loads(await router.dump_events()))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
