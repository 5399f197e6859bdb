"""What a row of a decode step costs the engine's process beside the device: plan, launch, commit, news, the message.

    python -m benches.host_rows [--rows 1 16 64 256] [--steps 2000]

The core and the loop are the real ones, the device is scripted and takes no time, the message goes to a socket that a thread empties.
Microseconds of CPU of the engine's thread.
"""

from __future__ import annotations

import argparse
import queue
import socket
import threading
import time

import numpy as np
from dsv4 import EngineConfig, SamplingParams
from dsv4.engine.link import Link
from dsv4.engine.process import Host

from tests.support.scripted_process import build


def empty(sock: socket.socket) -> None:
    while sock.recv(1 << 20):
        pass


def microseconds(rows: int, steps: int, looks_back: bool) -> float:
    """Of a step."""
    config = EngineConfig(max_num_seqs=rows, num_pages=rows * 16, async_scheduling=True)
    built = build(config)
    ours, theirs = socket.socketpair()
    threading.Thread(target=empty, args=(theirs,), daemon=True).start()
    host = Host(built, Link(ours), queue.SimpleQueue())
    params = SamplingParams(
        max_tokens=4000, ignore_eos=True, stop_token_ids=(5,), presence_penalty=0.5 if looks_back else 0.0
    )
    for key in range(1, rows + 1):
        host.loop.submit(key, np.array([50 + key, 60, 70], np.int32), params)
    for _ in range(50 + rows // 100):
        host.loop.step()
    begun = time.thread_time()
    for _ in range(steps):
        host.loop.step()
    taken = time.thread_time() - begun
    assert len(host.loop.requests) == rows, "a request ended while it was measured"
    ours.close()
    return 1e6 * taken / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    print(f"{'rows':>6} {'us a step':>10} {'us a row more':>14} {'with penalties':>15}")
    alone = 0.0
    for rows in args.rows:
        plain, penal = (microseconds(rows, args.steps, looks_back) for looks_back in (False, True))
        alone = alone or plain
        more = (plain - alone) / max(rows - args.rows[0], 1)
        print(f"{rows:6} {plain:10.1f} {more:14.2f} {penal:15.1f}", flush=True)


if __name__ == "__main__":
    main()
