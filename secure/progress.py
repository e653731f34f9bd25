"""Reports of progress, for whoever waits: a function is called, and nothing in this package prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Told = Callable[[int, int, str], None]
"""Reports progress: (done, total, what is being done). A total of 0 says that it is not known."""

T = TypeVar("T")


def silent(done: int, total: int, what: str) -> None:
    """Report to nobody."""


def counted(items: Sequence[T], told: Told, what: str) -> Iterator[T]:
    """Yield the items, and report how many are done before each."""
    for done, item in enumerate(items):
        told(done, len(items), what)
        yield item
