"""When many requests come at once a bounded number begins at each turn of the loop."""

from __future__ import annotations

import asyncio

from dsv4.api.turnstile import Turnstile


def test_so_many_begin_at_each_turn_and_in_order() -> None:
    async def main() -> list[list[int]]:
        turnstile, begun, turns = Turnstile(10), list[int](), list[list[int]]()

        async def one(i: int) -> None:
            await turnstile.wait()
            begun.append(i)

        tasks = [asyncio.ensure_future(one(i)) for i in range(95)]
        tasks[30].cancel()
        tasks[42].cancel()
        await asyncio.sleep(0)
        tasks[50].cancel()  # it waits already
        while not all(task.done() for task in tasks):
            turns.append(begun.copy())
            begun.clear()
            await asyncio.sleep(0)
        turns.append(begun.copy())
        return turns

    turns = asyncio.run(main())
    assert max(map(len, turns)) <= 10 and len(turns) >= 9
    assert [i for turn in turns for i in turn] == [i for i in range(95) if i not in (30, 42, 50)]


def test_few_do_not_wait() -> None:
    async def main() -> None:
        turnstile = Turnstile(3)
        for _ in range(50):
            for _ in range(3):
                coroutine = turnstile.wait()
                try:
                    coroutine.send(None)
                except StopIteration:
                    continue
                raise AssertionError("it waits")
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(main())
