"""The listening sockets. Apart from the server, so that a taken address is known before anything slow is imported."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from dsv4.errors import ConfigError

BACKLOG = 2048
"""Connections that the kernel holds until they are accepted."""

LONGEST_PATH = 107
"""Bytes of a Unix socket's path (`sun_path` less its final zero)."""

OTHER_TRIES = 20
"""Free ports tried until one is free on every address of a name."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket on the first address of `host`. ConfigError when it cannot be had."""
    sockets = bind_all(host, port)
    for other in sockets[1:]:
        other.close()
    return sockets[0]


def bind_all(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of `host`, which may be a name (`localhost` is both 127.0.0.1 and ::1) or an address,
    IPv6 with or without brackets; port 0 takes one that is free on all of them.

    They listen at once: of two sockets that only are bound to a port both think they have it. Raises ConfigError.
    """
    if not host.strip():  # an unset variable must not open the server to every address
        raise ConfigError("host is empty; try 127.0.0.1, or 0.0.0.0 for every address")
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as e:
        raise _refused(host, port, e) from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    for _ in range(OTHER_TRIES):
        try:
            return _listen_on(addresses, port)
        except OSError as e:
            if port or len(addresses) == 1 or e.errno != errno.EADDRINUSE:
                raise _refused(host, port, e) from None
    raise _refused(host, port, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)))


def _listen_on(addresses: list[tuple[socket.AddressFamily, tuple]], port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    several = len({family for family, _ in addresses}) > 1
    missing: OSError | None = None
    try:
        for family, address in addresses:
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as e:  # a kernel without IPv6
                missing = e
                continue
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and several:  # else it would take the port of IPv4 as well
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind((address[0], port, *address[2:]))
            except OSError as e:
                # A name may have an address that this machine lacks, as ::1 where IPv6 is off.
                if e.errno != errno.EADDRNOTAVAIL or len(addresses) == 1:
                    raise
                missing = e
                sockets.pop().close()
                continue
            sock.listen(BACKLOG)
            port = sock.getsockname()[1]
        if not sockets:
            raise missing or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _refused(host: str, port: int, error: Exception) -> ConfigError:
    if not isinstance(error, OSError) or isinstance(error, socket.gaierror):
        reason = "this is no address or name of this machine"
        if "://" in host or host.rpartition(":")[2].isdigit():
            reason += "; --host takes no scheme and no port"
        return ConfigError(f"host is {host!r}: {reason}; try 127.0.0.1, or 0.0.0.0 for every address")
    reason = error.strerror or str(error)
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return ConfigError(
        f"cannot listen on {shown}:{port}: {reason}; choose another --host or --port (0 takes a free one)"
    )


def bind_unix(path: str, mode: int = 0o660) -> socket.socket:
    """A listening Unix socket, for its owner and group. What a dead server left there is replaced; a living server, or anything
    that is no socket, is left alone. Raises ConfigError."""
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ConfigError(
            f"uds is {path!r}, {len(os.fsencode(path))} bytes; a socket's path has at most {LONGEST_PATH}"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~mode)  # so that there is no moment in which others may connect
    try:
        _remove_stale(path)
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as e:
        sock.close()
        reason = {errno.ENOENT: "its directory does not exist"}.get(e.errno or 0, e.strerror or str(e))
        raise ConfigError(f"cannot listen on {path}: {reason}; choose another --uds") from None
    except ConfigError:
        sock.close()
        raise
    finally:
        os.umask(before)
    return sock


def _remove_stale(path: str) -> None:
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise ConfigError(f"cannot listen on {path}: it exists and is no socket; choose another --uds")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except ConnectionRefusedError:  # nobody listens any more
            os.unlink(path)
        except (OSError, TimeoutError) as e:
            raise ConfigError(f"cannot listen on {path}: {e.strerror or e}; choose another --uds") from None
        else:
            raise ConfigError(f"cannot listen on {path}: another server listens there; choose another --uds")


def remove_dead(path: str) -> None:
    """Removes the file of a Unix socket on which nobody listens any more."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)
