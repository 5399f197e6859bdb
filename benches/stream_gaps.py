"""The longest gap of a running stream while another client sends one large request.

    python -m benches.stream_gaps [--only WORD] [--context TOKENS] [--small]

The server is a process of its own with a scripted engine (a token every 50 ms) and the tokenizer of the released model
(`--small`: that of the model that ships); no model runs. Beside the gap: the stream's tokens meanwhile, how long the
request took, its status, and the server's memory before and at most. The first line is the machine's own noise.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STEP = 0.05
PORT_TIMEOUT = 60


def serve(pipe: Any, context: int, small: bool) -> None:
    """The server's process."""
    from dsv4 import garbage
    from dsv4.text.tokenizer import Tokenizer

    from tests.support.fake_engine import FakeEngine, small_tokenizer
    from tests.support.serving import running

    tokenizer = small_tokenizer() if small else Tokenizer.v4()
    engine = FakeEngine(tokenizer=tokenizer, step_seconds=STEP, max_model_len=context)
    engine.model_config.vocab_size = 8192 if small else 129280
    with running(engine) as server:
        garbage.settle()  # as `dsv4 serve` does
        pipe.send(server.port)
        pipe.recv()


def memory(pid: int, field: str) -> float:
    """MB of a process: `VmRSS` now, `VmHWM` at most."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


class Stream:
    """A stream that runs all the while, and when its tokens came."""

    def __init__(self, port: int) -> None:
        self.times: list[float] = []
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        body = {"prompt": "Hi", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
        self._connection.request("POST", "/v1/completions", json.dumps(body))
        self._response = self._connection.getresponse()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, AttributeError, ValueError):
            while line := self._response.readline():
                if line.startswith(b"data"):
                    self.times.append(time.monotonic())

    def gap(self, begin: float, end: float) -> tuple[float, int]:
        """The longest pause that touches the span, in seconds, and the tokens in it."""
        while self.times[-1] < end:
            time.sleep(0.02)
        times = list(self.times)
        pauses = [b - a for a, b in itertools.pairwise(times) if b > begin and a < end]
        return max(pauses), sum(begin < t < end for t in times)


def prose(size: int) -> str:
    """Text of this repository, varied so that no piece comes twice."""
    source = "".join(p.read_text() for p in sorted(Path("python").rglob("*.py")))
    out, have, n = [], 0, 0
    while have < size:
        part = source[(n * 7919) % 5000 :][:20_000] + f"\n{n} "
        n += 1
        out.append(part)
        have += len(part)
    return "".join(out)[:size]


def user(text: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 1}).encode()


def prompt(value: Any) -> bytes:
    return json.dumps({"prompt": value, "max_tokens": 1}).encode()


def tools(count: int, size: int) -> bytes:
    text = prose(size)
    every = [
        {
            "type": "function",
            "function": {"name": f"f{i}", "description": text[i * size // count :][: size // count]},
        }
        for i in range(count)
    ]
    return json.dumps(
        {"messages": [{"role": "user", "content": "x"}], "tools": every, "max_tokens": 1}
    ).encode()


def messages(count: int, size: int) -> bytes:
    text, each = prose(size), size // count
    many = [
        {"role": "assistant" if i % 2 else "user", "content": text[i * each :][:each]} for i in range(count)
    ]
    return json.dumps({"messages": many, "max_tokens": 1}).encode()


def filled(
    piece: bytes, size: int, head: bytes = b'{"prompt":"x","max_tokens":1,"pad":[', tail: bytes = b"]}"
) -> bytes:
    """A body of `size` bytes that repeats a piece with commas between."""
    return head + b",".join([piece] * (size // (len(piece) + 1))) + tail


MB = 2**20
CASES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "nothing": ("/v1/completions", lambda: prompt("x")),
    **{
        f"{name} {size} MB": (path, lambda make=make, size=size: make(prose(size * MB)))
        for size in (1, 5, 20, 60)
        for name, path, make in (
            ("chat", "/v1/chat/completions", user),
            ("completion", "/v1/completions", prompt),
            ("tokenize", "/tokenize", prompt),
        )
    },
    "letters 20 MB": ("/v1/completions", lambda: prompt("a" * (20 * MB))),
    "letters 5 MB": ("/v1/completions", lambda: prompt("a" * (5 * MB))),
    "1M ids": ("/v1/completions", lambda: prompt([i % 8000 for i in range(1_000_000)])),
    "ids 20 MB": ("/v1/completions", lambda: filled(b"123456", 20 * MB, b'{"prompt":[')),
    "ids 60 MB": ("/v1/completions", lambda: filled(b"7", 60 * MB, b'{"prompt":[')),
    "[],[] 20 MB": ("/v1/completions", lambda: filled(b"[]", 20 * MB)),
    "[],[] 60 MB": ("/v1/completions", lambda: filled(b"[]", 60 * MB)),
    "[],[] as prompt 60 MB": ("/v1/completions", lambda: filled(b"[]", 60 * MB, b'{"prompt":[')),
    "{},{} as messages 60 MB": ("/v1/chat/completions", lambda: filled(b"{}", 60 * MB, b'{"messages":[')),
    "unknown key 20 MB": ("/v1/completions", lambda: filled(b'"' + b"x" * (20 * MB) + b'"', 21 * MB)),
    "unknown keys 20 MB": (
        "/v1/completions",
        lambda: (
            b'{"prompt":"x","max_tokens":1,'
            + b",".join(b'"key%d":1' % i for i in range(20 * MB // 14))
            + b"}"
        ),
    ),
    "62,500 messages 2 MB": ("/v1/chat/completions", lambda: messages(62_500, 2 * MB)),
    "900 tools 10 MB": ("/v1/chat/completions", lambda: tools(900, 10 * MB)),
    "detokenize 1M": (
        "/detokenize",
        lambda: json.dumps({"tokens": [i % 8000 for i in range(1_000_000)]}).encode(),
    ),
}


@contextlib.contextmanager
def server(context: int, small: bool) -> Iterator[tuple[int, int]]:
    """(port, process id)."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, context, small), daemon=True)
    process.start()
    if not ours.poll(PORT_TIMEOUT):
        raise SystemExit("the server did not start")
    try:
        yield ours.recv(), process.pid or 0
    finally:
        ours.send(None)
        process.join(20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--context", type=int, default=2**20, help="tokens of context")
    parser.add_argument("--small", action="store_true", help="the tokenizer of the model that ships")
    arguments = parser.parse_args()
    print(
        f"{'request':26} {'gap ms':>7} {'tokens':>6} {'took s':>7} {'status':>6} {'RSS before':>10} {'peak MB':>8}"
    )
    for name, (path, make) in CASES.items():
        if arguments.only not in name:
            continue
        body = make()
        with server(arguments.context, arguments.small) as (port, pid):
            stream = Stream(port)
            time.sleep(20 * STEP)
            before, begin = memory(pid, "VmRSS"), time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=180)
            try:
                connection.request("POST", path, body)
                response = connection.getresponse()
                status, answer = response.status, response.read()
            except (OSError, http.client.HTTPException) as e:
                status, answer = 0, repr(e).encode()
            end = time.monotonic()
            gap, tokens = stream.gap(begin - STEP, end)
            why = (
                ""
                if status == 200
                else json.loads(answer)["error"]["message"][:100]
                if status
                else answer.decode()[:80]
            )
            print(
                f"{name:26} {1e3 * gap:7.0f} {tokens:6} {end - begin:7.2f} {status:6} {before:10.0f} "
                f"{memory(pid, 'VmHWM'):8.0f}  {why}",
                flush=True,
            )


if __name__ == "__main__":
    main()
