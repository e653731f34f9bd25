"""One behaviour of a session, in every deployment and with all parties in this process."""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tokenizers")

import secure
from secure.cost.traffic import PHASES
from secure.deployments.deployment import Deployment, deployments
from secure.errors import EmptyInput, Error, InputTooLong, InvalidInput, InvalidProgram, PeerLost
from secure.models.text import text_inputs
from secure.tasks.embed import Embed
from tests.hosts import HOSTS, TinyText, compiled_tiny
from tests.relay import DIRECTIONS, Relay
from tests.tiny import LENGTH, TEXT, WORDS, sentences

DEADLINE = 2.0
KEYS = {
    "rounds",
    "traffic",
    "online_seconds",
    "offline_seconds",
    "client_seconds",
    "dealer_seconds",
    "query",
    "length",
    "id",
}


class Running:
    """A deployment to connect to, or all its parties in this process (``relays`` is empty then)."""

    def __init__(self, compiled: secure.Compiled, deployment: Deployment | None, relays: dict[str, Relay]) -> None:
        self.compiled, self.relays, self.deployment = compiled, relays, deployment

    @contextmanager
    def session(self, **options: Any) -> Iterator[secure.Session]:
        if self.deployment is None:
            with secure.insecure_in_process(self.compiled, **options) as session:
                yield session
            return
        with secure.connect(self.deployment, **{"cache": False, "deadline": 20.0, "pace": 0.0, **options}) as session:
            yield session

    def expected(self, text: str) -> Tensor:
        assert self.compiled.tokenizer is not None
        with torch.no_grad():
            answer: Tensor = TinyText().eval()(**text_inputs(self.compiled.tokenizer, text, LENGTH))[0]
        return answer.double()


