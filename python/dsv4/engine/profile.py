"""A trace of some steps by torch's profiler, for chrome://tracing or Perfetto. In the engine's process; nothing of it is loaded before."""

from __future__ import annotations

import logging

from dsv4.errors import Dsv4Error

log = logging.getLogger("dsv4.engine")


class Profile:
    """Traces from its creation until so many steps have ended."""

    def __init__(self, path: str, steps: int) -> None:
        """`path`: the file to write, which is packed where it ends with .gz. Raises OSError where it cannot be written."""
        open(path, "wb").close()
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.path, self.steps, self.done = path, steps, 0
        self.over, self.fault = False, ""
        self._profiler = profile(activities=activities, acc_events=True)
        self._profiler.start()

    def step(self) -> None:
        """A step has ended."""
        self.done += 1
        if self.done >= self.steps:
            self.finish()

    def finish(self) -> None:
        """Writes the file, unless it is written. What goes wrong is kept in `fault`: it must not end the engine."""
        if self.over:
            return
        self.over = True
        try:
            self._profiler.stop()
            self._profiler.export_chrome_trace(self.path)
        except Exception as e:
            log.exception("the profile could not be written")
            self.fault = f"{type(e).__name__}: {e}"


class Profiling:
    """At most one profile at a time. Who began one names it by its file, and touches no other."""

    def __init__(self) -> None:
        self._running: Profile | None = None
        self._kept: dict[str, Profile] = {}
        """By file, until `end`: another one may run before that."""

    @property
    def running(self) -> bool:
        """Whether steps are traced now."""
        return self._running is not None and not self._running.over

    def step(self) -> None:
        """A step has ended."""
        if self._running is not None and not self._running.over:
            self._running.step()

    def begin(self, path: str, steps: int) -> None:
        """`path`: a file that no other profile has. Raises Dsv4Error where one is taken already, and OSError."""
        if self.running:
            raise Dsv4Error("a profile is being taken; try again when it is done")
        self._running = self._kept[path] = Profile(path, steps)

    def state(self, path: str) -> bool:
        """Whether it is over. Raises Dsv4Error where there is none, as in an engine that was started again."""
        if path not in self._kept:
            raise Dsv4Error("the engine that took it has ended")
        return self._kept[path].over

    def end(self, path: str) -> int:
        """Ends it, if it is not over yet, and forgets it; the steps that it has, 0 where there is none. Raises Dsv4Error where it
        could not be written."""
        ended = self._kept.pop(path, None)
        if ended is None:
            return 0
        ended.finish()
        if ended is self._running:
            self._running = None
        if ended.fault:
            raise Dsv4Error(ended.fault)
        return ended.done
