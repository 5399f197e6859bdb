"""The collector of garbage in a process that serves: it looks only through what may be garbage, and seldom."""

from __future__ import annotations

import gc

YOUNG, MIDDLE, OLD = 10_000, 2, 1250
"""Objects after which the young ones are looked through, and how often until older ones are. With Python's own 700 and 10 all
objects of a request of 62,500 messages were looked through seven times while they were made, 30 ms each with the
interpreter's lock held. 50 and 50 look in the middle at half a million objects at a time, 0.2 s each with 10,000 streams, and these at 40,000
(CPython looks when a count is above its limit: at each fourth look at the young ones). What requests leave is freed by its counts; only cycles, which are few, wait longer."""


def settle() -> None:
    """Once everything that lives as long as the process is there: it is not looked through again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, OLD)
