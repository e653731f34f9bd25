"""Quotas and tokens: what is counted, what is refused and in which words, and that no token is ever shown."""

from __future__ import annotations

import logging
import sqlite3
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

import secure
from parties.limits import quotas, tokens
from parties.limits.meter import Meter
from parties.limits.quotas import BYTES, PREPARATIONS, QUERIES, Limits, Quotas
from parties.limits.tokens import Token, Tokens, WithToken, new_holder
from parties.net.caller import Caller, permit
from parties.net.endpoints import Endpoint
from parties.net.network import Network, Plaintext
from parties.net.peer import Peer
from parties.net.summed import SummedChannel
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import PartyServicer, PartyStub, add_PartyServicer_to_server
from parties.served.files import state_directory
from parties.services import hosting
from parties.tls.authority import Authority
from parties.tls.tls import Tls
from secure.deployments.two_party import DEALER, SERVER, TwoParty
from secure.errors import EndpointError, InvalidInput, QuotaError, TokenError
from tests.test_cli import Run, in_words, run
from tests.tiny import TEXT, Ready, Served, call, dealing

__all__ = ["run"]  # the fixture

ANNE, BEN = Caller("anne", "client", "127.0.0.1:1"), Caller("ben", "client", "127.0.0.1:2")
ANYBODY = Caller("", None, "127.0.0.1:3")


def limits(**table: Any) -> Limits:
    return Limits.read(table, "here")


# counting


def test_a_limit_is_kept_by_caller(tmp_path: Path) -> None:
    counted = Quotas(limits(queries=3, ben={"queries": 1}), tmp_path / "q.sqlite")
    for _ in range(3):
        counted.spend(ANNE, QUERIES)
    counted.spend(BEN, QUERIES)
    tomorrow = f"{datetime.now(UTC) + timedelta(days=1):%Y-%m-%d} 00:00 UTC"
    message = f"the quota of 3 queries a day is used up for the caller 'anne'; a new day begins at {tomorrow}"
    with pytest.raises(QuotaError, match=message):
        counted.spend(ANNE, QUERIES)
    with pytest.raises(QuotaError, match="quota of 1 queries a day is used up for the caller 'ben'"):
        counted.spend(BEN, QUERIES)
    counted.spend(ANYBODY, QUERIES, 2)
    with pytest.raises(QuotaError, match="every caller without a certificate together"):
        counted.spend(ANYBODY, QUERIES, 2)  # both or none
    assert counted.used("anne") == {QUERIES: 3}
    assert counted.used("") == {QUERIES: 2}


def test_counts_outlive_the_service(tmp_path: Path) -> None:
    file = tmp_path / "state" / "q.sqlite"
    first = Quotas(limits(preparations=2), file)
    first.spend(ANNE, PREPARATIONS, 2)
    again = Quotas(limits(preparations=2), file)  # the first has not even been closed, as if it were killed
    with pytest.raises(QuotaError, match="2 preparations"):
        again.spend(ANNE, PREPARATIONS)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_new_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Quotas(limits(queries=1), tmp_path / "q.sqlite")
    counted.spend(ANNE, QUERIES)
    monkeypatch.setattr(quotas, "today", lambda: "2999-01-01")
    counted.spend(ANNE, QUERIES)
    assert counted.used("anne") == {QUERIES: 1}
    base = sqlite3.connect(tmp_path / "q.sqlite")
    assert base.execute("SELECT DISTINCT day FROM used").fetchall() == [("2999-01-01",)]
    base.close()


def test_threads_and_processes_do_not_count_too_few(tmp_path: Path) -> None:
    two = [Quotas(limits(queries=100), tmp_path / "q.sqlite") for _ in range(2)]

    def spend(number: int) -> bool:
        try:
            two[number % 2].spend(ANNE, QUERIES)
        except QuotaError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(spend, range(120))) == 100


def test_bytes_are_counted_after_they_crossed() -> None:
    counted = Quotas(limits(bytes=100))
    counted.spend(ANNE, BYTES, 70)
    counted.require(ANNE)
    counted.spend(ANNE, BYTES, 70)
    with pytest.raises(QuotaError, match="quota of 100 bytes a day is used up"):
        counted.require(ANNE)
    with pytest.raises(QuotaError, match="quota of 100 bytes a day"):
        counted.spend(ANNE, QUERIES)
    counted.spend(ANNE, BYTES, 1)
    assert counted.used("anne") == {BYTES: 141}


