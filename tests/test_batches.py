"""Batches and streams: one query for several inputs, in every deployment that takes them and with all in process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tokenizers")

import secure
from secure.deployments.compiled import build
from secure.deployments.deployment import CompileOptions
from secure.errors import EmptyInput, Error, HandshakeError, InputTooLong, InvalidInput, InvalidProgram, PeerLost
from secure.lowering.client_inputs import MAXIMUM_BATCH, check_client_part
from secure.models.served_tokenizer import load_tokenizer
from secure.models.text import text_inputs
from secure.tasks.embed import Embed
from secure.tasks.task import Loaded
from tests.hosts import HOSTS, TinyText
from tests.test_session import Running
from tests.tiny import LENGTH, TEXT, WORDS, sentences

BATCH = 3
LONG = " ".join(WORDS[:40])


def compiled_for(deployment: Callable[[], Any], directory: Path, batch: int = BATCH, seed: int = 0) -> secure.Compiled:
    tokenizer, raw = load_tokenizer(directory), (directory / "tokenizer.json").read_bytes()
    samples = [text_inputs(tokenizer, text, LENGTH) for text in sentences()]
    module = TinyText().eval()
    with torch.no_grad():
        module.last.weight += seed
    loaded = Loaded("tiny", module, samples, tokenizer, raw, LENGTH)
    return build(loaded, deployment(), CompileOptions(embedding="client-table"), {}, batches=(batch,))


FORMS = [(kind, hosted) for kind in HOSTS for hosted in (True, False)]


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: f"{form[0].name}{'' if form[1] else ', in process'}")
def running(
    request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    kind, hosted = request.param
    compiled = compiled_for(kind, directory)
    with ExitStack() as stack:
        if not hosted:
            yield Running(compiled, None, {})
        else:
            yield Running(compiled, *HOSTS[kind](stack, compiled, tmp_path_factory.mktemp("state")))


def close(running: Running, text: str, answer: Tensor | Error) -> None:
    assert isinstance(answer, Tensor)
    assert answer.shape == (4,)
    torch.testing.assert_close(answer, running.expected(text), atol=2e-2, rtol=0)


@pytest.mark.parametrize("texts", range(8))
def test_queries_are_filled_and_answers_keep_their_order(running: Running, texts: int) -> None:
    given = sentences(8)[:texts]
    with running.session() as session:
        assert session.batch == BATCH
        for text, answer in zip(given, session.embed(given), strict=True):
            close(running, text, answer)
        assert len(session.reports) == -(-texts // BATCH)


@pytest.mark.parametrize("bad", [{0}, {1}, {2}, {0, 1}, {0, 1, 2}, {3}, {1, 4}, {0, 1, 2, 3, 4}])
def test_an_error_stands_in_the_place_of_its_input_alone(running: Running, bad: set[int]) -> None:
    given = [LONG if i in bad else text for i, text in enumerate(sentences(8)[:5])]
    with running.session() as session:
        found = list(session.stream(Embed(), iter(given)))
        assert len(session.reports) == 2
        for i, (text, answer) in enumerate(zip(given, found, strict=True)):
            if i in bad:
                assert isinstance(answer, InputTooLong)
            else:
                close(running, text, answer)
        with pytest.raises(InputTooLong, match=rf"text {min(bad) + 1} of 5: the text has"):
            session.embed(given)


def test_an_input_that_only_the_graph_refuses_is_found_in_its_batch(running: Running) -> None:
    """The ids of a text are checked with those of the whole query; the error belongs to one of them."""

    class Given(Embed):
        def inputs(self, given: str, served: Any) -> Any:
            found = super().inputs(given, served)
            return found if given != "alien" else {**found, "input_ids": torch.full_like(found["input_ids"], 4000)}

    texts = sentences(3)
    with running.session() as session:
        first, alien, last = session.stream(Given(), [texts[0], "alien", texts[2]])
    close(running, texts[0], first)
    assert isinstance(alien, InvalidInput)
    assert "token id is outside" in str(alien)
    close(running, texts[2], last)


def test_a_stream_reads_no_more_than_its_window(running: Running) -> None:
    read = count()

    def endless() -> Iterator[str]:
        for _ in read:
            yield TEXT

    with running.session() as session:
        stream = session.stream(Embed(), endless(), window=BATCH + 1)  # two whole queries
        for number, answer in enumerate(islice(stream, 4 * BATCH)):
            close(running, TEXT, answer)
            # the window itself, and the next one, whose first query is prepared already
            assert next(read) - number <= 3 * 2 * BATCH + number


def test_the_next_query_is_prepared_while_one_runs(running: Running) -> None:
    ahead = int(bool(running.relays) and isinstance(running.compiled.deployment, secure.TwoParty))
    with running.session() as session:
        for number, _ in enumerate(session.stream(Embed(), sentences(8)[: 2 * BATCH + 1])):
            assert session.ready == (ahead if number < 2 * BATCH else 0)  # none that nobody will use
        assert len({report.query for report in session.reports}) == 3


def test_empty_texts_and_wrong_windows_are_said(running: Running) -> None:
    with running.session() as session:
        (empty,) = session.stream(Embed(), [""])
        assert isinstance(empty, EmptyInput)
        with pytest.raises(InvalidInput, match="a window of 0 inputs"):
            session.stream(Embed(), [TEXT], window=0)
        wrong: Any = [TEXT, 3]
        with pytest.raises(InvalidInput, match="takes a list of texts"):
            list(session.stream(Embed(), wrong))


# a party that is lost


@pytest.mark.parametrize(("kind", "party"), [(secure.TwoParty, "server"), (secure.ThreeParty, "party 0")])
def test_a_lost_party_is_asked_again_under_fresh_correlations(
    kind: Any, party: str, directory: Path, tmp_path: Path
) -> None:
    compiled = compiled_for(kind, directory)
    texts = sentences(8) * 3
    with ExitStack() as stack:
        deployment, relays = HOSTS[kind](stack, compiled, tmp_path)
        running = Running(compiled, deployment, relays)
        with running.session() as session:
            answers = session.stream(Embed(), texts)
            for number, (text, answer) in enumerate(zip(texts, answers, strict=True)):
                close(running, text, answer)
                if number in (4, 10):
                    relays[party].cut()
            assert len(session.reports) == len(texts) // BATCH


def test_without_retries_the_error_names_the_inputs(directory: Path, tmp_path: Path) -> None:
    compiled = compiled_for(secure.TwoParty, directory)
    with ExitStack() as stack:
        deployment, relays = HOSTS[secure.TwoParty](stack, compiled, tmp_path)
        with Running(compiled, deployment, relays).session() as session:
            stream = session.stream(Embed(), [TEXT] * 7, retries=0)
            assert len(list(islice(stream, BATCH))) == BATCH
            relays["server"].cut()
            with pytest.raises(PeerLost, match=r"^texts 4 to 6: the server"):
                next(stream)


def test_answers_of_two_models_are_never_mixed(directory: Path, tmp_path: Path) -> None:
    """A server that comes back with other weights of the same shape is not asked on."""
    one, other = (compiled_for(secure.TwoParty, directory, seed=seed) for seed in (0, 1))
    with ExitStack() as stack:
        dealer = stack.enter_context(secure.serve(role="dealer", deployment=one.deployment))
        peers = {"dealer": dealer.address}
        server = secure.serve(one, role="server", peers=peers, state=tmp_path)
        at = server.address
        with secure.connect(secure.TwoParty(server=at, dealer=dealer.address), cache=False, pace=0.0) as session:
            stream = session.stream(Embed(), [TEXT] * (3 * BATCH))
            list(islice(stream, BATCH))
            server.close()
            stack.enter_context(secure.serve(other, role="server", listen=at, peers=peers, state=tmp_path))
            with pytest.raises(HandshakeError, match=r"other weights|Program digest"):
                list(stream)


def test_close_ends_a_stream_and_its_retries(directory: Path, tmp_path: Path) -> None:
    compiled = compiled_for(secure.TwoParty, directory)
    with ExitStack() as stack:
        deployment, _ = HOSTS[secure.TwoParty](stack, compiled, tmp_path)
        session = secure.connect(deployment, cache=False, pace=0.0)
        stream = session.stream(Embed(), [TEXT] * 300)
        next(stream)
        threading.Timer(0.2, session.close).start()
        with pytest.raises(PeerLost, match="it was closed"):
            list(stream)


# what is refused


@pytest.mark.parametrize("batch", [0, -1, MAXIMUM_BATCH + 1])
def test_batches_out_of_bounds_are_refused(directory: Path, batch: int) -> None:
    with pytest.raises(InvalidInput, match=f"a batch of {batch} inputs"):
        compiled_for(secure.TwoParty, directory, batch)


def test_ciphertexts_of_a_batch_are_not_refreshed(directory: Path) -> None:
    with pytest.raises(InvalidInput, match="a batch whose ciphertexts are refreshed"):
        compiled_for(partial(secure.Ckks, refresh=True), directory)


@pytest.mark.parametrize("label", ["0", "2", "4", "-3", "3.0", "٣", "", str(MAXIMUM_BATCH + 1), "9" * 40])
def test_a_label_that_is_not_the_batch_of_its_inputs_is_refused(directory: Path, label: str) -> None:
    program = compiled_for(secure.TwoParty, directory).program
    check_client_part(program.client_graph, program.client_inputs, program.labels)
    with pytest.raises(InvalidProgram, match="the label batch is"):
        check_client_part(program.client_graph, program.client_inputs, {**program.labels, "batch": label})
