"""The tiny text encoder shared among three parties in this process, some of which may misbehave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import secure
from parties.net.endpoints import Endpoint
from parties.net.network import Plaintext
from parties.net.peer import Peer
from parties.services.hosting import Service
from parties.store.entries import Store
from parties.three_party.hosted import parts_of
from parties.three_party.party import PartyService
from parties.three_party.party_0 import Party0Service
from parties.three_party.party_1 import Party1Service
from parties.three_party.party_2 import Party2Service
from parties.three_party.shared_model import load_share, share_model
from secure.deployments.three_party import ThreeParty
from secure.errors import Error
from secure.session.session import Session
from tests.tiny import LENGTH, LOOPBACK, sentences

Kinds = Mapping[int, type[PartyService]]
NONE: Mapping[int, Any] = {}


def shared(directory: Path, where: Path, embedding: str, *, public_weights: bool = False) -> Path:
    """The model of ``directory``, compiled and shared."""
    deployment = ThreeParty(public_weights=public_weights)
    compiled = secure.compile_text_model(
        str(directory), LENGTH, deployment=deployment, embedding=embedding, calibration=sentences()
    )
    share_model(compiled, where)
    return where


@dataclass
class Party:
    """One running party. make: makes its service, as a start does."""

    make: Callable[[], PartyService]
    service: PartyService
    hosted: Service

    @property
    def address(self) -> str:
        return self.hosted.address

    def peer(self) -> Peer:
        """A channel to it."""
        role = self.service.share.role
        return Peer(role, self.address, Plaintext(), role=role, start="the test")

    def stop(self) -> None:
        """At once, as a kill would."""
        self.hosted.close()

    def restart(self) -> None:
        """Start it again at the same address."""
        at = Endpoint.parse(self.address, what="the test")
        self.stop()
        self.service = self.make()
        self.hosted = hosted(self.service, at)


def hosted(service: PartyService, at: Endpoint = LOOPBACK) -> Service:
    """Host a party's service; use it as a context manager."""
    return Service(parts_of(service), at, Plaintext(), what="the test", role=service.share.role)


@dataclass
class Three:
    """Three running parties."""

    parties: list[Party]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(party.address for party in self.parties)

    def meet(self) -> None:
        """Wait until all three pairs that can have agreed on a key."""
        for caller, callee in ((0, 2), (1, 0), (1, 2)):
            with suppress(Error):
                self.parties[caller].service.key(callee)

    def dial(self, **options: Any) -> Session:
        return call(self.addresses, **options)


def call(addresses: tuple[str, ...], deployment: ThreeParty | None = None, **options: Any) -> Session:
    """A session with parties at these addresses; no cache unless ``options`` say so."""
    public = deployment is not None and deployment.public_weights
    return secure.connect(
        ThreeParty(parties=addresses, public_weights=public), **{"deadline": 20.0, "cache": False, **options}
    )


@contextmanager
def running(
    where: Path,
    kinds: Kinds = NONE,
    *,
    ahead: int = 0,
    deadline: float = 20.0,
    shares: Mapping[int, Path] = NONE,
    stores: Mapping[int, Callable[[], Store]] = NONE,
    most: int = 0,
) -> Iterator[Three]:
    """``kinds``: parties that misbehave; ``shares``: parties that hold another directory; ``stores``: those that open
    one at each start, party 0 of ``most`` bytes."""
    loaded = [load_share(shares.get(party, where / f"party-{party}")) for party in range(3)]
    with ExitStack() as stack:

        def serve(make: Callable[[], PartyService]) -> Party:
            service = make()
            party = Party(make, service, hosted(service))
            stack.callback(party.stop)
            return party

        kind_0: Any = kinds.get(0, Party0Service)
        kind_1: Any = kinds.get(1, Party1Service)
        kind_2: Any = kinds.get(2, Party2Service)

        def store(number: int) -> dict[str, Any]:
            return {"store": stores[number]()} if number in stores else {}

        size = {"most": most} if most else {}
        two = serve(lambda: kind_2(loaded[2], deadline=deadline, **store(2)))
        zero = serve(lambda: kind_0(loaded[0], two.peer(), ahead=ahead, deadline=deadline, **store(0), **size))
        one = serve(lambda: kind_1(loaded[1], zero.peer(), two.peer(), deadline=deadline))
        parties = Three([zero, one, two])
        parties.meet()
        yield parties
