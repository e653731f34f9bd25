"""How the bytes between parties are protected: one value, handed to everything that listens or connects.

``Plaintext`` is what there is so far. TLS will be a second class here, with the same three methods; nothing else in
``parties`` knows how a channel is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import grpc

from parties.net.endpoints import CLIENT_LIMIT, OPTIONS, Endpoint
from secure.errors import EndpointError


class Network(ABC):
    """Makes channels and listening ports. The commands and the Python API take one; its repr shows no key."""

    @abstractmethod
    def check(self, endpoint: Endpoint, *, what: str) -> None:
        """Raise EndpointError where this network must not reach ``endpoint``; called before anything takes long.

        ``what``: who is meant, for the message.
        """

    @abstractmethod
    def channel(self, endpoint: Endpoint, *, what: str) -> grpc.Channel:
        """A channel to ``endpoint``, checked."""

    @abstractmethod
    def bind(self, server: grpc.Server, endpoint: Endpoint, *, what: str) -> int:
        """Let ``server`` listen; the port, or 0 where the address cannot be used."""


@dataclass(frozen=True)
class Plaintext(Network):
    """No encryption and no identity. It stays on this machine unless ``beyond_loopback`` says otherwise.

    Whoever reads such a channel learns the seeds that cross it, and so inputs and weights.
    """

    beyond_loopback: bool = False

    def check(self, endpoint: Endpoint, *, what: str) -> None:
        if not self.beyond_loopback and not endpoint.is_loopback():
            raise EndpointError(
                f"{what}: {endpoint} is not on this machine, and the channel would not be encrypted",
                "use a loopback address behind an encrypted tunnel, or --insecure "
                "(secure.Plaintext(beyond_loopback=True)) where nobody else can read the network",
            )

    def channel(self, endpoint: Endpoint, *, what: str) -> grpc.Channel:
        self.check(endpoint, what=what)
        options = (*OPTIONS, ("grpc.max_receive_message_length", CLIENT_LIMIT))
        return grpc.insecure_channel(str(endpoint), options=options)

    def bind(self, server: grpc.Server, endpoint: Endpoint, *, what: str) -> int:
        self.check(endpoint, what=what)
        try:
            return server.add_insecure_port(str(endpoint))
        except RuntimeError:
            return 0
