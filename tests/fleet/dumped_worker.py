"""`dsv4 dynamo` that writes its core's dump where that is asked for: `python -m tests.fleet.dumped_worker FILE FLAGS…`. Who wants one makes
FILE.ask; it is gone when FILE is there."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from dsv4.cli import main
from dsv4.engine.async_engine import AsyncEngine
from dsv4.fleet.dynamo_worker import Dsv4Worker


async def answer(engine: AsyncEngine, file: Path) -> None:
    asked = file.with_suffix(".ask")
    while True:
        if asked.exists():
            file.write_text(await engine.dump())
            asked.unlink()
        await asyncio.sleep(0.05)


def run(file: Path, flags: list[str]) -> int:
    tasks: list[asyncio.Task[None]] = []
    start = Dsv4Worker.start

    async def started(self: Dsv4Worker, worker_id: int) -> Any:
        tasks.append(asyncio.create_task(answer(self.engine, file)))
        return await start(self, worker_id)

    Dsv4Worker.start = started  # type: ignore[method-assign]
    return main(["dynamo", *flags])


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
