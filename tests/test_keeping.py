"""Openings that later queries read: their products against integers, what the parties see, and what cannot go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from protocols import two_party as tp
from protocols.circuit import CorrelationReused, Correlations, check, deal, execute
from protocols.flow import Instruction
from protocols.protocol import CLIENT, SERVER, Opening
from protocols.steps import PairTraffic, run_pair
from protocols.two_party import KeptRows, keepers
from protocols.weights import DealerWeights, ServerWeights
from protocols.wire import FrameError, decode
from tests.helpers import combine, integers, key, shared, words
from tests.uniformity import View, difference, leaks, suspicious

RING, WIDTH, CAPACITY = 40, 4, 6
NONE = ServerWeights({})


class Parties:
    """Both parties and the dealer, with what each of them keeps."""

    def __init__(self, *kept: KeptRows) -> None:
        self.server, self.client, self.dealer = kept or (KeptRows(CAPACITY) for _ in range(3))

    def branch(self) -> Parties:
        return Parties(self.server.branch(), self.client.branch(), self.dealer.branch())

    def ask(
        self, circuit: list[Instruction], inputs: dict[str, Tensor], rows: int | None = None
    ) -> tuple[Tensor, list[View]]:
        """Run a circuit; return its last result, and everything that the parties see. rows: those that it reads."""
        keys, masks, traffic = (key(), key()), dict[str, Tensor](), PairTraffic(frames_to_first=[], frames_to_second=[])
        dealt = dict(deal(circuit, *keys, DealerWeights(key(), {}), self.dealer.given(circuit, rows), masks))
        outputs = [len(circuit) - 1, *keepers(circuit).values()]
        ours, theirs = run_pair(
            execute(
                circuit, outputs, SERVER, Correlations(SERVER, keys[0], dealt), NONE, self.server.given(circuit, rows)
            ),
            execute(
                circuit,
                outputs,
                CLIENT,
                Correlations(CLIENT, keys[1]),
                NONE,
                {**inputs, **self.client.given(circuit, rows)},
            ),
            traffic,
        )
        for kept, found in ((self.server, ours), (self.client, theirs)):
            kept.append(dict(zip(keepers(circuit), found[1:], strict=True)), rows)
        self.dealer.append(masks, rows)
        return combine(ours[0], theirs[0]), list(views(circuit, traffic, dealt))


def views(circuit: list[Instruction], traffic: PairTraffic, dealt: dict[int, memoryview]) -> Iterator[View]:
    for party, frames in (("server", traffic.frames_to_first), ("client", traffic.frames_to_second)):
        payload = b"".join(frames or [])
        for p in (i.protocol for i in circuit if isinstance(i.protocol, tp.Open)):
            part, payload = payload[: p.out.size], payload[p.out.size :]
            yield f"{party}: opening", decode(part, p.out), p.out.bits
        assert not payload
    for index, found in dealt.items():
        yield f"server: correction {index}", decode(bytes(found), circuit[index].protocol.draws[0].wire), RING


def secret(name: str, rows: int) -> Instruction:
    shape = (1, rows, WIDTH)
    return Instruction(shared(name, shape, RING, words(np.random.default_rng(), shape)))


def prompt(rows: int) -> list[Instruction]:
    """Keys of a prompt, kept; the result is q k^T."""
    shape = (1, rows, WIDTH)
    return [
        secret("q", rows),
        secret("k", rows),
        Instruction(tp.Open(shape, RING), (0,)),
        Instruction(tp.Open(shape, RING), (1,)),
        Instruction(tp.Keep(shape, RING, "keys"), (3,)),
        Instruction(tp.OpenedPermute((1, WIDTH, rows), RING, (0, 2, 1)), (4,)),
        Instruction(tp.Product((1, rows, rows), RING, True), (2, 5)),
    ]


def step(rows: int = 1) -> list[Instruction]:
    """One row of q times all keys: CAPACITY earlier ones, and the new ones."""
    shape, whole = (1, rows, WIDTH), CAPACITY + rows
    return [
        secret("q", rows),
        secret("k", rows),
        Instruction(tp.Open(shape, RING), (0,)),
        Instruction(tp.Open(shape, RING), (1,)),
        Instruction(tp.Keep(shape, RING, "keys"), (3,)),
        Instruction(tp.Recall((1, CAPACITY, WIDTH), RING, "keys")),
        Instruction(tp.OpenedConcat((1, whole, WIDTH), RING, 1), (5, 4)),
        Instruction(tp.OpenedPermute((1, WIDTH, whole), RING, (0, 2, 1)), (6,)),
        Instruction(tp.Product((1, rows, whole), RING, True), (2, 7)),
    ]


def numbers(rows: int, seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy(rng.integers(-(2**19), 2**19, (1, rows, WIDTH))) for name in ("q", "k")}


def product(q: Tensor, k: Tensor) -> Any:
    return integers(q @ k.mT, RING)


def test_products_with_rows_of_earlier_queries() -> None:
    parties, first = Parties(), numbers(2, 0)
    found, _ = parties.ask(prompt(2), first)
    assert (integers(found, RING) == product(first["q"], first["k"])).all()
    keys = first["k"]
    for number in range(1, 4):
        now = numbers(1, number)
        found, seen = parties.ask(step(), now)
        absent = torch.zeros(1, CAPACITY - keys.shape[1], WIDTH, dtype=torch.int64)
        assert (integers(found, RING) == product(now["q"], torch.cat([keys, absent, now["k"]], 1))).all()
        assert [view.numel() for name, view, _ in seen if "opening" in name] == [WIDTH] * 4  # one row of q and k each
        keys = torch.cat([keys, now["k"]], 1)
    assert parties.client.filled == 5
    for circuit in (prompt(2), step()):
        check(circuit, {})


def test_branches_go_on_by_themselves() -> None:
    parties, first = Parties(), numbers(2, 0)
    parties.ask(prompt(2), first)
    other = parties.branch()
    for each, seed in ((parties, 1), (other, 2), (parties, 3), (other, 4)):
        now = numbers(1, seed)
        found, _ = each.ask(step(), now)
        assert (integers(found, RING)[..., :2] == product(now["q"], first["k"])).all()
    assert parties.server.filled == other.server.filled == 4


def test_a_text_goes_on_from_an_earlier_row() -> None:
    """What stood behind is forgotten: it is zero for those who read on, and the next row stands in its place."""
    parties, first = Parties(), numbers(3, 0)
    parties.ask(prompt(3), first)
    keys = first["k"]
    for rows, seed in ((1, 1), (1, 2), (2, 3)):
        now = numbers(1, seed)
        found, _ = parties.ask(step(), now, rows)
        absent, keys = torch.zeros(1, CAPACITY - rows, WIDTH, dtype=torch.int64), keys[:, :rows]
        assert (integers(found, RING) == product(now["q"], torch.cat([keys, absent, now["k"]], 1))).all()
        assert parties.client.filled == rows + 1
        keys = torch.cat([keys, now["k"]], 1)
    for each in (parties.server, parties.client, parties.dealer):
        for rows in (-1, 4):
            with pytest.raises(ValueError, match=f"{rows} rows of 3 that are kept"):
                each.given(step(), rows)


def test_rows_are_put_in_place() -> None:
    """A new row moves no other, a query reads them where they are, and rows of a branch are not its origin's."""
    kept, x = KeptRows(4), torch.ones(1, 1, WIDTH, dtype=torch.int64)
    kept.append({"keys": x})
    recall = [Instruction(tp.Recall((1, 4, WIDTH), RING, "keys"))]
    before = kept.given(recall)["keys"]
    other = kept.branch()
    kept.append({"keys": 2 * x})
    assert kept.given(recall)["keys"].data_ptr() == before.data_ptr()
    assert kept.given(recall)["keys"][0, :, 0].tolist() == [1, 2, 0, 0]
    assert other.given(recall)["keys"][0, :, 0].tolist() == [1, 0, 0, 0]
    kept.append({"keys": 3 * x}, after=0)
    assert kept.filled == 1
    assert kept.given(recall)["keys"][0, :, 0].tolist() == [3, 0, 0, 0]