def test_sessions_at_a_time() -> None:
    counted = Quotas(limits(sessions=1))
    with counted.session(ANNE):
        with pytest.raises(QuotaError, match="the caller 'anne' has 1 sessions at a time, which is its quota"):
            counted.session(ANNE).__enter__()
        with counted.session(BEN):
            pass
    with counted.session(ANNE):
        pass
    assert not counted._open


def test_names_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "MAXIMUM_NAMES", 2)
    counted = Quotas(limits(queries=5))
    counted.spend(ANNE, QUERIES)
    counted.spend(BEN, QUERIES)
    with pytest.raises(QuotaError, match="2 callers came today, which is the limit"):
        counted.spend(ANYBODY, QUERIES)
    counted.spend(ANNE, QUERIES)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"querys": 1}, "here .quotas.: unknown setting 'querys'\nhint: did you mean 'queries'"),
        ({"queries": -1}, "here .quotas.: queries = -1: input should be greater than or equal to 0"),
        ({"queries": "1"}, "here .quotas.: queries = '1': input should be a valid integer"),
        ({"anne": {"bytes": 1.5}}, r"here .quotas.anne.: bytes = 1.5: "),
        ({"anne": {"zzz": 1}}, r"here .quotas.anne.: unknown setting 'zzz'\nhint: known: queries"),
    ],
)
def test_mistakes_in_limits(table: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Limits.read(table, "here")


def test_limits_in_words() -> None:
    assert not limits()
    assert limits(queries=0)
    assert str(limits(queries=1000, anne={})) == "quota of a caller a day: 1,000 queries; of their own: anne"


def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "q").write_bytes(b"no data base, but text that is longer than a header" * 50)
    with pytest.raises(InvalidInput, match=r"the counts of quotas in .*/q cannot be kept"):
        Quotas(limits(queries=1), tmp_path / "q")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(InvalidInput, match="cannot be kept"):
        Quotas(limits(queries=1), tmp_path / "link")


# the two parties


def test_prepared_queries_count_though_they_are_dropped(model: Ready, tmp_path: Path) -> None:
    """A client that looks at its share and drops the query uses up its quota; a restarted server remembers."""
    state = tmp_path / "state"
    three, message = limits(preparations=3, queries=2), "the quota of 3 preparations a day is used up"
    served: dict[str, Any] = {"role": SERVER, "quotas": three, "state": state}

    def session(server: secure.Service, dealer: Served) -> secure.Session:
        return call(server.address, dealer.address)

    with dealing() as dealer:
        peers = {DEALER: dealer.address}
        with secure.serve(model.compiled, peers=peers, **served) as server:
            assert "quota of a caller a day: 2 queries, 3 preparations" in server.about
            with session(server, dealer) as dropped:
                dropped.prepare()
                dropped.prepare()
            with session(server, dealer) as one:
                assert one.embed([TEXT])[0].isfinite().all()
        with secure.serve(model.compiled, peers=peers, **served) as server:
            with session(server, dealer) as none, pytest.raises(QuotaError, match=message) as error:
                none.embed([TEXT])
            assert "a new day begins at" in str(error.value)
            assert "hint: wait until then" in str(error.value)


def test_a_session_beyond_the_quota(model: Ready, tmp_path: Path) -> None:
    """The caller gets the kind of error that it is, with one hint, though the stream had begun."""
    with dealing() as dealer:
        peers, one = {DEALER: dealer.address}, limits(sessions=1)
        with (
            secure.serve(model.compiled, role=SERVER, peers=peers, quotas=one, state=tmp_path / "state") as server,
            call(server.address, dealer.address),
            pytest.raises(QuotaError, match="has 1 sessions at a time, which is its quota") as error,
        ):
            call(server.address, dealer.address)
    assert str(error.value).count("hint: ") == 1


