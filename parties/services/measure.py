"""Measure the time of a round between two processes of this machine, over the gRPC streams that queries use."""

from __future__ import annotations

import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import grpc
import numpy as np

from parties.net.endpoints import Endpoint
from parties.net.frames import FrameReader, to_frames
from parties.net.network import Plaintext
from parties.services import hosting
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import InferenceServicer, InferenceStub, add_InferenceServicer_to_server
from secure.cost.kernel_times import evict_caches
from secure.cost.projection import Transport
from secure.errors import Error

SIZES = (64, 1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 21)
SMALL, LARGE = 1 << 12, 1 << 18  # up to SMALL the time is that of a message; from LARGE on, that of the bytes
ROUNDS = 24
PLAN = [size for _ in range(ROUNDS) for size in SIZES]
BUSY = 4 << 20  # bytes that each side writes before a round: in a query each side computes between rounds, so that
# caches and the threads that carry messages cool down


class Swap(InferenceServicer):
    """A service that sends a frame of each planned size and reads one of the same, as both parties of a query do.

    At the end it sends the seconds of each wait.
    """

    def Session(
        self, requests: Iterator[pb.ClientMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerMessage]:
        waits = []
        for size in PLAN:
            evict_caches(BUSY)
            start = time.perf_counter()
            for frame in to_frames(bytes(size)):
                yield pb.ServerMessage(frame=frame)
            _read(size, (message.frame for message in requests))
            waits.append(time.perf_counter() - start)
        yield pb.ServerMessage(frame=pb.Frame(data=np.array(waits).tobytes(), last=True))


def _read(size: int, frames: Iterator[pb.Frame]) -> bytes:
    reader = FrameReader(size)
    while (payload := reader.add(next(frames))) is None:
        pass
    return payload


def measure_transport() -> Transport:
    """Measure rounds in which both sides send messages of several sizes at once, and fit a line to the times."""
    command, environment = hosting.child("parties.services.measure")
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        address = child.stdout.readline().strip()
        if not address:
            raise Error("the other process did not start", "see its output above")
        return _fit(_swap(address))
    finally:
        child.terminate()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _swap(address: str) -> dict[int, float]:
    """Return the median seconds of a round, by the size that each side sends.

    The smaller of both sides' times counts: it is that of the side that came last, because the other waits for it too.
    """
    outbox: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
    waits = []
    with Plaintext().channel(Endpoint.parse(address, what="the other process"), what="it", role="server") as channel:
        answers = (message.frame for message in InferenceStub(channel).Session(iter(outbox.get, None)))
        for size in PLAN:
            evict_caches(BUSY)
            start = time.perf_counter()
            for frame in to_frames(bytes(size)):
                outbox.put(pb.ClientMessage(frame=frame))
            _read(size, answers)
            waits.append(time.perf_counter() - start)
        theirs = np.frombuffer(_read(8 * len(PLAN), answers))
        outbox.put(None)
    by_round = np.minimum(waits, theirs).reshape(ROUNDS, len(SIZES))
    return dict(zip(SIZES, np.median(by_round[2:], axis=0).tolist(), strict=True))


def _fit(found: dict[int, float]) -> Transport:
    """Fit a line: its constant is the median of the small messages, its slope the median of the large ones'."""
    message = statistics.median(seconds for size, seconds in found.items() if size <= SMALL)
    slopes = [(seconds - message) / size for size, seconds in found.items() if size >= LARGE]
    return Transport(message, max(0.0, statistics.median(slopes)))


def _announce(address: str) -> None:
    sys.stdout.write(address + "\n")
    sys.stdout.flush()


def main() -> None:
    hosting.settle()
    server, address = hosting.start(
        Endpoint.parse("127.0.0.1:0", what="the other process"),
        [lambda s: add_InferenceServicer_to_server(Swap(), s)],
        network=Plaintext(),
        what="the other process",
        role="server",
        permissions={},
    )
    hosting.run_until_stopped(server, lambda: _announce(str(address)))


if __name__ == "__main__":
    main()
