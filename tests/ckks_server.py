"""Tiny models under CKKS, and servers of them as processes of their own, whose children a test can count.

``python -m tests.ckks_server NAME STATE`` serves one until it is stopped.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import torch
from torch import Tensor, nn

import secure
from parties.ckks.client import CkksLink
from parties.ckks.keystore import KeyStore, keys_digest
from parties.net.caller import Caller
from parties.net.endpoints import Endpoint
from parties.net.frames import parts, to_frames
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import (
    CkksServicer,
    ModelServicer,
    ModelStub,
    add_CkksServicer_to_server,
    add_ModelServicer_to_server,
)
from parties.services import hosting
from protocols.ckks import canonical, codec
from protocols.ckks.seal import Client, Context
from secure.ckks.compile import CkksModel, encrypt
from secure.cost.traffic import ONCE
from secure.session.session import Session
from tests.ciphertexts import returned
from tests.test_ckks_programs import SAMPLES, digits
from tests.tiny import Served

Script = Callable[[CkksLink], Iterable[Any]]
SLACK = 2.0  # over the predicted error


class Tiny(nn.Module):
    """Eight numbers to four, so small that its keys are made and used in moments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        out: Tensor = self.last(x + 0.25 * x * x)
        return out


def inputs(name: str, number: int = 0) -> dict[str, Tensor]:
    """One of the inputs that calibrated a model."""
    return SAMPLES[number] if name != "tiny" else {"images": SAMPLES[number]["images"][:, :8]}


@cache  # made once: two threads that make one would share the random numbers of its weights
def model(name: str) -> nn.Module:
    return Tiny().eval() if name == "tiny" else digits(1)


def build(name: str, precision_bits: float = 8) -> CkksModel:
    """In a ring of 8192, but for a pure DigitsModel, which takes 16384."""
    samples = [inputs(name, k) for k in range(8)]
    mode, degree = ("refresh" if name == "refresh" else "pure"), (16384 if name == "pure" else 8192)
    options: dict[str, Any] = {"mode": mode, "precision_bits": precision_bits, "degrees": [degree]}
    return encrypt(model(name), samples[0], calibration=samples[1:], **options)


def compiled(name: str) -> secure.Compiled:
    """The same for its deployment."""
    return secure.Compiled(secure.Ckks(refresh=name == "refresh"), build(name, 14 if name == "pure" else 8))


def dial(address: str, keys: Path | None = None, **options: Any) -> Session:
    return secure.connect(secure.Ckks(server=address, keys=keys), **{"cache": False, "deadline": 20.0, **options})


def uploaded(session: Session) -> int:
    """Bytes of evaluation keys that this session sent."""
    return sum(t.bytes for t in session.once if (t.sender, t.receiver, t.phase) == ("client", "server", ONCE))


def is_right(session: Session, name: str, error: float, number: int = 0) -> None:
    """A query whose answer is the model's, to ``error`` as predicted."""
    sample = inputs(name, number)
    answer = session.query(sample)
    with torch.no_grad():
        wanted = model(name)(**sample)
    assert (answer.shape, answer.dtype) == (wanted.shape, torch.float64)
    assert (answer - wanted).abs().max() < SLACK * error + session.program.grain / 2 < 0.1 * wanted.abs().max()


@dataclass
class RunningCkks:
    """A running server and somebody's session with it; ``error``: predicted, of an output element."""

    name: str
    address: str
    state: Path
    pid: int
    error: float
    session: Session

    @property
    def link(self) -> CkksLink:
        found: CkksLink = self.session.link
        return found

    @property
    def host(self) -> int:
        """The process that forks the evaluators."""
        (pid,) = children(self.pid)
        return pid

    @property
    def evaluating(self) -> list[int]:
        """The processes of queries: the host's children hold keys, and theirs compute."""
        return [pid for holder in children(self.host) for pid in children(holder)]

    @property
    def idle(self) -> bool:
        return not self.evaluating

    @property
    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def key_files(self) -> dict[str, Path]:
        return {path.stem: path for path in self.state.glob("evaluation-keys/*/*/*.keys")}

    def works(self, session: Session | None = None, number: int = 0) -> None:
        """A query whose answer is the model's."""
        is_right(session or self.session, self.name, self.error, number)


