"""The CKKS deployment over real gRPC on loopback: right answers, what is refused, and what a client ever sends."""

from __future__ import annotations

import itertools
import os
import queue
import re
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from parties import encrypted_client
from parties.calls import calling
from parties.encrypted_client import EncryptedConnection
from parties.encrypted_server import largest
from parties.endpoints import open_channel
from parties.errors import HandshakeError, PartyError, ProtocolError, QueryError
from parties.evaluators import _Host, read_keys
from parties.frames import PART, parts, to_frames
from parties.keystore import KeyStore, keys_digest
from proto import unseen_pb2 as pb
from proto.unseen_pb2_grpc import EncryptedServicer, EncryptedStub, add_EncryptedServicer_to_server
from protocols.ckks import codec
from protocols.ckks.seal import Client, Context, InvalidCiphertext
from tests.deployed import Deployed, children, inputs, model, running
from tests.ciphertexts import unpacked
from tests.tiny import Served, wait_until

Requests = Sequence[pb.EncryptedRequest]
SLACK = 2.0  # over the predicted error


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with running("tiny", tmp_path_factory.mktemp("tiny")) as server:
        yield server


@pytest.fixture(scope="module")
def refreshing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    with running("refresh", tmp_path_factory.mktemp("refresh")) as server:
        yield server


@pytest.fixture(scope="module")
def connection(tiny: Deployed) -> Iterator[EncryptedConnection]:
    with EncryptedConnection(tiny.address, deadline=20.0) as opened:
        yield opened


@pytest.fixture(scope="module")
def refreshed(refreshing: Deployed) -> Iterator[EncryptedConnection]:
    with EncryptedConnection(refreshing.address, deadline=20.0) as opened:
        yield opened


def check(server: Deployed, c: EncryptedConnection, number: int = 0) -> None:
    """A query whose answer is the model's."""
    sample = inputs(server.name, number)
    answer = c.query(sample)
    with torch.no_grad():
        wanted = model(server.name)(**sample)
    assert answer.shape == wanted.shape
    assert (answer - wanted).abs().max() < SLACK * server.error + c.program.grain / 2 < 0.1 * wanted.abs().max()


# right answers


def test_a_pure_query(tmp_path: Path) -> None:
    told = list[tuple[int, int, str]]()
    with (
        running("pure", tmp_path) as server,
        EncryptedConnection(server.address, told=lambda *t: told.append(t)) as c,
    ):
        assert (c.program.parameters.degree, c.program.refreshes) == (16384, ())
        check(server, c, 1)
        host = server.host
    wait_until(lambda: not Path(f"/proc/{host}").exists(), "the host ends with its server")
    (report,) = c.reports
    assert report.rounds == 0
    assert 0 < report.client_seconds < report.seconds
    sizes = [c.program.parameters.polynomial_bytes(level) for _, level, _ in c.program.views.values()]
    assert report.to_server == pytest.approx(sum(sizes), rel=0.15)
    assert report.to_client == pytest.approx(c.program.parameters.ciphertext_bytes(0), rel=0.15)
    assert c.key_bytes == pytest.approx(c.program.parameters.key_bytes * (2 + len(c.program.steps)), rel=0.15)
    assert c.key_seconds > 0
    assert (0, len(c.program.steps) + 2, "uploading keys") in told


def test_a_refreshed_query(refreshing: Deployed, refreshed: EncryptedConnection) -> None:
    for number in range(2):
        check(refreshing, refreshed, number)
        report, p = refreshed.reports[-1], refreshed.program.parameters
        assert report.rounds == len(refreshed.program.refreshes) > 0
        levels = [level for stage in refreshed.program.refreshes for level in stage]
        fresh = [*(level for _, level, _ in refreshed.program.views.values()), *levels]
        assert report.to_server == pytest.approx(sum(map(p.polynomial_bytes, fresh)), rel=0.15)
        masked = len(levels) * p.ciphertext_bytes(refreshed.program.reserve)
        assert report.to_client == pytest.approx(masked + p.ciphertext_bytes(0), rel=0.15)
        assert 0 < report.client_seconds < report.seconds


