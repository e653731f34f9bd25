"""Messages between the processes of one server: JSON and byte strings over a socket. A schedule is one such message."""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import Schedule, put_together, taken_apart
from protocols.errors import Error

LONGEST = 1 << 32  # bytes of one part of a message


class Pipe:
    """One end of a socket between two of a server's processes."""

    def __init__(self, at: socket.socket) -> None:
        self.socket = at

    def send(self, header: dict[str, Any], payloads: Sequence[bytes | memoryview] = ()) -> None:
        """Send a message: a JSON object, followed by byte strings."""
        text = json.dumps({**header, "sizes": [len(p) for p in payloads]}).encode()
        self.socket.sendall(struct.pack("<Q", len(text)) + text)
        for payload in payloads:
            self.socket.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], list[bytes]]:
        """Return the next message; raises EOFError if the other side is gone."""
        (size,) = struct.unpack("<Q", self._exactly(8))
        header = json.loads(self._exactly(size))
        return header, [self._exactly(n) for n in header.pop("sizes")]

    def _exactly(self, size: int) -> bytes:
        if size > LONGEST:
            raise Error(f"a message of {size} bytes between processes, where {LONGEST} is the limit")
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            count = self.socket.recv_into(view[filled:])
            if not count:
                raise EOFError
            filled += count
        return bytes(data)

    @property
    def closed(self) -> bool:
        """True once this end was closed."""
        return self.socket.fileno() < 0

    def close(self) -> None:
        self.socket.close()


def send_schedule(pipe: Pipe, schedule: Schedule, parameters: Parameters, views: Sequence[str]) -> None:
    """Send everything that a process needs to evaluate. It includes weights, so only the server's processes may get it.

    views: the names of the inputs, in the order in which their ciphertexts will come.
    """
    header, vectors = taken_apart(schedule)
    header |= {"parameters": dataclasses.asdict(parameters), "views": list(views)}
    pipe.send(header, [np.ascontiguousarray(v, "<f8").data.cast("B") for v in vectors])


def receive_schedule(pipe: Pipe) -> tuple[Schedule, Parameters, list[str]]:
    """Receive the message of ``send_schedule``."""
    d, payloads = pipe.receive()
    schedule = put_together(d, [np.frombuffer(payload, "<f8") for payload in payloads])
    return schedule, Parameters(**d["parameters"]), d["views"]
