"""A server around the scripted engine in a process of its own: `python -m tests.support.server_process STEP [SETTING=VALUE …]`.

Prints its port once it serves, and at the end how many requests are alive.
"""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def server_process(
    step: float = 0.0, *, files: tuple[int, int] | None = None, **settings: object
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process and its port. `step`: seconds of a token; `files`: soft and hard limit on open files; `settings` are those of
    ServerConfig and EngineConfig. Standard error goes to standard output."""

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, files)

    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(step), *(f"{k}={v}" for k, v in settings.items())],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.strip().isdecimal(), f"not a port: {line}"
        yield process, int(line)
    finally:
        process.kill()
        process.communicate()


def main() -> None:
    from dsv4.api.connections import check_file_limit, raise_file_limit
    from dsv4.api.listen import bind
    from dsv4.api.server import serve
    from dsv4.api.service import Service
    from dsv4.config import EngineConfig, ServerConfig, load

    from tests.support.fake_engine import FakeEngine, small_tokenizer

    settings = dict(pair.split("=", 1) for pair in sys.argv[2:])
    engine_config, config = load([EngineConfig, ServerConfig], {"port": "0", **settings}, {})
    logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
    logging.getLogger("uvicorn").setLevel("WARNING")
    check_file_limit(raise_file_limit(), config.max_connections)
    engine = FakeEngine(tokenizer=small_tokenizer(), step_seconds=float(sys.argv[1]))
    engine.config = engine_config
    sock = bind(config.host, config.port)
    service = Service(engine, config, "tiny")  # type: ignore[arg-type]
    serve(service, sock, lambda: print(sock.getsockname()[1], flush=True))
    print("live", engine.live, flush=True)


if __name__ == "__main__":
    main()
