"""The CKKS deployment over real gRPC on loopback: right answers, what is refused, and what a client ever sends."""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import re
import resource
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
import zstandard

import secure
from parties.ckks import client as client_module
from parties.ckks import server as server_module
from parties.ckks.client import CkksLink
from parties.ckks.keystore import KeyStore
from parties.net.endpoints import Endpoint
from parties.net.frames import PART
from parties.net.summed import SummedChannel
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import CkksStub, add_CkksServicer_to_server
from protocols.ckks import canonical
from protocols.ckks.evaluate import EncodedWeights
from protocols.ckks.seal import Client, Context, key_forms, split_keys
from secure.errors import Error, InvalidInput, PeerLost, ProtocolError, QueryError
from secure.session.session import Session
from tests import ckks_server
from tests.ciphertexts import residues
from tests.ckks_server import (
    RunningCkks,
    Script,
    connect,
    dial,
    frames,
    inputs,
    kept,
    running,
    sent,
    start,
    stored,
    upload,
    uploaded,
    zeros,
)
from tests.tiny import Served, wait_until

Keys = dict[str, bytes]
NOT_ONE = r"a frame of \d+ bytes or more, where the Program prescribes \d+"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCkks]:
    with running("tiny", tmp_path_factory.mktemp("tiny")) as server:
        yield server


@pytest.fixture(scope="module")
def refreshing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCkks]:
    with running("refresh", tmp_path_factory.mktemp("refresh")) as server:
        yield server


def test_a_pure_query(tmp_path: Path) -> None:
    with running("pure", tmp_path) as server:
        server.works(number=1)
        host, c, p = server.host, server.session, server.session.program.parameters
    wait_until(lambda: not Path(f"/proc/{host}").exists(), "the host ends with its server")
    (report,) = c.reports
    assert (p.degree, c.program.refreshes, report.rounds) == (16384, (), 1)
    assert 0 < report.client_seconds < report.online_seconds
    assert (report.offline_seconds, report.dealer_seconds, report.query) == (0, 0, 0)
    assert to_server(report) == sum(p.fresh_bytes(level) for _, level, _ in c.program.views.values())
    assert to_client(report) == p.ciphertext_bytes(0)
    assert report.bytes() == to_server(report) + to_client(report)
    assert uploaded(c) == p.public_key_bytes + p.key_bytes * (1 + len(c.program.steps))


def to_server(report: secure.Report) -> int:
    return report.bytes(sender="client", receiver="server", phase="online")


def to_client(report: secure.Report) -> int:
    return report.bytes(sender="server", receiver="client", phase="online")


def test_a_refreshed_query(refreshing: RunningCkks) -> None:
    c = refreshing.session
    for number in range(2):
        refreshing.works(number=number)
        report, p = c.reports[-1], c.program.parameters
        assert report.rounds == 1 + len(c.program.refreshes) > 1
        levels = [level for stage in c.program.refreshes for level in stage]
        fresh = [*(level for _, level, _ in c.program.views.values()), *levels]
        assert to_server(report) == sum(map(p.fresh_bytes, fresh))
        masked = len(levels) * p.ciphertext_bytes(c.program.reserve)
        assert to_client(report) == masked + p.ciphertext_bytes(0)
        assert 0 < report.client_seconds < report.online_seconds


def test_two_clients_at_once(refreshing: RunningCkks) -> None:
    most, right = 0, list[int]()

    def ask(session: Session, number: int) -> None:
        refreshing.works(session, number)
        right.append(number)

    with dial(refreshing.address) as other:
        threads = [threading.Thread(target=ask, args=(s, k)) for k, s in enumerate((refreshing.session, other))]
        for thread in threads:
            thread.start()
        while any(t.is_alive() for t in threads):
            most = max(most, len(refreshing.evaluating))
            threads[0].join(0.02)
            threads[1].join(0.02)
    assert (sorted(right), most) == ([0, 1], 2)
    wait_until(lambda: refreshing.idle, "the evaluators end")


