"""Client, server and dealer over real gRPC on loopback: what works, and what is refused before anything is computed."""

from __future__ import annotations

import gc
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import secure
from parties.net.endpoints import Endpoint
from parties.net.network import Plaintext
from parties.proto import unseen_pb2 as pb
from parties.served.published import Published
from parties.services import hosting
from parties.two_party import client as client_module
from parties.two_party.dealer_peer import DealerPeer
from parties.two_party.server import InferenceService
from secure.cost.traffic import Traffic
from secure.deployments.two_party import TwoParty
from secure.errors import (
    DealerError,
    DownloadError,
    EmptyInput,
    EndpointError,
    HandshakeError,
    InputTooLong,
    InvalidInput,
    PeerLost,
    ProtocolError,
    QueryError,
)
from secure.session.link import Report, digest_of_all
from secure.version import WIRE_VERSION
from tests.tiny import (
    LENGTH,
    TEXT,
    WORDS,
    Ready,
    Served,
    call,
    dealing,
    dial,
    expected,
    ready,
    sentences,
    serving,
    wait_until,
    works,
)

# what works


def crossed(report: Report) -> tuple[Traffic, ...]:
    """The links that a cost predicts: all but the server's word that a query is prepared."""
    return tuple(t for t in report.traffic if (t.sender, t.phase) != ("server", "offline"))


@pytest.mark.parametrize("embedding", ["one-hot", "client-table"])
def test_embeddings_are_those_of_the_model(embedding: str, directory: Path, state: Path, dealer: Served) -> None:
    served, texts = ready(directory, state, embedding), sentences(3)
    with serving(served, dealer.address) as server, dial(server, dealer) as connection:
        assert connection.length == LENGTH
        assert connection.program.digest == served.compiled.program.digest
        assert len(connection.once) == (2 if embedding == "client-table" else 1)
        for text, vector in zip(texts, connection.embed(texts), strict=True):
            assert vector.dtype == torch.float64
            torch.testing.assert_close(vector, expected(directory, text), atol=5e-3, rtol=0)
        for report in connection.reports:
            assert (report.rounds, crossed(report)) == (served.compiled.cost.rounds, served.compiled.cost.traffic)
            assert report.bytes(sender="dealer") > 0
            assert min(report.online_seconds, report.offline_seconds, report.client_seconds) > 0


def test_queries_are_prepared_ahead(server: Served, dealer: Served, model: Ready) -> None:
    with dial(server, dealer) as connection:
        assert connection.ready == 0
        connection.prepare()
        connection.prepare()
        assert connection.ready == 2
        with pytest.raises(QueryError, match="2 queries are prepared already"):
            connection.prepare()
        assert connection.ready == 2  # nothing was asked, and the connection goes on
        assert len(connection.embed([TEXT] * 3)) == 3
        assert connection.ready == 0
        assert [crossed(r) for r in connection.reports] == [model.compiled.cost.traffic] * 3


def test_two_clients_at_once(server: Served, dealer: Served, directory: Path) -> None:
    texts, answers, failures = sentences(6), dict[int, torch.Tensor](), list[BaseException]()

    def ask(mine: int) -> None:
        try:
            with dial(server, dealer) as connection:
                for i in range(mine, len(texts), 2):
                    answers[i] = connection.embed([texts[i]])[0]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for i, text in enumerate(texts):
        torch.testing.assert_close(answers[i], expected(directory, text), atol=5e-3, rtol=0)


