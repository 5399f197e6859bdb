"""The ranks of an engine as rank 0 has them: it starts a process for each of the others, hands them every plan, and watches them.

A rank that is gone, does not answer, or does not go on while others wait for it, ends the group: all ranks are killed, and
`lost` says which one it was. A step that fails on one rank alone costs its requests, as on one GPU: the ranks meet again before the
next one. On a GPU they cannot, as nothing ends a collective that waits there; the group is lost then.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from dsv4.config import EngineConfig
from dsv4.engine import remote
from dsv4.engine.child import Child, held_bytes, stacks, state_of
from dsv4.engine.meeting import Meeting, meet, member
from dsv4.engine.messages import Failed, Log
from dsv4.engine.progress import Progress
from dsv4.engine.rank_messages import (
    Done,
    FromRank,
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
    from_rank,
)
from dsv4.errors import Dsv4Error, RankLost
from dsv4.model.rank import PeerLost, Rank

log = logging.getLogger("dsv4.engine")

PROCESS = "dsv4.engine.follower"
"""What is started for a rank; tests put another module in its place."""

TICK = 1.0
"""Seconds between two looks at the ranks, at most."""

STARTING = 60.0
"""Seconds without an answer from a rank that starts, at least: it imports and reads meanwhile."""

CAUSE = 5.0
"""Seconds to find out which rank failed a collective: it says so at once, or its process is gone."""

STACKS_WAIT = 2.0
"""Seconds that ranks may take to tell what they do."""

QUIT_WAIT = 5.0
"""Seconds that ranks may take to end."""


class StepFailed(RuntimeError):
    """A step failed on another rank."""


@dataclass
class Peer:
    """Another rank, and what it has told."""

    rank: int
    child: Child
    free: int | None = None
    loaded: bool = False
    serves: bool = False
    done: int = 0
    """Steps launched or given up."""
    met: int = 0
    fault: str | None = None
    """What a step failed of, since the ranks met."""
    said: int = 0
    bytes: int = 0
    busy_us: float = 0.0
    silent: float = 0.0
    """Seconds without a word from it."""
    stacks: str | None = None
    failed: Failed | None = None
    log: Callable[[Log], None] = field(default=remote.write)

    def take(self, message: FromRank) -> None:
        self.silent = 0.0
        if isinstance(message, Here):
            self.free = message.free
        elif isinstance(message, Loaded):
            self.loaded = True
        elif isinstance(message, Serves):
            self.serves = True
        elif isinstance(message, Done):
            self.done += 1
            self.busy_us += message.us
            self.fault = self.fault or message.error
        elif isinstance(message, Met):
            self.met += 1
        elif isinstance(message, Pong):
            self.said, self.bytes = message.said, message.bytes
        elif isinstance(message, Stacks):
            self.stacks = message.text
        elif isinstance(message, Failed):
            self.failed = message


class Group:
    """R ranks, of which this process has rank 0. One thread takes steps."""

    def __init__(self, ranks: int, limit: float) -> None:
        """Starts the processes. `limit`: seconds after which a rank that does not answer or go on is given up. Raises RankLost."""
        self.ranks, self.limit = ranks, limit
        self.lost: str | None = None
        """Which rank ended the group, and how."""
        self.on_lost: Callable[[str], None] = lambda why: None
        """Called with that, on a thread of the group."""
        self.on_look: Callable[[], None] = lambda: None
        """Called whenever the ranks are looked at."""
        self.release: Callable[[], None] = lambda: None
        """Lets go of the graphs that hold collectives of the group: NCCL waits for their end."""
        self.rank: Rank | None = None
        self._error: Dsv4Error | None = None
        self._news = threading.Condition()
        """Held where something of a peer is read or written."""
        self._closing = threading.Event()
        self._steps = self._times = self._at_hand = 0
        self._open = False
        """A step was begun and not taken to its end, so ranks may wait in the midst of it."""
        self._device = ""
        self._busy = 0.0
        """Seconds in steps."""
        self._still, self._before = 0.0, -1
        """Seconds in which no rank went on, and how far they had come."""
        self._meeting = Meeting()
        self._peers: list[Peer] = []
        try:
            for r in range(1, ranks):
                self._peers.append(Peer(r, Child(PROCESS, f"rank {r}")))
        except Dsv4Error as e:
            self.close()
            raise RankLost(f"rank {len(self._peers) + 1} of {ranks} cannot be started: {e}") from None
        for peer in self._peers:
            self._thread(self._read, peer)
        self._thread(self._watch)

    def _thread(self, work: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, name="dsv4-ranks", daemon=True).start()

    # -- start

    def greet(self, config: EngineConfig) -> None:
        """Gives the ranks their settings."""
        self._device = config.device
        level = logging.getLogger("dsv4").getEffectiveLevel()
        for peer in self._peers:
            self._send(peer, Hello(peer.rank, self.ranks, config, level))

    def free(self) -> int:
        """The least memory, in bytes, that another rank may use."""
        self._await(lambda peer: peer.free is not None)
        return min(peer.free or 0 for peer in self._peers)

    def load(self, *, packed: bool) -> None:
        """Lets the ranks read their weights."""
        self._send_all(Load(packed))

    def told(self, progress: Progress | None) -> Progress:
        """`progress`, which also ends rank 0's reading when another rank is lost."""

        def show(done: int, total: int, name: str, stage: str = "weights") -> None:
            if self._error is not None:
                raise self._error
            if progress is not None:
                progress(done, total, name, stage)

        return show

    def form(self, pages: int, max_len: int, schema: Any, warm_up: int) -> Rank:
        """Waits until all have their weights, and makes them one group. Raises ConfigError, CheckpointError and RankLost for what
        one of them cannot go on for."""
        self._await(lambda peer: peer.loaded)
        self._send_all(Serve(self._meeting.path, pages, max_len, schema, warm_up))
        self.rank = member(self._meet(), self._device)
        return self.rank

    def await_all(self) -> None:
        """Waits until every rank takes steps."""
        self._await(lambda peer: peer.serves)

    # -- steps

    def begin_step(self, judged: Sequence[tuple[int, int]], plan: np.ndarray) -> int:
        """Hands a plan to all ranks; the number of the step. Raises RankLost."""
        self.check()
        if self._open:
            self._meet_again()
        self._steps, self._open = self._steps + 1, True
        self._send_all(Step(list(judged)), plan)
        return self._steps

    def check(self) -> None:
        """Raises RankLost where a rank is."""
        if self.lost is not None:
            raise RankLost(self.lost)

    def end_step(self) -> None:
        """This rank has begun all that there is to begin of a step."""
        self._open = False

    def tell(self, x: Tensor) -> None:
        """x becomes that of all ranks."""
        assert self.rank is not None
        self.rank.tell(x)

    @contextlib.contextmanager
    def step_at_hand(self) -> Iterator[None]:
        """Ranks that do not go on are found meanwhile. What fails in it is raised as what it is the fault of: StepFailed, RankLost."""
        self._at_hand, begun = self._at_hand + 1, time.monotonic()
        try:
            yield
        except PeerLost as e:
            raise self._fault(e) from e
        except Exception as e:
            if self._device == "cuda" and not isinstance(e, RankLost):
                self._lose(f"rank 0 of {self.ranks} failed in a step: {type(e).__name__}: {e}")
                raise RankLost(self.lost or "") from e
            raise
        finally:
            self._at_hand -= 1
            self._busy += time.monotonic() - begun

    def await_step(self, step: int) -> None:
        """Waits until every rank has launched the step. Raises StepFailed where one gave it up, and RankLost."""
        with self._news:
            self._news.wait_for(lambda: self.lost or all(peer.done >= step for peer in self._peers))
        if any(peer.fault is not None for peer in self._peers) or self.lost:
            self._open = True
            raise self._fault(None)

    def _fault(self, error: PeerLost | None) -> Exception:
        """Why a step failed that has not failed here."""
        with self._news:
            self._news.wait_for(lambda: self.lost or self._faulty() is not None, CAUSE)
            faulty = self._faulty()
        if self.lost is None and faulty is None:
            self._lose(f"rank 0 of {self.ranks} could not reach the others: {error}")
        elif self.lost is None and faulty is not None and self._device == "cuda":
            self._lose(f"rank {faulty.rank} of {self.ranks} failed in a step: {faulty.fault}")
        if self.lost is not None or faulty is None:
            return RankLost(self.lost or "")
        return StepFailed(f"rank {faulty.rank}: {faulty.fault}")

    def _faulty(self) -> Peer | None:
        return next((peer for peer in self._peers if peer.fault), None)

    def _meet_again(self) -> None:
        """After a step that was given up. Raises RankLost."""
        assert self.rank is not None
        self.rank.leave()
        self._times += 1
        with self._news:
            for peer in self._peers:
                peer.fault = None
        self._send_all(Meet(self._times))
        self.rank.join(self._meet())
        self._await(lambda peer: peer.met == self._times)
        with self._news:  # of what was given up
            for peer in self._peers:
                peer.fault = None
        self._open = False

    def _meet(self) -> Any:
        try:
            return meet(self._meeting.path, 0, self.ranks, self._device, self._times, self.limit)
        except RuntimeError as e:
            self._lose(f"the {self.ranks} ranks did not meet: {str(e).partition(chr(10))[0]}")
            raise RankLost(self.lost or "") from e

    # -- what there is to tell

    def counts(self) -> dict[str, int]:
        """By rank: bytes of memory, and microseconds in steps (of rank 0: in launching them and waiting for the others)."""
        with self._news:
            told = {peer.rank: (peer.bytes, peer.busy_us) for peer in self._peers}
        ranks = {0: (held_bytes(), 1e6 * self._busy)} | told
        return {f"rank_{r}_bytes": n for r, (n, _) in ranks.items()} | {
            f"rank_{r}_step_us": round(us) for r, (_, us) in ranks.items()
        }

    def close(self) -> None:
        """Ends all other ranks, and the group. No step follows."""
        if self._closing.is_set():
            return
        self._closing.set()
        self.release()
        if self.rank is not None:
            self.rank.leave()  # which ends what others may wait for
        self._send_all(Quit())
        if self.rank is not None:
            self.rank.end()
        for peer in self._peers:
            if not peer.child.wait(0.0 if self.lost else QUIT_WAIT):
                peer.child.kill()
            peer.child.link.release()
        self._meeting.close()

    # -- watching

    def _send(self, peer: Peer, message: ToRank, plan: np.ndarray | None = None) -> None:
        if plan is None:
            peer.child.link.send(encode(message))
        else:
            peer.child.link.send(encode(message), plan)

    def _send_all(self, message: ToRank, plan: np.ndarray | None = None) -> None:
        for peer in self._peers:
            self._send(peer, message, plan)

    def _await(self, holds: Callable[[Peer], bool]) -> None:
        """Waits until it holds of every peer. Raises what one could not go on for."""
        with self._news:
            self._news.wait_for(lambda: self.lost or all(map(holds, self._peers)))
        if self._error is not None:
            raise self._error

    def _read(self, peer: Peer) -> None:
        """The thread that reads what a rank tells."""
        while (received := peer.child.link.receive()) is not None:
            message = from_rank(received[0])
            if isinstance(message, Log):
                remote.write(
                    Log(message.logger, message.level, f"rank {peer.rank}: {message.text}", message.traceback)
                )
            with self._news:
                peer.take(message)
                self._news.notify_all()
        if self._closing.is_set():
            return
        peer.child.wait(remote.CAUSE)
        name = f"rank {peer.rank} of {self.ranks}"
        if peer.failed is None:
            self._lose(f"{name} is gone, {peer.child.how()}")
        else:
            self._lose(f"{name}: {peer.failed.text}", peer.failed.kind)

    def _watch(self) -> None:
        """The thread that finds ranks which do not answer or do not go on."""
        tick = min(TICK, max(self.limit / 4, 0.05))
        while not self._closing.wait(tick) and self.lost is None:
            self._send_all(Ping())
            self.on_look()
            with self._news:  # counted by looks, so that a pause of this process is none of theirs
                for peer in self._peers:
                    peer.silent += tick
                why = self._silent() or self._stuck(tick)
            if why is not None:
                self._lose(why, stacks_too=True)

    def _silent(self) -> str | None:
        for peer in self._peers:
            if peer.silent > (self.limit if peer.serves else max(self.limit, STARTING)):
                return f"rank {peer.rank} of {self.ranks} has not answered for {peer.silent:.0f} s{state_of(peer.child.pid)}"
        return None

    def _stuck(self, tick: float) -> str | None:
        """The rank that others wait for."""
        said = {0: self.rank.said if self.rank else 0} | {peer.rank: peer.said for peer in self._peers}
        come = sum(said.values()) + sum(peer.done for peer in self._peers) + self._steps
        self._still = self._still + tick if self._at_hand and come == self._before else 0.0
        self._before = come
        if self._still <= self.limit:
            return None
        last = min(said, key=lambda r: said[r])
        if said[last] == max(said.values()):
            return f"none of the {self.ranks} ranks has gone on for {self._still:.0f} s"
        return (
            f"rank {last} of {self.ranks} has not gone on for {self._still:.0f} s, and the others wait for it"
        )

    def _lose(self, why: str, kind: str = "", *, stacks_too: bool = False) -> None:
        """Ends the group, unless it has ended. `kind`: name of the error that a rank ended with."""
        with self._news:
            if self.lost is not None or self._closing.is_set():
                return
            self._error = remote.as_error(Failed(kind, why)) if kind else RankLost(why)
            self.lost = why
            self._news.notify_all()
        log.critical("%s", why)
        if stacks_too:
            self._tell_stacks()
        for peer in self._peers:
            peer.child.kill()
        if self.rank is not None:
            try:
                self.rank.let_go()
            except (
                Exception
            ) as e:  # a GPU that failed takes nothing more, and who waits for it must be told all the more
                log.error("what waits on the GPU cannot be let go", exc_info=e)
        self.on_lost(why)

    def _tell_stacks(self) -> None:
        """Logs what each rank does."""
        self._send_all(ShowStacks())
        with self._news:
            self._news.wait_for(lambda: all(peer.stacks for peer in self._peers), STACKS_WAIT)
        log.critical("rank 0 is at\n%s", stacks())
        for peer in self._peers:
            if peer.stacks is None:
                peer.child.show_stacks()
                state = state_of(peer.child.pid) or "; its stack goes to standard error"
                log.critical("rank %d does not tell where it is%s", peer.rank, state)
            else:
                log.critical("rank %d is at\n%s", peer.rank, peer.stacks)
