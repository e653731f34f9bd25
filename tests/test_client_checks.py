"""What three parties do about a client that sends anything: malformed look-up keys, inputs beyond their clamps."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from protocols import ring
from protocols import two_party as tp
from protocols.circuit import Correlations, deal, execute
from protocols.errors import ClientDeviates
from protocols.flow import Instruction
from protocols.prg import Key
from protocols.protocol import CircuitCost, Exchange
from protocols.steps import Done, advance, pack_frame, unpack_frame
from protocols.three_party import Translated, checks, dpf, translate
from protocols.three_party.checks import InRange, UnitVectors
from protocols.three_party.dpf import Keys
from protocols.three_party.lookup import LookupKeys
from protocols.three_party.sharing import HOLDERS, PARTY_2
from protocols.three_party.sketch import Sketch, joined
from protocols.wire import Wire
from secure import InvalidProgram, ThreeParty
from secure.cost.kernel_times import measure
from tests.helpers import key
from tests.test_program import classifier
from tests.three import held_weights, query
from tests.uniformity import View, difference, leaks, suspicious

WORD = st.sampled_from([1, -1, 2, 3, 1 << 31, 1 << 32, 1 << 62, ring.wrap(1 << 63)]) | st.integers(-(2**63), 2**63 - 1)


def uniform(*shape: int) -> Tensor:
    words = np.frombuffer(bytearray(secrets.token_bytes(8 * int(np.prod(shape)))), dtype=np.int64)
    return torch.from_numpy(words).reshape(shape)


# sketches of any vectors


def sketch_of(vectors: Sequence[Tensor], pieces: int = 1) -> Tensor:
    """The sketch of (P, V) vectors, one tensor for each pair of keys, from uniform shares added in a few pieces."""
    total = torch.zeros((vectors[0].shape[0], len(vectors) + 3), dtype=torch.int64)
    for pair, v in enumerate(vectors):
        common, first = key(), uniform(*v.shape)
        for party, share in enumerate((first, v - first)):
            sketch = Sketch(v.shape[0], party, common.stream(3))
            size = -(-v.shape[1] // pieces)
            for start in range(0, v.shape[1], size):
                sketch.add(slice(0, len(v)), start, share[:, start : start + size])
            total += joined({pair: sketch}, len(vectors))
    return total


def passes(sketch: Tensor) -> list[bool]:
    sums, (place, mark, product) = sketch[:, :-3], sketch[:, -3:].unbind(1)
    return ((sums == 1).all(1) & (product == place * mark)).tolist()


def unit(place: int, domain: int) -> Tensor:
    out = torch.zeros(domain, dtype=torch.int64)
    out[place] = 1
    return out


@settings(deadline=None)
@given(data=st.data(), domain=st.integers(1, 70), pairs=st.sampled_from([1, 3]), pieces=st.integers(1, 3))
def test_unit_vectors_pass(data: st.DataObject, domain: int, pairs: int, pieces: int) -> None:
    places = data.draw(st.lists(st.integers(0, domain - 1), min_size=1, max_size=4))
    vectors = torch.stack([unit(place, domain) for place in places])
    sketch = sketch_of([vectors] * pairs, pieces)
    assert passes(sketch) == [True] * len(places)
    assert sketch[:, pairs].tolist() == places


@settings(deadline=None, max_examples=300)
@given(data=st.data(), domain=st.integers(1, 70), pairs=st.sampled_from([1, 3]))
def test_nothing_else_passes(data: st.DataObject, domain: int, pairs: int) -> None:
    """Few places that are not zero, of values that two divides often, or that add up to one."""
    vectors = []
    for _ in range(pairs):
        places = data.draw(st.lists(st.integers(0, domain - 1), max_size=4))
        v = torch.zeros(domain, dtype=torch.int64)
        for place in places:
            v[place] = data.draw(WORD)
        if data.draw(st.booleans()) and places:
            v[places[0]] += 1 - v.sum()
        vectors.append(v)
    same = all(torch.equal(v, vectors[0]) for v in vectors)
    is_unit = int((vectors[0] == 1).sum()) == 1 and int((vectors[0] != 0).sum()) == 1
    assert passes(sketch_of([v.unsqueeze(0) for v in vectors])) == [same and is_unit]


def test_a_field_is_not_needed() -> None:
    """e + 2^63 e_x passes <t, v>^2 = <t^2, v> modulo 2^64 for every other t; here never, of a thousand."""
    v = unit(5, 40) + (unit(7, 40) << 63) + (unit(9, 40) << 63)  # the sum is 1
    assert int(v.sum()) == 1
    t = uniform(1000, 40)
    squares = ((t @ v) ** 2 == (t * t) @ v).float().mean()
    assert 0.2 < float(squares) < 0.8
    assert not any(passes(sketch_of([v.repeat(1000, 1)])))


def test_a_sketch_shows_nothing_by_itself() -> None:
    """One holder's share of every sum is uniform over queries."""
    seen: list[View] = []
    for place in (0, 39):
        v, shares = unit(place, 40).repeat(4000, 1), uniform(4000, 40)
        sketch = Sketch(4000, 1, key().stream(0))
        sketch.add(slice(0, 4000), 0, v - shares)
        seen += [(f"{place}: sum {i}", sums, 64) for i, sums in enumerate(sketch.sums.unbind(1))]
    assert not leaks(seen)


