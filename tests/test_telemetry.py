"""The numbers, the health and the log lines of every role, and that nothing secret is in any of them."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import re
import secrets
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import secure
from parties import deployments
from parties.deployments import starting_order
from parties.limits.quotas import Limits
from parties.net.endpoints import Endpoint
from parties.net.network import Plaintext
from parties.net.peer import Peer
from parties.net.summed import MethodSums
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import DealerStub
from parties.services.hosting import Service
from parties.telemetry import port, spans
from parties.telemetry.events import Events, Listener, PhaseEnded
from parties.telemetry.logs import JsonLines, TextLines, tagged
from parties.telemetry.metrics import RoleMetrics
from parties.telemetry.names import query_id, session_label
from parties.telemetry.port import TelemetryPort
from parties.telemetry.spans import Spans
from parties.telemetry.telemetry import Telemetry
from parties.tls.authority import Authority
from parties.tls.tls import Tls
from protocols.prg import Key
from secure.cost.traffic import OFFLINE, ONLINE
from secure.deployments.three_party import PARTIES, ThreeParty
from secure.deployments.two_party import CLIENT, DEALER, SERVER, TwoParty
from secure.errors import EndpointError, Error, InvalidInput, QuotaError
from secure.session.session import Session
from tests.ckks_server import compiled, dial, inputs, uploaded
from tests.test_cli import Run, run
from tests.three_parties import shared
from tests.tiny import TEXT, WORDS, Ready, wait_until

__all__ = ["run"]  # the fixture


def fetched(address: str, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


@dataclass(frozen=True)
class Scraped:
    """What Prometheus reads of a role."""

    text: str

    @classmethod
    def of(cls, service: Service) -> Scraped:
        return cls(fetched(where(service)))

    @classmethod
    def when(cls, service: Service, least: float, name: str, **labels: str) -> Scraped:
        """The same once this number is ``least`` or more: what ends a call is counted after its caller has heard."""
        wait_until(lambda: cls.of(service).value(name, 0.0, **labels) >= least, name)
        return cls.of(service)

    def value(self, name: str, default: float | None = None, **labels: str) -> float:
        """The number of this name that has these labels, and perhaps others; the sum if there are several."""
        found = [
            sample.value
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found or default is not None, f"{name} {labels}"
        return float(sum(found))


def where(service: Service) -> str:
    """The address of a service's numbers, as it tells a person."""
    (line,) = (line for line in service.about if line.startswith("numbers for Prometheus: "))
    address: str = line.removeprefix("numbers for Prometheus: http://").partition("/")[0]
    return address


@dataclass(frozen=True)
class Running:
    """Server and dealer in this process, whose numbers are told, and a client."""

    dealer: Service
    server: Service
    session: Session


@contextmanager
def two(model: Ready, **given: Any) -> Iterator[Running]:
    with (
        deployments.serve(role=DEALER, deployment=TwoParty(), metrics="0") as dealer,
        deployments.serve(
            model.compiled, role=SERVER, peers={DEALER: dealer.address}, metrics="127.0.0.1:0", **given
        ) as server,
        secure.connect(TwoParty(server=server.address, dealer=dealer.address), cache=False) as session,
    ):
        yield Running(dealer, server, session)


@pytest.fixture(scope="module")
def running(model: Ready) -> Iterator[Running]:
    with two(model) as made:
        yield made