def test_two_clients_at_once(refreshing: Deployed, refreshed: EncryptedConnection) -> None:
    most, errors = 0, list[BaseException]()
    with EncryptedConnection(refreshing.address) as other:

        def ask(c: EncryptedConnection, number: int) -> None:
            try:
                check(refreshing, c, number)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=ask, args=(c, k)) for k, c in enumerate((refreshed, other))]
        for thread in threads:
            thread.start()
        while any(t.is_alive() for t in threads):
            most = max(most, len(children(refreshing.host)))
            threads[0].join(0.02)
            threads[1].join(0.02)
    assert errors == []
    assert most == 2
    wait_until(lambda: not children(refreshing.host), "the evaluators end")


# keys


def test_keys_that_are_kept_are_uploaded_once(tiny: Deployed, tmp_path: Path) -> None:
    def secrets() -> tuple[str, bytes]:
        (path,) = directory.iterdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        digest, _, secret = path.read_bytes().partition(b"\n")
        return digest.decode(), secret

    directory = tmp_path / "keys"
    with EncryptedConnection(tiny.address, keys=directory) as c:
        assert c.key_bytes > 0
        check(tiny, c)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    digest, secret = secrets()
    with EncryptedConnection(tiny.address, keys=directory) as c:
        assert (c.key_bytes, c.key_seconds) == (0, 0)
        check(tiny, c)
    assert secrets() == (digest, secret)
    (held,) = (path for path in tiny.key_files() if path.stem == digest)
    assert stat.S_IMODE(held.stat().st_mode) == 0o600
    assert secret[64:96] not in held.read_bytes()
    held.unlink()  # the server loses them
    with EncryptedConnection(tiny.address, keys=directory) as c:
        assert c.key_bytes > 0
        check(tiny, c)
    assert secrets()[1] == secret
    assert {path.stem for path in tiny.key_files()} >= {secrets()[0]}
    assert secrets()[0] != digest


def test_keys_expire_on_the_server(tiny: Deployed, tmp_path: Path) -> None:
    with EncryptedConnection(tiny.address, keys=tmp_path) as c:
        (held,) = (path for path in tiny.key_files() if path.stem == c._keys_digest)
        assert c._stub.Keys(pb.KeysRequest(digest=c._keys_digest)).expires_seconds == 24 * 3600
        os.utime(held, (0, 0))
        with pytest.raises(QueryError, match="does not hold these evaluation keys\nhint: connect again"):
            c.query(inputs("tiny"))
    assert not held.exists()
    with EncryptedConnection(tiny.address, keys=tmp_path) as c:
        assert c.key_bytes > 0
        check(tiny, c)


@pytest.mark.parametrize("digest", ["", "0" * 64, "../" * 21 + "a", "0" * 63 + "\n", "A" * 64])
def test_keys_that_nobody_sent(digest: str, connection: EncryptedConnection) -> None:
    assert not connection._stub.Keys(pb.KeysRequest(digest=digest)).held
    refused(connection, [start(connection, keys_digest=digest), *fresh(connection)], "query", "does not hold these")


# the store of keys by itself


@pytest.fixture(scope="module")
def made(connection: EncryptedConnection) -> dict[str, bytes]:
    """Keys of somebody, in the Program's order."""
    return Client(Context(connection.program.parameters)).evaluation_keys(list(connection.program.steps))


def stored(store: KeyStore, keys: dict[str, bytes], age: float = 0.0) -> Path:
    digest = keys_digest(keys)
    store.add(digest, [(name, len(data)) for name, data in keys.items()], keys.values())
    path = store.directory / f"{digest}.keys"
    os.utime(path, (time.time() - age,) * 2)
    return path


def others(keys: dict[str, bytes], count: int) -> list[dict[str, bytes]]:
    """The store looks at names, sizes and digests alone."""
    return [{**keys, "relin": bytes([k]) * len(keys["relin"])} for k in range(count)]


