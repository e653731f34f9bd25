"""The computing of a query's corrections: in this process, or wherever else a subclass computes them.

It is a function of a Program, the key of the mask of the weights, and the query's two keys. Sessions, query numbers and
their burning stay with the dealer's service.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from protocols.circuit import deal
from protocols.prg import Key
from protocols.two_party import KeptRows
from protocols.weights import DealerWeights
from secure.mpc.program import Program


@dataclass(frozen=True, eq=False)
class DealtModel:
    """A model as the dealer computes with it. mask: the key that expands to the mask B of its weights; weights: B."""

    program: Program
    mask: Key = field(repr=False)
    weights: DealerWeights = field(repr=False)

    @classmethod
    def of(cls, program: Program, mask: Key, beside: DealtModel | None = None) -> DealtModel:
        """Make a model whose mask is expanded when it is first used. beside: another Program of the same mask.

        Raises ValueError if the two have weights of one name and different shapes.
        """
        shapes = program.weight_shapes
        return cls(program, mask, beside.weights.beside(shapes) if beside else DealerWeights(mask, shapes))

    def corrections(
        self, server: Key, client: Key, kept: KeptRows | None = None, rows: int = 0
    ) -> Iterator[memoryview]:
        """Yield the corrections of the query of these keys, see ``protocols.circuit.deal``.

        kept: the masks of what earlier queries kept, of which the first ``rows`` are read; those of this query are put
        behind these at the end.
        """
        given = kept.given(self.program.circuit, rows) if kept is not None else {}
        masks = dict[str, Tensor]()
        for _, payload in deal(self.program.circuit, server, client, self.weights, given, masks):
            yield payload
        if kept is not None:
            kept.append(masks, rows)


class Dealing(ABC):
    """A place where corrections are computed. Whoever runs it must be trusted as the dealer is: it gets all keys."""

    @abstractmethod
    def corrections(self, model: DealtModel, server: Key, client: Key) -> Iterator[bytes | memoryview]:
        """Yield the corrections of one query, in order, in pieces of any size. Closing it ends the work.

        server, client: the keys of both parties in this query, which no other query has.
        """

    def about(self) -> tuple[str, ...]:
        """Return lines for a person about where it computes."""
        return ()

    def close(self) -> None:  # noqa: B027 - not every place has something to release
        """Release what it holds."""


class DealingHere(Dealing):
    """Dealing in this process, in the thread of whoever asks."""

    def corrections(self, model: DealtModel, server: Key, client: Key) -> Iterator[bytes | memoryview]:
        return model.corrections(server, client)
