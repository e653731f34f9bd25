"""The choice of queries for inputs: by the length that each needs, and by what a query can carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secure.session.link import Offer


@dataclass(frozen=True)
class Planned:
    """A query: its size, and the places of the inputs that it carries, in order; as many as its batch at most."""

    size: Offer
    places: tuple[int, ...]


def planned(lengths: Sequence[int], offers: Sequence[Offer]) -> list[Planned]:
    """Put inputs into queries of the sizes that are offered, those with the first input first.

    lengths: the length that was chosen for each input, for which there is at least one offer. Inputs of one length
    share queries in their order. The largest batch comes first that they fill to the half at least, then the same for
    the rest; if none is, the smallest. So no query has more places empty than full, unless nothing smaller is offered.
    """
    queries = list[Planned]()
    for length in sorted(set(lengths)):
        sizes = sorted((o for o in offers if o.length == length), key=lambda offer: offer.batch)
        rest = [place for place, own in enumerate(lengths) if own == length]
        while rest:
            size = next((o for o in reversed(sizes) if o.batch <= 2 * len(rest)), sizes[0])
            queries.append(Planned(size, tuple(rest[: size.batch])))
            rest = rest[size.batch :]
    return sorted(queries, key=lambda query: query.places[0])