# malformed keys

DOMAIN, WIDTH = 37, 3
Pair = tuple[Keys, Keys]


def changed(pair: Pair, **arrays: Any) -> Pair:
    first, second = (replace(keys, **arrays) for keys in pair)
    return first, second


def output(place: int, pair: Pair, added: Mapping[int, int]) -> Pair:
    """Add to words of the leaf of ``place``: to one word of it what ``added`` says by its number in the leaf."""
    outputs = pair[0].outputs.copy()
    for word, value in added.items():
        outputs[:, word] += np.uint64(value % 2**64)
    return changed(pair, outputs=outputs)


def signed(place: int, pair: Pair, added: Mapping[int, int]) -> Pair:
    """The same, with the sign that makes the vector's words grow by ``added``."""
    grown = output(place, pair, added)
    total = dpf.evaluate(grown[0], 0) + dpf.evaluate(grown[1], 1)
    first = next(iter(added))
    if int(total[0, place // dpf.LEAF * dpf.LEAF + first]) == (place % dpf.LEAF == first) + added[first]:
        return grown
    return output(place, pair, {word: -value for word, value in added.items()})


def everywhere(place: int, pair: Pair) -> Pair:
    """Equal roots whose control bits differ in all leaves: the output correction lands on every one."""
    corrections = np.zeros_like(pair[0].corrections)
    corrections[:, :, :, 0] = 1
    return changed(pair, roots=pair[0].roots, corrections=corrections)


def garbage(place: int, pair: Pair) -> Pair:
    return changed(pair, corrections=uniform(*pair[0].corrections.shape).numpy().view(np.uint64))


def apart(place: int) -> Pair:
    """Another output correction for the holder of key 1, who reads it in half of the leaves: at least in one."""
    while True:
        first = fresh(place)
        second = output(place, first, {0: 1})[1]
        if not torch.equal(dpf.evaluate(second, 1), dpf.evaluate(first[1], 1)):
            return first[0], second


def fresh(place: int) -> Pair:
    return dpf.generate([place], DOMAIN)


PLACE = 18  # word 2 of its leaf
VECTORS: dict[str, Callable[[int], Pair]] = {
    "zero": lambda at: signed(at, fresh(at), {2: -1}),
    "two": lambda at: signed(at, fresh(at), {2: 1}),
    "minus one": lambda at: signed(at, fresh(at), {2: -2}),
    "two points of a leaf": lambda at: signed(at, fresh(at), {1: 1}),
    "2 and -1 in a leaf": lambda at: signed(at, fresh(at), {2: 1, 3: -1}),
    "1 + 2^63 and 2^63": lambda at: output(at, fresh(at), {2: 1 << 63, 0: 1 << 63}),
    "1 + 2^32 and -2^32": lambda at: signed(at, fresh(at), {2: 1 << 32, 0: -(1 << 32)}),
    "beyond the domain": lambda at: signed(36, dpf.generate([36], DOMAIN), {0: -1, 1: 1}),
    "every leaf": lambda at: everywhere(at, fresh(at)),
    "garbage corrections": lambda at: garbage(at, fresh(at)),
    "keys of two pairs": lambda at: (fresh(at)[0], fresh(at)[1]),
    "twice the first key": lambda at: (fresh(at)[0],) * 2,
    "keys of two points": lambda at: (fresh(at)[0], fresh(at + 1)[1]),
    "another correction for one holder": apart,
    "another point": lambda at: fresh(at + 1),
    "another leaf": lambda at: fresh(at + dpf.LEAF),
}


def looking_up(points: int, *, public: bool = False, trusted: bool = False) -> Translated:
    """The circuit of a table's product with one-hot rows, for three parties."""
    circuit = [
        Instruction(tp.Input((points, DOMAIN), 40, "ids", 0, 0.0, 1.0)),
        Instruction(tp.Deliver((points, DOMAIN), 40), (0,)),
        Instruction(tp.Linear((points, WIDTH), 40, "t"), (1,)),
        Instruction(tp.Reveal((points, WIDTH), 40), (2,)),
    ]
    return translate(circuit, [3], public=public, one_hot={"ids"}, trusted_clients=trusted)


def sent(pairs: Sequence[Pair], *, public: bool) -> list[bytes]:
    """The keys of a look-up as a client sends them, by party, from the pairs of each component."""
    if public:
        return [keys.to_bytes() for keys in pairs[0]]
    return [LookupKeys(pairs[i][0], pairs[(i + 1) % 3][1]).to_bytes() for i in range(3)]


class Ran:
    """Parties 0 and 1 after a look-up: what each received, and the result or error of each; party 2's rows."""

    def __init__(self, made: Translated, keys: Sequence[bytes], table: Tensor, *, public: bool = False) -> None:
        held: Any = held_weights({"t": table}, made.weight_rings, public=public)
        streams, pairs = (key(), key()), {frozenset(pair): key() for pair in HOLDERS}
        ((index, p),) = made.lookups.values()
        found = []
        for party, own in enumerate(keys):
            coins = {other: k for pair, k in pairs.items() for other in pair - {party} if party in pair}
            found.append(p.shares(party, own, held[party], coins, index))
        self.brought = CircuitCost()
        inputs: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self.from_two: dict[str, Tensor] = {}
        for name, (at, each) in made.from_keys.items():
            mask = each.zero_share(streams[1], at)
            inputs[1][name] = found[1][name] + mask
            inputs[0][name] = found[0][name]
            if not public:
                self.from_two[name] = ring.reduce(found[2][name] - mask, each.ring)
                inputs[0][name] = inputs[0][name] + self.from_two[name]
        self.dealt = dict(deal(made.circuit, *streams, held[PARTY_2]))
        self.received: tuple[list[tuple[Tensor, Wire]], ...] = ([], [])
        self.results: list[Any] = [None, None]
        self.errors: list[ClientDeviates | None] = [None, None]
        steps = [
            execute(
                made.circuit,
                made.outputs,
                party,
                Correlations(party, streams[party], None if party else self.dealt),
                held[party],
                inputs[party],
            )
            for party in (0, 1)
        ]
        self._run(steps)

    def _run(self, steps: list[Any]) -> None:
        answers: list[Any] = [None, None]
        while True:
            now: list[Any] = []
            for party in (0, 1):
                try:
                    now.append(advance(steps[party], answers[party]))
                except ClientDeviates as error:
                    self.errors[party] = error
            if len(now) < 2:
                return
            if all(isinstance(x, Done) for x in now):
                self.results = [x.result[0] for x in now]
                return
            assert all(isinstance(x, Exchange) for x in now)
            frames = [pack_frame(x) for x in now]
            answers = [unpack_frame(frames[1 - party], now[party]) for party in (0, 1)]
            for party in (0, 1):
                self.received[party].extend(zip(answers[party], now[party].receive, strict=True))

    @property
    def refused(self) -> bool:
        """Whether both parties refused, in the same words, and neither has a result."""
        if self.errors == [None, None]:
            return False
        assert [str(e) for e in self.errors] == [str(self.errors[0])] * 2
        assert self.results == [None, None]
        return True


@pytest.mark.parametrize("public", [False, True])
@settings(deadline=None, max_examples=25)
@given(ids=st.lists(st.integers(0, DOMAIN - 1), min_size=1, max_size=6))
def test_honest_keys_pass(public: bool, ids: list[int]) -> None:
    made, table = looking_up(len(ids), public=public), uniform(DOMAIN, WIDTH)
    if public:
        table = ring.signed(table, 40)
    ((_, p),) = made.lookups.values()
    ran = Ran(made, p.keys(torch.tensor(ids)), table, public=public)
    assert not ran.refused
    assert torch.equal(ring.reduce(sum(ran.results), 40), ring.reduce(table[torch.tensor(ids)], 40))
    size = sum(wire.size for _, wire in ran.received[0])
    assert made.cost == CircuitCost(
        2, size, size, sum(map(len, ran.dealt.values())), sum(p.cost().brought for _, p in made.from_keys.values())
    )
    assert size == 16 * len(ids) + 32


@pytest.mark.parametrize("components", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("name", VECTORS)
def test_malformed_keys_are_refused(name: str, components: tuple[int, ...]) -> None:
    """Of one component, of two, or of all of them."""
    pairs = [VECTORS[name](PLACE) if j in components else fresh(PLACE) for j in range(3)]
    another = name in ("another point", "another leaf") and components == (0, 1, 2)
    ran = Ran(looking_up(1), sent(pairs, public=False), uniform(DOMAIN, WIDTH))
    assert ran.refused != another
    if not another:
        assert "keys of the look-up 'ids/0' are malformed" in str(ran.errors[0])
        assert "hint: " in str(ran.errors[0])


@pytest.mark.parametrize("name", [name for name in VECTORS if not name.startswith("another ")])
def test_malformed_keys_to_a_public_table_are_refused(name: str) -> None:
    table = torch.arange(DOMAIN * WIDTH).reshape(DOMAIN, WIDTH)
    assert Ran(looking_up(1, public=True), sent([VECTORS[name](PLACE)], public=True), table, public=True).refused


@pytest.mark.parametrize("name", VECTORS)
def test_trusted_clients_are_believed(name: str) -> None:
    """What happened before there was a check: an answer."""
    ran = Ran(looking_up(1, trusted=True), sent([VECTORS[name](PLACE)] * 3, public=False), uniform(DOMAIN, WIDTH))
    assert not ran.refused
    assert ran.results[0] is not None


def test_two_rows_at_once_were_an_answer() -> None:
    """The exploit: with trusted clients, the sum of two rows of the table."""
    table, pairs = uniform(DOMAIN, WIDTH), [VECTORS["two points of a leaf"](PLACE) for _ in range(3)]
    ran = Ran(looking_up(1, trusted=True), sent(pairs, public=False), table)
    assert torch.equal(ring.reduce(sum(ran.results), 40)[0], ring.reduce(table[PLACE] + table[PLACE - 1], 40))
    assert Ran(looking_up(1), sent(pairs, public=False), table).refused


def test_one_malformed_key_of_many_is_refused() -> None:
    made, table = looking_up(9), uniform(DOMAIN, WIDTH)
    for at in (0, 4, 8):
        pairs = []
        for _ in range(3):
            pair = dpf.generate(list(range(9)), DOMAIN)
            outputs = pair[0].outputs.copy()
            outputs[at, 0] += np.uint64(1)
            pairs.append(changed(pair, outputs=outputs))
        assert Ran(made, sent(pairs, public=False), table).refused


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_bytes_are_refused(data: st.DataObject) -> None:
    """Bytes of the right size that no client made, and honest keys of which one bit is flipped."""
    made, table, ids = looking_up(2), uniform(DOMAIN, WIDTH), torch.tensor([3, 30])
    ((_, p),) = made.lookups.values()
    keys = [bytearray(k) for k in p.keys(ids)]
    own = keys[data.draw(st.integers(0, 2))]
    if data.draw(st.booleans()):
        own[:] = data.draw(st.binary(min_size=len(own), max_size=len(own)))
    else:
        own[data.draw(st.integers(0, len(own) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    ran = Ran(made, [bytes(k) for k in keys], table)
    if not ran.refused:  # of one bit: nobody reads it, as a correction where all control bits are zero
        assert torch.equal(ring.reduce(sum(ran.results), 40), ring.reduce(table[ids], 40))


def test_a_correction_that_nobody_reads_may_be_anything() -> None:
    """Why a flipped bit may pass: where a holder's control bits are all zero, its correction has no effect."""
    passed = 0
    for _ in range(40):
        first, second = dpf.generate([1], 2)  # one leaf: no levels, the holder of key 0 has control bit 0
        outputs = first.outputs.copy()
        outputs[0, 0] += np.uint64(1)
        moved = replace(first, outputs=outputs)
        both = dpf.evaluate(moved, 0) + dpf.evaluate(second, 1)
        passed += passes(sketch_of([both])) == [True]
    assert passed == 40


# what is seen until then


@pytest.mark.parametrize("name", [None, "two points of a leaf", "every leaf", "1 + 2^63 and 2^63"])
def test_what_parties_see_is_uniform(name: str | None) -> None:
    """Of two extreme tables, with honest and with malformed keys: rows and sketches of party 2, frames, corrections."""
    points, runs = 1500, list[list[View]]()
    made = looking_up(points)
    for value in (0, -1):
        table = torch.full((DOMAIN, WIDTH), value, dtype=torch.int64)
        pairs = []
        for _ in range(3):
            pair = dpf.generate([PLACE] * points, DOMAIN)
            if name is not None:
                one = VECTORS[name](PLACE)
                added = one[0].outputs[0] - fresh(PLACE)[0].outputs[0]
                corrections = np.ones_like(pair[0].corrections) if name == "every leaf" else pair[0].corrections
                pair = changed(pair, outputs=pair[0].outputs + added, corrections=corrections)
            pairs.append(pair)
        ran = Ran(made, sent(pairs, public=False), table)
        assert ran.refused == (name is not None)
        views = [(f"party 2: {n}", x, 40 if n == "ids/0" else 64) for n, x in ran.from_two.items()]
        for party in (0, 1):
            for i, (x, wire) in enumerate(ran.received[party]):
                if wire.size > 32:  # a hash is too short for this; see below
                    views.append((f"party {party}: {i}", x, wire.bits))
        dealt = torch.from_numpy(np.frombuffer(b"".join(ran.dealt.values()), dtype=np.int64).copy())
        views.append(("corrections", dealt, 64))
        assert len(views) == 5
        assert not leaks(views)
        runs.append(views)
    for (view, x, width), (_, y, _) in zip(*runs, strict=True):
        assert suspicious(difference(x, y), width) is None, view


def test_an_honest_clients_hash_is_known_to_its_receiver() -> None:
    """Each party receives the hash that it sends itself, so it learns nothing by it."""
    made = looking_up(3)
    ((_, p),) = made.lookups.values()
    ran = Ran(made, p.keys(torch.tensor([1, 2, 3])), uniform(DOMAIN, WIDTH))
    hashes = [x for party in (0, 1) for x, wire in ran.received[party] if wire.size == 32]
    assert torch.equal(*hashes)


def test_a_sketch_has_a_stream_of_its_own() -> None:
    """Of two look-ups in one query."""
    circuit = [
        Instruction(tp.Input((2, DOMAIN), 40, "ids", 0, 0.0, 1.0)),
        Instruction(tp.Deliver((2, DOMAIN), 40), (0,)),
        Instruction(tp.Linear((2, WIDTH), 40, "t"), (1,)),
        Instruction(tp.Linear((2, WIDTH), 40, "u"), (1,)),
        Instruction(tp.Reveal((2, WIDTH), 40), (2,)),
        Instruction(tp.Reveal((2, WIDTH), 40), (3,)),
    ]
    made = translate(circuit, [4, 5], one_hot={"ids"})
    assert list(made.from_keys) == ["ids/0", "ids/0/sketch", "ids/1", "ids/1/sketch"]
    places = [index for index, _ in made.from_keys.values()]
    assert len(set(places)) == len(places)


# inputs


def shared_input(ring_bits: int, fraction: int, low: float, high: float, count: int) -> list[Instruction]:
    return [
        Instruction(tp.Input((count,), ring_bits, "x", fraction, low, high)),
        Instruction(tp.Reveal((count,), ring_bits), (0,)),
    ]


def compared(circuit: list[Instruction], values: Sequence[int]) -> Tensor:
    """Share the integers as a client does that does not clamp; the values that come back."""
    from protocols.steps import run_pair

    made = translate(circuit, [1])
    asked = query(circuit, {"x": torch.tensor([ring.wrap(v) for v in values])}, made=made)
    (a,), (b,) = run_pair(asked.party(0), asked.party(1))
    return ring.reduce(a + b, made.results[0].bits)


@pytest.mark.parametrize(("low", "high"), [(-3.0, 4.0), (0.0, 1.0), (-8.0, 7.0), (2.0, 2.0), (-31.0, 31.0)])
def test_every_value_of_a_small_ring(low: float, high: float) -> None:
    bits = 6 if high - low < 31 else 7
    circuit = shared_input(6, 0, low, high, 1)
    for value in range(1 << bits):
        inside = low <= ring.wrap(value, bits) - (2 << bits - 1) * (ring.wrap(value, bits) >= 1 << bits - 1) <= high
        if inside:
            assert compared(circuit, [value]).tolist() == [value % 64]
        else:
            with pytest.raises(ClientDeviates, match=f"'x' is not within its range of {low:g} to {high:g}"):
                compared(circuit, [value])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), bits=st.integers(20, 64), fraction=st.integers(0, 12), count=st.integers(1, 20))
def test_any_input(data: st.DataObject, bits: int, fraction: int, count: int) -> None:
    """One element beyond its clamps, by however much, among others that are not."""
    reach = st.integers(-(2 ** min(40, bits - fraction - 2)) + 1, 2 ** min(40, bits - fraction - 2) - 1)
    low, high = sorted(data.draw(st.tuples(reach, reach)))
    circuit = shared_input(bits, fraction, float(low), float(high), count)
    least, greatest = low << fraction, high << fraction
    within = st.sampled_from([least, greatest]) | st.integers(least, greatest)
    values = data.draw(st.lists(within, min_size=count, max_size=count))
    assert torch.equal(compared(circuit, values), ring.reduce(torch.tensor(values), bits))
    ends = st.sampled_from([least - 1, greatest + 1, least + 2 ** (bits - 1), greatest - 2 ** (bits - 1)])
    at, wrong = data.draw(st.integers(0, count - 1)), data.draw(ends | st.integers(-(2**63), 2**63 - 1))
    residue = (wrong - least) % 2**bits
    assume(residue > greatest - least)
    values[at] = wrong
    with pytest.raises(ClientDeviates, match="'x' is not within"):
        compared(circuit, values)


@pytest.mark.parametrize(("low", "high"), [(-1.3, 2.7), (0.5, 0.7), (-3.1, -2.2)])
def test_whatever_an_honest_client_computes_is_within_its_clamps(low: float, high: float) -> None:
    """NaN and infinities too: a Program that makes them of some texts alone must not hear of them by a refusal."""
    values = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), 1e300, -1e300, low, high, 0.0], dtype=torch.float64
    )
    for fraction in (0, 3, 14, 20):
        circuit = shared_input(40, fraction, low, high, len(values))
        protocol = circuit[0].protocol
        assert isinstance(protocol, tp.Input)
        encoded = protocol.encode(values).tolist()
        assert compared(circuit, encoded).tolist() == [x % 2**40 for x in encoded]


def test_a_fraction_within_the_clamps_passes() -> None:
    """A range says no more: a mask of one half is not found out."""
    assert compared(shared_input(40, 8, 0.0, 1.0, 2), [128, 256]).tolist() == [128, 256]


def test_what_an_input_costs() -> None:
    circuit = shared_input(64, 8, -1.0, 1.0, 64)
    plain, checked = (translate(circuit, [1], trusted_clients=trusted).cost for trusted in (True, False))
    opened, bits = tp.Open((64,), 64).cost(), tp.Compare((64,), 64, 0, (-256, 257)).cost()
    assert plain == CircuitCost()
    assert checked == replace(opened + bits + InRange("x", (64,), -1.0, 1.0).cost(), rounds=4)
    assert (bits.to_first, InRange("x", (64,), -1.0, 1.0).cost().to_first) == (528, 32)


def test_an_opening_of_an_input_serves_its_readers_too() -> None:
    circuit = [
        Instruction(tp.Input((4,), 64, "x", 8, -1.0, 1.0)),
        Instruction(tp.Open((4,), 30), (0,)),
        Instruction(tp.Product((4,), 30), (1, 1)),
        Instruction(tp.Reveal((4,), 30), (2,)),
    ]
    made = translate(circuit, [3])
    kinds = [i.protocol.kind for i in made.circuit]
    assert kinds == ["shared_input", "open", "compare", "in_range", "product"]
    assert made.circuit[1].protocol == tp.Open((4,), 64)
    assert made.circuit[4].inputs == (1, 1)
    assert made.origin == (0, 0, 0, 0, 2)


def test_a_range_of_half_a_ring_is_compared_in_a_wider_one() -> None:
    circuit = shared_input(6, 0, -31.0, 31.0, 3)
    made = translate(circuit, [1])
    assert made.circuit[0].protocol.out.bits == 7
    assert made.results[0].bits == 6
    assert compared(circuit, [-31, 0, 31]).tolist() == [33, 0, 31]


@pytest.mark.parametrize(("low", "high", "fraction"), [(-1e300, 1e300, 63), (0.0, 2.0**62, 0), (-(2.0**40), 0.0, 30)])
def test_clamps_that_nothing_can_be_compared_with_are_refused(low: float, high: float, fraction: int) -> None:
    circuit = shared_input(64, fraction, low, high, 1)
    with pytest.raises(ValueError, match="too wide to compare it with"):
        translate(circuit, [1])
    translate(circuit, [1], trusted_clients=True)


def test_one_hot_rows_that_are_not_looked_up_are_refused() -> None:
    circuit = shared_input(64, 0, 0.0, 1.0, 4)
    with pytest.raises(ValueError, match="one-hot rows of 'x' are not looked up"):
        translate(circuit, [1], one_hot={"x"})


def test_a_deployment_says_so_in_the_words_of_a_program() -> None:
    program = classifier()[1].program
    wide = [
        replace(i, protocol=replace(i.protocol, high=1e300)) if isinstance(i.protocol, tp.Input) else i
        for i in program.circuit
    ]
    with pytest.raises(InvalidProgram, match="three parties cannot run this Program: the input 'plain"):
        ThreeParty().translated(replace(program, circuit=tuple(wide)))


# a whole model


@pytest.mark.parametrize("public", [False, True])
def test_no_round_more(public: bool) -> None:
    program = classifier()[1].program
    trusted, checked = (
        ThreeParty(public_weights=public, trusted_clients=trusted).translated(program).cost for trusted in (True, False)
    )
    assert trusted.rounds == checked.rounds
    opened = 24 * 8 if public else 0  # nothing else opens the input of a public layer: in a ring of at most 64 bits
    assert 0 < checked.to_first - trusted.to_first < opened + 250
    assert 0 < checked.dealt - trusted.dealt < 2000


def test_checks_are_timed_without_a_peer() -> None:
    """A profile runs one party against zeros, which are no honest peer's hash."""
    deployed = ThreeParty().deployed(classifier()[1].program)
    timings = measure(deployed, repeats=1)
    found = [index for index, i in enumerate(deployed.circuit) if i.protocol.checks]
    assert found
    assert all(len(timings.segments[party][index]) == 2 for party in (0, 1) for index in found)


def test_every_combination_of_options_is_served_as_it_was_compiled() -> None:
    for public, trusted in itertools.product((False, True), repeat=2):
        deployment = ThreeParty(public_weights=public, trusted_clients=trusted)
        assert ThreeParty.served(deployment.compiled_as()) == deployment


def test_checks_fit_their_operands() -> None:
    sketch = Instruction(UnitVectors("x", 2, 3)).protocol
    with pytest.raises(ValueError, match="a sketch of 3 pairs of 2 keys"):
        sketch.check_operands([tp.Open((2, 5), 64)])
    with pytest.raises(ValueError, match="two bits of each of 9"):
        InRange("x", (9,), 0.0, 1.0).check_operands([tp.Compare((9,), 8, 0, (1,))])
    assert checks._last(8) == 255
    assert [checks._last(n) for n in (1, 2, 7, 9)] == [1, 3, 127, 1]


def test_coins_are_those_of_a_pair() -> None:
    """Whoever has other coins than the other holder finds honest keys malformed."""
    v = unit(4, 9).unsqueeze(0)
    shares = uniform(1, 9)
    out = torch.zeros((1, 4), dtype=torch.int64)
    for party, (share, coin) in enumerate(((shares, Key(bytes(16))), (v - shares, Key(bytes(15) + b"1")))):
        sketch = Sketch(1, party, coin.stream(0))
        sketch.add(slice(0, 1), 0, share)
        out += joined({0: sketch}, 1)
    assert passes(out) == [False]
