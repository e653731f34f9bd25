"""Corrections that the workers of a Ray cluster compute for the dealer.

A worker gets a query's two keys and the key of the weights' mask, with the Program. With these it could read inputs and
weights out of the parties' messages: **the cluster belongs to the dealer's trust domain**, and to nobody else's. Seeds,
from which later keys follow, stay in the dealer's process. Keys travel in calls, not in an actor's constructor, whose
arguments Ray keeps.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from parties.cluster.joined import Cluster, lost, same_versions
from parties.services.dealing import Dealing, DealtModel
from parties.services.hosting import settle
from protocols import warm
from protocols.prg import Key
from secure.errors import DealerError
from secure.mpc.program import Program
from secure.version import __version__

MODELS = 32  # that a worker keeps, with their masks expanded; one counts once for each length and batch
BLOCK = 16 << 20  # bytes of a piece of corrections; each costs Ray some milliseconds, whatever its size
AHEAD = 2  # pieces that a worker makes before they are taken

Block = np.ndarray[tuple[int], np.dtype[np.uint8]]
"""Bytes, as an array, which Ray hands over in shared memory: whoever gets it reads it where it lies."""


class DealingWorker:
    """An actor that computes corrections. It keeps the mask of each model, so that B is expanded once."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        warm.warm_up()
        settle()
        self._models = OrderedDict[tuple[str, bytes], DealtModel]()

    def version(self) -> str:
        return __version__

    def deal(self, program: bytes, digest: str, mask: bytes, server: bytes, client: bytes) -> Iterator[Block]:
        """Yield the corrections of one query in blocks of BLOCK bytes, the last one shorter."""
        model = self._models.pop((digest, mask), None)
        if model is None:
            beside = next((each for (_, other), each in self._models.items() if other == mask), None)
            model = DealtModel.of(Program.from_bytes(program), Key(mask), beside)
        self._models[digest, mask] = model
        while len(self._models) > MODELS:
            self._models.popitem(last=False)
        yield from blocks(model.corrections(Key(server), Key(client)), BLOCK)


def blocks(pieces: Iterable[memoryview], size: int) -> Iterator[Block]:
    """Regroup byte strings of any sizes into blocks of ``size`` bytes, the last one shorter, copying each byte once."""
    block, filled = np.empty(size, np.uint8), 0
    for piece in pieces:
        given = np.frombuffer(piece, np.uint8)
        while len(given):
            taken = min(size - filled, len(given))
            block[filled : filled + taken] = given[:taken]
            filled, given = filled + taken, given[taken:]
            if filled == size:
                yield block
                block, filled = np.empty(size, np.uint8), 0
    if filled:
        yield block[:filled]


class RayDealing(Dealing):
    """Dealing on a cluster. workers: actors that compute, one query each at a time; None: one for each processor.

    A query goes to the worker that has the fewest. If one dies, its queries fail with a DealerError, their numbers stay
    burnt, and clients ask again under fresh correlations.
    """

    def __init__(self, cluster: Cluster, workers: int | None = None) -> None:
        self._cluster, self._lock = cluster, threading.Lock()
        try:
            self._actors = cluster.workers(DealingWorker, workers)
            same_versions(cluster.get([actor.version.remote() for actor in self._actors]), __version__)
        except BaseException:
            cluster.close()
            raise
        self._busy = Counter[int]()

    def corrections(self, model: DealtModel, server: Key, client: Key) -> Iterator[bytes | memoryview]:
        with self._lock:
            number = min(range(len(self._actors)), key=self._busy.__getitem__)
            self._busy[number] += 1
            actor = self._actors[number]
        stream, program = None, model.program
        try:
            keys = model.mask.value, server.value, client.value
            stream = self._cluster.stream(actor.deal, AHEAD, program.encoded, program.digest, *keys)
            for reference in stream:
                yield self._cluster.get(reference).data
        except Exception as error:
            self._replace(actor, number)
            raise DealerError(*lost(error).args) from None
        finally:
            if stream is not None:
                self._cluster.cancel(stream)  # nothing, if it has ended
            with self._lock:
                self._busy[number] -= 1

    def _replace(self, actor: object, number: int) -> None:
        """Put a fresh worker in the place of one that failed, unless somebody has done so."""
        with self._lock:
            if self._actors[number] is actor:
                self._actors[number] = self._cluster.workers(DealingWorker, 1)[0]

    def about(self) -> tuple[str, ...]:
        return (f"corrections are computed by {len(self._actors)} workers of a cluster", *self._cluster.about())

    def close(self) -> None:
        self._cluster.close()
