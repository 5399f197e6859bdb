"""Who may use the server: keys, and the tenants that they belong to.

A key is known by its SHA-256 alone. What a request brings is looked up under a random one of this process, so that neither the
number of keys nor how much of one was right shows in the time it takes.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dsv4.config import ServerConfig
from dsv4.errors import ConfigError, kind
from dsv4.quantities import Range, counted, parse_bytes, parse_count
from dsv4.spelling import nearest

try:
    import tomllib
except ImportError:  # before Python 3.11
    import tomli as tomllib  # type: ignore[import-not-found, no-redef]

log = logging.getLogger("dsv4.api")

ALGORITHM = "sha256:"
"""How a key's hash begins in the file."""

LONGEST_NAME = 128
"""Characters of a tenant's name."""

COUNT = Range(1)


def _limit(help: str, *, bytes: bool = False) -> Any:
    return field(default=None, metadata={"help": help, "bytes": bytes})


@dataclass(frozen=True, slots=True)
class Tenant:
    """What the file says of a tenant; without a file, and for who is in none, nothing is limited."""

    name: str = ""
    admin: bool = False
    """Its keys open the admin routes too, and may name another tenant."""
    pin: bool = False
    """It may keep prefixes in the cache."""
    monitor: bool = False
    """It may read the figures of the whole server."""
    share_cache: bool = False
    """It takes part in the cache that all share, in place of one of its own."""
    requests_per_minute: int | None = _limit("requests a minute")
    tokens_per_minute: int | None = _limit("tokens a minute, those from the cache not counted")
    max_concurrent: int | None = _limit("requests at a time")
    max_tokens: int | None = _limit("tokens of an answer")
    max_prompt_tokens: int | None = _limit("tokens of a prompt")
    max_body_bytes: int | None = _limit("bytes of a request's body", bytes=True)

    def salted(self, salt: str) -> str:
        """The salt of a request that brings `salt`, which holds no U+0000: no two tenants have the same."""
        return salt if self.share_cache or not self.name else f"{self.name}\0{salt}"

    def session(self, key: str) -> str:
        """The session that this tenant calls `key`."""
        return f"{self.name}\0{key}" if self.name else key


ANYONE = Tenant(pin=True, monitor=True)
"""Who has no key where none is needed, and the key that is for all (`--api-key`)."""

ADMIN = Tenant(admin=True, pin=True)
"""`--admin-key`."""


