"""The service at the other end of a channel: its name, its address, and a hint for when it does not answer."""

from __future__ import annotations

from contextlib import AbstractContextManager

from parties.net.calls import calling
from parties.net.endpoints import Endpoint
from parties.net.network import Network
from secure.errors import Error, PeerLost


class Peer:
    """An open channel to ``who`` ("the dealer").

    role: the role that must answer ("dealer"). start: the command that starts that service, for hints.
    """

    def __init__(self, who: str, address: str | Endpoint, network: Network, *, role: str, start: str) -> None:
        self.who = who
        self.at = Endpoint.parse(address, what=who) if isinstance(address, str) else address
        self._start = start
        self.channel = network.channel(self.at, what=who, role=role)

    def __str__(self) -> str:
        return f"{self.who} at {self.at}"

    def calling(
        self, doing: str = "", *, hint: str | None = None, kind: type[Error] = PeerLost
    ) -> AbstractContextManager[None]:
        """Return a context that turns a call's gRPC error into a ``kind``. hint: default, how to start the peer."""
        hint = hint or f"start it with: {self._start} --listen {self.at}"
        return calling(self.who, self.at, hint, doing=doing, kind=kind)

    def close(self) -> None:
        self.channel.close()