def test_two_parties_tell_their_numbers(model: Ready) -> None:
    with two(model) as running:
        for before in (Scraped.of(running.server), Scraped.of(running.dealer)):
            assert before.value("unseen_queries_total", phase="online") == 0  # it is there before the first event
            assert before.value("unseen_refusals_total") == 0
        running.session.embed([TEXT, TEXT])
        report = running.session.reports[-1]
        server = Scraped.when(running.server, 2, "unseen_queries_total", phase="online")
        made = server.value("unseen_queries_total", phase="offline")
        dealer = Scraped.when(running.dealer, made, "unseen_calls_total", method="Dealer/Deal", code="ok")
        came, left, dealt = (
            report.bytes(sender=sender, receiver=receiver, phase=phase)
            for sender, receiver, phase in (
                ("client", "server", ONLINE),
                ("server", "client", ONLINE),
                ("dealer", "server", OFFLINE),
            )
        )
        assert server.value("unseen_info", role="server", deployment="two-party") == 1
        assert server.value("unseen_queries_total", phase="online") == 2
        assert server.value("unseen_phase_seconds_count", phase="online") == 2
        assert 0 < server.value("unseen_phase_seconds_sum", phase="online") < 60
        assert server.value("unseen_rounds_total", phase="online") == 2 * report.rounds
        assert server.value("unseen_payload_bytes_total", phase="online", direction="received") == 2 * came
        assert server.value("unseen_payload_bytes_total", phase="online", direction="sent") == 2 * left
        prepared = server.value("unseen_queries_total", phase="offline")
        assert prepared >= 2
        assert server.value("unseen_payload_bytes_total", phase="offline", direction="received") == prepared * dealt
        assert dealer.value("unseen_queries_total", phase="offline") == prepared
        assert dealer.value("unseen_payload_bytes_total", phase="offline", direction="sent") == prepared * dealt
        # messages are these payloads and what frames them, and sums
        moved = server.value("unseen_message_bytes_total", method="Inference/Session", direction="received")
        assert 2 * came < moved < 3 * came + 10_000
        assert dealer.value("unseen_message_bytes_total", method="Dealer/Deal", direction="sent") > prepared * dealt
        assert dealer.value("unseen_calls_total", method="Dealer/Deal", code="ok") == prepared
        for role in (server, dealer):
            assert role.value("unseen_seats_taken", what="sessions") == 1 < role.value("unseen_seats", what="sessions")
            assert role.value("process_resident_memory_bytes") > 1e6
            assert role.value("unseen_draining") == 0
        assert server.value("unseen_budget_bytes", budget="memory") > 0
        assert server.value("unseen_budget_taken_bytes", budget="memory") >= 0
        assert dealer.value("unseen_seats_taken", what="models") == 1


@pytest.fixture(scope="module")
def three(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Service]]:
    """Parties 0, 1 and 2, started in the order in which they need one another."""
    shares = shared(directory, tmp_path_factory.mktemp("shares"), "one-hot")
    with ExitStack() as stack:
        made = dict[str, Service]()
        for role in starting_order(ThreeParty()):
            peers = {name: made[name].address for name in role.peers if name in made}
            share = shares / role.name.replace(" ", "-")
            serving = deployments.serve(share, role=role.name, deployment=ThreeParty(), peers=peers, metrics="0")
            made[role.name] = stack.enter_context(serving)
        yield [made[name] for name in PARTIES]


def test_three_parties_tell_their_numbers(three: list[Service]) -> None:
    addresses = tuple(each.address for each in three)
    with secure.connect(ThreeParty(parties=addresses), cache=False) as session:
        session.embed([TEXT])
        report = session.reports[-1]
    zero, one, two = (Scraped.when(each, 1, "unseen_queries_total", phase="online") for each in three)
    assert [each.value("unseen_queries_total", phase="online") for each in (zero, one, two)] == [1, 1, 1]
    assert zero.value("unseen_rounds_total", phase="online") == one.value("unseen_rounds_total", phase="online") > 1
    for a, b in ((zero, one), (one, zero)):
        sent, received = (
            each.value("unseen_payload_bytes_total", phase="online", direction=direction)
            for each, direction in ((a, "sent"), (b, "received"))
        )
        assert sent == received > 0
    dealt = report.bytes(sender=PARTIES[2], receiver=PARTIES[0], phase=OFFLINE)
    assert zero.value("unseen_payload_bytes_total", phase="offline", direction="received") == dealt
    assert two.value("unseen_payload_bytes_total", phase="offline", direction="sent") >= dealt
    assert zero.value("unseen_queries_ahead") == 1
    assert two.value("unseen_assignable_queries") >= 0
    assert all(each.value("unseen_seats_taken", what="queries") == 0 for each in (zero, one, two))
    assert zero.value("unseen_message_bytes_total", method="Party/Compute", direction="received") > 0


