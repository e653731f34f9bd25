"""The caller of a service: its name, its role and its address, as its certificate proves them.

Handlers ask ``caller(context)``. The guard of the service (``parties.services.guard``) notes every caller before a
handler runs, so a handler never sees a caller that may not call it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote
from weakref import WeakKeyDictionary

import grpc

from parties.proto import unseen_pb2 as pb

Permissions = Mapping[str, frozenset[str]]
"""The roles that may call a method, by its full name: "/unseen.v3.Dealer/Register" -> {"server"}."""

CLIENT = "client"
"""The role of a client, in every deployment."""


@dataclass(frozen=True)
class Caller:
    """The peer that makes a call. name, role: those of its certificate; address: the one that it connects from.

    On a network without identities the name is "" and the role None: it is anybody on this machine, so every
    permission check passes, and all of them are one caller to whatever counts by caller.
    """

    name: str
    role: str | None
    address: str

    def __str__(self) -> str:
        return f"{self.role} {self.name!r} at {self.address}" if self.role else self.address


_NOTED: WeakKeyDictionary[grpc.ServicerContext, Caller] = WeakKeyDictionary()


def note(context: grpc.ServicerContext, who: Caller) -> None:
    """Keep the caller of a call for its handler. Only the guard calls this."""
    _NOTED[context] = who


def caller(context: grpc.ServicerContext) -> Caller:
    """Return who makes this call."""
    return _NOTED.get(context) or Caller("", None, address(context))


def address(context: grpc.ServicerContext) -> str:
    """Return the caller's address in words, such as ``127.0.0.1:40123``."""
    return unquote(context.peer()).removeprefix("ipv4:").removeprefix("ipv6:")


def permit(service: str, **methods: Iterable[str]) -> Permissions:
    """Say which roles may call each method of a service. A method that is not named may be called by none.

    Raises KeyError for a service or a method that does not exist.
    """
    described = pb.DESCRIPTOR.services_by_name[service]
    known = described.methods_by_name
    return {f"/{described.full_name}/{known[name].name}": frozenset(roles) for name, roles in methods.items()}
