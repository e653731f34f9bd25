"""What a message takes between two processes of this machine: an echo over the same gRPC streams that queries use."""

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
from parties.frames import to_frames
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import InferenceServicer, InferenceStub, add_InferenceServicer_to_server
from secure.projection import Transport

SIZES = (64, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
ROUNDS = 12


class Echo(InferenceServicer):
    """Answers every frame with one of the same size."""

    def Session(
        self, requests: Iterator[pb.ClientMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerMessage]:
        for message in requests:
            yield pb.ServerMessage(frame=message.frame)


def measure_transport(rounds: int = ROUNDS) -> Transport:
    """Half a round trip for messages of several sizes, fitted by a line."""
    child = subprocess.Popen([sys.executable, "-m", "parties.transport"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        address = child.stdout.readline().strip()
        if not address:
            raise PartyError("the echo process did not start", "see its output above")
        return _fit(_ping(address, rounds))
    finally:
        child.terminate()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _ping(address: str, rounds: int) -> dict[int, float]:
    """Median seconds one way, by size."""
    outbox: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
    found = {}
    with open_channel(Endpoint.parse(address, what="the echo"), insecure=False, what="the echo") as channel:
        answers = InferenceStub(channel).Session(iter(outbox.get, None))
        for size in SIZES:
            payload, times = bytes(size), []
            for _ in range(rounds):
                start, frames = time.perf_counter(), list(to_frames(payload))
                for frame in frames:
                    outbox.put(pb.ClientMessage(frame=frame))
                for _ in frames:
                    next(answers)
                times.append(time.perf_counter() - start)
            found[size] = statistics.median(times[2:]) / 2
        outbox.put(None)
    return found


def _fit(found: dict[int, float]) -> Transport:
    """The line through the smallest message whose slope fits the others best, relative to their sizes."""
    first = min(found)
    message = found[first]
    slopes = [(seconds - message) / size for size, seconds in found.items() if size > 1 << 17]
    return Transport(message, statistics.median(slopes))


def main() -> None:
    server, address = hosting.start(
        Endpoint.parse("127.0.0.1:0", what="the echo"),
        lambda s: add_InferenceServicer_to_server(Echo(), s),
        insecure=False,
        what="the echo",
    )
    hosting.run_until_stopped(server, lambda: print(address, flush=True))


if __name__ == "__main__":
    main()
