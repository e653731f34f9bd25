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
from numpy.typing import NDArray

from parties.net.endpoints import Endpoint
from parties.net.frames import FrameReader, to_frames
from parties.net.network import Plaintext
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import InferenceServicer, InferenceStub, add_InferenceServicer_to_server
from parties.services import hosting
from secure.cost.kernel_times import evict_caches
from secure.cost.projection import Transport
from secure.errors import Error

SIZES = (64, 1 << 12, 1 << 16, 1 << 18, 1 << 20, 1 << 21)
SMALL, LARGE = 1 << 12, 1 << 18  # up to SMALL the time is that of a message; from LARGE on, that of the bytes
ROUNDS = 24
STREAM = 128 << 20  # bytes that are streamed one way, into memory that is new, as corrections are
PLAN = [size for _ in range(ROUNDS) for size in SIZES]
BUSY = 4 << 20  # bytes that each side writes before a round: in a query each side computes between rounds, so that
# caches and the threads that carry messages cool down


class Swap(InferenceServicer):
    """A service that sends a frame of each planned size and reads one of the same, as both parties of a query do.

    At the end it streams many bytes, as a dealer does, and sends the seconds and processor seconds of each part.
    """

    def Session(
        self, requests: Iterator[pb.ClientMessage], context: grpc.ServicerContext
    ) -> Iterator[pb.ServerMessage]:
        taken = []
        for size in PLAN:
            evict_caches(BUSY)
            start = _clocks()
            for frame in to_frames(bytes(size)):
                yield pb.ServerMessage(frame=frame)
            _read(size, (message.frame for message in requests))
            taken.append(_clocks() - start)
        start = _clocks()
        for frame in to_frames(bytes(STREAM)):
            yield pb.ServerMessage(frame=frame)
        taken.append(_clocks() - start)
        yield pb.ServerMessage(frame=pb.Frame(data=np.array(taken).tobytes(), last=True))


def _clocks() -> NDArray[np.float64]:
    """Return the time, and the processor time of this process with all its threads."""
    return np.array((time.perf_counter(), time.process_time()))


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
        return _fit(*_swap(address))
    finally:
        child.terminate()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _swap(address: str) -> tuple[dict[int, tuple[float, float]], tuple[float, float]]:
    """Return the median seconds and processor seconds of a round, by the size that each side sends.

    The smaller of both sides' times counts: it is that of the side that came last, because the other waits for it too.
    Of their processor times it is the mean. The second result: processor seconds of sending and of getting STREAM.
    """
    outbox: queue.SimpleQueue[pb.ClientMessage | None] = queue.SimpleQueue()
    taken = []
    with Plaintext().channel(Endpoint.parse(address, what="the other process"), what="it", role="server") as channel:
        answers = (message.frame for message in InferenceStub(channel).Session(iter(outbox.get, None)))
        for size in PLAN:
            evict_caches(BUSY)
            start = _clocks()
            for frame in to_frames(bytes(size)):
                outbox.put(pb.ClientMessage(frame=frame))
            _read(size, answers)
            taken.append(_clocks() - start)
        start = _clocks()
        _read(STREAM, answers)
        getting = _clocks() - start
        *rounds_there, sending = np.frombuffer(_read(16 * (len(PLAN) + 1), answers)).reshape(-1, 2)
        outbox.put(None)
    ours, theirs = np.array(taken), np.array(rounds_there)
    rounds = np.stack([np.minimum(ours, theirs)[:, 0], (ours + theirs)[:, 1] / 2], axis=1)
    medians = np.median(rounds.reshape(ROUNDS, len(SIZES), 2)[2:], axis=0)
    by_size = {size: (float(seconds), float(work)) for size, (seconds, work) in zip(SIZES, medians, strict=True)}
    return by_size, (float(sending[1]), float(getting[1]))


def _fit(found: dict[int, tuple[float, float]], streaming: tuple[float, float]) -> Transport:
    """Fit lines: a constant is the median of the small messages, a slope the median of the large ones'."""
    message, byte = _line({size: seconds for size, (seconds, _) in found.items()})
    round_work, byte_work = _line({size: work for size, (_, work) in found.items()})
    sending, getting = (work / STREAM for work in streaming)
    return Transport(message, byte, round_work, byte_work / 2, sending, getting)  # each side sends one and gets one


def _line(found: dict[int, float]) -> tuple[float, float]:
    message = statistics.median(seconds for size, seconds in found.items() if size <= SMALL)
    slopes = [(seconds - message) / size for size, seconds in found.items() if size >= LARGE]
    return message, max(0.0, statistics.median(slopes))


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
