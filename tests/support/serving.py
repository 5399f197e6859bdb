"""A real server on a loopback port, on a thread of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

from dsv4.api.listen import bind
from dsv4.api.server import Server, make_server
from dsv4.api.service import Service
from dsv4.config import ServerConfig


class RunningServer:
    """Where it listens, and what it serves."""

    def __init__(self, service: Service, server: Server, port: int) -> None:
        self.service, self.server, self.port = service, server, port
        self.url = f"http://127.0.0.1:{port}"

    @property
    def engine(self) -> Any:
        return self.service.engine


@contextlib.contextmanager
def running(engine: Any, name: str = "tiny", **settings: Any) -> Iterator[RunningServer]:
    """Serves `engine` under `name`; `settings` are those of ServerConfig. Stops as SIGTERM would."""
    config = ServerConfig(port=0, **{"drain_timeout": 0.0, **settings})
    service = Service(engine, config, name)
    ready = threading.Event()
    server = make_server(service, ready.set)
    sock = bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    assert ready.wait(60), "the server did not start"
    try:
        yield RunningServer(service, server, sock.getsockname()[1])
    finally:
        server.stop()
        thread.join(60)
        service.close()
        assert not thread.is_alive(), "the server did not stop"


def free_port() -> int:
    """A port that nobody listens on now, for a process that has to be told one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port
