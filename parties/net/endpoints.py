"""Addresses of services, and the options of every gRPC channel."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from secure.errors import EndpointError

# The largest gRPC message in bytes. Frames have about 1 MB, but a Program is sent to the dealer in one message, and
# Program and tokenizer are sent to the client in one.
SERVICE_LIMIT, CLIENT_LIMIT = 16 << 20, 64 << 20
OPTIONS = (
    ("grpc.max_send_message_length", CLIENT_LIMIT),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener
    ("grpc.enable_http_proxy", 0),  # a proxy would carry even loopback traffic off this machine
    ("grpc.http2.max_pings_without_data", 0),
    # a peer that was away is found again soon: gRPC's own times grow to two minutes
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long one attempt may take
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


SHARED = (*(option for option in OPTIONS if option[0] != "grpc.so_reuseport"), ("grpc.so_reuseport", 1))
"""The same for processes that listen at one port together."""


@dataclass(frozen=True)
class Endpoint:
    host: str
    port: int

    @classmethod
    def parse(cls, text: str, *, what: str) -> Endpoint:
        """Parse ``host:port``; port 0 lets the system choose (listening only). Raises EndpointError; names ``what``."""
        host, colon, port = text.strip().rpartition(":")
        host = host.strip("[]")
        if not colon or not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
            raise EndpointError(f"{what}: {text!r} is not host:port", "for example 127.0.0.1:50051")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def resolved(self) -> tuple[str, ...]:
        """Return all IP addresses of the host, in the system's order. Raises EndpointError if it has none."""
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise EndpointError(
                f"the host {self.host!r} cannot be resolved", "check its spelling, and the name server"
            ) from None
        return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))

    def at(self, address: str) -> str:
        """Return gRPC's name for this port at one address, which it does not resolve again."""
        return f"ipv6:[{address}]:{self.port}" if ":" in address else f"ipv4:{address}:{self.port}"


def is_loopback(addresses: Iterable[str]) -> bool:
    """Tell whether every address is this machine's own."""
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def names_this_machine(said: str, host: str) -> bool:
    """Tell whether the header ``Host`` of a request by HTTP is one at which it may come: this machine's own.

    host: the name at which we listen. An address is its own name, and so is localhost; another name may lead here
    without being ours, and a browser would take what it finds under it for its owner's.
    """
    name = re.sub(r":\d*$", "", said).strip("[]").lower()
    with suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return name in ("localhost", host.lower())


def first_answering(endpoint: Endpoint, addresses: Sequence[str], seconds: float) -> str | None:
    """Return the first address at which something listens on the endpoint's port, or None."""
    for address in addresses:
        with suppress(OSError), socket.create_connection((address, endpoint.port), timeout=seconds):
            return address
    return None