def test_two_parties_that_ask_for_tokens(model: Ready, tmp_path: Path) -> None:
    """Clients need one for both; the server needs none for the dealer."""
    token, file = Token.fresh(), tmp_path / "tokens"
    write_tokens(file, (token, "alice", 1))
    asked: dict[str, Any] = {"tokens": file, "quotas": limits(queries=1)}
    with secure.serve(role=DEALER, deployment=TwoParty(), state=state_directory(), **asked) as dealer:
        at = Endpoint.parse(dealer.address, what="the dealer")
        with pytest.raises(InvalidInput, match="is run by this user"):
            hosting.check_owners({DEALER: at}, Plaintext())
        peers, state = {DEALER: dealer.address}, tmp_path / "state"
        with secure.serve(model.compiled, role=SERVER, peers=peers, state=state, **asked) as server:
            with call(server.address, dealer.address, token=token.text) as session:
                assert session.embed([TEXT])[0].isfinite().all()
            with pytest.raises(TokenError, match="this service asks every client for a token"):
                call(server.address, dealer.address)
            with (
                call(server.address, dealer.address, token=token.text) as session,
                pytest.raises(QuotaError, match="used up for the caller '/alice'"),
            ):
                session.embed([TEXT])


# at a service


class Echo(PartyServicer):
    """Ask answers every part with an empty reply, and notes the caller; Compute is no method of clients."""

    permissions = permit("Party", Ask=["client"], Compute=["party 1"])

    def __init__(self) -> None:
        self.callers: list[Caller] = []

    def Ask(self, requests: Iterator[pb.AskPart], context: grpc.ServicerContext) -> Iterator[pb.AskReply]:
        self.callers.append(hosting_caller(context))
        for _ in requests:
            yield pb.AskReply(working=pb.Working(steps=1))

    def Compute(self, requests: Iterator[pb.PeerMessage], context: grpc.ServicerContext) -> Iterator[pb.PeerMessage]:
        yield from requests


def hosting_caller(context: grpc.ServicerContext) -> Caller:
    from parties.net.caller import caller

    return caller(context)


@contextmanager
def echoing(
    counted: Quotas | None, asked: Tokens | None = None, network: Network | None = None
) -> Iterator[tuple[Echo, Endpoint]]:
    echo = Echo()
    server, at = hosting.start(
        Endpoint("127.0.0.1", 0),
        [lambda server: add_PartyServicer_to_server(echo, server)],
        network=network or Plaintext(),
        what="the echo",
        role="party 0",
        permissions=Echo.permissions,
        meter=Meter(counted, asked, Echo.permissions),
    )
    try:
        yield echo, at
    finally:
        server.stop(0).wait()


def ask(at: Endpoint, network: Network | None = None, parts: int = 1) -> int:
    peer = Peer("the echo", at, network or Plaintext(), role="party 0", start="x")
    sent = threading.Event()

    def requests() -> Iterator[pb.AskPart]:
        yield from [pb.AskPart(frame=pb.Frame(data=b"x" * 50))] * parts
        sent.set()

    try:
        with peer.calling():
            return len(list(PartyStub(peer.channel).Ask(requests())))
    finally:
        sent.wait(0.2)  # gRPC's own thread complains if the channel is closed while it sends
        peer.close()


def test_calls_and_bytes_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    counted = Quotas(limits(queries=2))
    with echoing(counted) as (_, at):
        assert ask(at, parts=3) == 3
        assert ask(at) == 1
        with pytest.raises(
            QuotaError, match=r"the echo at .* refused: the quota of 2 queries a day is used up"
        ) as error:
            ask(at)
    assert "hint: wait until then, or ask the service's owner" in str(error.value)
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "refused /unseen.v3.Party/Ask of 127.0.0.1" in line
    assert "the quota of 2 queries a day is used up" in line
    sent, got = (
        pb.AskPart(frame=pb.Frame(data=b"x" * 50)).ByteSize(),
        pb.AskReply(working=pb.Working(steps=1)).ByteSize(),
    )
    assert counted.used("") == {QUERIES: 2, BYTES: 4 * (sent + got)}


def test_sessions_are_given_back() -> None:
    counted, wait = Quotas(limits(sessions=1)), threading.Event()

    def slow() -> Iterator[pb.AskPart]:
        yield pb.AskPart()
        wait.wait(20)

    with echoing(counted) as (_, at), SummedChannel(grpc.insecure_channel(str(at)), "it") as channel:
        call = PartyStub(channel).Ask(slow())
        next(call)
        with pytest.raises(QuotaError, match="has 1 sessions at a time, which is its quota"):
            ask(at)
        call.cancel()
        wait.set()
        for _ in range(100):
            try:
                assert ask(at) == 1
                break
            except QuotaError:
                threading.Event().wait(0.05)
        else:
            pytest.fail("the session was not given back")


