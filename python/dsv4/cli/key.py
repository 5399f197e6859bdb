"""`dsv4 key`: a new key for the server's file of keys, or the hash of one that there is."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from dsv4.errors import ConfigError


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "key",
        help="a new API key and its hash, for --keys-file",
        description="Makes a key. The key goes to who uses it, the table into the file of --keys-file.",
        epilog="examples:\n  dsv4 key team-a >> keys.toml    the key itself is on standard error\n"
        '  printf %s "$KEY" | dsv4 key team-a --stdin',
    )
    parser.add_argument(
        "tenant", nargs="?", default="NAME", metavar="TENANT", help="the tenant's name in the table"
    )
    parser.add_argument("--stdin", action="store_true", help="read the key from standard input instead")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from dsv4.api.keys import hash_of, new_key

    if not arguments.tenant.strip() or not arguments.tenant.isprintable():
        raise ConfigError(f"tenant is {arguments.tenant!r}; it takes a name of characters that can be seen")
    key = sys.stdin.read().strip() if arguments.stdin else new_key()
    if not key:
        raise ConfigError("standard input is empty; it takes the key")
    if not arguments.stdin:
        print(f"key        {key}", file=sys.stderr)
    quoted = arguments.tenant.replace("\\", "\\\\").replace('"', '\\"')
    print(f'[tenants."{quoted}"]\nkeys = ["{hash_of(key)}"]')
    return 0