@pytest.fixture(scope="module")
def ciphertexts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server of ciphertexts."""
    state = tmp_path_factory.mktemp("keys")
    with deployments.serve(compiled("tiny"), role=SERVER, state=state, metrics="0") as server:
        yield server


def test_the_server_of_ciphertexts_tells_its_numbers(ciphertexts: Service) -> None:
    server = ciphertexts
    with dial(server.address) as session:
        session.query(inputs("tiny"))
        report = session.reports[-1]
        numbers = Scraped.when(server, 1, "unseen_queries_total", phase="online")
        assert numbers.value("unseen_queries_total", phase="online") == 1
        assert numbers.value("unseen_rounds_total", phase="online") == report.rounds
        for direction, sender in (("received", "client"), ("sent", "server")):
            crossed = report.bytes(sender=sender, phase=ONLINE)
            assert numbers.value("unseen_payload_bytes_total", phase="online", direction=direction) == crossed
        assert numbers.value("unseen_key_files_bytes") == uploaded(session)
        assert numbers.value("unseen_message_bytes_total", method="Ckks/Upload", direction="received") > 0


# health


def asked(address: str, service: str = "", path: str = "Check") -> Any:
    """What a standard probe gets: its messages carry no sums."""
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)


def test_a_standard_probe_asks_for_the_health(running: Running) -> None:
    serving = health_pb2.HealthCheckResponse.SERVING
    for service in ("", "unseen.v3.Inference", "unseen.v3.Model"):
        assert asked(running.server.address, service).status == serving
    assert asked(running.dealer.address, "unseen.v3.Dealer").status == serving
    with pytest.raises(grpc.RpcError) as unknown:
        asked(running.dealer.address, "unseen.v3.Inference")
    assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    with (
        grpc.insecure_channel(running.server.address) as channel,
        pytest.raises(grpc.RpcError) as watched,
    ):
        next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10))
    assert watched.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert fetched(where(running.server), "/healthz") == "serving\n"


def test_a_service_that_goes_away_is_not_healthy() -> None:
    with deployments.serve(role=DEALER, deployment=TwoParty(), metrics="0") as dealer:
        dealer._draining.begin()
        assert asked(dealer.address).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(urllib.error.HTTPError, match="503") as refused:
            fetched(where(dealer), "/healthz")
        assert refused.value.read() == b"draining\n"
        assert Scraped.of(dealer).value("unseen_draining") == 1
        address = where(dealer)
    with pytest.raises(urllib.error.URLError):
        fetched(address)


def test_under_tls_a_probe_shows_any_certificate(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "pki")
    directories = {role: authority.issue(role, role) for role in (DEALER, CLIENT)}
    network = Tls(directories[DEALER])
    with deployments.serve(role=DEALER, deployment=TwoParty(), network=network, metrics="0") as dealer:
        ca, key, certificate = ((directories[CLIENT] / name).read_bytes() for name in ("ca.pem", "key.pem", "cert.pem"))
        name = network.credentials.certificate.dns[0]
        for given, works in (((ca, key, certificate), True), ((ca,), False)):
            channel = grpc.secure_channel(
                dealer.address, grpc.ssl_channel_credentials(*given), [("grpc.ssl_target_name_override", name)]
            )
            with channel, nullcontext() if works else pytest.raises(grpc.RpcError):
                reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
        numbers = Scraped.of(dealer)
        ends = numbers.value("unseen_certificate_ends_timestamp_seconds", certificate="own")
        assert ends == network.credentials.certificate.ends.timestamp() > time.time()
        assert numbers.value("unseen_certificate_ends_timestamp_seconds", certificate="authority") > ends
        assert fetched(where(dealer), "/healthz") == "serving\n"


# the port


@pytest.mark.parametrize(
    ("text", "at"), [("9464", "127.0.0.1:9464"), ("0.0.0.0:1", "0.0.0.0:1"), ("[::1]:2", "[::1]:2")]
)
def test_a_port_alone_stays_on_this_machine(text: str, at: str) -> None:
    assert str(port.parse(text)) == at


def test_a_port_that_cannot_be_used() -> None:
    with pytest.raises(EndpointError, match="--metrics: 'nowhere' is not host:port"):
        deployments.serve(role=DEALER, deployment=TwoParty(), metrics="nowhere")
    with deployments.serve(role=DEALER, deployment=TwoParty(), metrics="0") as dealer:
        taken = where(dealer)
        with pytest.raises(EndpointError, match="cannot be used; it may be in use"):
            deployments.serve(role=DEALER, deployment=TwoParty(), metrics=taken)
        with TelemetryPort(Endpoint.parse(taken, what="x"), {}, ports=3) as other:  # another process of one role
            assert 0 < int(other.address.split(":")[1]) - int(taken.split(":")[1]) < 3


def test_it_takes_nothing_in(running: Running) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        fetched(where(running.server), "/etc/passwd")
    with pytest.raises(urllib.error.HTTPError, match=r"405|501"):
        urllib.request.urlopen(f"http://{where(running.server)}/metrics", data=b"x", timeout=10)


def test_a_slow_reader_costs_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port, "SECONDS", 0.3)
    with TelemetryPort(Endpoint("127.0.0.1", 0), {"/metrics": port.page("200 OK", "x")}) as listening:
        host, _, number = listening.address.partition(":")
        silent = [socket.create_connection((host, int(number)), timeout=10) for _ in range(port.PLACES)]
        assert all(each.recv(1) == b"" for each in silent)  # cut
        for each in silent:
            each.close()
        assert fetched(listening.address) == "x"


def test_silent_connections_keep_no_probe_out() -> None:
    with TelemetryPort(Endpoint("127.0.0.1", 0), {"/healthz": port.page("200 OK", "x")}) as listening:
        host, _, number = listening.address.partition(":")
        silent = [socket.create_connection((host, int(number)), timeout=10) for _ in range(port.PLACES)]
        for _ in range(2):
            assert fetched(listening.address, "/healthz") == "x"
            silent.append(socket.create_connection((host, int(number)), timeout=10))
        assert ended(silent[0])  # the oldest was cut
    assert ended(silent[-1])  # nor does any outlive the port
    for each in silent:
        each.close()


def ended(connection: socket.socket) -> bool:
    """Tell whether the other end closes a connection, whatever it had still to read, and does not keep it open."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_connection_without_a_thread_takes_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with TelemetryPort(Endpoint("127.0.0.1", 0), {"/healthz": port.page("200 OK", "x")}) as listening:
        host, _, number = listening.address.partition(":")
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", none)
            for _ in range(port.PLACES + 1):
                with socket.create_connection((host, int(number)), timeout=10) as refused:
                    assert refused.recv(1) == b""
        assert not listening._server._open
        assert fetched(listening.address, "/healthz") == "x"


