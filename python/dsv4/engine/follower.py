"""The process of a rank that is not rank 0: `python -m dsv4.engine.follower`. It has its part of the model and of the cache, carries out
the plans that rank 0 gives it, and decides nothing.

A thread takes messages from the socket and answers at once what may not wait for a step. The process ends when it is told to, and
when rank 0's is gone.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dsv4 import garbage
from dsv4.engine.child import adopt, held_bytes, stacks
from dsv4.engine.link import Link
from dsv4.engine.process import LAST_WORDS, Relay, failed
from dsv4.engine.rank_messages import (
    Done,
    Hello,
    Here,
    Load,
    Loaded,
    Meet,
    Met,
    Ping,
    Pong,
    Quit,
    Serve,
    Serves,
    ShowStacks,
    Stacks,
    Step,
    ToRank,
    encode,
    to_rank,
)
from dsv4.host import stay_near

if TYPE_CHECKING:
    from dsv4.engine.buffers import StepPlan
    from dsv4.engine.ranked import FollowingDevice
    from dsv4.model.rank import Rank

log = logging.getLogger("dsv4.engine")

Told = TypeVar("Told", bound=ToRank)


class Follower:
    """A rank, from its settings to its end. Its thread calls `run`."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.rank: Rank | None = None
        self._inbox: queue.SimpleQueue[tuple[ToRank, np.ndarray]] = queue.SimpleQueue()

    def receive_all(self) -> None:
        """The thread that takes messages, until the other side is gone, which ends the process."""
        while (received := self.link.receive()) is not None:
            message = to_rank(received[0])
            if isinstance(message, Ping):
                said = 0 if self.rank is None else self.rank.said
                self.link.send(encode(Pong(said, held_bytes())))
            elif isinstance(message, ShowStacks):
                self.link.send(encode(Stacks(stacks())))
            else:
                self._inbox.put((message, received[1]))
        os._exit(1)

    def run(self) -> None:
        """Until it is told to end. Raises what it cannot go on for."""
        message = self._next(Hello)
        logging.getLogger().setLevel(message.log_level)
        device, plan, meeting = self._build(message)
        while True:
            received, payload = self._inbox.get()
            if isinstance(received, Step):
                plan.unpack(payload)
                self.link.send(encode(self._step(device, plan, received)))
            elif isinstance(received, Meet):
                self._meet(message, meeting, received.time)
                self.link.send(encode(Met()))
            elif isinstance(received, Quit):
                return

    def _build(self, hello: Hello) -> tuple[FollowingDevice, StepPlan, str]:
        """Loads and meets the others, as it is told."""
        from dsv4.engine.buffers import StepPlan
        from dsv4.engine.build import follower_weights, following_device, settle_rank
        from dsv4.engine.memory import usable_memory

        settle_rank(hello.config, hello.rank, hello.ranks)
        if hello.config.device == "cuda":
            stay_near(hello.rank)
        self.link.send(encode(Here(usable_memory(hello.config).bytes)))
        load = self._next(Load)
        model_config, weights = follower_weights(hello.config, hello.rank, hello.ranks, packed=load.packed)
        self.link.send(encode(Loaded()))
        serve = self._next(Serve)
        self._meet(hello, serve.meeting, 0)
        assert self.rank is not None
        device = following_device(hello.config, model_config, weights, serve.pages, serve.max_len, self.rank)
        if serve.warm_up:
            device.warm_up(serve.warm_up, hello.config.capture_context)
        plan = StepPlan(serve.schema, pinned=hello.config.device == "cuda")  # type: ignore[arg-type]
        garbage.settle()  # all ranks wait for one that looks through everything that stays
        self.link.send(encode(Serves()))
        return device, plan, serve.meeting

    def _next(self, kind: type[Told]) -> Told:
        received, _ = self._inbox.get()
        if isinstance(received, Quit):
            sys.exit(0)
        assert isinstance(received, kind), received
        return received

    def _meet(self, hello: Hello, meeting: str, times: int) -> None:
        from dsv4.engine.meeting import meet, member

        if self.rank is not None:
            self.rank.leave()
        group = meet(meeting, hello.rank, hello.ranks, hello.config.device, times, hello.config.rank_timeout)
        if self.rank is None:
            self.rank = member(group, hello.config.device)
        else:
            self.rank.join(group)

    def _step(self, device: FollowingDevice, plan: StepPlan, step: Step) -> Done:
        """Takes part in a step. One that fails here fails on all ranks: this one leaves the group."""
        from dsv4.model.rank import PeerLost

        assert self.rank is not None
        begun, error = time.perf_counter(), None
        try:
            device.follow(plan, step.judged)
        except PeerLost:
            error = ""
        except Exception as e:
            log.error("step %d failed", plan.step, exc_info=e)
            error = f"{type(e).__name__}: {e}"
        if error is not None:
            self.rank.leave()
        return Done(1e6 * (time.perf_counter() - begun), error)


def main() -> None:
    """The process."""
    link = adopt(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, handlers=[Relay(link)])
    follower, code = Follower(link), 0
    try:
        import dsv4.engine.build  # noqa: F401  torch, which may fail; whole before a message asks how much it holds

        threading.Thread(target=follower.receive_all, name="dsv4-inbox", daemon=True).start()
        follower.run()
    except SystemExit:
        pass
    except Exception as e:
        link.send(encode(failed(e, "the process of a rank failed")))
        code = 1
    link.flush(LAST_WORDS)
    sys.stderr.flush()
    os._exit(code)  # as in `process.py`


if __name__ == "__main__":
    main()