def test_views_are_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two extreme secrets alike, and of both runs together; the same kept rows are read by all queries."""
    monkeypatch.setattr("tests.test_keeping.WIDTH", 1 << 15)
    runs = []
    for value in (-(1 << (RING - 1)), (1 << (RING - 1)) - 1):
        parties, seen = Parties(), list[View]()
        inputs = {name: torch.full((1, 1, WIDTH), value) for name in ("q", "k")}
        for number, circuit in enumerate((prompt(1), step(), step())):
            _, found = parties.ask(circuit, inputs)  # its corrections are too few numbers for statistics
            seen += [(f"{n} {number}.{i}", x.reshape(-1), w) for i, (n, x, w) in enumerate(found) if "opening" in n]
        runs.append(seen)
    for seen in runs:
        assert not leaks([v for v in seen if v[0].startswith("server")])
        assert not leaks([v for v in seen if v[0].startswith("client")])
    for (view, x, width), (_, y, _) in zip(*runs, strict=True):
        assert suspicious(difference(x, y), width) is None, view


def test_rows_that_are_written_anew_have_masks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that was a wrong guess is given up, and another opened in its place: together they tell nothing either."""
    monkeypatch.setattr("tests.test_keeping.WIDTH", 1 << 15)
    parties, seen = Parties(), list[View]()
    inputs = {name: torch.full((1, 2, WIDTH), 5) for name in ("q", "k")}
    parties.ask(prompt(2), inputs)
    for rows in (2, 3, 2):  # one of two is right, then none
        _, found = parties.ask(step(2), inputs, rows)
        seen += [(f"{name} {len(seen)}", x.reshape(-1), width) for name, x, width in found if "opening" in name]
    assert not leaks(seen)
    for party in ("server", "client"):
        first, *others = [x for name, x, _ in seen if name.startswith(party)][
            1::2
        ]  # of the keys, whose row 3 is common
        for other in others:
            assert suspicious(difference(first, other), RING) is None
    masks = parties.dealer.given(step(2), 4)["keys"].clone()
    parties.ask(step(2), inputs, 3)
    again = parties.dealer.given(step(2), 5)["keys"]
    assert torch.equal(masks[:, :3], again[:, :3])
    assert not torch.equal(masks[:, 3], again[:, 3])


