"""The protection of the bytes between parties: one value, which everything that listens or connects is given.

``Plaintext`` stands here, ``Tls`` in ``parties.net.tls``; nothing else in ``parties`` makes channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import grpc

from parties.net.caller import Caller, address
from parties.net.endpoints import CLIENT_LIMIT, OPTIONS, Endpoint
from secure.errors import EndpointError


class Network(ABC):
    """A maker of channels and listening ports. Commands and the Python API take one; its repr shows no key."""

    @abstractmethod
    def check(self, endpoint: Endpoint, *, what: str) -> None:
        """Raise EndpointError if this network must not reach ``endpoint``; called before anything takes long.

        what: the name of the service at ``endpoint``, for the message.
        """

    @abstractmethod
    def channel(self, endpoint: Endpoint, *, what: str, role: str) -> grpc.Channel:
        """Check ``endpoint`` and open a channel to it.

        role: the role that must answer there. Where the network has identities, the peer proves it before anything is
        sent.
        """

    @abstractmethod
    def bind(self, server: grpc.Server, endpoint: Endpoint, *, what: str, role: str) -> int:
        """Let ``server`` listen at ``endpoint`` as ``role``; return the port, or 0 if the address cannot be used."""

    @abstractmethod
    def caller(self, context: grpc.ServicerContext) -> Caller:
        """Return who makes a call. Raises TlsError if its certificate is not valid any more, or has no role."""

    def about(self) -> tuple[str, ...]:
        """Return lines for a person about this network, such as how long a certificate is valid."""
        return ()


@dataclass(frozen=True)
class Plaintext(Network):
    """A network without encryption or identities. It stays on this machine unless ``beyond_loopback`` is set.

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

    def channel(self, endpoint: Endpoint, *, what: str, role: str) -> grpc.Channel:
        self.check(endpoint, what=what)
        options = (*OPTIONS, ("grpc.max_receive_message_length", CLIENT_LIMIT))
        return grpc.insecure_channel(str(endpoint), options=options)

    def bind(self, server: grpc.Server, endpoint: Endpoint, *, what: str, role: str) -> int:
        self.check(endpoint, what=what)
        try:
            return server.add_insecure_port(str(endpoint))
        except RuntimeError:
            return 0

    def caller(self, context: grpc.ServicerContext) -> Caller:
        return Caller("", None, address(context))