def status(address: str, named: str | None) -> int:
    """How /metrics answers whoever asks for a machine of this name; None: for none."""
    host, _, number = address.partition(":")
    with socket.create_connection(("127.0.0.1" if host == "0.0.0.0" else host, int(number)), timeout=10) as asked:
        said = "" if named is None else f"Host: {named}\r\n"
        asked.sendall(f"GET /metrics HTTP/1.0\r\n{said}\r\n".encode())
        return int(asked.makefile().readline().split()[1])


def test_another_name_that_leads_to_the_loopback_reads_nothing() -> None:
    pages = {"/metrics": port.page("200 OK", "x")}
    with TelemetryPort(Endpoint("127.0.0.1", 0), pages) as own:
        for wrong in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
            assert status(own.address, wrong) == 421
        for right in ("localhost", "LOCALHOST:1", "127.0.0.1:9464", "[::1]:1", None):
            assert status(own.address, right) == 200
    with TelemetryPort(Endpoint("0.0.0.0", 0), pages) as reached:
        assert status(reached.address, "server.example") == 200


# refusals


def test_refusals_are_counted_by_their_codes(model: Ready, tmp_path: Path) -> None:
    with two(model, quotas=Limits.read({"queries": 1}, "here"), state=tmp_path) as made:
        made.session.embed([TEXT])
        with pytest.raises(QuotaError):
            made.session.embed([TEXT])
        ended = {"method": "Inference/Session", "code": "quota"}
        numbers = Scraped.when(made.server, 1, "unseen_calls_total", **ended)
        assert numbers.value("unseen_refusals_total", reason="quota") == 1
        peer = Peer("the dealer", made.dealer.address, Plaintext(), role=DEALER, start="x")
        with pytest.raises(Error), peer.calling():
            DealerStub(peer.channel).Close(pb.CloseRequest(session=bytes(16)))
        peer.close()
        Scraped.when(made.dealer, 1, "unseen_refusals_total", reason=Error.code)


def test_methods_of_others_are_no_labels(running: Running) -> None:
    """Callers of unseen's other versions are answered, whatever the method that they name."""
    with grpc.insecure_channel(running.dealer.address) as channel:
        for number in range(50):
            called: Any = channel.unary_unary(f"/unseen.v2.Dealer/Invented{number}")
            with pytest.raises(grpc.RpcError, match="update the caller"):
                called(b"", timeout=10)
    found = Scraped.when(running.dealer, 50, "unseen_calls_total", method="other")
    assert "Invented" not in found.text


def test_codes_of_others_are_no_labels() -> None:
    made = RoleMetrics("two-party", SERVER)
    made.refused("quota")
    made.refused("x" * 1000)
    text = generate_latest(made.registry).decode()
    assert 'unseen_refusals_total{reason="quota"} 1.0' in text
    assert 'unseen_refusals_total{reason="other"} 1.0' in text
    assert "xxx" not in text