def test_corrections_are_uniform() -> None:
    """Of products of one kept opening with many others: the client's shares that mask them are new each time."""
    many = 1 << 12
    circuit = step(many)
    seen: list[View] = []
    parties = Parties(*(KeptRows(CAPACITY + many) for _ in range(3)))
    parties.ask(prompt(CAPACITY), numbers(CAPACITY, 0))
    for branch in (parties.branch(), parties.branch()):
        inputs = {name: torch.zeros((1, many, WIDTH), dtype=torch.int64) for name in ("q", "k")}
        slim = [*circuit[:6], Instruction(tp.OpenedPermute((1, WIDTH, CAPACITY), RING, (0, 2, 1)), (5,))]
        slim.append(Instruction(tp.Product((1, many, CAPACITY), RING, True), (2, 6)))
        _, found = branch.ask(slim, inputs)
        seen += [(f"{name} {len(seen)}", x.reshape(-1), w) for name, x, w in found if "correction" in name]
    assert len(seen) == 2
    assert not leaks(seen)


def test_a_key_serves_one_opening() -> None:
    """The mask of what is kept can not be drawn again: that burns a correlation twice."""
    correlations, opening = Correlations(CLIENT, key()), tp.Open((1, 1, WIDTH), RING)
    correlations.take(3, opening)
    with pytest.raises(CorrelationReused):
        correlations.take(3, opening)


def test_rows_that_do_not_fit_are_refused() -> None:
    kept = KeptRows(3)
    row = Opening(torch.zeros(1, 2, WIDTH), torch.zeros(1, 2, WIDTH))
    kept.append({"keys": row, "values": row})
    other = Opening(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="a row of 'values' has another shape"):
        kept.append({"keys": Opening(*(x[:, :1] for x in row)), "values": other})
    assert repr(kept) == "KeptRows(2 of 3)"
    with pytest.raises(ValueError, match="2 rows more than 2, 3 fit"):
        kept.append({"keys": row, "values": row})
    with pytest.raises(ValueError, match="more than"):
        kept.append({"keys": row})
    for name, rows in (("keys", 1), ("others", 3)):
        with pytest.raises(ValueError, match="2 rows are kept"):
            kept.given([Instruction(tp.Recall((1, rows, WIDTH), RING, name))])
    with pytest.raises(FrameError, match="no earlier query kept 'keys', which instruction 5 reads"):
        dict(deal(step(), key(), key(), DealerWeights(key(), {})))
    recall = tp.Recall((1, 3, WIDTH), RING, "keys")
    with pytest.raises(ValueError, match=r"has shape \(1, 2, 4\), not \(1, 3, 4\)"):
        next(recall.run(CLIENT, {}, (row,), NONE))
