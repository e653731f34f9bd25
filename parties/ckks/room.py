"""Room that callers share: what goes first where it is short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


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
