"""What a round takes between two processes of this machine, over the same gRPC streams that queries use."""

from __future__ import annotations

import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import grpc

from parties import hosting
from parties.endpoints import Endpoint, open_channel
from parties.errors import PartyError
from parties.frames import FrameReader, to_frames
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import InferenceServicer, InferenceStub, add_InferenceServicer_to_server
from secure.projection import Transport
from secure.timing import evict_caches

SIZES = (64, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
ROUNDS = 12
PLAN = [size for size in SIZES for _ in range(ROUNDS)]


class Swap(InferenceServicer):
    """Sends a frame of each planned size and reads one of the same, as both parties of a query do at once."""

    def Session(
        self, requests: Iterator[pb.ClientMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerMessage]:
        for size in PLAN:
            payload = bytes(size)
            evict_caches()  # as what is sent in a query was made, and used, a while ago
            next(requests)  # a barrier, so that a round begins at the same moment on both sides
            yield pb.ServerMessage()
            for frame in to_frames(payload):
                yield pb.ServerMessage(frame=frame)
            _read(size, (message.frame for message in requests))


def _read(size: int, frames: Iterator[pb.Frame]) -> None:
    reader = FrameReader(size)
    while reader.add(next(frames)) is None:
        pass


def measure_transport() -> Transport:
    """Rounds in which both sides send messages of several sizes at once, fitted by a line."""
    command, environment = hosting.child("parties.transport")
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        address = child.stdout.readline().strip()
        if not address:
            raise PartyError("the other process did not start", "see its output above")
        return _fit(_swap(address))
    finally:
        child.terminate()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _swap(address: str) -> dict[int, float]:
    """Median seconds of a round, by the size that each side sends."""
    outbox: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
    times: dict[int, list[float]] = {}
    with open_channel(Endpoint.parse(address, what="the other process"), insecure=False, what="it") as channel:
        answers = InferenceStub(channel).Session(iter(outbox.get, None))
        for size in PLAN:
            payload = bytes(size)
            evict_caches()
            outbox.put(pb.ClientMessage())
            next(answers)
            start = time.perf_counter()
            for frame in to_frames(payload):
                outbox.put(pb.ClientMessage(frame=frame))
            _read(size, (message.frame for message in answers))
            times.setdefault(size, []).append(time.perf_counter() - start)
        outbox.put(None)
    return {size: statistics.median(found[2:]) for size, found in times.items()}


def _fit(found: dict[int, float]) -> Transport:
    """The line through the smallest message whose slope fits the others best, relative to their sizes."""
    first = min(found)
    message = found[first]
    slopes = [(seconds - message) / size for size, seconds in found.items() if size > 1 << 17]
    return Transport(message, statistics.median(slopes))


def _announce(address: str) -> None:
    sys.stdout.write(address + "\n")
    sys.stdout.flush()


def main() -> None:
    hosting.keep_freed_memory()
    server, address = hosting.start(
        Endpoint.parse("127.0.0.1:0", what="the other process"),
        lambda s: add_InferenceServicer_to_server(Swap(), s),
        insecure=False,
        what="the other process",
    )
    hosting.run_until_stopped(server, lambda: _announce(str(address)))


if __name__ == "__main__":
    main()
