"""The place where server and dealer count what their callers use."""

from __future__ import annotations

from typing import Protocol

from parties.net.caller import Caller


class Spend(Protocol):
    """A count of what callers use: it raises an Error when ``amount`` more of ``what`` is beyond a caller's quota."""

    def __call__(self, caller: Caller, what: str, amount: int) -> None: ...


def unlimited(caller: Caller, what: str, amount: int) -> None:
    """Count nothing."""
