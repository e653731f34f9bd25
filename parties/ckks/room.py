"""Room that callers share: places for calls, and what goes first where room is short."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from secure.errors import Error

K = TypeVar("K", bound=Hashable)


class Places:
    """Places for calls of one kind: ``limit`` in all, of which a caller that has a name gets ``per_caller``.

    Callers without a name (there are no certificates) are one caller, and ``limit`` alone bounds them.
    """

    def __init__(self, what: str, limit: int, per_caller: int) -> None:
        self.what, self.limit, self.per_caller = what, limit, per_caller
        self._lock = threading.Lock()
        self._taken: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        return self._taken.total()

    @contextmanager
    def held(self, caller: str) -> Iterator[None]:
        """Hold a place within this context. Raises Error if there is none."""
        with self._lock:
            if caller and self._taken[caller] >= self.per_caller:
                raise Error(f"{self.per_caller} {self.what} of one client, which is the limit", "try again later")
            if self.taken >= self.limit:
                raise Error(f"{self.limit} {self.what}, which is the limit", "try again later")
            self._taken[caller] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[caller] -= 1
                self._taken += Counter()  # drops zeros, so that names are not kept


@dataclass(frozen=True)
class Kept(Generic[K]):
    """Something that is kept for a caller. used: when it was used last. size: of it, in any unit."""

    key: K
    caller: str
    used: float
    size: int


def surplus(
    kept: Iterable[Kept[K]], room: int, *, wanted: int = 0, caller: str = "", each: int | None = None
) -> list[K]:
    """Return what must go so that ``wanted`` more of ``caller`` fits: the oldest of whoever keeps most, repeatedly.

    So a caller who keeps little loses nothing to one who keeps much. room: of all together; each: of one caller.
    """
    left = sorted(kept, key=lambda k: k.used)
    sizes = Counter({caller: wanted})
    for k in left:
        sizes[k.caller] += k.size
    out = list[K]()
    while left and (sizes.total() > room or (each is not None and sizes[caller] > each)):
        most = max(sizes, key=lambda c: sizes[c]) if sizes.total() > room else caller
        found = next((k for k in left if k.caller == most), left[0])
        left.remove(found)
        sizes[found.caller] -= found.size
        out.append(found.key)
    return out
