"""The CKKS deployment over real gRPC on loopback: right answers, what is refused, and what a client ever sends."""

from __future__ import annotations

import os
import queue
import re
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from parties.calls import calling
from parties.encrypted_client import EncryptedConnection
from parties.encrypted_server import largest
from parties.errors import PartyError, ProtocolError, QueryError
from parties.evaluators import _Host, read_keys
from parties.frames import PART, parts, to_frames
from parties.keystore import KeyStore, keys_digest
from proto import unseen_pb2 as pb
from protocols.ckks.seal import Client, Context
from tests.deployed import Deployed, children, inputs, model, running
from tests.tiny import wait_until

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
    assert (answer - wanted).abs().max() < SLACK * server.error < 0.1 * wanted.abs().max()


# right answers


def test_a_pure_query(tmp_path: Path) -> None:
    told = list[tuple[int, int, str]]()
    with (
        running("pure", tmp_path) as server,
        EncryptedConnection(server.address, told=lambda *t: told.append(t)) as c,
    ):
        assert (c.program.parameters.degree, c.program.refreshes) == (16384, ())
        check(server, c, 1)
    (report,) = c.reports
    assert report.rounds == 0
    assert 0 < report.client_seconds < report.seconds
    sizes = [c.program.parameters.polynomial_bytes(level) for _, level, _ in c.program.views.values()]
    assert report.to_server == pytest.approx(sum(sizes), rel=0.1)
    assert report.to_client == pytest.approx(c.program.parameters.ciphertext_bytes(0), rel=0.1)
    assert c.key_bytes == pytest.approx(c.program.parameters.key_bytes * (1 + len(c.program.steps)), rel=0.1)
    assert c.key_seconds > 0
    assert (0, len(c.program.steps) + 1, "uploading keys") in told


def test_a_refreshed_query(refreshing: Deployed, refreshed: EncryptedConnection) -> None:
    for number in range(2):
        check(refreshing, refreshed, number)
        report, p = refreshed.reports[-1], refreshed.program.parameters
        assert report.rounds == len(refreshed.program.refreshes) > 0
        levels = [level for stage in refreshed.program.refreshes for level in stage]
        fresh = [*(level for _, level, _ in refreshed.program.views.values()), *levels]
        assert report.to_server == pytest.approx(sum(map(p.polynomial_bytes, fresh)), rel=0.1)
        masked = len(levels) * p.ciphertext_bytes(refreshed.program.reserve)
        assert report.to_client == pytest.approx(masked + p.ciphertext_bytes(0), rel=0.1)
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


def test_a_server_that_is_started_again(tmp_path: Path) -> None:
    for began in (True, False):
        with running("tiny", tmp_path / "state") as server:
            host = server.host
            with EncryptedConnection(server.address, keys=tmp_path / "keys") as c:
                assert (c.key_bytes > 0) == began
                check(server, c)
            assert len(server.key_files()) == 1
        wait_until(lambda: not Path(f"/proc/{host}").exists(), "the host ends with its server")  # noqa: B023
    # BUG: the host ends by os._exit, which runs no atexit: its directory in /dev/shm stays for ever
    assert list((tmp_path / "state").glob("unseen-*")) == []


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


def upload(c: EncryptedConnection, keys: dict[str, bytes], data: bytes | None = None, **other: Any) -> None:
    header = {"program_digest": c.program.digest, "digest": keys_digest(keys)}
    sizes = other.pop("keys", [pb.KeySize(name=n, size=len(k)) for n, k in keys.items()])
    body = b"".join(keys.values()) if data is None else data
    header = pb.KeysHeader(**{**header, **other}, keys=sizes)
    messages = [pb.UploadPart(header=header), *(pb.UploadPart(data=part) for part in parts(body))]
    send_upload(c, messages)


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
        (lambda c, k: send_upload(c, twice(c, k)), "second header"),
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


def twice(c: EncryptedConnection, keys: dict[str, bytes]) -> list[pb.UploadPart]:
    sizes = [pb.KeySize(name=n, size=len(k)) for n, k in keys.items()]
    header = pb.KeysHeader(program_digest=c.program.digest, digest=keys_digest(keys), keys=sizes)
    return [pb.UploadPart(header=header)] * 2


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
