"""The server's halves of queries that are dealt before a client comes: made in the background, kept in a store."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parties.proto import unseen_pb2 as pb
from parties.store.entries import Store, Taken, label_of
from parties.store.filler import Filler, Shelf
from parties.store.sealed import sealed_size
from parties.store.spool import spool
from parties.telemetry.events import Reading
from parties.two_party.conversations import IN_MEMORY as IN_MEMORY
from parties.two_party.dealer_peer import DealerPeer
from parties.two_party.keys import entry_proving_key, server_entry_key
from parties.two_party.masked_model import MaskedModel
from protocols.circuit import Correlations, ReadWhenUsed, correction_places, split_corrections
from protocols.flow import Circuit
from protocols.prg import KEY_BYTES, Key
from protocols.protocol import SERVER
from secure.errors import DealerError, StoreError
from secure.mpc.program import Program

log = logging.getLogger("unseen.server")

TRIES = 4  # entries that a query tries, each of which the dealer may have forgotten
_HEAD = 2 * KEY_BYTES


@dataclass(frozen=True, repr=False)  # holds keys
class Assignment:
    """An entry that the dealer gave to a query. said: the message about it for the client."""

    said: pb.Assigned
    taken: Taken

    def correlations(self, circuit: Circuit, whole: bool) -> Correlations:
        """Return the server's half. Raises StoreError.

        whole: all of it is read into memory now, and so checked as a whole; otherwise each part when it is used.
        """
        key, taken = Key(self.taken.head[:KEY_BYTES]), self.taken
        if not whole:
            return Correlations(SERVER, key, ReadWhenUsed(circuit, taken.read))
        return Correlations(SERVER, key, split_corrections(circuit, taken.read(0, taken.size)))


class Stocked:
    """A server's store of queries, of any number of models, and the thread that fills it.

    most: the bytes that all entries take; models share them equally. The store holds corrections, which are uniform to
    whoever does not know the client's key, and the server's keys of them. With the messages of the query that used an
    entry they show what the server's view shows, which is nothing about the client.
    """

    def __init__(self, store: Store, most: int, dealer: DealerPeer) -> None:
        self._store, self._dealer = store, dealer
        self._labels: dict[tuple[str, str], str] = {}
        self._filler = Filler(store, most, log)

    def close(self) -> None:
        self._filler.close()
        self._store.close()

    def readings(self) -> Iterator[Reading]:
        """Yield how many queries are left for each model."""
        return self._filler.readings()

    def serve(self, model: MaskedModel, dealers_store: bytes) -> None:
        """Keep the store filled for a model from now on.

        dealers_store: the name of the store where the dealer keeps the other halves. Entries whose other halves lay in
        another one are of no use, and are removed: a dealer without a directory begins an empty one at every start.
        """
        program, size = model.program, model.program.cost.dealt
        names = program.digest, model.weights_digest
        label = label_of("stocked", *names, dealers_store)

        def make() -> None:
            with self._dealer.stocking(*names, model.mask_seed) as (entry, seed, parts):
                head = server_entry_key(seed, *names, entry).value + entry_proving_key(seed, entry)
                self._store.put(label, entry, head, size, parts)

        self._labels[names] = label
        self._filler.serve(Shelf(_shelf(names), label, sealed_size(_HEAD, size), make))

    def drop(self, model: MaskedModel) -> None:
        """Serve a model no more: its entries are removed, and others have their room."""
        names = model.program.digest, model.weights_digest
        self._labels.pop(names, None)
        self._filler.drop(_shelf(names))

    @contextmanager
    def query(self) -> Iterator[None]:
        """Say that a query runs, so that the store is not filled meanwhile unless it is nearly empty."""
        with self._filler.paused():
            yield

    def assign(self, model: MaskedModel, session: bytes, query: int, proving: bytes) -> Assignment | None:
        """Take an entry from the store, and have the dealer give its other half to a query.

        The entry is burnt here before the dealer hears of it, and burnt there before it answers. None: there is none
        that both hold, so the query must be dealt. proving: the session's key for proofs. The corrections are read
        later, while the client computes its half. Raises DealerError.
        """
        label = self._labels[model.program.digest, model.weights_digest]
        for _ in range(TRIES):
            try:
                taken = self._store.take(label)
                if taken is None:
                    return None
            except StoreError as error:
                log.warning("an entry of the store is lost: %s", str(error).replace("\n", "; "))
                continue
            finally:
                self._filler.wake()
            sealed = self._dealer.assign(session, query, taken.entry, proving, taken.head[KEY_BYTES:])
            if sealed:
                return Assignment(pb.Assigned(query=query, entry=taken.entry, sealed=sealed), taken)
            log.info("an entry of the store was dropped: the dealer does not know it")
        return None


def memory_of(program: Program) -> int:
    """Return the bytes of memory that a prepared query needs: all corrections, or the largest of one instruction if
    there are more than IN_MEMORY.
    """
    size = program.cost.dealt
    return size if size <= IN_MEMORY else max(instruction.protocol.dealt_bytes for instruction in program.circuit)


def spooled_of(program: Program) -> int:
    """Return the bytes of temporary files that a prepared query takes where there is no memory to spare."""
    size = program.cost.dealt
    return size if size > IN_MEMORY else 0


def _shelf(names: tuple[str, str]) -> str:
    return f"program {names[0][:12]} of model {names[1][:12]}"


def receive(
    circuit: Circuit, key: Key, size: int, parts: Iterable[bytes], whole: bool, directory: Path | None = None
) -> Correlations:
    """Make the server's correlations of a query from what the dealer sends.

    whole: they stay in memory; otherwise they lie encrypted in a file without a name. Raises DealerError if they are
    not ``size`` bytes, StoreError, which goes to the client and so says nothing of this machine; the log does.
    """
    if not whole:
        try:
            spooled = spool(size, _exactly(parts, size), directory)
        except StoreError as error:
            log.error("a query failed: %s", str(error).replace("\n", "; "))
            raise StoreError("the server could not keep the corrections of this query", "ask its owner") from None
        return Correlations(SERVER, key, ReadWhenUsed(circuit, spooled.read))
    (correlations,) = receive_together(circuit, [key], size, parts)
    return correlations


def receive_together(circuit: Circuit, keys: Sequence[Key], size: int, parts: Iterable[bytes]) -> list[Correlations]:
    """Make the server's correlations of queries that are dealt together, in memory: each has its own.

    Of each instruction come the corrections of all queries. Raises DealerError if they are not ``size`` bytes a query.
    """
    buffers = [np.empty(size, np.uint8).data for _ in keys]  # not cleared: every byte of them comes
    whole = [slice(0, size)] if len(keys) == 1 else correction_places(circuit).values()
    places = ((buffer, place) for place in whole for buffer in buffers)
    room = memoryview(b"")
    for part in _exactly(parts, size * len(keys)):
        view = memoryview(part)
        while view:
            if not room:
                buffer, place = next(places)
                room = buffer[place]
            taken = min(len(view), len(room))
            room[:taken], view, room = view[:taken], view[taken:], room[taken:]
    return [
        Correlations(SERVER, key, split_corrections(circuit, buffer)) for key, buffer in zip(keys, buffers, strict=True)
    ]


def _exactly(parts: Iterable[bytes], size: int) -> Iterator[bytes]:
    filled = 0
    for part in parts:
        filled += len(part)
        if filled > size:
            break
        yield part
    if filled != size:
        raise DealerError(f"the dealer sent {filled} bytes of corrections, the Program prescribes {size}")