def test_a_store_drops_what_is_oldest(connection: EncryptedConnection, made: dict[str, bytes], tmp_path: Path) -> None:
    size = sum(map(len, made.values()))
    store = KeyStore(tmp_path / "a", connection.program, maximum=int(2.5 * size))
    paths = []
    for k, keys in enumerate(others(made, 4)):
        paths.append(stored(store, keys, 100 - k))
        assert sum(p.stat().st_size for p in store.directory.iterdir()) <= store.maximum
    assert [p.exists() for p in paths] == [False, False, True, True]
    assert store.path(paths[2].stem) == paths[2]  # a use: what was second is last now
    stored(store, made)
    assert [p.exists() for p in paths] == [False, False, True, False]
    assert read_keys(paths[2]) == others(made, 3)[2]


def test_a_store_forgets(connection: EncryptedConnection, made: dict[str, bytes], tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "b", connection.program, expires=0.2)
    old, path = stored(store, others(made, 1)[0], 10), stored(store, made)
    assert not old.exists()
    assert store.path(path.stem) == path
    time.sleep(0.3)
    assert store.path(path.stem) is None
    assert not path.exists()
    (store.directory / ".part-left").write_bytes(b"x")  # by a server that was killed
    KeyStore(store.directory, connection.program)
    assert list(store.directory.iterdir()) == []


def test_keys_that_never_fit_drop_nobodys(
    connection: EncryptedConnection, made: dict[str, bytes], tmp_path: Path
) -> None:
    store = KeyStore(tmp_path / "c", connection.program, maximum=int(1.1 * sum(map(len, made.values()))))
    path = stored(store, made)
    large = {name: data + data[: len(data) // 4] for name, data in made.items()}
    with pytest.raises(ProtocolError, match=r"keys of \d+ bytes, where this server keeps \d+ of all clients"):
        stored(store, large)
    assert path.exists()  # BUG: _make_room deletes everybody's keys before it refuses


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, bytes(8), struct.pack("<Q", 2) + b"[]"])
def test_a_file_of_keys_that_is_damaged(content: bytes, connection: EncryptedConnection, tmp_path: Path) -> None:
    """As after a power cut: the host says so, and goes on."""
    path = tmp_path / "x.keys"
    path.write_bytes(content)
    host = _Host(
        SimpleNamespace(program=connection.program),  # type: ignore[arg-type]
        SimpleNamespace(),  # type: ignore[arg-type]
        1 << 30,
    )
    host.context = Context(connection.program.parameters)
    # BUG: struct.error, MemoryError, AttributeError are not caught: they end the host, so all queries, for good
    assert "error" in host._load("0" * 64, path)


# uploads that are refused


def upload(c: EncryptedConnection, made: dict[str, bytes], data: bytes | None = None, **other: Any) -> None:
    body = b"".join(made.values()) if data is None else data
    send_upload(c, [announced(c, made, **other), *(pb.UploadPart(data=part) for part in parts(body))])


def announced(c: EncryptedConnection, made: dict[str, bytes], **other: Any) -> pb.UploadPart:
    sizes = [pb.KeySize(name=n, size=len(k)) for n, k in made.items()]
    fields = {"program_digest": c.program.digest, "digest": keys_digest(made), "keys": sizes}
    return pb.UploadPart(header=pb.KeysHeader(**{**fields, **other}))