def test_methods_of_others_are_not_metered(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("")
    with (
        echoing(Quotas(limits(queries=0)), Tokens(tmp_path / "t")) as (_, at),
        SummedChannel(grpc.insecure_channel(str(at)), "it") as channel,
    ):
        assert len(list(PartyStub(channel).Compute(iter([pb.PeerMessage()])))) == 1


# tokens


def write_tokens(file: Path, *lines: tuple[Token, str, int]) -> Tokens:
    file.write_text("# names\n\n" + "".join(f"{new_holder(*line).line()}\n" for line in lines))
    return Tokens(file)


def test_a_token_names_the_caller(tmp_path: Path) -> None:
    mine, other = Token.fresh(), Token.fresh()
    asked = write_tokens(tmp_path / "tokens", (other, "bob", 1), (mine, "alice", 1))
    with echoing(None, asked) as (echo, at):
        assert ask(at, WithToken(Plaintext(), mine)) == 1
    assert [c.name for c in echo.callers] == ["/alice"]


def test_quotas_by_token(tmp_path: Path) -> None:
    mine, other = Token.fresh(), Token.fresh()
    asked = write_tokens(tmp_path / "tokens", (other, "bob", 1), (mine, "alice", 1))
    with echoing(Quotas(limits(queries=1, **{"/bob": {"queries": 2}})), asked) as (_, at):
        ask(at, WithToken(Plaintext(), mine))
        with pytest.raises(QuotaError, match="used up for the caller '/alice'"):
            ask(at, WithToken(Plaintext(), mine))
        for _ in range(2):
            ask(at, WithToken(Plaintext(), other))


def test_names_and_tokens_under_tls(tmp_path: Path) -> None:
    """The certificate's name comes first; a token of another client's line adds its own."""
    authority, token = Authority.make(tmp_path / "certs"), Token.fresh()
    client, party = (Tls(authority.issue(role, "acme")) for role in ("client", "party 0"))
    asked = write_tokens(tmp_path / "tokens", (token, "alice", 1))
    counted = Quotas(limits(queries=0, **{"acme/alice": {"queries": 2}}))
    with echoing(counted, asked, party) as (echo, at):
        assert ask(at, WithToken(client, token), parts=3) == 3
        assert ask(at, WithToken(client, token)) == 1
        with pytest.raises(QuotaError, match="used up for the caller 'acme/alice'"):
            ask(at, WithToken(client, token))
        with pytest.raises(TokenError, match="asks every client for a token"):
            ask(at, client)
    assert [(c.name, c.role) for c in echo.callers] == [("acme/alice", "client")] * 2


def test_wrong_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.DEBUG)
    mine, wrong = Token.fresh(), Token.fresh()
    asked = write_tokens(tmp_path / "tokens", (mine, "alice", 1))
    messages = list[str]()
    with echoing(None, asked) as (echo, at):

        def refused(network: Network, message: str) -> None:
            with pytest.raises(TokenError, match=message) as error:
                ask(at, network)
            messages.append(str(error.value))
            (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
            assert message in line
            caplog.clear()

        refused(Plaintext(), "this service asks every client for a token")
        assert "--token-file" in messages[-1]
        refused(WithToken(Plaintext(), wrong), "the token is not known here, or was revoked")
        ask(at, WithToken(Plaintext(), mine))
        tomorrow = datetime.now(UTC) + timedelta(days=2)
        with monkeypatch.context() as later:
            later.setattr(tokens, "datetime", type("Later", (), {"now": staticmethod(lambda _: tomorrow)}))
            refused(WithToken(Plaintext(), mine), "the token of 'alice' has expired")
        (tmp_path / "tokens").write_text("# nobody is left\n")
        refused(WithToken(Plaintext(), mine), "the token is not known here, or was revoked")
        write_tokens(tmp_path / "tokens", (wrong, "carol", 1))
        ask(at, WithToken(Plaintext(), wrong))
        (tmp_path / "tokens").unlink()
        with pytest.raises(TokenError, match="not known here"):
            ask(at, WithToken(Plaintext(), wrong))
    assert len(echo.callers) == 2
    said = " ".join(messages) + caplog.text + repr([r.args for r in caplog.records])
    for token in (mine, wrong):
        assert token.text not in said
        assert token.text[10:] not in said


def test_no_token_is_shown() -> None:
    token = Token.fresh()
    for shown in (repr(token), str(token), repr(WithToken(Plaintext(), token)), f"{token}", repr({"t": token})):
        assert token.text[7:] not in shown
    with pytest.raises(InvalidInput, match="this is no token") as error:
        Token("not_a_token_but_perhaps_a_password")
    assert "password" not in str(error.value)


def test_a_token_never_crosses_unencrypted(tmp_path: Path) -> None:
    network = WithToken(Plaintext(beyond_loopback=True), Token.fresh())
    for reach in (
        lambda: network.check(Endpoint("192.0.2.1", 5), what="the server"),
        lambda: network.channel(Endpoint("192.0.2.1", 5), what="the server", role="server"),
    ):
        with pytest.raises(EndpointError, match=r"the server: the token would cross to 192\.0\.2\.1:5 unencrypted"):
            reach()


def test_a_broken_line_grants_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token, file = Token.fresh(), tmp_path / "tokens"
    asked = write_tokens(file, (token, "alice", 1))
    good = file.read_text()
    file.write_text(good + "zzz alice 2999-01-01\n0123 bob\n")
    assert [holder.name for holder in asked.holders()] == ["alice"]
    assert len([r for r in caplog.records if "is ignored" in r.getMessage()]) == 2
    asked.holders()
    assert len([r for r in caplog.records if "is ignored" in r.getMessage()]) == 2
    file.chmod(0o666)
    with pytest.raises(InvalidInput, match="others may write"):
        Tokens(file)
    file.chmod(0o600)
    with pytest.raises(InvalidInput, match="tokens, line 4: a line of tokens begins with a SHA-256"):
        Tokens(file)
    with pytest.raises(InvalidInput, match="cannot be read: No such file"):
        Tokens(tmp_path / "none")


def test_the_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokens"
    made = run("token", "new", "alice", "--tokens", str(file), "--days", "3")
    token = Token(made.out.strip())
    assert made.code == 0
    assert token.text not in made.err
    assert token.text not in file.read_text()
    assert token.digest in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run("token", "new", "bob", "--tokens", str(file)).code == 0
    assert [h.name for h in Tokens(file).holders()] == ["alice", "bob"]
    listed = run("token", "list", "--tokens", str(file)).out
    assert "alice until " in listed
    assert token.digest not in listed
    in_words(run("token", "new", "alice", "--tokens", str(file)), "has a token of the name 'alice'", "delete its line")
    in_words(run("token", "new", "a b", "--tokens", str(file)), "'a b' is no name of a token", "64 letters")
    in_words(run("token", "new", "--tokens", str(file)), "a token needs a name", "new NAME")


def test_embed_takes_a_token(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(f"{Token.fresh().text}\n")
    file.chmod(0o644)
    in_words(run("embed", "x", "--token-file", str(file)), f"others may read or write {file}", "chmod 600")
    file.chmod(0o600)
    in_words(run("embed", "x", "--token-file", str(file), "--server", "127.0.0.1:1"), "cannot be reached", "start it")
    monkeypatch.setenv("UNSEEN_TOKEN", "x" * 50)
    said = run("embed", "x", "--server", "127.0.0.1:1")
    in_words(said, "this is no token of unseen", "begins with unseen_")
    assert "xxxx" not in said.err
    in_words(run("embed", "x", "--token-file", "/no/file"), "--token-file: /no/file cannot be read", "one token")
    monkeypatch.delenv("UNSEEN_TOKEN")
    with pytest.raises(EndpointError, match=r"would cross to 192\.0\.2\.1:5 unencrypted"):
        secure.connect(
            secure.TwoParty(server="192.0.2.1:5"),
            token=file.read_text().strip(),
            network=Plaintext(beyond_loopback=True),
        )


def test_what_a_callers_own_quota_leaves_out_is_that_of_every_caller() -> None:
    found = limits(queries=10, preparations=3, bob={"queries": 4})
    assert (found.of("bob").queries, found.of("bob").preparations) == (4, 3)
    assert found.of("ann") == found.every
