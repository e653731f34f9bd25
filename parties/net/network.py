"""The protection of the bytes between parties: one value, which everything that listens or connects is given.

``Plaintext`` stands here, ``Tls`` in ``parties.tls.tls``; nothing else in ``parties`` makes channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import grpc

from parties.net.caller import Caller, address
from parties.net.endpoints import CLIENT_LIMIT, OPTIONS, Endpoint, first_answering, is_loopback
from parties.net.summed import SummedChannel
from secure.errors import EndpointError, PeerLost

PROBING = 5.0  # seconds


class Network(ABC):
    """A maker of channels and listening ports. Commands and the Python API take one; its repr shows no key."""

    @property
    def proves_roles(self) -> bool:
        """Tell whether a channel proves, before anything is sent, that its peer has the role that was asked for."""
        return False

    @abstractmethod
    def check(self, endpoint: Endpoint, *, what: str) -> None:
        """Raise EndpointError if this network must not reach ``endpoint``; called before anything takes long.

        what: the name of the service at ``endpoint``, for the message.
        """

    @abstractmethod
    def probe(self, endpoint: Endpoint, *, what: str, role: str) -> None:
        """Connect once as a channel would, and send nothing.

        Raises PeerLost if nobody answers, TlsError if the wrong one does, EndpointError.
        """

    @abstractmethod
    def channel(
        self, endpoint: Endpoint, *, what: str, role: str, met: Callable[[str], None] | None = None
    ) -> grpc.Channel:
        """Check ``endpoint`` and open a channel to it.

        role: the role that must answer there. Where the network has identities, the peer proves it before anything is
        sent. met: hears the SHA-256 of the peer's certificate then, in hexadecimal digits, at every new connection.
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

    def ends(self) -> Mapping[str, float]:
        """Return when certificates end that it needs, by what they are, in seconds since 1970."""
        return {}


@dataclass(frozen=True)
class Plaintext(Network):
    """A network without encryption or identities. It stays on this machine unless ``beyond_loopback`` is set.

    Whoever reads such a channel learns the seeds that cross it, and so inputs and weights.
    """

    beyond_loopback: bool = False

    def check(self, endpoint: Endpoint, *, what: str) -> None:
        self._allowed(endpoint, what)

    def _allowed(self, endpoint: Endpoint, what: str) -> tuple[str, ...]:
        """Return the endpoint's addresses, resolved once: what is checked is what is used."""
        addresses = endpoint.resolved()
        if not self.beyond_loopback and not is_loopback(addresses):
            raise EndpointError(
                f"{what}: {endpoint} is not on this machine, and the channel would not be encrypted",
                "make certificates with `unseen certs` and give --tls DIRECTORY (secure.Tls(DIRECTORY)), or --insecure "
                "(secure.Plaintext(beyond_loopback=True)) where nobody else can read the network",
            )
        return addresses

    def probe(self, endpoint: Endpoint, *, what: str, role: str) -> None:
        if first_answering(endpoint, self._allowed(endpoint, what), PROBING) is None:
            raise PeerLost(f"{what} at {endpoint} cannot be reached", "is it running, and is the port open?")

    def channel(
        self, endpoint: Endpoint, *, what: str, role: str, met: Callable[[str], None] | None = None
    ) -> grpc.Channel:
        addresses = self._allowed(endpoint, what)
        one = len(addresses) == 1
        at = addresses[0] if one else first_answering(endpoint, addresses, PROBING) or addresses[0]
        options = (
            *OPTIONS,
            ("grpc.max_receive_message_length", CLIENT_LIMIT),
            # a connection of its own: a balancer chooses by connection, and a lost one is not waited for
            ("grpc.use_local_subchannel_pool", 1),
        )
        return SummedChannel(grpc.insecure_channel(endpoint.at(at), options=options), f"{what} at {endpoint}")

    def bind(self, server: grpc.Server, endpoint: Endpoint, *, what: str, role: str) -> int:
        return bound(endpoint, self._allowed(endpoint, what), server.add_insecure_port)

    def caller(self, context: grpc.ServicerContext) -> Caller:
        return Caller("", None, address(context))


def bound(endpoint: Endpoint, addresses: Iterable[str], add: Callable[[str], int]) -> int:
    """Listen at all addresses of an endpoint, on one port, by ``add``; return the port, or 0 if it cannot be used.

    An address of a family that this machine does not have is left out, if another one can be used.
    """
    port = 0
    for each in addresses:
        with suppress(RuntimeError):
            port = add(str(Endpoint(each, port or endpoint.port))) or port
    return port