def send_upload(c: EncryptedConnection, messages: Sequence[pb.UploadPart]) -> None:
    with calling("the server", c._at, ""):
        c._stub.Upload(iter(messages), timeout=20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, k: upload(c, k, digest="0" * 64), "are not the announced ones"),
        (lambda c, k: upload(c, k, digest="../../x"), "are not the announced ones"),
        (lambda c, k: upload(c, k, program_digest="0" * 64), "are for another Program"),
        (lambda c, k: upload(c, dict(list(k.items())[:-1])), "not those that the Program needs"),
        (lambda c, k: upload(c, dict(reversed(k.items()))), "not those that the Program needs"),
        (lambda c, k: upload(c, {**k, "rotate 999": b"x"}), "not those that the Program needs"),
        (lambda c, k: upload(c, k, keys=[]), "not those that the Program needs"),
        (lambda c, k: upload(c, {**k, "relin": b""}), "key 'relin' of 0 bytes"),
        (lambda c, k: upload(c, {**k, "relin": bytes(2 * len(k["relin"]))}), r"'relin' of \d+ bytes, where at most"),
        (lambda c, k: upload(c, k, keys=[pb.KeySize(name=n, size=1 << 62) for n in k]), "bytes, where at most"),
        (lambda c, k: upload(c, k, keys=[pb.KeySize(name=n, size=9) for n in k]), "are not the announced ones"),
        (lambda c, k: upload(c, k, b"".join(k.values())[:-1]), "ended 1 bytes before the end of a key"),
        (lambda c, k: upload(c, k, b""), r"ended \d+ bytes before the end of a key"),
        (lambda c, k: upload(c, k, b"".join(k.values()) + b"x"), "are not the announced ones"),
        (lambda c, k: upload(c, {n: os.urandom(len(d)) for n, d in k.items()}), "relinearization key: .* not valid"),
        (lambda c, k: upload(c, {**k, "relin": k["relin"][:-1]}), "relinearization key: .* not valid"),
        (lambda c, k: upload(c, elsewhere(c, list(c.program.steps))), "relinearization key: .* not valid under N"),
        (lambda c, k: upload(c, dict(zip(k, [*k.values()][:1] * len(k), strict=True))), "rotates otherwise"),
        (lambda c, k: send_upload(c, []), "begins with the header"),
        (lambda c, k: send_upload(c, [pb.UploadPart(data=b"x")]), "begins with the header"),
        (lambda c, k: send_upload(c, [pb.UploadPart()]), "begins with the header"),
        (lambda c, k: send_upload(c, [announced(c, k)] * 2), "second header"),
    ],
)
def test_keys_that_are_refused(
    change: Callable[[EncryptedConnection, dict[str, bytes]], None],
    message: str,
    tiny: Deployed,
    connection: EncryptedConnection,
    made: dict[str, bytes],
) -> None:
    before = tiny.key_files()
    with pytest.raises(PartyError, match=f"^the server at .* refused: .*{message}"):
        change(connection, made)
    assert tiny.key_files() == before
    check(tiny, connection)


def elsewhere(c: EncryptedConnection, steps: list[int]) -> dict[str, bytes]:
    p = c.program.parameters
    return Client(Context(replace(p, levels=p.levels - 1))).evaluation_keys(steps)


def test_a_relinearization_key_that_is_none(
    tiny: Deployed, connection: EncryptedConnection, made: dict[str, bytes]
) -> None:
    step = next(name for name in made if name != "relin")
    # BUG: accepted, as SEAL reads both as the same; every query then ends with "internal error"
    with pytest.raises(PartyError, match="relinearization"):
        upload(connection, {**made, "relin": made[step]})
    check(tiny, connection)


def test_no_more_than_two_upload_at_once(tiny: Deployed, connection: EncryptedConnection) -> None:
    boxes = [queue.SimpleQueue[pb.UploadPart | None]() for _ in range(2)]
    calls = [connection._stub.Upload.future(iter(box.get, None)) for box in boxes]
    try:

        def full() -> bool:
            try:
                send_upload(connection, [])
            except PartyError as error:
                return "2 clients upload keys at this moment" in str(error)
            return False

        wait_until(full, "the limit is reached")
    finally:
        for call, box in zip(calls, boxes, strict=True):
            call.cancel()
            box.put(None)
    wait_until(lambda: not full(), "the uploads ended")
    check(tiny, connection)


# queries that are refused


def start(c: EncryptedConnection, **other: str) -> pb.EncryptedRequest:
    fields = {"program_digest": c.program.digest, "weights_digest": c._weights_digest, "keys_digest": c._keys_digest}
    return pb.EncryptedRequest(start=pb.EncryptedStart(**{**fields, **other}))


def sent(data: bytes) -> list[pb.EncryptedRequest]:
    return [pb.EncryptedRequest(frame=frame) for frame in to_frames(data)]