def children(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended since has no children
            found += map(int, path.read_text().split())
    return found


@contextmanager
def running(name: str, state: Path) -> Iterator[RunningCkks]:
    command, environment = hosting.child("tests.ckks_server", name, str(state))
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        about = json.loads(server.stdout.readline())
        with dial(about["listening"]) as session:
            yield RunningCkks(name, about["listening"], state, about["pid"], about["error"], session)
    finally:
        server.terminate()
        server.wait()
        if server.stdout is not None:
            server.stdout.close()


# keys


def kept(directory: Path) -> tuple[Path, str, bytes]:
    (path,) = directory.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    digest, _, secret = path.read_bytes().partition(b"\n")
    return path, digest.decode(), secret


def connect(server: RunningCkks, keys: Path, *, uploads: bool) -> None:
    with dial(server.address, keys) as session:
        assert (uploaded(session) > 0, session.link.key_seconds > 0) == (uploads, uploads)
        server.works(session)


def stored(store: KeyStore, keys: dict[str, bytes], age: float = 0.0, caller: str = "") -> Path:
    """A store looks at sizes and digests alone."""
    digest = keys_digest(keys)
    store.add(digest, keys.values(), caller)
    path = store.path(digest, caller)
    assert path is not None
    os.utime(path, (time.time() - age,) * 2)
    return path


# what a client may say


class Query:
    """One by hand."""

    def __init__(self, c: CkksLink) -> None:
        self.box: queue.SimpleQueue[pb.CkksRequest | None] = queue.SimpleQueue()
        self.say(start(c), *(request for data in encrypted(c) for request in sent(data)))
        self.replies = c._stub.Query(iter(self.box.get, None), timeout=30)

    def say(self, *requests: pb.CkksRequest) -> None:
        for request in requests:
            self.box.put(request)

    def until_refresh(self) -> None:
        assert 1 in (reply.refresh for reply in self.replies)

    def failure(self) -> pb.Failure:
        *_, last = self.replies
        self.box.put(None)
        assert last.WhichOneof("content") == "failure"
        return last.failure  # type: ignore[no-any-return]

    def cancel(self) -> None:
        self.replies.cancel()
        self.box.put(None)


def upload(c: CkksLink, made: dict[str, bytes], data: bytes | None = None, **other: Any) -> None:
    body = b"".join(made.values()) if data is None else data
    send_upload(c, [announced(c, made, **other), *(pb.UploadPart(data=part) for part in parts(body))])


def announced(c: CkksLink, made: dict[str, bytes], **other: Any) -> pb.UploadPart:
    fields = {"program_digest": c.program.digest, "digest": keys_digest(made)}
    return pb.UploadPart(header=pb.KeysHeader(**{**fields, **other}))


def send_upload(c: CkksLink, messages: Sequence[pb.UploadPart]) -> None:
    with c._server.calling(hint=""):
        *_, last = c._stub.Upload(iter(messages), timeout=20)
        assert last.held


def start(c: CkksLink, **other: str) -> pb.CkksRequest:
    fields = {"program_digest": c.program.digest, "model": c.model, "keys_digest": c.keys_digest}
    return pb.CkksRequest(start=pb.CkksStart(**{**fields, **other}))


def sent(data: bytes) -> list[pb.CkksRequest]:
    return [pb.CkksRequest(frame=frame) for frame in to_frames(data)]


def encrypted(c: CkksLink, lower: int = 0) -> list[bytes]:
    """The inputs of a query."""
    values = c.program.client_values(inputs("tiny" if c.program.labels["mode"] == "pure" else "refresh"), {})
    return [c.client.encrypt(values[k], level - lower) for k, (_, level, _) in c.program.views.items()]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def zeros(c: CkksLink, level: int, **other: int) -> bytes:
    """A ciphertext, under other parameters if given."""
    p = replace(c.program.parameters, **other)
    client = Client(Context(p)) if other else c.client
    return client.encrypt(np.zeros(p.slots), level)


# what a server may say


class Faulty(CkksServicer, ModelServicer):
    """Describes what a real server does, says that it holds all keys, and then says ``script``."""

    def __init__(self, c: CkksLink, script: Script) -> None:
        self.description = ModelStub(c._server.channel).Describe(pb.DescribeRequest())
        self.c, self.script = c, script

    def add(self, server: grpc.Server) -> None:
        add_ModelServicer_to_server(self, server)
        add_CkksServicer_to_server(self, server)

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        found: pb.Description = self.description
        return found

    def Upload(self, requests: Iterator[pb.UploadPart], context: grpc.ServicerContext) -> Iterator[pb.KeysReply]:
        yield pb.KeysReply(held=sum(len(part.data) for part in requests) > 0)

    def Query(self, requests: Any, context: grpc.ServicerContext) -> Iterator[pb.CkksReply]:
        for content in self.script(self.c):
            yield pb.CkksReply(**content)


@contextmanager
def faulty(c: CkksLink, script: Script, kind: type[Faulty] = Faulty) -> Iterator[Served]:
    served = Served(lambda service, server: service.add(server), kind(c, script))
    try:
        yield served
    finally:
        served.stop()


class SilentDescribe(Faulty):
    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.Description:
        time.sleep(6)
        return super().Describe(request, context)


class SilentUpload(Faulty):
    """Reads all keys and says nothing."""

    def Upload(self, requests: Iterator[pb.UploadPart], context: grpc.ServicerContext) -> Iterator[pb.KeysReply]:
        for _ in requests:
            pass
        time.sleep(6)
        yield from ()


class DeafUpload(Faulty):
    """Reads nothing, says nothing."""

    def Upload(self, requests: Iterator[pb.UploadPart], context: grpc.ServicerContext) -> Iterator[pb.KeysReply]:
        time.sleep(6)
        yield from ()


class SlowUpload(Faulty):
    """Takes more seconds than a client's deadline, and says that it works."""

    def Upload(self, requests: Iterator[pb.UploadPart], context: grpc.ServicerContext) -> Iterator[pb.KeysReply]:
        for _ in range(5):
            time.sleep(0.5)
            yield pb.KeysReply(held=False)
        yield pb.KeysReply(held=True)


class UploadInVain(Faulty):
    def Upload(self, requests: Iterator[pb.UploadPart], context: grpc.ServicerContext) -> Iterator[pb.KeysReply]:
        yield pb.KeysReply(held=False)


def result(c: CkksLink, level: int) -> bytes:
    """A ciphertext as a server sends it."""
    return returned(c.client, zeros(c, level), level)


def frames(data: bytes) -> Iterator[dict[str, pb.Frame]]:
    return ({"frame": frame} for frame in to_frames(data))


def slow(c: CkksLink) -> Iterator[dict[str, Any]]:
    for done in range(5):
        time.sleep(0.5)
        yield {"progress": pb.Progress(done=done, total=5, path="x")}
    yield {"failure": pb.Failure(code="query", message="late")}


def quiet(c: CkksLink) -> Iterator[dict[str, Any]]:
    time.sleep(6)
    yield from ()


# what a client sends


class Recorder(secure.Network, grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """A network that notes every message that leaves a client."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self._plain = secure.Plaintext()

    def check(self, endpoint: Endpoint, *, what: str) -> None:
        self._plain.check(endpoint, what=what)

    def probe(self, endpoint: Endpoint, *, what: str, role: str) -> None:
        self._plain.probe(endpoint, what=what, role=role)

    def channel(
        self, endpoint: Endpoint, *, what: str, role: str, met: Callable[[str], None] | None = None
    ) -> grpc.Channel:
        return grpc.intercept_channel(self._plain.channel(endpoint, what=what, role=role), self)

    def bind(self, server: grpc.Server, endpoint: Endpoint, *, what: str, role: str) -> int:
        raise AssertionError("a client does not listen")

    def caller(self, context: grpc.ServicerContext) -> Caller:
        raise AssertionError("nobody calls a client")

    def _noted(self, messages: Iterable[Any]) -> Iterator[Any]:
        for message in messages:
            self.sent.append(message)
            yield message

    def intercept_unary_unary(self, go_on: Any, details: Any, request: Any) -> Any:
        return go_on(details, next(self._noted([request])))

    def intercept_stream_stream(self, go_on: Any, details: Any, requests: Any) -> Any:
        return go_on(details, self._noted(requests))

    def apart(self, sizes: Iterable[int]) -> tuple[pb.KeysHeader, pb.CkksStart, list[bytes], list[bytes]]:
        """Header, start, keys of these sizes, and ciphertexts."""
        header = next(m.header for m in self.sent if type(m) is pb.UploadPart)
        begin = next(m.start for m in self.sent if type(m) is pb.CkksRequest)
        joined = b"".join(m.data for m in self.sent if type(m) is pb.UploadPart)
        at = np.cumsum([0, *sizes]).tolist()
        assert len(joined) == at[-1]
        frames = [m.frame for m in self.sent if type(m) is pb.CkksRequest and m.HasField("frame")]
        ends = [0, *(i + 1 for i, frame in enumerate(frames) if frame.last)]
        ciphertexts = [b"".join(f.data for f in frames[a:b]) for a, b in itertools.pairwise(ends)]
        return header, begin, [joined[a:b] for a, b in itertools.pairwise(at)], ciphertexts


def forbidden(c: CkksLink, sample: dict[str, Tensor], decrypted: Sequence[Any]) -> list[canonical.Words]:
    """The secret key, as residues and as it is stored (after the name of its parameters); inputs; what it decrypted."""
    p, secret = c.program.parameters, c.client.secret_bytes()
    out = [np.frombuffer(canonical.body_of(secret), np.uint64, (p.levels + 2) * p.degree, 72)]
    out.append(np.frombuffer(secret, np.uint64, len(secret) // 8 - 33, 256))
    out += [value.double().numpy().view(np.uint64).reshape(-1) for value in sample.values()]
    for plain in decrypted:
        out += [codec._words(plain), c.client.context.decode(plain).view(np.uint64)]
    return out


def contains(data: bytes, words: canonical.Words) -> bool:
    """Whether 32 bytes in a row of the words stand anywhere in the data."""

    def hashed(x: canonical.Words) -> canonical.Words:
        return (x * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)

    table = np.zeros(1 << 24, bool)
    table[hashed(words)] = True
    for offset in range(8):
        here = np.frombuffer(data, np.uint64, max(0, len(data) - offset) // 8, offset)
        likely = table[hashed(here)]
        found = np.flatnonzero(likely[:-3] & likely[1:-2] & likely[2:-1] & likely[3:])
        for at in found[np.isin(here[found], words[:-3])]:
            for place in np.flatnonzero(words[:-3] == here[at]):
                if (here[at : at + 4] == words[place : place + 4]).all():
                    return True
    return False


def main(name: str, state: Path) -> None:
    torch.set_num_threads(1)
    state.mkdir(parents=True, exist_ok=True)
    made = compiled(name)
    with secure.serve(made, role="server", state=state, workers=2, deadline=20.0) as service:
        about = {"listening": service.address, "pid": os.getpid(), "error": made.model.predicted_error}

        def announce() -> None:
            sys.stdout.write(json.dumps(about) + "\n")
            sys.stdout.flush()

        service.wait_announced(announce)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
