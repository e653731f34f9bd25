"""A client of three servers over gRPC that sends anything: all refuse it in the same words, and nobody else suffers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn.functional import cosine_similarity

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import secure
from parties.three_party.hosted import parts_of
from parties.three_party.shared_model import share_model
from protocols import two_party as tp
from protocols.three_party import dpf
from protocols.three_party.endpoints import LookedUp
from protocols.three_party.lookup import LookupKeys
from secure import Program
from secure.deployments.three_party import PARTIES, ThreeParty
from secure.errors import ClientDeviates, HandshakeError, OutOfRange
from tests.test_client_checks import changed
from tests.three_parties import Three, call, running
from tests.tiny import LENGTH, TEXT, expected, sentences, wait_until


@pytest.fixture(scope="module")
def shares(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name, each made once."""
    base = tmp_path_factory.mktemp("shares")
    compiled = secure.compile_text_model(
        str(directory), LENGTH, deployment=ThreeParty(), embedding="one-hot", calibration=sentences()
    )
    made = {
        "checked": ThreeParty(),
        "public": ThreeParty(public_weights=True),
        "trusted": ThreeParty(trusted_clients=True),
    }
    for name, deployment in made.items():
        share_model(replace(compiled, deployment=deployment), base / name)
    return {name: base / name for name in made}


@pytest.fixture(scope="module")
def three(shares: dict[str, Path]) -> Iterator[Three]:
    with running(shares["checked"]) as parties:
        yield parties


def of_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every later client of this process ask for the row of each token and those of its leaf, all at once."""
    real = LookedUp.keys

    def keys(self: LookedUp, ids: Tensor) -> list[bytes]:
        pairs = []
        for _ in range(self.pairs):
            pair = dpf.generate(ids.reshape(-1), self.rows)
            pairs.append(changed(pair, outputs=pair[0].outputs + 1))
        if self.public:
            return [k.to_bytes() for k in pairs[0]]
        made = [LookupKeys(pairs[i][0], pairs[(i + 1) % 3][1]).to_bytes() for i in range(3)]
        assert [len(k) for k in made] == [len(k) for k in real(self, ids)]
        return made

    monkeypatch.setattr(LookedUp, "keys", keys)


def plain_inputs(program: Program) -> list[tp.Input]:
    found = [i.protocol for i in program.circuit if isinstance(i.protocol, tp.Input)]
    return [p for p in found if p.name.startswith("plain")]


def beyond(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make every later client share one value of its plain input ``number`` that is one step beyond its clamps."""
    real = Program.encode

    def encode(self: Program, *given: Any) -> dict[str, Tensor]:
        values, p = real(self, *given), plain_inputs(self)[number]
        moved = values[p.name].clone()
        moved.reshape(-1)[-1] = round(p.high * 2.0**p.fraction) + 1
        return values | {p.name: moved}

    monkeypatch.setattr(Program, "encode", encode)


def refused(three: Three, words: str, caplog: pytest.LogCaptureFixture) -> None:
    """A client's query ends without an answer, in the same words everywhere."""
    caplog.set_level(logging.WARNING)
    with three.dial() as connection:
        with pytest.raises(ClientDeviates, match=words) as caught:
            connection.embed([TEXT])
        assert "hint: the parties have ended the query" in str(caught.value)
        assert not connection.reports
    said = {r.name: r.getMessage() for r in caplog.records if "client's" in r.getMessage()}
    assert set(said) == {"unseen.party-0", "unseen.party-1"}
    for party in three.parties:
        wait_until(lambda party=party: not party.service._asked, "nothing of the query is kept")  # type: ignore[misc]


def answered(three: Three, directory: Path) -> None:
    with three.dial() as connection:
        (answer,) = connection.embed([TEXT])
        assert cosine_similarity(answer, expected(directory, TEXT), dim=0) > 0.9999


@pytest.mark.parametrize("name", ["checked", "public"])
def test_malformed_keys_end_the_query(
    directory: Path,
    shares: dict[str, Path],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(shares[name]) as three:
        with monkeypatch.context() as patch:
            of_two_rows(patch)
            refused(three, "keys of the look-up 'one-hot.*' are malformed", caplog)
        answered(three, directory)


def test_an_input_beyond_its_clamps_ends_the_query(
    directory: Path, three: Three, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = plain_inputs(three.parties[0].service.share.program)
    assert inputs
    for number, p in enumerate(inputs):
        caplog.clear()
        with monkeypatch.context() as patch:
            beyond(patch, number)
            refused(three, f"input '{p.name}' is not within its range of {p.low:g} to {p.high:g}", caplog)
    answered(three, directory)


def test_trusted_clients_are_believed(
    directory: Path, shares: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the same client was told before there was a check of rows: an answer about rows of its choice.

    Two rows together leave the ranges, which is for the client alone to see.
    """
    with running(shares["trusted"]) as three:
        assert "trusted clients: what they send is not checked" in parts_of(three.parties[0].service).about[0]
        answered(three, directory)
        of_two_rows(monkeypatch)
        with three.dial() as connection, pytest.raises(OutOfRange):
            connection.embed([TEXT])


def test_who_insists_on_trusted_clients_gets_them(three: Three, shares: dict[str, Path]) -> None:
    with pytest.raises(HandshakeError, match="trusted_clients"):
        secure.connect(ThreeParty(parties=three.addresses, trusted_clients=True), cache=False)
    with running(shares["trusted"]) as parties, call(parties.addresses) as session:
        assert session.link.served == ThreeParty(trusted_clients=True)


def test_the_cost_is_known_before(three: Three) -> None:
    share = three.parties[0].service.share
    with three.dial() as connection:
        connection.embed([TEXT])
        (report,) = connection.reports
    predicted = share.deployment.price(share.program)
    assert report.rounds == predicted.rounds
    for link in predicted.traffic:
        assert report.bytes(sender=link.sender, receiver=link.receiver, phase=link.phase) == link.bytes
    trusted = ThreeParty(trusted_clients=True).price(share.program)
    assert trusted.rounds == predicted.rounds
    for sender, receiver in ((PARTIES[0], PARTIES[1]), (PARTIES[1], PARTIES[0]), (PARTIES[2], PARTIES[0])):
        assert trusted.bytes(sender=sender, receiver=receiver) < predicted.bytes(sender=sender, receiver=receiver)
