"""Draining: a service that is stopped takes no new clients, and ends when the work that it has is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from parties.net.caller import CLIENT, Permissions
from parties.net.calls import refuse
from secure.errors import GoingAway

DRAIN = 30.0  # seconds that work may take after SIGTERM, by default
NOTICE = 0.3  # seconds for which a service still answers that it is going away, before it stops listening
POLL = 0.1


class Draining:
    """The calls that a service works on, and whether it still takes those of clients.

    permissions: the roles that may call each method. standing: methods whose calls last as long as the service does,
    and which are no work. A method that only clients may call begins work for them, so ``begin`` closes it. The calls
    of servers and parties go on, because the work that there is depends on them.
    """

    def __init__(self, permissions: Permissions, standing: frozenset[str] = frozenset()) -> None:
        self._closing = frozenset(method for method, roles in permissions.items() if roles == {CLIENT})
        self._standing, self._calls, self._lock = standing, 0, threading.Lock()
        self._begun = False
        self.needs_peers = any(CLIENT not in roles for roles in permissions.values())

    @property
    def begun(self) -> bool:
        """Tell whether the service takes no new clients any more."""
        return self._begun

    @contextmanager
    def call(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        """Count a call while it lasts; refuse it if it begins work that there is no time for."""
        if self._begun and method in self._closing:
            refuse(context, grpc.StatusCode.UNAVAILABLE, going_away("this service"))
        one = method not in self._standing
        with self._lock:
            self._calls += one
        try:
            yield
        finally:
            with self._lock:
                self._calls -= one

    def begin(self) -> None:
        """Refuse new work from now on."""
        self._begun = True

    def wait(self, until: float, left: Callable[[], bool], hurry: Callable[[], bool]) -> None:
        """Wait until there is no work, ``until`` a time of the monotonic clock at most, or until ``hurry`` is true.

        left: tells whether there is work that is no call.
        """
        while (self._calls or left()) and time.monotonic() < until and not hurry():
            time.sleep(POLL)


def going_away(who: str) -> GoingAway:
    """Return the error for a client that comes, or would go on, while ``who`` is being stopped."""
    return GoingAway(f"{who} is going away", "connect again: another one, or the next, answers at its address")