def test_threads_share_a_session_one_query_at_a_time(server: Served, dealer: Served, model: Ready) -> None:
    with dial(server, dealer) as connection:
        threads = [threading.Thread(target=connection.embed, args=([TEXT],)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [crossed(r) for r in connection.reports] == [model.compiled.cost.traffic] * 3


def test_bad_texts_cost_a_query_and_nothing_else(server: Served, dealer: Served) -> None:
    ids = torch.full((1, LENGTH), 10**6)
    with dial(server, dealer) as connection:
        with pytest.raises(InputTooLong, match=f"the limit is {LENGTH}"):
            connection.embed([TEXT, " ".join(WORDS[:LENGTH])])
        for text in ("", "   "):
            with pytest.raises(EmptyInput):
                connection.embed([TEXT, text])
        with pytest.raises(ValueError, match="token id"):
            connection.query({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        connection.embed([TEXT])
        assert len(connection.reports) == 8  # a bad input costs a query like any other


def test_a_connection_that_was_closed(server: Served, dealer: Served) -> None:
    with dial(server, dealer) as connection:
        connection.prepare()
    connection.close()
    for use in (connection.prepare, lambda: connection.embed([TEXT])):
        with pytest.raises(PeerLost, match="this session has ended: it was closed\nhint: connect again"):
            use()


def test_nothing_is_left_open(server: Served, dealer: Served) -> None:
    """Neither threads nor file descriptors, whether a connection succeeds or not."""

    def some() -> None:
        works(server, dealer)
        with pytest.raises(HandshakeError):
            dial(server, dealer, program_digest="0" * 64)
        with pytest.raises(DealerError):
            call(server.address, "127.0.0.1:1")
        with pytest.raises(PeerLost):
            call("127.0.0.1:1", dealer.address)

    some()
    descriptors, threads = open_files(), threading.active_count()
    for _ in range(4):
        some()
    wait_until(lambda: threading.active_count() <= threads + 1, "threads end")
    wait_until(lambda: open_files() <= descriptors + 4, "files are closed")


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_proxy_is_not_used(server: Served, dealer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy elsewhere would see the traffic that must not leave this machine."""
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    works(server, dealer)


# addresses


@pytest.mark.parametrize("bad", ["", "localhost", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000"])
def test_malformed_addresses(bad: str) -> None:
    with pytest.raises(EndpointError, match=r"the server: .* is not host:port\nhint: for example"):
        call(bad, "127.0.0.1:1")
    with pytest.raises(EndpointError, match=r"the dealer: .* is not host:port"):
        call("127.0.0.1:1", bad)


@pytest.mark.parametrize("deadline", [0, -1.0, math.inf, math.nan, "60", None])
def test_deadlines_that_are_none(deadline: Any) -> None:
    message = r"a deadline of .* s\nhint: give a finite number of seconds, more than 0"
    for deployment in (TwoParty(), secure.ThreeParty(), secure.Ckks()):
        with pytest.raises(InvalidInput, match=message):
            secure.connect(deployment, deadline=deadline)
    with pytest.raises(InvalidInput, match=message):
        secure.serve("nowhere", role="party 0", deployment=secure.ThreeParty(), peers=PEERS, deadline=deadline)


@pytest.mark.parametrize("ahead", [-1, 17, 1.5, "1", None])
def test_queries_ahead_that_are_too_many(ahead: Any) -> None:
    with pytest.raises(InvalidInput, match=r"queries ahead\nhint: 0 to 16"):
        secure.serve("nowhere", role="party 0", deployment=secure.ThreeParty(), peers=PEERS, ahead=ahead)


@pytest.mark.parametrize("workers", [0, -1, 1.5, "1", None])
def test_workers_that_are_none(workers: Any) -> None:
    with pytest.raises(InvalidInput, match=r"workers\nhint: give 1 or more"):
        secure.serve("nowhere", role="server", deployment=secure.Ckks(), workers=workers)


PEERS = {"party 2": "127.0.0.1:1"}


def test_only_loopback_without_saying_so(model: Ready) -> None:
    far, here = "192.0.2.1:5", "127.0.0.1:5"
    for server, dealer, what in ((far, here, "the server"), (here, far, "the dealer")):
        with pytest.raises(
            EndpointError, match=f"{what}: {far} is not on this machine.*not be encrypted\nhint: .*insecure"
        ):
            call(server, dealer)
    with pytest.raises(EndpointError, match=r"the dealer: 192\.0\.2\.1:5 is not on this machine"):
        DealerPeer("192.0.2.1:5", Plaintext())
    with pytest.raises(EndpointError, match=r"the thing: 0\.0\.0\.0:0 is not on this machine"):
        hosting.start(Endpoint("0.0.0.0", 0), [], network=Plaintext(), what="the thing", role="server", permissions={})
    open_to_all = Plaintext(beyond_loopback=True)
    server_, address = hosting.start(
        Endpoint("0.0.0.0", 0), [], network=open_to_all, what="the thing", role="server", permissions={}
    )
    server_.stop(None).wait()
    assert address.port > 0
    open_to_all.channel(Endpoint("192.0.2.1", 5), what="x", role="server").close()


def test_a_port_in_use(dealer: Served) -> None:
    with (
        pytest.raises(EndpointError, match=f"the test: the address {dealer.address} cannot be used.*\nhint: choose"),
        dealing(listen=dealer.endpoint),
    ):
        pass


def test_no_dealer(model: Ready, server: Served) -> None:
    nobody = "127.0.0.1:1"
    message = f"the dealer at {nobody} cannot be reached.*\nhint: start it with: unseen dealer --listen {nobody}"
    with pytest.raises(DealerError, match=message):
        InferenceService([model.masked], DealerPeer(nobody, Plaintext()))
    with pytest.raises(DealerError, match=message):
        call(server.address, nobody)


def test_no_server(dealer: Served) -> None:
    with pytest.raises(
        PeerLost, match=r"the server at 127\.0\.0\.1:1 cannot be reached\nhint: start it with: unseen serve"
    ):
        call("127.0.0.1:1", dealer.address)


def test_another_dealer_than_the_servers(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PATIENCE", 0.2)
    with (
        dealing() as other,
        pytest.raises(DealerError, match=r"does not know the Program.*\nhint: start the server with"),
    ):
        dial(server, other)


# agreement


def changed(monkeypatch: pytest.MonkeyPatch, field: str, value: Any) -> None:
    """Let clients say something else in their handshake."""
    real = pb.Hello
    monkeypatch.setattr(pb, "Hello", lambda **fields: real(**{**fields, field: value}))


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("deployment", "three-party", "deployment"),
        ("fixed_point", '{"fraction_bits": 3}', "fixed point"),
        ("program_digest", "f" * 64, "Program digest"),
        ("weights_digest", "e" * 64, "weights digest"),
    ],
)
def test_the_server_refuses_another_handshake(
    field: str,
    value: Any,
    name: str,
    server: Served,
    dealer: Served,
    model: Ready,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = model.compiled.program
    ours = {
        "deployment": TwoParty.name,
        "fixed point": '"fraction_bits": 16',
        "Program digest": program.digest,
        "weights digest": model.weights_digest,
    }
    with monkeypatch.context() as patch:
        changed(patch, field, value)
        with pytest.raises(HandshakeError) as caught:
            dial(server, dealer)
    assert f"{name}: the client has {str(value)!r}" in str(caught.value)
    assert ours[name] in str(caught.value)
    assert "\nhint: " in str(caught.value)
    works(server, dealer)


class Lying(Published):
    """Describes something else than is served."""

    change: Callable[[pb.Description], object]

    def Describe(self, request: Any, context: Any) -> pb.Description:
        description = super().Describe(request, context)
        type(self).change(description)
        return description


def lying(change: Callable[[pb.Description], object]) -> type[Published]:
    return type("Lying", (Lying,), {"change": staticmethod(change)})


def spoil_program(description: pb.Description) -> None:
    description.program = description.program.replace(b'"instructions"', b'"instruction"')


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            lambda d: setattr(d, "version", 9),
            HandshakeError,
            f"the server speaks version 9 .*this client version {WIRE_VERSION}",
        ),
        (
            lambda d: setattr(d, "deployment", "ckks"),
            HandshakeError,
            f"the server is one of 'ckks', this client asks '{TwoParty.name}'",
        ),
        (lambda d: setattr(d, "model", "0" * 64), DealerError, "does not know the Program"),
        (lambda d: setattr(d, "tokenizer", b"{"), HandshakeError, "tokenizer: one of the digest .* came"),
        (lambda d: d.files.pop(), DownloadError, "the server offers no masked-weights"),
        (lambda d: setattr(d.files[0], "sha256", "../../x"), DownloadError, "masked-weights: the announced digest"),
        (lambda d: setattr(d.files[0], "sha256", "é" * 64), DownloadError, "masked-weights: the announced digest"),
        (lambda d: setattr(d.files[0], "sha256", "0" * 64), PeerLost, "it has no such file\nhint: connect again"),
        (lambda d: setattr(d.files[0], "size", 1 << 60), DownloadError, "size of 1152921504606846976 bytes is imposs"),
        (lambda d: setattr(d.files[0], "size", 1 << 20), DownloadError, "is impossible, the Program needs .* at most"),
        (lambda d: d.files.append(d.files[0]), ProtocolError, "the server describes masked-weights twice"),
        (lambda d: setattr(d.files[0], "size", 5), DownloadError, "not the announced file"),
        (lambda d: setattr(d, "role", "dealer"), HandshakeError, "dealer answers at .* where server should"),
        (spoil_program, ProtocolError, "the Program of the server: not a valid Program"),
    ],
)
def test_a_description_that_does_not_hold(
    change: Any,
    kind: type[Exception],
    message: str,
    model: Ready,
    dealer: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "PATIENCE", 0.2)
    with serving(model, dealer.address, describing=lying(change)) as server, pytest.raises(kind, match=message):
        call(server.address, dealer.address, cache=tmp_path)


@pytest.mark.parametrize("listed", [["1" * 64], ["1" * 64, "2" * 64]])
def test_a_server_that_lists_the_pinned_programs_and_sends_another(
    listed: list[str], model: Ready, dealer: Served
) -> None:
    def change(description: pb.Description) -> None:
        name = model.compiled.program.labels.get("model", "")
        del description.offers[:]
        for length, digest in enumerate(listed):
            description.offers.add(model=name, weights=description.model, length=length, batch=1, program_digest=digest)

    with (
        serving(model, dealer.address, describing=lying(change)) as server,
        pytest.raises(HandshakeError, match=f"Program digest: the server has '{model.compiled.program.digest}', this"),
    ):
        dial(server, dealer, program_digest=digest_of_all(listed))


def test_a_pinned_program(server: Served, dealer: Served, model: Ready) -> None:
    digest = model.compiled.program.digest
    dial(server, dealer, program_digest=digest).close()
    for other in ("0" * 64, "é"):
        with pytest.raises(
            HandshakeError, match=f"Program digest: the server has '{digest}', this client expects '{other}'"
        ):
            dial(server, dealer, program_digest=other)
