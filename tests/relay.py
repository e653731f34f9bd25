"""A relay between a client and a service, which a test can make silent or slow, or let cut, or change a byte."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType

DIRECTIONS = ("to", "from")
"""To the service, and from it."""


class Relay:
    """Listens on a free port of this machine and passes bytes on to ``target``, both ways, until ``silence``.

    delay: seconds that whatever passes is held back.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._speaking = threading.Event()
        self._speaking.set()
        self._closed = threading.Event()
        self._sockets: set[socket.socket] = set()
        self.delay = 0.0
        self.passed = dict.fromkeys(DIRECTIONS, 0)
        self._damage: tuple[str, int, int] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def silence(self) -> None:
        """From now on what arrives stays here."""
        self._speaking.clear()

    def speak(self) -> None:
        self._speaking.set()

    def damage(self, direction: str, after: int, flips: int) -> None:
        """Change the bits ``flips`` of one byte: that behind the next ``after`` bytes in a direction."""
        self._damage = direction, self.passed[direction] + after, flips

    @property
    def damaged(self) -> bool:
        """True once the byte has passed."""
        return self._damage is None

    def heal(self) -> None:
        """Leave a byte that has not passed as it is: else it is one of whatever comes next."""
        self._damage = None

    def cut(self) -> None:
        """Break all connections that there are; new ones may come."""
        for each in tuple(self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed.set()
        self._speaking.set()
        for each in (self._listener, *self._sockets):
            each.close()

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        """Pass on one connection until both of its directions have ended; close it if nobody listens at the target."""
        with near, suppress(OSError), socket.create_connection(self._target) as far:
            self._sockets |= {near, far}
            back = threading.Thread(target=self._pass, args=(DIRECTIONS[1], far, near), daemon=True)
            back.start()
            self._pass(DIRECTIONS[0], near, far)
            back.join()
            self._sockets -= {near, far}

    def _pass(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                self._speaking.wait()
                if self.delay:
                    time.sleep(self.delay)
                sink.sendall(self._changed(direction, data))
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            for each in (source, sink):  # a connection that broke at one end breaks at the other
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _changed(self, direction: str, data: bytes) -> bytes:
        start = self.passed[direction]
        self.passed[direction] += len(data)
        if self._damage is None or self._damage[0] != direction or not 0 <= self._damage[1] - start < len(data):
            return data
        (_, at, flips), found = self._damage, bytearray(data)
        found[at - start] ^= flips
        self._damage = None
        return bytes(found)