def test_a_listener_that_fails_fails_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Listener):
        def refused(self, code: str) -> None:
            raise ValueError("secret")

    made = RoleMetrics("two-party", SERVER)
    Events(Broken(), made).refused("busy")
    assert "an event was not counted: ValueError" in caplog.text
    assert 'reason="busy"} 1.0' in generate_latest(made.registry).decode()


# names


def test_a_query_has_one_name_everywhere() -> None:
    label = session_label(bytes(16))
    names = {query_id(label, number) for number in range(100)} | {query_id(session_label(bytes(15) + b"1"), 0)}
    assert len(names) == 101
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in names)


# commands


def test_commands_say_everything_in_json(run: Run) -> None:
    with deployments.serve(role=DEALER, deployment=TwoParty(), metrics="0") as other:
        taken = where(other)
        ended = run("dealer", "--listen", "127.0.0.1:0", "--metrics", taken, "--log-format", "json")
    assert ended.code == 1
    *lines, last = [json.loads(line) for line in ended.err.splitlines()]
    assert all({"time", "level", "logger", "message"} == set(line) for line in (*lines, last))
    assert f"--metrics: the address {taken} cannot be used" in "".join(line["message"] for line in (*lines, last))


def test_check_tries_the_port_of_the_numbers(run: Run) -> None:
    checked = run("check", "dealer", "--listen", "127.0.0.1:0", "--metrics", "0", "--otlp", "http://127.0.0.1:1/x")
    assert "the numbers' port 0: free, on this machine alone" in checked.out.replace("\n", " ")
    with deployments.serve(role=DEALER, deployment=TwoParty(), metrics="0") as other:
        checked = run("check", "dealer", "--listen", "127.0.0.1:0", "--metrics", where(other))
    assert checked.code == 1
    assert "cannot be used; it may be in use" in checked.out


def test_lines_for_people_and_for_machines() -> None:
    record = logging.LogRecord("unseen.server", logging.INFO, "x.py", 1, "query %d answered", (3,), None)
    for name, value in tagged(query="0123456789abcdef", session="").items():
        setattr(record, name, value)
    assert TextLines().format(record).endswith(" INFO unseen.server query 3 answered [query 0123456789abcdef]")
    line = json.loads(JsonLines().format(record))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO",
        "logger": "unseen.server",
        "message": "query 3 answered",
        "query": "0123456789abcdef",
    }


# spans


def test_the_spans_of_both_sides_are_in_one_trace(running: Running) -> None:
    kept, listening = {role: InMemorySpanExporter() for role in (SERVER, DEALER)}, list[Spans]()
    for role, service in ((SERVER, running.server), (DEALER, running.dealer)):
        assert service._telemetry is not None
        listening.append(Spans("two-party", role, kept[role]))
        service._telemetry.events.tell(listening[-1])
    running.session.embed([TEXT])
    report = running.session.reports[-1]

    def exported() -> list[Any]:
        for each in listening:
            each._waiting.force_flush()
        return [span for exporter in kept.values() for span in exporter.get_finished_spans()]

    wait_until(lambda: any(span.name == ONLINE for span in exported()), "the query's span")
    spans = exported()
    for each in listening:
        each.close()
    query = [span for span in spans if span.name == ONLINE and span.attributes["unseen.query"] == report.id]
    assert len(query) == 1
    (whole,) = query
    trace = whole.context.trace_id
    assert whole.attributes["unseen.rounds"] == report.rounds
    of_it = [span for span in spans if span.context.trace_id == trace]
    assert {span.name for span in of_it} >= {ONLINE, "round", "compute"}
    rounds = [span for span in of_it if span.name == "round"]
    assert len(rounds) == report.rounds
    for key, sender in (("unseen.received", "client"), ("unseen.sent", "server")):
        assert sum(span.attributes[key] for span in rounds) == report.bytes(sender=sender, phase=ONLINE)
    for span in of_it:
        inside = span.parent == whole.context and whole.start_time <= span.start_time <= span.end_time
        assert span is whole or span.name == OFFLINE or (inside and span.end_time <= whole.end_time + 1000)
    assert len({span.context.span_id for span in spans}) == len(spans)
    assert not any(word in span.to_json() for span in spans for word in WORDS)


