"""A link: one deployment's connection to one served Program, as a ``Session`` uses it.

Those that use sockets are in ``parties``.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from secure.cost.timeline import Timeline
from secure.cost.traffic import Traffic, total, traffic_json
from secure.errors import DealerError, InvalidInput, NotDealt, PeerLost
from secure.models.tokens import TextTokenizer

MAXIMUM_LENGTHS = 8
"""Padded lengths of one model. The parties see which of them each text takes: at most three bits of it."""

LOST = (PeerLost, DealerError, NotDealt)
"""The errors after which a query is asked again on a new connection, with other correlations."""


@dataclass(frozen=True)
class Offer:
    """A size at which a model is served. length: to which texts are padded, in tokens; 0 if it takes none.

    batch: the inputs of a query. program_digest: of the Program of this size.
    """

    length: int
    batch: int
    program_digest: str

    @classmethod
    def of(cls, program: ClientProgram) -> Offer:
        """Return the size of a Program, as its labels say."""
        return cls(int(program.labels.get("length", 0)), int(program.labels.get("batch", 1)), program.digest)


def digest_of_all(digests: Iterable[str]) -> str:
    """Return one digest of several Programs, in any order: SHA-256 over theirs. That of a single Program is its own."""
    found = sorted({*digests})
    return found[0] if len(found) == 1 else hashlib.sha256("\n".join(["programs", *found]).encode()).hexdigest()


@dataclass(frozen=True)
class Report:
    """The time and traffic of one query, measured at the client.

    rounds: messages of the online phase that waited for one another. traffic: payload bytes by link and phase.
    online_seconds: time from the query to its answer. offline_seconds: time of its offline phase, whether that ran
    ahead of the query or not. client_seconds: the part of both in which this client computed. dealer_seconds: the part
    of the offline phase in which correlations were dealt; 0 where nobody deals. query: its number in the session, from
    0. length: the tokens to which its texts were padded, which the parties see; 0 if the model takes none. id: a name
    of the query that the services' logs have too, and that tells nothing about it; "" where there are no services.
    """

    rounds: int
    traffic: tuple[Traffic, ...]
    online_seconds: float
    offline_seconds: float
    client_seconds: float
    dealer_seconds: float
    query: int
    length: int = 0
    id: str = ""

    def bytes(self, *, sender: str | None = None, receiver: str | None = None, phase: str | None = None) -> int:
        """Sum the bytes of the links that match; by default of all links."""
        return total(self.traffic, sender=sender, receiver=receiver, phase=phase)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values, with the same keys in every deployment."""
        return {**asdict(self), "traffic": traffic_json(self.traffic)}


class ClientProgram(Protocol):
    """The client's side of a Program, which the Programs of every deployment have."""

    @property
    def labels(self) -> Mapping[str, str]: ...
    @property
    def digest(self) -> str: ...
    @property
    def output_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each of the model's outputs, by name."""

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise InvalidInput for wrong names, types and shapes of inputs, and for NaN."""

    def clear_values(self, inputs: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Compute and check all that the client computes in the clear.

        tables: the token tables that the owner lets clients hold.
        """

    def dummy_values(self) -> Mapping[str, Any]:
        """Return zeros in place of ``clear_values``."""

    def encode(self, values: Mapping[str, Any], tables: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Encode clear values for the protocol, in steps that do not depend on them."""

    def decode(self, results: Sequence[Any]) -> dict[str, Tensor]:
        """Decode results into float64 tensors, by the names of the model's outputs."""

    def check_results(self, results: Sequence[Any]) -> None:
        """Raise OutOfRange if the results themselves say that they are not to be trusted."""


def only(outputs: Mapping[str, Tensor]) -> Any:
    """Return a model's answer: the tensor itself if there is one output, else a dict of all outputs by name."""
    return next(iter(outputs.values())) if len(outputs) == 1 else dict(outputs)


class Ahead(NamedTuple):
    """Queries of a link that follow, each behind the rows of the one before. most: so many may come."""

    link: Link
    most: int = 1


class Link(ABC):
    """One deployment's connection, as a Session uses it.

    program, tables, tokenizer: those of the served model. model: a name of its weights; "" if there is none. once:
    traffic that happens once per session (downloads, keys). ended: the reason why no query can run any more; ""
    while queries can run. offers: all sizes at which the same weights are served, if there are several. compiled_as:
    the deployment's options with which the model was compiled.
    """

    deployment: str
    program: Any  # a ClientProgram
    tables: Mapping[str, Tensor]
    tokenizer: TextTokenizer | None
    model: str = ""
    once: tuple[Traffic, ...] = ()
    ended: str = ""
    offers: tuple[Offer, ...] = ()
    compiled_as: Mapping[str, str] = {}
    timeline: Timeline | None = None  # of the last query, where one is kept

    @property
    def ready(self) -> int:
        """The number of prepared queries that are not yet used."""
        return 0

    def prepare(self) -> None:  # noqa: B027 - not every deployment has an offline phase
        """Run the offline phase of one query ahead of it; do nothing if the deployment has no such phase."""

    def converse(self, capacity: int) -> Any:
        """Begin a conversation: queries of which later ones read what earlier ones kept, up to ``capacity`` rows.

        What it returns is handed to ``go_on``. Raises InvalidInput if the deployment keeps nothing between queries.
        """
        raise InvalidInput(f"{self.deployment} does not generate text yet", "use secure.insecure_in_process")

    def go_on(
        self,
        conversation: Any,
        values: Mapping[str, Any],
        number: int,
        *,
        rows: int | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Sequence[Any], Report]:
        """Run the session's query ``number`` as the next one of a conversation; otherwise as ``ask`` does.

        The conversation may have begun on another link, to another Program of the same model. rows: those that it
        reads; the parties see it, and forget those behind; None for all that are kept. ahead: the queries that go on
        behind all rows of this one, which may be prepared while this one runs.
        """
        raise NotImplementedError

    def leave(self, conversation: Any) -> None:  # noqa: B027 - most deployments keep nothing that has to be released
        """End a conversation: no query goes on with it."""

    def beside(self, program_digest: str) -> Link:
        """Open a link to another Program of the same model, whose queries go on with conversations of this one.

        Raises what opening a link raises.
        """
        raise InvalidInput(f"{self.deployment} does not generate text yet", "use secure.insecure_in_process")

    @abstractmethod
    def ask(self, values: Mapping[str, Any], number: int, *, ahead: bool = False) -> tuple[Sequence[Any], Report]:
        """Run the session's query ``number``; return the results for ``program.decode``, and the query's report.

        values: those of ``program.encode``. Neither messages nor their times may depend on them. ahead: another query
        follows, and may be prepared while this one runs.
        Raises PeerLost if a party stays silent for longer than the deadline.
        """

    @abstractmethod
    def close(self) -> None:
        """Release everything that the link holds. It is called once."""
