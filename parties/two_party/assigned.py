"""The dealer's halves of entries: the client's key of every query that was dealt ahead, until it is assigned."""

from __future__ import annotations

import time

from parties.store.entries import Store, label_of
from protocols.prg import KEY_BYTES, Key

MODEL_ENTRIES = 4096  # of one model; the oldest one makes room for another
KEPT = 8 * 86400.0  # seconds that an entry is kept; servers keep theirs for less


class ClientKeys:
    """The clients' keys of entries, by model and id, in a store; some hundred bytes each.

    total: the entries of all models together. If there are more, those of models that nobody serves at present go
    first, and those of others have room again.
    """

    def __init__(self, store: Store, total: int) -> None:
        self._store, self._total = store, total

    @property
    def name(self) -> bytes:
        """The store's name: entries that another store kept are lost."""
        return self._store.name

    def keep(
        self, model: tuple[str, str], entry: bytes, client: Key, proving: bytes, served: list[tuple[str, str]]
    ) -> None:
        """Keep the client's key of an entry, and the key by which the entry's server shows that it is its own.

        served: the models that servers renew. Raises StoreError.
        """
        label = _label(model)
        if self._store.level(label).entries >= MODEL_ENTRIES:
            self._store.take(label)
        elif self._store.level().entries >= self._total:
            self._store.sweep(keep=[_label(each) for each in served])
        self._store.put(label, entry, client.value + proving)

    def take(self, model: tuple[str, str], entry: bytes) -> tuple[Key, bytes] | None:
        """Burn an entry durably, and return its two keys; None if it is not known. Raises StoreError."""
        found = self._store.take(_label(model), entry)
        return None if found is None else (Key(found.head[:KEY_BYTES]), found.head[KEY_BYTES:])

    def __len__(self) -> int:
        return self._store.level().entries

    def sweep(self) -> None:
        """Forget entries that are too old."""
        self._store.sweep(before=time.time() - KEPT)

    def close(self) -> None:
        self._store.close()


def _label(model: tuple[str, str]) -> str:
    return label_of("assigned", *model)
