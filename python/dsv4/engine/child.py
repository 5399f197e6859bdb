"""A process of ours: how it is started, watched, asked what it does, and ended. Knows nothing of engines, so that ranks are watched
in the same way.

A child never outlives its parent, however that ends: the kernel kills it (`PR_SET_PDEATHSIG`), and its end of the socket
closes. A parent learns of a child's end from the socket at once, and why from `waitpid`.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import site
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path

from dsv4.engine.link import Link
from dsv4.errors import EngineDead

_PR_SET_PDEATHSIG = 1
STACKS = signal.SIGUSR1
"""Upon which a child writes the stacks of its threads to standard error, even from inside a call that does not return."""

IN_THE_KERNEL = 10.0
"""Seconds that a killed process may take to end; one that a driver holds is left to the kernel then."""


class Child:
    """`python -m MODULE` with a socket to it. It runs in a session of its own, so that Ctrl-C in a terminal is the parent's."""

    def __init__(self, module: str, name: str) -> None:
        """`name`: what it is called in messages. Raises EngineDead when no process can be had."""
        self.name = name
        ours, theirs = socket.socketpair()
        self.link = Link(ours)
        self._started, self._ended = threading.Event(), threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._reaping, self._reaped = threading.Lock(), False
        """Once it is reaped its number may be another process's."""
        self._error: OSError | None = None
        command = [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())]
        # The kernel kills a child with the *thread* that started it, so this one stays until the child has ended.
        threading.Thread(target=self._watch, args=(command, theirs), name=f"dsv4-{name}", daemon=True).start()
        self._started.wait()
        if self._error is not None:
            self.link.release()
            raise EngineDead(f"{name} cannot be started: {self._error}")

    def _watch(self, command: list[str], theirs: socket.socket) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_paths()},
                start_new_session=True,
            )
        except OSError as e:
            self._error = e
        finally:
            theirs.close()
            self._started.set()
        if self._process is not None:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            with self._reaping:
                self._end_group()  # what it has started itself
                self._process.wait()
                self._reaped = True
        self._ended.set()

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    def wait(self, seconds: float) -> bool:
        """Whether it has ended; waits for that so long."""
        return self._ended.wait(seconds)

    def how(self) -> str:
        """How it has ended, for a sentence."""
        code = self._process.returncode if self._process is not None else None
        if code is None:
            return "it has not ended"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"it was killed by {signal.Signals(-code).name}"
        return f"it ended with exit code {code}"

    def show_stacks(self) -> None:
        """Lets it write what its threads do to standard error."""
        with self._reaping, contextlib.suppress(OSError):
            if not self._reaped:
                os.kill(self.pid, STACKS)

    def kill(self) -> None:
        """Ends it and all that it has started, at once, and waits for that."""
        with self._reaping, contextlib.suppress(OSError):
            if not self._reaped:
                os.kill(self.pid, signal.SIGKILL)  # the watcher ends the rest
        self._ended.wait(IN_THE_KERNEL)

    def _end_group(self) -> None:
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)


def _paths() -> dict[str, str]:
    """What makes the child find the package that this process has, and nothing that lies in the current directory."""
    here = str(Path(__file__).parents[2])
    before = os.environ.get("PYTHONPATH", "")
    known = [*site.getsitepackages(), site.getusersitepackages(), *before.split(os.pathsep)]
    paths = before if here in known else os.pathsep.join(filter(None, (here, before)))
    return {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}


def stacks() -> str:
    """What the threads of this process do."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(number, number)}:\n" + "".join(traceback.format_stack(frame)).rstrip()
        for number, frame in sys._current_frames().items()
    )


def state_of(pid: int) -> str:
    """What keeps a process from running, for the end of a sentence."""
    with contextlib.suppress(OSError, IndexError):
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return {
            "T": "; it is stopped (SIGSTOP)",
            "t": "; a debugger holds it",
            "D": "; it waits in the kernel",
        }.get(letter, "")
    return ""


def held_bytes() -> int:
    """Memory that this process holds: of its GPU where it uses one, else of the host."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.memory_reserved())
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def adopt(arguments: list[str]) -> Link:
    """What a child does first. `arguments`: those that `Child` gives it."""
    descriptor, parent = map(int, arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent's to act upon: it ends what is under way first
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            faulthandler.enable()
            faulthandler.register(STACKS)
    return Link(socket.socket(fileno=descriptor))
