"""Who sends a request: the tenant it counts for, and whether it may do what only an admin may."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import Scope

from dsv4.api.http import header
from dsv4.api.keys import ANYONE, Keys, Tenant
from dsv4.api.limits import Meter
from dsv4.config import ServerConfig

TENANT_HEADER = b"x-dsv4-tenant"
"""Goes before the body's `user`: a gateway sets it, clients choose `user`. A tenant's own key goes before both."""


@dataclass(frozen=True, slots=True)
class Caller:
    """A request's tenant and its rights."""

    meter: Meter
    admin: bool
    pin: bool
    monitor: bool

    @property
    def tenant(self) -> Tenant:
        """Without a name where the request itself says who asks."""
        return self.meter.tenant


class Callers:
    """Knows callers by their keys, and keeps what each tenant uses."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError for a file of keys that cannot be read."""
        self.keys = Keys(config)
        self._anyone = Meter(ANYONE)
        self.meters = {name: Meter(tenant) for name, tenant in self.keys.tenants.items()}
        """By name, of the tenants in the file."""

    def of(self, scope: Scope) -> Caller | None:
        """Whose request this is; None where the server wants a key and this brings none that it knows. A key that is unknown
        is not looked at where it wants none."""
        given = [_bearer(header(scope, b"authorization")), header(scope, b"x-api-key").strip(" \t")]
        owner = self.keys.find(as_sent for key in given if (as_sent := _utf8(key)))
        if owner is None:
            return None if self.keys.required else Caller(self._anyone, False, True, True)
        named = owner.name if owner.name and not owner.admin else ""
        if not named:  # it may say for whom it asks
            said = _utf8(header(scope, TENANT_HEADER))
            named = said if said in self.meters else owner.name
        meter, admin = self.meters.get(named, self._anyone), owner.admin
        return Caller(meter, admin, admin or owner.pin, admin or owner.monitor)

    def reload(self) -> None:
        """Reads the keys again. What a tenant has used of its limits stays used."""
        self.keys.reload()
        tenants = self.keys.tenants
        for name, tenant in tenants.items():
            if name in self.meters:
                self.meters[name].change(tenant)
            else:
                self.meters[name] = Meter(tenant)
        for name in self.meters.keys() - tenants.keys():
            del self.meters[name]

    def refused(self) -> dict[str, dict[str, int]]:
        """By tenant, requests refused for each kind of limit."""
        return {name: meter.refused for name, meter in self.meters.items()}


def _bearer(credentials: str) -> str:
    """The key of an `Authorization` header: a scheme, whose case does not matter, spaces, the key (RFC 9110, 11.4)."""
    scheme, _, key = credentials.strip(" \t").replace("\t", " ").partition(" ")
    return key.lstrip(" ") if scheme.lower() == "bearer" else ""


def _utf8(text: str) -> str:
    """A header, which was read as Latin-1, as the text whose bytes it holds."""
    return text.encode("latin-1").decode("utf-8", "surrogateescape")
