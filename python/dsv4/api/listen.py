"""The listening socket. Apart from the server, so that a taken port is known before anything slow is
imported."""

from __future__ import annotations

import socket

from dsv4.errors import ConfigError


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, made before any weight is read. ConfigError when the address cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as e:
        reason = e.strerror or str(e)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; choose another --host or --port (0 takes a free one)"
        ) from None
    sock.set_inheritable(True)
    return sock