def encrypted(c: EncryptedConnection, lower: int = 0) -> list[bytes]:
    """The inputs of a query."""
    values = c.program.client_values(inputs("tiny" if c.program.labels["mode"] == "pure" else "refresh"), {})
    return [c.client.encrypt(values[k], level - lower) for k, (_, level, _) in c.program.views.items()]


def fresh(c: EncryptedConnection) -> list[pb.EncryptedRequest]:
    return [request for data in encrypted(c) for request in sent(data)]


def refused(c: EncryptedConnection, requests: Requests, code: str, message: str) -> None:
    *before, last = c._stub.Query(iter(requests), timeout=20)
    assert all(reply.WhichOneof("content") == "progress" for reply in before)
    assert last.failure.code == code
    assert re.search(message, last.failure.message)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda c, x: [], "peer-lost", "before the start of its query"),
        (lambda c, x: sent(x), "protocol", "a query begins with its start"),
        (lambda c, x: [pb.EncryptedRequest()], "protocol", "a query begins with its start"),
        (lambda c, x: [start(c)], "peer-lost", "ended the stream before ciphertext 1 of 1"),
        (lambda c, x: [start(c), *sent(x + bytes(PART))[:-1]], "protocol", r"more than \d+ bytes"),
        (lambda c, x: [start(c), *sent(bytes(largest(c.program, 3) + 1))], "protocol", r"more than \d+ bytes"),
        (lambda c, x: [start(c), pb.EncryptedRequest(frame=pb.Frame(data=x))], "peer-lost", "before ciphertext 1"),
        (lambda c, x: [start(c), start(c)], "protocol", "'start' where a ciphertext was expected"),
        (lambda c, x: [start(c), pb.EncryptedRequest()], "protocol", "None where a ciphertext was expected"),
        (lambda c, x: [start(c), *sent(b"")], "protocol", "0 bytes that are not one ciphertext"),
        (lambda c, x: [start(c), *sent(x[:-1])], "protocol", "bytes that are not one ciphertext"),
        (lambda c, x: [start(c), *sent(x + b"x")], "protocol", "bytes that are not one ciphertext"),
        (lambda c, x: [start(c), *sent(flipped(x, 0))], "protocol", "not valid under N = 8192"),
        (lambda c, x: [start(c), *sent(flipped(x, 40))], "protocol", "not valid under N = 8192"),
        (lambda c, x: [start(c), *sent(x[:16] + os.urandom(len(x) - 16))], "protocol", "not valid under N = 8192"),
        (lambda c, x: [start(c), *sent(encrypted(c, 1)[0])], "protocol", "expected 2 at level 3"),
        (lambda c, x: [start(c), *sent(foreign(c))], "protocol", "not valid under N = 8192"),
        (lambda c, x: [start(c, program_digest="0" * 64), *sent(x)], "handshake", "Program digest: the client has '0"),
        (lambda c, x: [start(c, weights_digest="é"), *sent(x)], "handshake", "weights digest: the client has 'é'"),
    ],
)
def test_queries_that_are_refused(
    change: Callable[[EncryptedConnection, bytes], Requests],
    code: str,
    message: str,
    tiny: Deployed,
    connection: EncryptedConnection,
) -> None:
    refused(connection, change(connection, encrypted(connection)[0]), code, message)
    check(tiny, connection)