class Keys:
    """The keys of one server. `reload` reads the file again."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError for a file that cannot be read."""
        self._config, self._blind = config, secrets.token_bytes(32)
        self.required = config.api_key is not None or config.keys_file is not None
        """Whether a request without a key is refused."""
        self.tenants: Mapping[str, Tenant] = {}
        """Those of the file."""
        self._owners: Mapping[bytes, Tenant] = {}
        self._read()

    def find(self, given: Iterable[str]) -> Tenant | None:
        """Whose key one of these is; None where none is known. All of them are looked up."""
        found = [self._owners.get(self._blinded(_digest(key))) for key in given]
        return next((tenant for tenant in found if tenant is not None), None)

    @property
    def has_admin(self) -> bool:
        """Whether any key opens the admin routes."""
        return any(tenant.admin for tenant in self._owners.values())

    def reload(self) -> None:
        """Reads the file again. Where it cannot be read what held before goes on, and the log says why."""
        try:
            self._read()
        except ConfigError as e:
            log.error("the keys stay as they are: %s", e)
        else:
            log.warning("keys read again: %s", self.describe())

    def describe(self) -> str:
        """What opens the server, for the start-up lines."""
        if not self.required:
            return "none: whoever reaches the port is served"
        count = len(self._owners) - (self._config.api_key is not None) - (self._config.admin_key is not None)
        of_file = f"{count} of {counted(len(self.tenants), 'tenant')} in {self._config.keys_file}"
        parts = ["--api-key"] * (self._config.api_key is not None)
        return " and ".join([*parts, *[of_file] * (self._config.keys_file is not None)])

    def _read(self) -> None:
        config, owners = self._config, dict[bytes, Tenant]()
        tenants: dict[str, Tenant] = {}
        for key, owner in ((config.api_key, ANYONE), (config.admin_key, ADMIN)):
            if key is not None:
                owners[self._blinded(_digest(key))] = owner
        if config.keys_file is not None:
            for tenant, digests in read_file(config.keys_file):
                tenants[tenant.name] = tenant
                for digest in digests:
                    if owners.setdefault(self._blinded(digest), tenant) is not tenant:
                        raise ConfigError(
                            f"keys_file {config.keys_file}: tenants.{tenant.name}.keys has a key that another tenant has too"
                        )
        self._owners, self.tenants = owners, tenants

    def _blinded(self, digest: bytes) -> bytes:
        return hmac.digest(self._blind, digest, "sha256")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def new_key() -> str:
    """A key of 256 random bits."""
    return f"sk-dsv4-{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """A key as the file has it."""
    return ALGORITHM + _digest(key).hex()


def read_file(path: str) -> Iterator[tuple[Tenant, list[bytes]]]:
    """Each tenant of a file with the digests of its keys. Raises ConfigError, which names file, field, value and what it takes, and
    never shows what may be a key."""
    where = f"keys_file {path}"
    try:
        with open(path, "rb") as file:
            found = tomllib.load(file)
    except OSError as e:
        raise ConfigError(f"{where}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{where} is no TOML: {e}") from None
    for name in found:
        if name != "tenants":
            raise ConfigError(f"{where} has {name!r}; it takes [tenants.NAME]{nearest(name, ['tenants'])}")
    tenants = found.get("tenants")
    if type(tenants) is not dict or not tenants:
        raise ConfigError(f"{where} has no tenants; it takes a table [tenants.NAME] for each")
    for name, table in tenants.items():
        shown = name if name.isprintable() else repr(name)
        yield _tenant(f"{where}: tenants.{shown[:LONGEST_NAME]}", name, table)


def _tenant(where: str, name: str, table: Any) -> tuple[Tenant, list[bytes]]:
    if not (0 < len(name) <= LONGEST_NAME and name.isprintable()):
        raise ConfigError(f"{where} is no name; it takes 1 to {LONGEST_NAME} printable characters")
    if type(table) is not dict:
        raise ConfigError(f"{where} is {kind(table)}; it takes a table")
    known = {f.name: f for f in fields(Tenant) if f.name != "name"}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key == "keys":
            continue
        if key not in known:
            raise ConfigError(f"{where} has {key!r}, which is unknown{nearest(key, [*known, 'keys'])}")
        about = known[key].metadata
        values[key] = _number(f"{where}.{key}", value, about["bytes"]) if about else value
        if not about and type(value) is not bool:
            raise ConfigError(f"{where}.{key} is {value!r:.60}; it takes true or false")
    return Tenant(name, **values), _digests(where, table.get("keys"))


def _number(where: str, value: Any, bytes: bool) -> int:
    try:
        if type(value) is str:
            value = parse_bytes(value) if bytes else parse_count(value)
        if type(value) is not int:
            raise ValueError
    except ValueError:
        takes = "a size such as 2MiB" if bytes else COUNT.words(int, str(value))
        raise ConfigError(f"{where} is {value!r:.60}; it takes {takes}") from None
    if fault := COUNT.fault(value, int):
        raise ConfigError(f"{where} is {value}; {fault}")
    return value


def _digests(where: str, given: Any) -> list[bytes]:
    if type(given) is not list or not given:
        raise ConfigError(f"{where}.keys is missing; it takes a list of hashes, which `dsv4 key` makes")
    for i, text in enumerate(given):
        if type(text) is not str or not re.fullmatch(ALGORITHM + "[0-9a-fA-F]{64}", text):
            raise ConfigError(
                f"{where}.keys[{i}] is no hash; it takes {ALGORITHM} and 64 hexadecimal digits, which `dsv4 key` makes"
            )
    return [bytes.fromhex(text.removeprefix(ALGORITHM)) for text in given]