FORMS = [(kind, hosted) for kind in HOSTS for hosted in (True, False)]


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: f"{form[0].name}{'' if form[1] else ', in process'}")
def running(
    request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    kind, hosted = request.param
    compiled = compiled_tiny(directory, kind())
    with ExitStack() as stack:
        if not hosted:
            yield Running(compiled, None, {})
        else:
            yield Running(compiled, *HOSTS[kind](stack, compiled, tmp_path_factory.mktemp("state")))


@pytest.fixture
def hosted(running: Running) -> Running:
    """The same, where there are parties to connect to."""
    if not running.relays:
        pytest.skip("all parties are this process")
    return running


def test_every_deployment_is_here() -> None:
    assert set(HOSTS) == {found for found in deployments() if found.__module__.startswith("secure.")}


# the behaviour


def test_a_list_in_a_list_out(running: Running) -> None:
    texts = sentences(2)
    with running.session() as session:
        answers = session.embed(texts)
        assert isinstance(answers, list)
        for text, answer in zip(texts, answers, strict=True):
            assert (answer.dtype, answer.shape) == (torch.float64, (4,))
            torch.testing.assert_close(answer, running.expected(text), atol=2e-2, rtol=0)
        assert session.embed([]) == []
        inputs = text_inputs(running.compiled.tokenizer, texts[0], LENGTH)  # type: ignore[arg-type]
        assert session.query(inputs).dtype == torch.float64
        assert len(session.reports) == 3
        assert (session.length, session.deployment) == (LENGTH, running.compiled.deployment.name)
        assert session.program.digest == running.compiled.program.digest


def test_reports_have_the_same_keys_and_what_was_predicted(running: Running) -> None:
    with running.session() as session:
        session.embed([TEXT])
        (report,) = session.reports
    as_json = json.loads(json.dumps(report.as_dict()))
    assert set(as_json) == KEYS
    assert {key for link in as_json["traffic"] for key in link} == {"sender", "receiver", "phase", "bytes"}
    assert report.online_seconds > 0
    assert 0 < report.client_seconds <= report.online_seconds + report.offline_seconds
    roles = {role.name for role in running.compiled.deployment.roles()}
    for link in (*report.traffic, *session.once):
        assert {link.sender, link.receiver} <= roles
        assert link.phase in PHASES
    cost = running.compiled.cost
    assert report.rounds == cost.rounds
    for link in cost.traffic:
        if link.phase != "once":
            measured = report.bytes(sender=link.sender, receiver=link.receiver, phase=link.phase)
            assert measured == pytest.approx(link.bytes, rel=0.2), link  # ciphertexts are compressed


def test_a_byte_that_changes_is_noticed(hosted: Running) -> None:
    """No answer is another one: there is an error instead, unless the byte was none of a message, nor of its frame."""
    chance, errors, tried = random.Random(7), list[secure.Error](), 0
    with hosted.session(deadline=DEADLINE) as session:
        passed = {relay: dict(relay.passed) for relay in hosted.relays.values()}
        session.embed([TEXT])
    sizes = {relay: {way: relay.passed[way] - passed[relay][way] for way in DIRECTIONS} for relay in passed}
    for relay, way in itertools.product(sizes, DIRECTIONS):
        for flips in (1, 128):
            try:
                with hosted.session(deadline=DEADLINE) as session:
                    relay.damage(way, chance.randrange(max(1, sizes[relay][way])), flips)
                    answer = session.embed([TEXT])[0]
            except secure.Error as error:
                errors.append(error)
            else:
                torch.testing.assert_close(answer, hosted.expected(TEXT), atol=2e-2, rtol=0)
            tried += relay.damaged
            relay.heal()
            relay.cut()  # both ends may wait for bytes that a frame of HTTP/2 has announced, until pings find out
    assert tried
    assert errors
    assert any(isinstance(error, secure.ChangedOnTheWay) for error in errors)


def in_a_fork(work: Callable[[], Any], tries: int = 3) -> str:
    """Do something in a forked child; return the error that it raised there, or "" if it did not.

    gRPC's own threads may be anywhere when a process forks; of such a child that ends by a signal there is another.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python, about threads
        pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as said:
        found = said.read().decode()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and tries > 1:
        return in_a_fork(work, tries - 1)
    return found


def test_a_forked_child_is_told_so(hosted: Running) -> None:
    """It would wait for ever, and what was prepared would be used twice."""
    with hosted.session() as session:
        session.embed([TEXT])
        session.prepare()
        for ask in (lambda: session.embed([TEXT]), session.prepare, lambda: next(session.stream(Embed(), [TEXT]))):
            assert "QueryError: this session belongs to process" in in_a_fork(ask)
        assert in_a_fork(session.close) == ""
        assert hosted.deployment is not None
        made = partial(secure.connect, hosted.deployment, cache=False)
        assert "EndpointError" in (said := in_a_fork(made))
        assert "it was forked from one that had connected before" in said
        torch.testing.assert_close(session.embed([TEXT])[0], hosted.expected(TEXT), atol=2e-2, rtol=0)


def spied(session: secure.Session, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, dict[str, Any]]]:
    """When each query of a session was asked, and the shapes of its values."""
    ask, seen = session.link.ask, list[tuple[float, dict[str, Any]]]()

    def spying(values: Any, number: int, **options: Any) -> Any:
        assert number == len(seen)
        seen.append((time.monotonic(), {name: (value.shape, value.dtype) for name, value in values.items()}))
        return ask(values, number, **options)

    monkeypatch.setattr(session.link, "ask", spying)
    return seen


def test_a_text_that_cannot_be_used_is_a_query_like_others(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server chooses the tokenizer, so whether a text can be used is a secret of the text."""
    long, half = " ".join(WORDS[:LENGTH]), "half a \ud83d"
    with running.session() as session:
        seen = spied(session, monkeypatch)
        session.embed([TEXT])
        for texts, error, message in (
            ([TEXT, long, TEXT], InputTooLong, f"^text 2 of 3: the text has .*the limit is {LENGTH}"),
            ([long, " ", TEXT], InputTooLong, "^text 1 of 3: the text has"),
            ([TEXT, "  "], EmptyInput, "^text 2 of 2: the text is empty"),
            ([" "], EmptyInput, r"^the text is empty"),
            (["x" * 2049], InputTooLong, "the text has 2049 characters, the limit is 2048"),
            ([half], InvalidInput, "half a surrogate pair"),
        ):
            before, answers = len(seen), list[Tensor]()
            with pytest.raises(error, match=message):
                answers.extend(session.run(Embed(), texts))
            assert len(seen) == len(session.reports) == before + len(texts)
        ids = torch.full((1, LENGTH), 10**6)
        before = len(seen)
        with pytest.raises(InvalidInput, match=r"^a token id"):
            session.query({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert len(seen) == before + 1
        assert all(shapes == seen[0][1] for _, shapes in seen)
        first, *others = session.reports
        for report in others:
            assert report.rounds == first.rounds
            for one, other in zip(first.traffic, report.traffic, strict=True):
                assert (one.sender, one.receiver, one.phase) == (other.sender, other.receiver, other.phase)
                if one.sender == "client":
                    assert one.bytes == other.bytes
                assert one.bytes == pytest.approx(other.bytes, rel=5e-3, abs=32)  # parties report their own times
        torch.testing.assert_close(session.embed([TEXT])[0], running.expected(TEXT), atol=2e-2, rtol=0)


def test_answers_before_a_text_that_cannot_be_used(running: Running) -> None:
    with running.session() as session:
        coming, answers = session.run(Embed(), [TEXT, TEXT, " ", TEXT]), list[Tensor]()
        with pytest.raises(EmptyInput, match="text 3 of 4"):
            answers.extend(coming)
        assert (len(answers), len(session.reports)) == (2, 4)
        torch.testing.assert_close(answers[1], running.expected(TEXT), atol=2e-2, rtol=0)


def test_the_first_message_leaves_at_a_time_of_its_own(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a slow tokenizer nor a slow graph moves it, unless it takes longer than the pace: then to twice that."""
    pace, room, work = 0.4, 0.35, list[float]()
    with running.session(pace=pace) as session:
        seen = spied(session, monkeypatch)
        clear_values = type(session.program).clear_values

        def slow(program: Any, inputs: Any, tables: Any) -> Any:
            time.sleep(work.pop())
            return clear_values(program, inputs, tables)

        monkeypatch.setattr(type(session.program), "clear_values", slow)
        for texts, seconds, leaves in (
            ([TEXT], [0.0], pace),
            ([TEXT], [0.2], pace),
            ([" ", TEXT], [0.2], pace),
            ([TEXT, TEXT], [0.3, 0.3], 2 * pace),
        ):
            work[:], before, start = seconds, len(seen), time.monotonic()
            with suppress(EmptyInput):
                session.embed(texts)
            assert leaves <= seen[before][0] - start < leaves + room
        work[:], before, start = [0.2], len(seen), time.monotonic()
        session.query(text_inputs(running.compiled.tokenizer, TEXT, LENGTH))  # type: ignore[arg-type]
        assert pace <= seen[before][0] - start < pace + room


def test_a_program_that_fails_on_an_input_says_no_value(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with running.session() as session:
        seen = spied(session, monkeypatch)

        def failing(program: Any, inputs: Any, tables: Any) -> Any:
            raise IndexError("index 4711 is out of bounds")

        monkeypatch.setattr(type(session.program), "clear_values", failing)
        with pytest.raises(InvalidProgram, match="the server's Program fails on this input: IndexError") as caught:
            session.embed([TEXT])
        assert "4711" not in str(caught.value)
        assert len(seen) == 1


@pytest.mark.parametrize("pace", [-1.0, float("nan"), float("inf")])
def test_a_pace_that_is_none(pace: float) -> None:
    with pytest.raises(InvalidInput, match=r"a pace of .* seconds\nhint: 0 or more"):
        secure.connect(secure.TwoParty(), pace=pace)


def test_mistakes_that_no_server_has_a_part_in_ask_nothing(running: Running) -> None:
    with running.session() as session:
        with pytest.raises(InvalidInput, match="embed takes a list of texts"):
            session.embed(TEXT)
        ones = torch.ones((1, LENGTH), dtype=torch.int64)
        with pytest.raises(InvalidInput, match="the model has no input 'extra'\nhint: its inputs are"):
            session.query({"input_ids": ones, "attention_mask": ones, "extra": ones})
        with pytest.raises(InvalidInput, match="not a mapping from parameter names to tensors"):
            session.query(ones)  # type: ignore[arg-type]
        with pytest.raises(InvalidInput, match="the input 'input_ids' is a list, not a tensor"):
            session.query({"input_ids": [1], "attention_mask": ones})  # type: ignore[dict-item]
        with pytest.raises(InvalidInput, match="the input 'attention_mask' is missing"):
            session.query({"input_ids": ones})
        with pytest.raises(InvalidInput, match=r"the input 'input_ids' is int \(1, 3\), the graph was made for int"):
            session.query({"input_ids": ones[:, :3], "attention_mask": ones})
        assert session.reports == []
        session.embed([TEXT])


def test_the_answers_before_a_failure(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with running.session() as session:
        ask = session.link.ask

        def failing(values: Any, number: int, **options: Any) -> Any:
            if number == 2:
                raise PeerLost("the test takes the peer away", "do not worry")
            return ask(values, number, **options)

        monkeypatch.setattr(session.link, "ask", failing)
        coming = session.run(Embed(), [TEXT] * 4)
        answers = [next(coming), next(coming)]
        with pytest.raises(PeerLost, match=r"text 3 of 4: the test takes the peer away\nhint: do not worry"):
            next(coming)
        assert len(answers) == len(session.reports) == 2


def test_one_query_at_a_time(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with running.session() as session:
        ask, inside, most = session.link.ask, list[int](), list[int]()

        def counting(values: Any, number: int, **options: Any) -> Any:
            inside.append(number)
            most.append(len(inside))
            try:
                return ask(values, number, **options)
            finally:
                inside.remove(number)

        monkeypatch.setattr(session.link, "ask", counting)
        threads = [threading.Thread(target=session.embed, args=([TEXT],)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == [1, 1, 1]
        assert sorted(report.query for report in session.reports) == [0, 1, 2]


def test_a_closed_session(running: Running) -> None:
    with running.session() as session:
        session.prepare()
    for use in (session.prepare, lambda: session.embed([TEXT])):
        with pytest.raises(PeerLost, match=r"this session has ended: it was closed\nhint: connect again"):
            use()
    session.close()  # again, without harm


def test_threads_are_given_back(running: Running) -> None:
    before = torch.get_num_threads()
    with running.session() as session:
        session.embed([TEXT])
    assert torch.get_num_threads() == before


def test_a_network_that_is_none() -> None:
    with pytest.raises(secure.InvalidInput, match="the network is 'directory'"):
        secure.connect(secure.TwoParty(), network="directory")


def test_a_pinned_program(hosted: Running) -> None:
    with hosted.session(program_digest=hosted.compiled.program.digest):
        pass
    with pytest.raises(secure.HandshakeError, match="Program digest"), hosted.session(program_digest="0" * 64):
        pass


def test_a_silent_party_ends_a_query_within_the_deadline(hosted: Running) -> None:
    for role, relay in hosted.relays.items():
        with hosted.session(deadline=DEADLINE) as session:
            session.embed([TEXT])
            relay.silence()
            start = time.monotonic()
            try:
                with pytest.raises(Error) as caught:
                    session.embed([TEXT])
                assert time.monotonic() - start < 2 * DEADLINE + 2, role
                assert type(caught.value) in (PeerLost, secure.DealerError), role
                assert "hint:" in str(caught.value)
            finally:
                relay.speak()
    with hosted.session() as session:  # the parties go on
        session.embed([TEXT])


def test_a_silent_party_ends_connecting_within_the_deadline(hosted: Running) -> None:
    for role, relay in hosted.relays.items():
        relay.silence()
        start = time.monotonic()
        try:
            with pytest.raises(Error), hosted.session(deadline=DEADLINE):
                pass
            assert time.monotonic() - start < 2 * DEADLINE + 2, role
        finally:
            relay.speak()
