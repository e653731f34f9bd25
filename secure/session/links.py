"""The links of a session, one for each size of its model that its queries use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from secure.errors import HandshakeError, PeerLost
from secure.lowering.client_inputs import GENERATE, SETTINGS, TABLES, TASK
from secure.models.tokenizer_document import TOKENIZER
from secure.session.link import ClientProgram, Link, Offer

SAME = ("model", "normalized", TASK, SETTINGS, TOKENIZER)
"""The labels of a Program that all sizes of a model have in common."""


class Links:
    """The link that a session was opened with, and links to the other sizes of its model, opened when they are needed.

    main: of the greatest length. open: opens a link to a Program, by its digest; None if there is no way to.
    offers: the sizes that may be used; none stands for the main link's own alone.
    """

    def __init__(self, main: Link, open: Callable[[str], Link] | None, offers: Sequence[Offer]) -> None:
        self.size = Offer.of(main.program)
        usable = tuple(offer for offer in offers if offer.length <= self.size.length)
        self.offers = usable if self.size in usable and open is not None else (self.size,)
        self._open, self._links = open, {self.size: main}  # by size
        self.can_renew = open is not None
        self._lock, self._closed = threading.Lock(), ""

    @property
    def main(self) -> Link:
        """The link that the session was opened with."""
        return self._links[self.size]

    @property
    def opened(self) -> tuple[Link, ...]:
        """All links that were opened, those that have ended since among them."""
        return tuple(self._links.values())

    def missing(self, size: Offer) -> bool:
        """Tell whether a link would have to be opened for this size."""
        return size != self.size and (size not in self._links or bool(self._links[size].ended))

    def of(self, size: Offer) -> Link:
        """Return the link of a size, and open it if need be.

        Raises what opening raises, HandshakeError if the Program is not that of the same model at this size, and
        PeerLost if the session has ended.
        """
        if self.main.ended:
            raise PeerLost(f"this session has ended: {self.main.ended}", "connect again")
        if self.missing(size):
            self.renew(size)
        return self._links[size]

    def renew(self, size: Offer) -> None:
        """Open another link of a size; it takes the place of one that is lost.

        Raises PeerLost if another thread closes all links meanwhile.
        """
        assert self._open is not None
        link = self._open(size.program_digest)
        try:
            self._check(link, size)
            if link.program.labels.get(TABLES) == self.main.program.labels.get(TABLES):
                link.tables = self.main.tables  # one copy of them in memory
            with self._lock:
                if self._closed:
                    raise PeerLost(f"this session has ended: {self._closed}", "connect again")
                lost, self._links[size] = self._links.get(size), link
        except BaseException:
            link.close()
            raise
        if lost is not None:
            lost.close()

    def _check(self, link: Link, size: Offer) -> None:
        """Raise HandshakeError unless answers of a link and of the main one belong together."""
        ours, theirs = self.main.program, link.program
        found = Offer.of(theirs)
        wrong = next((name for name in SAME if ours.labels.get(name) != theirs.labels.get(name)), "")
        if found != size or wrong or link.model != self.main.model or _widths(ours) != _widths(theirs):
            raise HandshakeError(
                f"the server's Program for {size.length} tokens, {size.batch} a query, is not one of the same model"
                f"{f' ({wrong} differs)' if wrong else ''}",
                "ask the server's owner, or use one length: --fixed-length (fixed_length=True)",
            )

    def close(self, why: str) -> None:
        """Close all links, each with the reason why; none is opened from now on."""
        with self._lock:
            self._closed, opened = why, self.opened
        for link in opened:
            link.ended = link.ended or why
            link.close()


def _widths(program: ClientProgram) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Program's outputs without the batch, by name; of tokens it is no matter how many come."""
    first = 2 if program.labels.get(TASK) == GENERATE else 1
    return {name: tuple(shape[first:]) for name, shape in program.output_shapes.items()}
