"""The computing of a query's corrections: in this process, or wherever else a subclass computes them.

It is a function of a Program, the key of the mask of the weights, and the query's two keys. Sessions, query numbers and
their burning stay with the dealer's service.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock, Thread
from weakref import ReferenceType, ref

from torch import Tensor

from parties.limits.memory import memory_budget
from parties.net.calls import unexpected
from protocols.circuit import Dealt, deal, deal_together
from protocols.prg import Key
from protocols.two_party import KeptRows
from protocols.weights import DealerWeights
from secure.mpc.program import Program

log = logging.getLogger("unseen.dealer")

EXPECTED = 128  # models that wait for their masks to be expanded


@dataclass(frozen=True, eq=False)
class DealtModel:
    """A model as the dealer computes with it. mask: the key that expands to the mask B of its weights; weights: B."""

    program: Program
    mask: Key = field(repr=False)
    weights: DealerWeights = field(repr=False)

    @classmethod
    def of(cls, program: Program, mask: Key, beside: DealtModel | None = None) -> DealtModel:
        """Make a model whose mask is expanded when it is first used, or by ``Dealing.expect``.

        beside: another Program of the same mask.
        Raises ValueError if the two have weights of one name and different shapes.
        """
        shapes = program.weight_shapes
        return cls(program, mask, beside.weights.beside(shapes) if beside else DealerWeights(mask, shapes))

    def corrections(self, server: Key, client: Key) -> Iterator[memoryview]:
        """Yield the corrections of the query of these keys, see ``protocols.circuit.deal``."""
        for _, payload in deal(self.program.circuit, server, client, self.weights):
            yield payload

    def conversed(self, keys: Sequence[tuple[Key, Key]], kept: KeptRows, rows: int) -> Iterator[memoryview]:
        """Yield the corrections of queries of a conversation that are dealt together: of each instruction, for all.

        keys: those of server and client, for each query. kept: the masks of what earlier queries kept, of which the
        first ``rows`` are read by the first query, and by each later one also what those before it keep. The masks of
        these are put behind them at the end.
        """
        given, size = kept.given(self.program.circuit, rows), self.program.kept_rows
        queries: list[Dealt] = []
        for server, client in keys:
            before = [query.keeping for query in queries]
            queries.append(Dealt(server, client, _WithRows(given, before, rows, size) if before else given))
        for _, payloads in deal_together(self.program.circuit, queries, self.weights):
            yield from payloads
        for i, query in enumerate(queries):
            kept.append(query.keeping, rows + i * size)


@dataclass(frozen=True, eq=False, repr=False)
class _WithRows(Mapping[str, Tensor]):
    """Masks of rows as a query reads them: those that were given, and behind ``rows`` of them those of queries before.

    before: the masks that these keep, by name, ``size`` rows each; they come while the queries are dealt.
    """

    given: Mapping[str, Tensor]
    before: Sequence[Mapping[str, Tensor]]
    rows: int
    size: int

    def __getitem__(self, name: str) -> Tensor:
        whole = self.given[name].clone()
        for i, masks in enumerate(self.before):
            start = self.rows + i * self.size
            whole[..., start : start + self.size, :] = masks[name]
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


class Dealing(ABC):
    """A place where corrections are computed. Whoever runs it must be trusted as the dealer is: it gets all keys."""

    @abstractmethod
    def corrections(self, model: DealtModel, server: Key, client: Key) -> Iterator[bytes | memoryview]:
        """Yield the corrections of one query, in order, in pieces of any size. Closing it ends the work.

        server, client: the keys of both parties in this query, which no other query has.
        """

    def expect(self, model: DealtModel) -> None:  # noqa: B027 - not every place has something to prepare
        """Prepare for the first query of a model, which was just registered, and return at once. Raises nothing."""

    def about(self) -> tuple[str, ...]:
        """Return lines for a person about where it computes."""
        return ()

    def close(self) -> None:  # noqa: B027 - not every place has something to release
        """Release what it holds."""


class DealingHere(Dealing):
    """Dealing in this process, in the thread of whoever asks.

    One thread expands the masks of models before anybody does, weight by weight, until one takes more than half of the
    memory that there is to spare: what is left is expanded in the query that needs it. It leaves out models that are
    forgotten meanwhile, and of more than EXPECTED that wait the oldest.
    """

    def __init__(self) -> None:
        self._expected, self._lock, self._works = deque[ReferenceType[DealtModel]](maxlen=EXPECTED), Lock(), False

    def expect(self, model: DealtModel) -> None:
        with self._lock:
            self._expected.append(ref(model))
            if self._works:
                return
            self._works = True
        try:
            Thread(target=self._expand, name="unseen-masks", daemon=True).start()
        except RuntimeError:  # no thread is to be had
            self._works = False

    def _expand(self) -> None:
        while True:
            with self._lock:
                if not self._expected:
                    self._works = False
                    return
                expected = self._expected.popleft()
            try:
                while (model := expected()) is not None and model.weights.expand_next(memory_budget(None)):
                    del model
            except Exception as error:
                unexpected(error, log)

    def corrections(self, model: DealtModel, server: Key, client: Key) -> Iterator[bytes | memoryview]:
        return model.corrections(server, client)