def foreign(c: EncryptedConnection) -> bytes:
    p = c.program.parameters
    return Client(Context(replace(p, scale_bits=p.scale_bits + 1))).encrypt(np.ones(p.slots), 3)


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: flipped(x, 40), lambda x: bytes(1 << 20), None])
def test_refreshes_that_are_refused(
    change: Callable[[bytes], bytes] | None, refreshing: Deployed, refreshed: EncryptedConnection
) -> None:
    c, box = refreshed, queue.SimpleQueue[pb.EncryptedRequest | None]()
    for request in (start(c), *fresh(c)):
        box.put(request)
    replies = c._stub.Query(iter(box.get, None), timeout=30)
    assert 1 in (reply.refresh for reply in replies)
    level = c.program.refreshes[0][0]
    good = c.client.encrypt(np.zeros(c.program.parameters.slots), level)
    if change is None:
        change, good = (lambda x: x), c.client.encrypt(np.zeros(c.program.parameters.slots), level - 1)
    for request in sent(change(good)) * len(c.program.refreshes[0]):
        box.put(request)
    *_, last = replies
    box.put(None)
    assert last.failure.code == "protocol"
    assert re.match(r"(refreshed )?ciphertext( 1)?( has more|: \d)", last.failure.message)
    wait_until(lambda: not children(refreshing.host), "the evaluator ends")


@pytest.mark.parametrize("when", ["progress", "refresh"])
def test_a_client_that_vanishes(when: str, refreshing: Deployed, refreshed: EncryptedConnection) -> None:
    box = queue.SimpleQueue[pb.EncryptedRequest | None]()
    for request in (start(refreshed), *fresh(refreshed)):
        box.put(request)
    replies = refreshed._stub.Query(iter(box.get, None))
    if when == "refresh":
        assert 1 in (reply.refresh for reply in replies)
    wait_until(lambda: len(children(refreshing.host)) == 1, "an evaluator works")
    replies.cancel()
    box.put(None)
    wait_until(lambda: not children(refreshing.host), "it ends")
    check(refreshing, refreshed)


