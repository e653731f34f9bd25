"""The tiny text encoder shared among three parties in this process, some of which may misbehave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from approximations.activations import GELU_FORMS
from parties.three_party.client import ThreePartyConnection, connect_three
from parties.three_party.party import PartyService
from parties.three_party.party_0 import ZeroService
from parties.three_party.party_1 import OneService
from parties.three_party.party_2 import HelperService
from parties.three_party.shared_model import load_share, share_model
from proto.unseen_pb2_grpc import add_PartyServicer_to_server
from protocols.fixedpoint import FixedPoint
from secure.models.text import compile_text_model
from tests.tiny import LENGTH, Served, sentences

Kinds = Mapping[int, type[PartyService]]
NONE: Mapping[int, Any] = {}


def shared(directory: Path, where: Path, embedding: str, *, public_weights: bool = False) -> Path:
    """The model of ``directory``, compiled and shared."""
    compiled, tokenizer, raw = compile_text_model(
        str(directory), LENGTH, embedding, GELU_FORMS[0], FixedPoint(), sentences()
    )
    share_model(compiled, tokenizer, raw, where, public_weights=public_weights)
    return where


@dataclass
class Three:
    """Three running parties."""

    parties: list[Served]

    @property
    def addresses(self) -> list[str]:
        return [party.address for party in self.parties]

    def dial(self, **options: Any) -> ThreePartyConnection:
        return connect_three(self.addresses, cache=False, **{"deadline": 20.0, **options})


@contextmanager
def running(
    where: Path,
    kinds: Kinds = NONE,
    *,
    ahead: int = 0,
    deadline: float = 20.0,
    shares: Mapping[int, Path] = NONE,
) -> Iterator[Three]:
    """``kinds``: parties that misbehave; ``shares``: parties that hold another directory."""
    loaded = [load_share(shares.get(party, where / f"party-{party}")) for party in range(3)]
    with ExitStack() as stack:

        def serve(service: PartyService) -> Served:
            served = Served(add_PartyServicer_to_server, service)
            stack.callback(getattr(service, "close", lambda: None))
            stack.callback(served.stop)
            return served

        two = serve(kinds.get(2, HelperService)(loaded[2], deadline=deadline))
        zero_kind: Any = kinds.get(0, ZeroService)
        one_kind: Any = kinds.get(1, OneService)
        zero = serve(zero_kind(loaded[0], two.endpoint, ahead=ahead, deadline=deadline))
        one = serve(one_kind(loaded[1], zero.endpoint, two.endpoint, deadline=deadline))
        yield Three([zero, one, two])