def test_the_weights_of_a_long_chain_are_encoded() -> None:
    """What primes miss their powers of two by must not add up over the levels."""
    made = ckks_server.build("pure", precision_bits=8)
    p = made.program.parameters
    assert max(abs(np.log2(scale) - p.scale_bits) for scale in p.scales) < 1
    EncodedWeights(Context(p), made.schedule).prepare()


# keys


def test_keys_that_are_kept_are_uploaded_once(tiny: RunningCkks, tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    connect(tiny, directory, uploads=True)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    _, digest, secret = kept(directory)
    connect(tiny, directory, uploads=False)
    assert kept(directory)[1:] == (digest, secret)
    held = tiny.key_files()[digest]
    assert stat.S_IMODE(held.stat().st_mode) == 0o600
    held.unlink()  # the server loses them
    connect(tiny, directory, uploads=True)
    assert kept(directory)[2] == secret
    assert digest not in tiny.key_files()
    assert kept(directory)[1] in tiny.key_files()


def test_keys_expire_on_the_server(tiny: RunningCkks, tmp_path: Path) -> None:
    with dial(tiny.address, tmp_path) as c:
        os.utime(tiny.key_files()[c.link.keys_digest], (0, 0))
        with pytest.raises(QueryError, match="does not hold these evaluation keys\nhint: connect again"):
            c.query(inputs("tiny"))
    connect(tiny, tmp_path, uploads=True)


def test_keys_that_were_damaged_are_uploaded_again(tiny: RunningCkks, tmp_path: Path) -> None:
    connect(tiny, tmp_path, uploads=True)
    path, digest, secret = kept(tmp_path)
    tiny.key_files()[digest].with_stem("a" * 64).write_bytes(b"abc")  # by a name that the host does not know yet
    path.write_bytes(b"a" * 64 + b"\n" + secret)
    with dial(tiny.address, tmp_path) as c, pytest.raises(Error, match="hint: "):
        c.query(inputs("tiny"))
    connect(tiny, tmp_path, uploads=True)


@pytest.mark.parametrize("digest", ["", "0" * 64, "../" * 21 + "a", "0" * 63 + "\n", "A" * 64])
def test_keys_that_nobody_sent(digest: str, tiny: RunningCkks) -> None:
    assert not tiny.link._stub.Keys(pb.KeysRequest(digest=digest)).held
    requests = [start(tiny.link, keys_digest=digest), *sent(ckks_server.encrypted(tiny.link)[0])]
    (reply,) = tiny.link._stub.Query(iter(requests), timeout=20)
    assert (reply.failure.code, reply.failure.message[:42]) == ("query", "the server does not hold these evaluation ")


@pytest.fixture(scope="module")
def made(tiny: RunningCkks) -> Keys:
    """Keys of somebody, in the Program's order."""
    return Client(tiny.link.client.context).evaluation_keys(list(tiny.link.program.steps))


def test_a_store_drops_what_is_oldest(tiny: RunningCkks, made: Keys, tmp_path: Path) -> None:
    store = KeyStore(tmp_path, tiny.link.program, maximum=int(2.5 * sum(map(len, made.values()))))
    others, paths = [{**made, "relin": bytes([k]) * len(made["relin"])} for k in range(4)], list[Path]()
    for k, keys in enumerate(others):
        paths.append(stored(store, keys, 100 - k))
        assert sum(p.stat().st_size for p in tmp_path.glob("*/*/*")) <= store.maximum
    assert [p.exists() for p in paths] == [False, False, True, True]
    assert store.path(paths[2].stem, "") == paths[2]  # a use: what was second is last now
    stored(store, made)
    assert [p.exists() for p in paths] == [False, False, True, False]
    forms = key_forms(store.program.parameters, store.program.steps)
    assert split_keys(paths[2].read_bytes(), forms) == others[2]


def test_a_store_forgets(tiny: RunningCkks, made: Keys, tmp_path: Path) -> None:
    store = KeyStore(tmp_path, tiny.link.program, expires=0.5)
    old, path = stored(store, {**made, "relin": bytes(len(made["relin"]))}, 10), stored(store, made)
    assert not old.exists()
    assert store.path(path.stem, "") == path
    time.sleep(0.6)
    assert store.path(path.stem, "") is None
    assert list(tmp_path.glob("*/*/*")) == []


@pytest.mark.parametrize("ahead", [400 * 86400, -400 * 86400])
def test_a_store_goes_by_one_clock(
    ahead: float, tiny: RunningCkks, made: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files may get their times from another clock, such as a file server's. Keys of this moment have not expired."""
    store, real = KeyStore(tmp_path, tiny.link.program), time.time
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    keys = b"".join(made.values())
    digest = hashlib.sha256(keys).hexdigest()
    store.add(digest, [keys], "")
    assert store.path(digest, "") is not None
    assert store.path(digest, "") is not None  # also after a use
    monkeypatch.setattr(time, "time", lambda: real() + ahead + store.expires + 60)
    assert store.path(digest, "") is None


def test_keys_that_never_fit_drop_nobodys(tiny: RunningCkks, made: Keys, tmp_path: Path) -> None:
    path = stored(KeyStore(tmp_path, tiny.link.program), made)
    for bounds, caller in (({"maximum": 1000}, ""), ({"each": 1000}, "a")):
        small = KeyStore(tmp_path, tiny.link.program, **bounds)
        with pytest.raises(ProtocolError, match=r"keys of \d+ bytes, where this server keeps 1000 of a client"):
            stored(small, {**made, "relin": bytes(len(made["relin"]))}, caller=caller)
    assert path.exists()


def test_a_disk_that_takes_no_more_is_named(tiny: RunningCkks, made: Keys, tmp_path: Path) -> None:
    store = KeyStore(tmp_path, tiny.link.program)
    path = stored(store, made)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (store.size // 2, limits[1]))
    try:
        with pytest.raises(QueryError, match="cannot keep evaluation keys: File too large"):
            stored(store, {**made, "relin": bytes(len(made["relin"]))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [each for each in tmp_path.glob("*/*/*") if each.is_file()] == [path]


def test_who_keeps_little_loses_nothing_to_who_keeps_much(tiny: RunningCkks, made: Keys, tmp_path: Path) -> None:
    size = sum(map(len, made.values()))
    store = KeyStore(tmp_path, tiny.link.program, maximum=int(4.5 * size), each=int(3.5 * size))
    others = [{**made, "relin": bytes([k]) * len(made["relin"])} for k in range(8)]
    little = stored(store, made, 1000, "little")
    much = [stored(store, keys, 100 - k, "much") for k, keys in enumerate(others)]
    assert little.exists()
    assert [p.exists() for p in much] == [False] * 5 + [True] * 3  # its own part
    third = stored(store, made, caller="third")
    assert little.exists()
    assert third.exists()
    assert [p.exists() for p in much] == [False] * 6 + [True] * 2  # its oldest
    assert store.path(little.stem, "third") == third  # a client finds its own keys only: these are the same bytes
    assert store.path(much[-1].stem, "third") is None


def test_keys_of_other_programs_count(tiny: RunningCkks, made: Keys, tmp_path: Path) -> None:
    other = tmp_path / "of another Program" / "of somebody"
    other.mkdir(parents=True)
    (other / "x.keys").write_bytes(bytes(1000))
    os.utime(other / "x.keys", (0, 0))
    stored(KeyStore(tmp_path, tiny.link.program), made)
    assert not (other / "x.keys").exists()  # it expired, though its Program is served no more


# what is refused


def nested_zstandard(keys: Keys) -> Keys:
    """A key of SEAL's with Zstandard inside Zstandard, filled up to the size of a key."""
    inner = zstandard.compress(bytes(1 << 26), 19)
    nested = zstandard.compress(b"".join([inner] * 64), 19)
    header = struct.pack("<HB", canonical.MAGIC, 16) + canonical.VERSION + struct.pack("<B2xQ", 2, 16 + len(nested))
    bomb = header + nested
    name = next(name for name in keys if name.startswith("rotate"))
    return {**keys, name: bomb + b"\xff" * (len(keys[name]) - len(bomb))}


def without_a_part(c: CkksLink, keys: Keys) -> Keys:
    """A relinearization key without its last digit, which SEAL would take, and read beyond its end."""
    p = c.program.parameters
    rows, seeds = canonical.switching_key(p).unpack(keys["relin"], "it")
    form = canonical.WireForm(p, p.levels + 2, p.levels, p.levels)
    return {**keys, "relin": form.pack(rows[:-1], seeds[:-1])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, k: upload(c, k, digest="0" * 64), "are not the announced ones"),
        (lambda c, k: upload(c, k, program_digest="0" * 64), "are for another Program"),
        (lambda c, k: upload(c, k, digest="../../x"), "have no digest"),
        (lambda c, k: upload(c, dict(list(k.items())[:-1])), r"keys of \d+ bytes, where this Program's have"),
        (lambda c, k: upload(c, {**k, "rotate 999": b"x"}), "bytes or more, where this Program's have"),
        (lambda c, k: upload(c, {**k, "relin": b""}), r"keys of \d+ bytes, where"),
        (lambda c, k: upload(c, k, b"".join(k.values())[:-1]), r"keys of \d+ bytes, where"),
        (lambda c, k: upload(c, k, b"".join(k.values()) + b"x"), "bytes or more, where"),
        (lambda c, k: upload(c, {n: b"\xff" * len(d) for n, d in k.items()}), "key: a residue that is not below"),
        (lambda c, k: upload(c, {**k, "relin": b"\xff" * len(k["relin"])}), "relinearization key: a residue"),
        (lambda c, k: upload(c, {n: zeros(c, 2, levels=2) for n in k}), r"keys of \d+ bytes, where"),
        (lambda c, k: upload(c, nested_zstandard(k)), "a residue that is not below"),
        (lambda c, k: upload(c, without_a_part(c, k)), r"keys of \d+ bytes, where"),
        (lambda c, k: ckks_server.send_upload(c, [pb.UploadPart(data=b"x")]), "begins with the header"),
        (lambda c, k: ckks_server.send_upload(c, [ckks_server.announced(c, k)] * 2), "second header"),
    ],
)
def test_uploads_that_are_refused(change: Callable[..., None], message: str, tiny: RunningCkks, made: Keys) -> None:
    before = tiny.key_files()
    with pytest.raises(Error, match=f"^the server at .* refused: .*{message}"):
        change(tiny.link, made)
    assert tiny.key_files() == before
    tiny.works()


def test_no_more_than_four_upload_at_once(tiny: RunningCkks, made: Keys) -> None:
    def full() -> bool:
        with pytest.raises(Error, match=r"4 uploads of keys at this moment|keys of 0 bytes") as caught:
            ckks_server.send_upload(tiny.link, [ckks_server.announced(tiny.link, made)])
        return "limit" in str(caught.value)

    boxes = [queue.SimpleQueue[Any]() for _ in range(server_module.UPLOADS)]
    for box in boxes:
        box.put(ckks_server.announced(tiny.link, made))
    calls = [tiny.link._stub.Upload(iter(box.get, None)) for box in boxes]
    for call in calls:
        next(call)  # a word, which says that it has its place: what asks below must not take it
    wait_until(full, "the limit is reached")
    before = tiny.threads
    assert all(full() for _ in range(20))
    for call, box in zip(calls, boxes, strict=True):
        call.cancel()
        box.put(None)
    wait_until(lambda: not full(), "the uploads ended")
    wait_until(lambda: tiny.threads < before + 10, "their watchdogs end")


def test_a_client_that_uploads_and_does_not_read(
    tiny: RunningCkks, made: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on sending, so that only the words that it leaves unread tell that it is no client to wait for."""
    monkeypatch.setattr(server_module, "WORD", 0.001)
    service = server_module.CkksService(tiny.link.program, "x", None, tmp_path, deadline=0.5)  # type: ignore[arg-type]
    served, ended = Served(add_CkksServicer_to_server, service), threading.Event()

    def endless() -> Iterator[pb.UploadPart]:
        yield ckks_server.announced(tiny.link, made)
        while not ended.wait(0.1):
            yield pb.UploadPart(data=b"")

    small = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]  # unread words that a client takes
    with SummedChannel(grpc.insecure_channel(served.address, small), "it") as channel:
        call = CkksStub(channel).Upload(endless())
        try:
            wait_until(lambda: service._uploads.free == server_module.UPLOADS - 1, "it uploads")
            wait_until(lambda: service._uploads.free == server_module.UPLOADS, "its place is free again")
            with pytest.raises(grpc.RpcError):
                list(call)
            assert call.code() == grpc.StatusCode.CANCELLED
        finally:
            ended.set()
            call.cancel()
            served.stop()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda c, x: [], "peer-lost", "before the start of its query"),
        (lambda c, x: sent(x), "protocol", "a query begins with its start"),
        (lambda c, x: [start(c)], "peer-lost", "ended the stream before ciphertext 1 of 1"),
        (lambda c, x: [start(c), *sent(x + b"\0")], "protocol", NOT_ONE),
        (lambda c, x: [start(c), *sent(x[:-1])], "protocol", NOT_ONE),
        (lambda c, x: [start(c), *sent(x[:64] + b"\xff" * (len(x) - 64))], "protocol", "a residue that is not below"),
        (lambda c, x: [start(c), *sent(ckks_server.encrypted(c, 1)[0])], "protocol", NOT_ONE),
        (lambda c, x: [start(c), *sent(zeros(c, 3, scale_bits=27))], "protocol", NOT_ONE),
        (lambda c, x: [start(c, program_digest="0" * 64), *sent(x)], "handshake", "Program digest: the client has '0"),
        (lambda c, x: [start(c, model="é"), *sent(x)], "handshake", "model: the client has 'é'"),
    ],
)
def test_queries_that_are_refused(change: Callable[..., Any], code: str, message: str, tiny: RunningCkks) -> None:
    *before, last = tiny.link._stub.Query(iter(change(tiny.link, ckks_server.encrypted(tiny.link)[0])), timeout=20)
    assert all(reply.WhichOneof("content") == "progress" for reply in before)
    assert last.failure.code == code
    assert re.search(message, last.failure.message)
    tiny.works()


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: b"\xff" * len(x), lambda x: bytes(1 << 20), None])
def test_refreshes_that_are_refused(change: Callable[[bytes], bytes] | None, refreshing: RunningCkks) -> None:
    query, levels = ckks_server.Query(refreshing.link), refreshing.link.program.refreshes[0]
    query.until_refresh()
    bad = zeros(refreshing.link, levels[0] - 1) if change is None else change(zeros(refreshing.link, levels[0]))
    query.say(*sent(bad) * len(levels))
    failure = query.failure()
    assert failure.code == "protocol"
    assert re.match(r"(refreshed ciphertext: a residue|ciphertext \d of \d+: a frame)", failure.message)
    wait_until(lambda: refreshing.idle, "the evaluator ends")


@pytest.mark.parametrize("waits", [False, True])
def test_a_client_that_vanishes(waits: bool, refreshing: RunningCkks) -> None:
    query = ckks_server.Query(refreshing.link)
    if waits:
        query.until_refresh()
    wait_until(lambda: not refreshing.idle, "an evaluator works")
    query.cancel()
    wait_until(lambda: refreshing.idle, "it ends")
    refreshing.works()


def test_an_image_that_is_no_number_is_never_sent(tiny: RunningCkks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.link, "_stub", None)
    with pytest.raises(InvalidInput, match=r"no number \(NaN\)"):
        tiny.session.query({"images": torch.full((1, 8), float("nan"))})


def test_an_image_out_of_range_is_sent_as_zeros(tiny: RunningCkks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server chooses the range: it does not see which images are in it."""
    ask, asked = tiny.link.ask, list[Any]()

    def spying(values: Any, number: int, **options: Any) -> Any:
        asked.append(values)
        return ask(values, number, **options)

    monkeypatch.setattr(tiny.link, "ask", spying)
    with pytest.raises(InvalidInput, match=r"has values in \[.*\], the Program was made for"):
        tiny.session.query({"images": torch.full((1, 8), 3.0)})
    (values,) = asked
    assert all((slots == 0).all() for slots in values.values())


ONE: dict[str, Any] = {"result": 1}


@pytest.mark.parametrize(
    ("name", "script", "error", "message"),
    [
        ("tiny", lambda c: [{"refresh": 1}], ProtocolError, "asks for refresh 1, the Program has 0"),
        ("tiny", lambda c: [{"result": 2}, *frames(b"x"), *frames(b"x")], ProtocolError, "sends 2 results, not 1"),
        ("tiny", lambda c: [ONE, *frames(ckks_server.result(c, 0) + b"x")], ProtocolError, NOT_ONE),
        ("tiny", lambda c: frames(b"x"), ProtocolError, "sent 'frame' where a refresh or a result"),
        ("tiny", lambda c: [], PeerLost, "ended the query without an answer"),
        ("tiny", lambda c: [ONE], PeerLost, "ended the query within a ciphertext"),
        (
            "tiny",
            lambda c: [ONE, *frames(b"\xff" * c.program.parameters.ciphertext_bytes(0))],
            ProtocolError,
            "no ciphertext of this Program: result: a residue that is not below",
        ),
        ("tiny", lambda c: [ONE, *frames(ckks_server.result(c, 1))], ProtocolError, NOT_ONE),
        ("tiny", lambda c: [{"failure": pb.Failure(code="query", message="a\x1b")}], QueryError, r"^a\?$"),
        ("tiny", ckks_server.quiet, PeerLost, r"the server at .* said nothing for 1 s \(evaluating\)"),
        ("tiny", ckks_server.slow, QueryError, "^late$"),  # later than the deadline, but not silent
        ("refreshing", lambda c: [{"refresh": 2}], ProtocolError, "asks for refresh 2, the Program has"),
        ("refreshing", lambda c: [{"refresh": 1}, *frames(bytes(PART))], ProtocolError, NOT_ONE),
        ("refreshing", lambda c: [{"refresh": 1}, ONE], ProtocolError, "no ciphertext where one was expected"),
        ("refreshing", lambda c: [{"refresh": 1}, *2 * [*frames(ckks_server.result(c, 0))]], ProtocolError, NOT_ONE),
    ],
)
def test_servers_that_are_refused(
    name: str, script: Script, error: type[Exception], message: str, request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: RunningCkks = request.getfixturevalue(name)
    monkeypatch.setattr(real.link, "_deadline", 1.0)
    began = time.monotonic()
    with (
        ckks_server.faulty(real.link, script) as server,
        secure.Plaintext().channel(server.endpoint, what="x", role="server") as channel,
    ):
        monkeypatch.setattr(real.link, "_stub", CkksStub(channel))
        with pytest.raises(error, match=message):
            real.session.query(inputs(real.name))
        assert time.monotonic() - began < 5
    monkeypatch.undo()
    if name == "tiny":
        real.works()  # with the same session: a query that failed leaves the next ones as they are


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ckks_server.SilentDescribe, "did not answer in time"),
        (ckks_server.SilentUpload, r"said nothing for 1 s \(taking the evaluation keys\)"),
        (ckks_server.DeafUpload, r"said nothing for 1 s \(taking the evaluation keys\)"),
        (ckks_server.UploadInVain, "ended the upload and holds no keys"),
    ],
)
def test_a_silent_server_ends_a_connection_within_the_deadline(
    kind: type[ckks_server.Faulty], message: str, tiny: RunningCkks
) -> None:
    with ckks_server.faulty(tiny.link, lambda c: [], kind) as server:
        began = time.monotonic()
        with pytest.raises(PeerLost, match=message):
            dial(server.address, deadline=1.0)
        assert time.monotonic() - began < 4


def endless(c: CkksLink) -> Iterator[dict[str, Any]]:
    """A server that tells of progress for ever."""
    while True:
        time.sleep(0.05)
        yield {"progress": pb.Progress(done=1, total=2, path="soon")}


def test_progress_without_an_end_ends(tiny: RunningCkks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "LASTING", 1.0)
    with ckks_server.faulty(tiny.link, endless) as server, dial(server.address, deadline=5.0) as session:
        began = time.monotonic()
        with pytest.raises(PeerLost, match=r"is not done after 1 s \(evaluating\)"):
            session.query(ckks_server.inputs("tiny"))
        assert time.monotonic() - began < 3


def test_a_port_that_says_nothing_ends_a_connection_within_the_deadline() -> None:
    with socket.socket() as quiet:
        quiet.bind(("127.0.0.1", 0))
        quiet.listen()
        began = time.monotonic()
        with pytest.raises(PeerLost, match="did not answer in time"):
            dial(f"127.0.0.1:{quiet.getsockname()[1]}", deadline=1.0)
        assert time.monotonic() - began < 4


def test_words_keep_an_upload_alive(tiny: RunningCkks) -> None:
    with ckks_server.faulty(tiny.link, lambda c: [], ckks_server.SlowUpload) as server:
        began = time.monotonic()
        with dial(server.address, deadline=1.0) as session:
            assert uploaded(session) > 0
        assert time.monotonic() - began > 2


def test_progress_is_told(refreshing: RunningCkks) -> None:
    heard: list[tuple[int, int, str]] = []
    with dial(refreshing.address, told=lambda *progress: heard.append(progress)) as session:
        refreshing.works(session)
    keys = [(done, total) for done, total, path in heard if path == "uploading keys"]
    assert keys == [(k, len(keys)) for k in range(2 + len(session.program.steps))]
    evaluated = [(done, total) for done, total, path in heard if path.startswith("blocks")]
    assert evaluated == sorted(evaluated)
    assert all(0 <= done < total for done, total in evaluated)
    assert evaluated


@pytest.mark.parametrize("by_thread", [False, True])
def test_a_closed_session_answers_nothing(by_thread: bool, refreshing: RunningCkks) -> None:
    failed: list[BaseException] = []

    def ask(session: Session) -> None:
        try:
            session.query(inputs("refresh"))
        except Error as error:
            failed.append(error)

    with dial(refreshing.address) as session:
        if by_thread:
            thread = threading.Thread(target=ask, args=(session,))
            thread.start()
            wait_until(lambda: not refreshing.idle, "an evaluator works")
    if by_thread:
        thread.join(10)
        assert not thread.is_alive()
        wait_until(lambda: refreshing.idle, "it ends")
    else:
        ask(session)
    (error,) = failed
    assert isinstance(error, PeerLost)
    assert "this session has ended: it was closed" in str(error)


def test_keys_that_cannot_be_kept(tiny: RunningCkks, tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("no directory")
    with pytest.raises(InvalidInput, match=r"the key .*file.*: File exists\nhint: give another directory"):
        dial(tiny.address, place)


def test_a_kept_key_that_is_damaged(tiny: RunningCkks, tmp_path: Path) -> None:
    connect(tiny, tmp_path, uploads=True)
    path, digest, secret = kept(tmp_path)
    path.write_bytes(digest.encode() + b"\n" + secret[:-1])
    with pytest.raises(InvalidInput, match=r"holds no secret key\nhint: delete it"):
        dial(tiny.address, tmp_path)


# in one process


@pytest.mark.parametrize("name", ["tiny", "refresh"])
def test_all_in_one_process(name: str) -> None:
    made = ckks_server.compiled(name)
    with secure.insecure_in_process(made) as session:
        for number in range(2):
            ckks_server.is_right(session, name, made.model.predicted_error, number)
        assert uploaded(session) == made.cost.bytes(phase="once")
        for number, report in enumerate(session.reports):
            assert (report.query, report.rounds) == (number, made.cost.rounds)
            assert to_server(report) == made.cost.bytes(sender="client", phase="online")
            assert to_client(report) == made.cost.bytes(sender="server")
            assert 0 < report.client_seconds < report.online_seconds
        noiseless = secure.plain_reference(made, inputs(name))
        assert noiseless.dtype == torch.float64
        assert (session.query(inputs(name)) - noiseless).abs().max() < 2 * made.model.predicted_error
    with pytest.raises(PeerLost, match="this session has ended"):
        session.query(inputs(name))


def test_a_process_may_serve_and_ask(refreshing: RunningCkks, tmp_path: Path) -> None:
    """As a notebook does: the process that evaluates starts after channels, threads and servers are there."""
    made = ckks_server.compiled("tiny")
    refreshing.works()
    before = set(ckks_server.children(os.getpid()))
    with secure.serve(made, role="server", state=tmp_path) as first:
        with secure.serve(made, role="server", state=tmp_path) as second:
            for service in (first, second):
                with dial(service.address) as session:
                    ckks_server.is_right(session, "tiny", made.model.predicted_error)
            assert len(set(ckks_server.children(os.getpid())) - before) == 2
        port = Endpoint.parse(second.address, what="it").port
        with socket.socket() as free:  # no child holds what this process listened at
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))
        with dial(first.address) as session:
            ckks_server.is_right(session, "tiny", made.model.predicted_error)
    refreshing.works()
    assert set(ckks_server.children(os.getpid())) == before
    with secure.serve(made, role="server", state=tmp_path) as third:
        with pytest.raises(secure.EndpointError, match="it may be in use"):
            secure.serve(made, role="server", state=tmp_path, listen=third.address)
        assert len(set(ckks_server.children(os.getpid())) - before) == 1  # what did not start left nothing


# what a client sends


@pytest.mark.parametrize("name", ["tiny", "refreshing"])
def test_what_a_client_sends(name: str, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server: RunningCkks = request.getfixturevalue(name)
    recorder, decrypted, decrypt = ckks_server.Recorder(), list[Any](), Client.decrypt_plain

    def noted(client: Client, data: bytes, level: int) -> Any:
        decrypted.append(decrypt(client, data, level))
        return decrypted[-1]

    monkeypatch.setattr(Client, "decrypt_plain", noted)
    with dial(server.address, network=recorder) as session:
        server.works(session)
    c = session.link

    # the kinds of messages
    kinds = [(type(m), m.WhichOneof("content") if m.DESCRIPTOR.oneofs else None) for m in recorder.sent]
    uploads, queries = [(pb.UploadPart, k) for k in ("header", "data")], ("start", "frame")
    order = [(pb.DescribeRequest, None), *uploads, *((pb.CkksRequest, k) for k in queries)]
    assert [kind for kind, _ in itertools.groupby(kinds)] == order
    p, forms = c.program.parameters, key_forms(c.program.parameters, c.program.steps)
    header, begin, keys, ciphertexts = recorder.apart(form.size for form in forms.values())
    assert begin == start(c).start
    assert (header.program_digest, header.digest) == (begin.program_digest, begin.keys_digest)

    # keys and ciphertexts, as many and as large as fresh ones
    levels = [level for _, level, _ in c.program.views.values()]
    levels += [level for stage in c.program.refreshes for level in stage]
    assert (len(c.program.refreshes) > 0) == (name == "refreshing")
    assert [len(x) for x in ciphertexts] == [p.fresh_bytes(level) for level in levels]
    assert sum(map(len, ciphertexts)) == to_server(session.reports[0])

    # no secret key, no input, nothing decrypted in any of it
    assert len(decrypted) == len(levels) - len(c.program.views) + 1
    forbidden = ckks_server.forbidden(c, inputs(server.name), decrypted[::3] + decrypted[-1:])
    objects = [*zip(forms.values(), keys, strict=True)]
    objects += [(canonical.fresh(p, level), x) for level, x in zip(levels, ciphertexts, strict=True)]
    sent = b"".join([*keys, *ciphertexts, *(residues(form, x) for form, x in objects)])
    sent += b"".join(m.SerializeToString() for m in (recorder.sent[0], header, begin))
    words = np.concatenate(forbidden)
    assert not ckks_server.contains(sent, words)
    for place in np.cumsum([0, *map(len, forbidden[:-1])]).tolist():  # each would be found
        assert ckks_server.contains(sent[:1001] + words[place : place + 4].tobytes() + sent[1001:5000], words)