@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_an_image_out_of_range_is_never_sent(
    value: float, connection: EncryptedConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_stub", None)
    count, image = len(connection.reports), torch.full((1, 8), 0.5)
    image[0, 3] = value
    with pytest.raises(ValueError, match=r"has values in \[.*\], the Program was made for"):
        connection.query({"images": image})
    assert len(connection.reports) == count


# what a server may ask for


class Faulty(EncryptedServicer):
    """Describes what a real server does, says that it holds all keys, and then says ``script``."""

    def __init__(self, c: EncryptedConnection, script: Callable[[EncryptedConnection], Iterator[Any]]) -> None:
        self.description, self.c, self.script = c._stub.Describe(pb.DescribeRequest()), c, script

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.EncryptedDescription:
        return self.description  # type: ignore[no-any-return]

    def Upload(self, requests: Iterator[pb.UploadPart], context: grpc.ServicerContext) -> pb.KeysReply:
        return pb.KeysReply(held=sum(len(part.data) for part in requests) > 0)

    def Query(self, requests: Any, context: grpc.ServicerContext) -> Iterator[pb.EncryptedReply]:
        for content in self.script(self.c):
            yield pb.EncryptedReply(**content)


def frames(data: bytes) -> Iterator[dict[str, pb.Frame]]:
    return ({"frame": frame} for frame in to_frames(data))


def quiet(c: EncryptedConnection) -> Iterator[dict[str, Any]]:
    time.sleep(6)
    yield from ()


def zeros(c: EncryptedConnection, level: int) -> bytes:
    return c.client.encrypt(np.zeros(c.program.parameters.slots), level)


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        (lambda c: [{"refresh": 1}], ProtocolError, "asks for refresh 1, the Program has 0"),
        (lambda c: [{"refresh": 0}], ProtocolError, "asks for refresh 0, the Program has 0"),
        (lambda c: [{"result": 0}], ProtocolError, "sends 0 results, not 1"),
        (lambda c: [{"result": 2}, *frames(b"x"), *frames(b"x")], ProtocolError, "sends 2 results, not 1"),
        (lambda c: [{"result": 1}, *frames(bytes(largest(c.program, 0) + 1))], ProtocolError, r"of more than \d+ byte"),
        (lambda c: [{"result": 1}, {"result": 1}], ProtocolError, "no ciphertext where one was expected"),
        (lambda c: [*frames(b"x")], ProtocolError, "sent 'frame' where a refresh or a result"),
        (lambda c: [{}], ProtocolError, "sent None where a refresh or a result"),
        (lambda c: [], PeerLost, "ended the query without an answer"),
        (lambda c: [{"result": 1}], (PartyError, InvalidCiphertext), "not one ciphertext|ended the"),
        (lambda c: [{"result": 1}, *frames(os.urandom(99))], InvalidCiphertext, "result: 99 bytes"),
        (lambda c: [{"result": 1}, *frames(zeros(c, 1))], InvalidCiphertext, "2 polynomials at level 1.* level 0"),
        (lambda c: [{"failure": pb.Failure(code="query", message="a\x1b[2Jb")}], QueryError, r"a\?\[2Jb"),
        (quiet, PeerLost, "did not answer in time"),  # BUG (at 63d9b94): a query has no deadline at all
    ],
)
def test_servers_that_are_refused(
    script: Callable[[EncryptedConnection], Iterator[Any]],
    error: type[Exception],
    message: str,
    connection: EncryptedConnection,
) -> None:
    faulty = Served(add_EncryptedServicer_to_server, Faulty(connection, script))
    try:
        with EncryptedConnection(faulty.address, deadline=1.0) as c, pytest.raises(error, match=message):
            c.query(inputs("tiny"))
        assert c.reports == []
    finally:
        faulty.stop()


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        (lambda c: [{"refresh": 2}], ProtocolError, "asks for refresh 2, the Program has"),
        (lambda c: [{"refresh": 0}], ProtocolError, "asks for refresh 0, the Program has"),
        (
            lambda c: [{"refresh": 1}, *frames(bytes(largest(c.program, c.program.reserve) + 1))],
            ProtocolError,
            r"of more than \d+ bytes",
        ),
        (lambda c: [{"refresh": 1}, {"result": 1}], ProtocolError, "no ciphertext where one was expected"),
        (lambda c: [{"refresh": 1}, *2 * [*frames(zeros(c, 0))]], InvalidCiphertext, "at level 0"),
    ],
)
def test_refreshes_that_the_client_refuses(
    script: Callable[[EncryptedConnection], Iterator[Any]],
    error: type[Exception],
    message: str,
    refreshed: EncryptedConnection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faulty = Served(add_EncryptedServicer_to_server, Faulty(refreshed, script))
    try:
        with open_channel(faulty.endpoint, insecure=False, what="x") as channel:
            monkeypatch.setattr(refreshed, "_stub", EncryptedStub(channel))
            with pytest.raises(error, match=message):
                refreshed.query(inputs("refresh"))
    finally:
        faulty.stop()


def test_a_program_that_was_not_expected(tiny: Deployed, connection: EncryptedConnection) -> None:
    with pytest.raises(HandshakeError, match=f"has the digest {connection.program.digest}, not 00"):
        EncryptedConnection(tiny.address, program_digest="00")


# what a client sends


class Recorder(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """Every message that leaves a client."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def _noted(self, details: Any, messages: Iterable[Any]) -> Iterator[Any]:
        for message in messages:
            self.sent.append((details.method.rpartition("/")[2], message))
            yield message

    def intercept_unary_unary(self, go_on: Any, details: Any, request: Any) -> Any:
        return go_on(details, next(self._noted(details, [request])))

    def intercept_stream_unary(self, go_on: Any, details: Any, requests: Any) -> Any:
        return go_on(details, self._noted(details, requests))

    intercept_stream_stream = intercept_stream_unary


def contains(data: bytes, words: codec.Words) -> bool:
    """Whether 32 bytes in a row of the words stand anywhere in the data."""
    low, table = np.uint64((1 << 22) - 1), np.zeros(1 << 22, bool)
    table[words[:-3] & low] = True
    for offset in range(8):
        here = np.frombuffer(data, np.uint64, max(0, len(data) - offset) // 8, offset)
        likely = np.flatnonzero(table[here & low])
        for at in likely[np.isin(here[likely], words[:-3])]:
            for place in np.flatnonzero(words[:-3] == here[at]):
                if at + 4 <= len(here) and (here[at : at + 4] == words[place : place + 4]).all():
                    return True
    return False


def whole(pieces: Sequence[bytes], sizes: Sequence[int]) -> list[bytes]:
    joined, ends = b"".join(pieces), np.cumsum([0, *sizes]).tolist()
    assert len(joined) == ends[-1]
    return [joined[a:b] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize("name", ["tiny", "refreshing"])
def test_what_a_client_sends(name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    server: Deployed = request.getfixturevalue(name)
    recorder, decrypted = Recorder(), list[Any]()
    monkeypatch.setattr(
        encrypted_client, "open_channel", lambda *a, **k: grpc.intercept_channel(open_channel(*a, **k), recorder)
    )
    decrypt = Client.decrypt_plain

    def noted(self: Client, data: bytes, level: int) -> Any:
        decrypted.append(decrypt(self, data, level))
        return decrypted[-1]

    monkeypatch.setattr(Client, "decrypt_plain", noted)
    with EncryptedConnection(server.address) as c:
        check(server, c)
    # the kinds of messages, each with nothing else in it
    kinds = [(method, type(m), m.WhichOneof("content") if m.DESCRIPTOR.oneofs else None) for method, m in recorder.sent]
    order = [kind for kind, _ in itertools.groupby(kinds)]
    assert order == [
        ("Describe", pb.DescribeRequest, None),
        ("Upload", pb.UploadPart, "header"),
        ("Upload", pb.UploadPart, "data"),
        ("Query", pb.EncryptedRequest, "start"),
        ("Query", pb.EncryptedRequest, "frame"),
    ]
    header, begin = recorder.sent[1][1].header, [m.start for _, m in recorder.sent if type(m) is pb.EncryptedRequest][0]
    assert (header.program_digest, header.digest) == (begin.program_digest, begin.keys_digest)
    assert begin == start(c).start
    # keys and ciphertexts, as many and as large as fresh ones
    pieces = [m.data for method, m in recorder.sent if method == "Upload" and m.data]
    keys = whole(pieces, [key.size for key in header.keys])
    again = c.client.evaluation_keys(list(c.program.steps))
    assert [key.name for key in header.keys] == list(again)
    assert [len(unpacked(k)) for k in keys] == [len(unpacked(k)) for k in again.values()]
    frames = [m.frame for method, m in recorder.sent if method == "Query" and m.HasField("frame")]
    ends = [i + 1 for i, frame in enumerate(frames) if frame.last]
    ciphertexts = [b"".join(f.data for f in frames[a:b]) for a, b in itertools.pairwise([0, *ends])]
    levels = [level for _, level, _ in c.program.views.values()]
    levels += [level for stage in c.program.refreshes for level in stage]
    assert (len(c.program.refreshes) > 0) == (name == "refreshing")
    assert [len(unpacked(x)) for x in ciphertexts] == [len(unpacked(zeros(c, level))) for level in levels]
    assert sum(map(len, ciphertexts)) == c.reports[0].to_server
    assert len(set(ciphertexts)) == len(ciphertexts)
    # no secret key, no input, nothing decrypted in any of it
    sample = next(iter(inputs(server.name).values())).double().numpy().view(np.uint64).reshape(-1)
    p, secret = c.program.parameters, c.client.secret_bytes()
    forbidden = [np.frombuffer(unpacked(secret), np.uint64, (p.levels + 2) * p.degree, 72), sample]
    forbidden.append(np.frombuffer(secret, np.uint64, len(secret) // 8 - 2, 16))
    assert len(decrypted) == len(levels) - len(c.program.views) + 1
    for plain in decrypted[::3] + decrypted[-1:]:
        forbidden += [codec._words(plain), c.client.context.decode(plain).view(np.uint64)]
    everything = b"".join(m.SerializeToString() for _, m in recorder.sent)
    everything += b"".join(map(unpacked, [*keys, *ciphertexts])) + b"".join(keys)
    words = np.concatenate(forbidden)
    assert not contains(everything, words)
    for place in np.cumsum([0, *map(len, forbidden[:-1])]).tolist():  # each would be found
        assert contains(everything[:1001] + words[place : place + 4].tobytes() + everything[1001:5000], words)