def test_spans_cross_http(running: Running) -> None:
    """A collector gets them as OTLP; a real one is not needed to read it."""
    came = list[bytes]()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever, daemon=True)
        thread.start()
        made = Telemetry("two-party", SERVER, otlp=f"http://127.0.0.1:{collector.server_port}/v1/traces")
        made.events.ended(PhaseEnded(ONLINE, 0.5, "0123456789abcdef", 3, 10, 20))
        made.close()
        collector.shutdown()
        thread.join()
    found = ExportTraceServiceRequest.FromString(came[0] if came[0][:2] != b"\x1f\x8b" else gzip.decompress(came[0]))
    (span,) = found.resource_spans[0].scope_spans[0].spans
    assert span.name == ONLINE
    assert span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(0.5e9, rel=1e-3)


def test_a_collector_that_is_no_url() -> None:
    for wrong in ("127.0.0.1:4318", "ftp://here/", "http://", "http://[::1", "http://here:x/"):
        with pytest.raises(InvalidInput, match=r"--otlp: this is no URL of HTTP"):
            Telemetry("two-party", SERVER, otlp=wrong)


@pytest.mark.parametrize(
    "url", ["https://me:hidden@here/", "https://hidden@here/", "me:hidden@here", "https://me:hidden@[::1"]
)
def test_a_password_in_a_url_is_shown_to_nobody(url: str, run: Run) -> None:
    with pytest.raises(InvalidInput) as caught:
        Telemetry("two-party", SERVER, otlp=url)
    assert "hidden" not in str(caught.value)
    assert "OTEL_EXPORTER_OTLP_HEADERS" in str(caught.value) or "no URL" in str(caught.value)
    checked = run("check", "dealer", "--listen", "127.0.0.1:0", "--otlp", url)
    assert checked.code == 1
    assert "hidden" not in checked.out + checked.err


def test_a_collector_that_hangs_holds_no_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "LAST", 0.3)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")  # so that its thread does not outlast this test by much
    with socket.create_server(("127.0.0.1", 0)) as silent:
        made = Telemetry("two-party", SERVER, otlp=f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces")
        made.events.ended(PhaseEnded(ONLINE, 0.5, "0123456789abcdef", 3, 10, 20))
        began = time.monotonic()
        made.close()
        assert 0.2 < time.monotonic() - began < 3


# logs, and what is in all that is emitted


class Emitted(logging.Handler):
    """Every line of every logger at level DEBUG, in both forms, as commands write them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.json, self.text = list[str](), list[str]()
        self._forms = JsonLines(), TextLines()

    def emit(self, record: logging.LogRecord) -> None:
        for lines, form in zip((self.json, self.text), self._forms, strict=True):
            lines.append(form.format(record))

    def __enter__(self) -> Emitted:
        root = logging.getLogger()
        self._level = root.level
        root.addHandler(self)
        root.setLevel(logging.DEBUG)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)
        logging.getLogger().setLevel(self._level)

    @property
    def documents(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.json]


@dataclass
class Secrets:
    """What must not be emitted: all that the parties drew, every key, and every message that crossed."""

    found: set[bytes] = field(default_factory=set)

    @classmethod
    @contextmanager
    def kept(cls) -> Iterator[Secrets]:
        self = cls()
        drawn, made, put = secrets.token_bytes, Key.__init__, MethodSums.put

        def keep(data: bytes) -> bytes:
            self.found.add(bytes(data))
            return data

        def sent(sums: MethodSums, data: bytes) -> bytes:
            pieces = (data[at : at + 32] for at in range(0, min(len(data), 4096), 32))  # of long ones their beginning
            for piece in pieces:
                if not all(32 <= byte < 127 for byte in piece):  # text is public: Programs, digests, errors
                    keep(piece)
            return put(sums, data)

        def new(key: Key, value: bytes) -> None:
            keep(value)
            made(key, value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(secrets, "token_bytes", lambda *size: keep(drawn(*size)))
            patch.setattr(Key, "__init__", new)
            patch.setattr(MethodSums, "put", sent)
            yield self

    def shown_in(self, text: str) -> list[str]:
        """The forms of secrets that stand in a text."""
        forms = (
            bytes.hex,
            lambda data: base64.b64encode(data).decode().rstrip("=")[:-1],
            lambda data: repr(data)[2:-1],
            lambda data: str(list(data))[1:-1],
        )
        return [
            form(data)
            for data in self.found
            if len(data) >= 8 and len(set(data)) > 3
            for form in forms
            if form(data) in text
        ]


LONG = re.compile(r"(?<![0-9a-zA-Z+/_-])(?=[0-9a-zA-Z+/_-]*[0-9])[0-9a-zA-Z+/_-]{16,}")
"""Words with digits of such a length that a seed or a key could be one."""


NUMBER = re.compile(r"(?<![0-9a-zA-Z])[0-9]+\.[0-9]+(e[+-]?[0-9]+)?|[0-9]{4}-[0-9]{2}-[0-9]{2}T")
KNOWN = ("unseen_", "/tmp/")


def check(emitted: str, secret: Secrets, public: set[str]) -> None:
    """Nothing secret is in what was emitted, and no long word but public names and file names."""
    assert len(secret.found) > 50
    assert secret.shown_in(emitted) == []
    words = {word for word in LONG.findall(NUMBER.sub("", emitted)) if not word.startswith(KNOWN)}
    assert words <= public
    assert "tensor(" not in emitted
    assert not any(word in emitted for word in WORDS)


def test_nothing_secret_is_emitted_by_two_parties(model: Ready, tmp_path: Path) -> None:
    quotas = Limits.read({"queries": 2}, "here")
    traces, given = tmp_path / "traces", {"quotas": quotas, "state": tmp_path}
    kept, listening = InMemorySpanExporter(), list[Spans]()
    with Secrets.kept() as secret, Emitted() as emitted, two(model, traces=traces, **given) as made:
        for service in (made.server, made.dealer):
            assert service._telemetry is not None
            listening.append(Spans("two-party", "a role", kept))
            service._telemetry.events.tell(listening[-1])
        made.session.embed([TEXT, TEXT])
        label: str = made.session.link.session_label
        with pytest.raises(QuotaError):
            made.session.embed([TEXT])
        told = [Scraped.of(made.server).text, Scraped.of(made.dealer).text]
        ids = [report.id for report in made.session.reports]
    written = [path.read_text() for path in traces.iterdir()]
    assert len(written) == 2
    answered = [each for each in emitted.documents if "answered in" in each["message"]]
    assert [each["query"] for each in answered] == ids
    dealt = [each["query"] for each in emitted.documents if each["message"].startswith("dealt query")]
    assert set(ids) <= set(dealt)
    (ended,) = (each for each in emitted.documents if "quota" in each["message"] and "session" in each)
    assert ended["session"] == label
    assert any(line.endswith(f"[query {ids[0]}]") for line in emitted.text)
    for each in listening:
        each._waiting.force_flush()
    spans = kept.get_finished_spans()
    for each in listening:
        each.close()
    assert len(spans) > 20
    whole = "\n".join([*emitted.json, *emitted.text, *told, *written, *(span.to_json() for span in spans)])
    contexts = [span.context for span in spans if span.context is not None]
    of_spans = {f"0x{one.trace_id:032x}" for one in contexts} | {f"0x{one.span_id:016x}" for one in contexts}
    names = {model.program.digest, model.weights_digest, label, *dealt, *of_spans}
    digests = {name[:12] for name in names}
    check(whole, secret, names | digests | {f"{label}-{number}" for number in range(3)})


def test_nothing_secret_is_emitted_by_three_parties(three: list[Service]) -> None:
    with Secrets.kept() as secret, Emitted() as emitted:
        addresses = tuple(each.address for each in three)
        with secure.connect(ThreeParty(parties=addresses), cache=False) as session:
            session.embed([TEXT, TEXT])
            ids = [report.id for report in session.reports]
    answered = [each["query"] for each in emitted.documents if each["message"].startswith("a query answered")]
    assert sorted(answered) == sorted([*ids, *ids])  # at parties 0 and 1
    check("\n".join([*emitted.json, *(Scraped.of(each).text for each in three)]), secret, {*ids})


def test_nothing_secret_is_emitted_by_the_server_of_ciphertexts(ciphertexts: Service) -> None:
    with Secrets.kept() as secret, Emitted() as emitted, dial(ciphertexts.address) as session:
        session.query(inputs("tiny"))
        session.query(inputs("tiny"))
        told, ids = Scraped.of(ciphertexts).text, [report.id for report in session.reports]
    answered = [each["query"] for each in emitted.documents if "answered in" in each["message"]]
    assert answered == ids
    assert ids[0] != ids[1]  # of one input
    check("\n".join([*emitted.json, told]), secret, {*ids})


def test_a_planted_secret_is_found() -> None:
    secret = Secrets({bytes(range(40, 72))})
    for shown in (bytes.hex, repr, list, lambda data: base64.b64encode(data).decode()):
        assert secret.shown_in(f"a line with {shown(bytes(range(40, 72)))}")
    assert not secret.shown_in("a line with nothing")
    many = Secrets({secrets.token_bytes(16) for _ in range(60)})
    check("query 0 answered in 0.07132874562398742 s by 0123456789abcdef", many, {"0123456789abcdef"})
    with pytest.raises(AssertionError, match="0123456789abcdef"):
        check("a seed 0123456789abcdef that nobody recorded", many, set())
    with pytest.raises(AssertionError):
        check(f"an input, {WORDS[5]}", many, set())


# documentation, and the files for Grafana and Prometheus

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "examples" / "deploy"
OWN = re.compile(r"\bunseen_[a-z_]+\b")
COUNTERS = {"unseen_queries", "unseen_rounds", "unseen_payload_bytes", "unseen_refusals", "unseen_calls"}
COUNTERS |= {"unseen_call_seconds", "unseen_message_bytes"}


def told_names() -> set[str]:
    """The numbers that the code tells, as Prometheus names them."""
    code = [path.read_text() for path in (ROOT / "parties").rglob("*.py") if "proxy" not in path.parts]
    found = {name for text in code for name in re.findall(r'"(unseen_[a-z_]+[a-z])"', text)}
    assert found >= COUNTERS
    return {f"{name}_total" if name in COUNTERS else name for name in found}


def test_every_number_is_documented_and_every_documented_one_is_told() -> None:
    table = (ROOT / "docs" / "operations.md").read_text().partition("## Numbers, health")[2].partition("**Health.**")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in OWN.findall(row)} == told_names()


@pytest.mark.parametrize("file", ["grafana.json", "prometheus/alerts.yml"])
def test_files_ask_for_numbers_that_are_told(file: str) -> None:
    text = (DEPLOY / file).read_text()
    asked_for = set(OWN.findall(text)) - {"unseen_phase_seconds_bucket"}
    assert len(asked_for) > 3
    assert asked_for <= told_names()


def expressions() -> list[str]:
    """What the dashboard asks Prometheus, for all roles and the last minute."""
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [each.replace("$__rate_interval", "1m").replace("$job", ".*") for each in found]


def test_the_dashboard_is_in_grafanas_form() -> None:
    document = json.loads((DEPLOY / "grafana.json").read_text())
    numbers = [panel["id"] for panel in document["panels"]]
    assert len(set(numbers)) == len(numbers) > 10
    cells = set[tuple[int, int]]()
    for panel in document["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own
        assert panel["type"] == "row" or (panel["description"] and panel["targets"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus (Debian: apt-get install prometheus)")
def test_a_real_prometheus_reads_them(running: Running, tmp_path: Path) -> None:
    jobs = {"server": running.server, "dealer": running.dealer}
    config = {
        "global": {"scrape_interval": "1s"},
        "rule_files": [str(DEPLOY / "prometheus" / "alerts.yml")],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [where(service)]}]} for job, service in jobs.items()
        ],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # which is YAML too
    with socket.create_server(("127.0.0.1", 0)) as probe:
        at = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    process = subprocess.Popen([*command, f"--web.listen-address={at}"], stderr=subprocess.DEVNULL)

    def ask(expression: str) -> list[Any]:
        try:
            text = fetched(at, "/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        except urllib.error.HTTPError as error:
            if error.code == 503:
                return []  # it starts
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        except urllib.error.URLError:
            return []
        found: list[Any] = json.loads(text)["data"]["result"]
        return found

    try:
        wait_until(lambda: len(ask("unseen_info")) == 2, "both roles are read", 30)
        running.session.embed([TEXT, TEXT])
        wait_until(lambda: bool(ask('rate(unseen_queries_total{job="server"}[1m]) > 0')), "queries are seen", 30)
        answers = {expression: ask(expression) for expression in expressions()}
        # nobody keeps a store here, shows certificates, refuses anything or is away
        empty = ("unseen_stored_queries", "unseen_queries_ahead", "unseen_certificate", "unseen_refusals", "up{")
        for expression, answer in answers.items():
            assert answer or any(name in expression for name in empty), expression
        rules = json.loads(fetched(at, "/api/v1/rules"))["data"]["groups"][0]["rules"]
        assert len(rules) == 7
        assert all(rule["health"] in ("ok", "unknown") for rule in rules)
        if promtool := shutil.which("promtool"):
            text = Scraped.of(running.server).text.encode()
            linted = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
            complaints = [line for line in linted.stderr.decode().splitlines() if "process_" not in line]
            assert complaints == []
    finally:
        process.terminate()
        process.wait()
