"""The base class of all protocols: a protocol is a frozen object of sizes, and its methods are local steps.

A protocol defines

- the correlated randomness that it needs (``draws``) and how the dealer completes it (``deal``),
- what the parties do online (``run``, a generator that yields what it must exchange and is resumed with
  what came back),
- its function on plain residues (``clear``), and its cost (``cost``, as formulas that tests check by measuring).

Nothing here moves a byte. Values at run time are torch tensors or small tuples of them:

- a *share*: an int64 tensor, this party's summand of x modulo 2^ring;
- an *opening*: ``Opening(z, r)``: both parties know z = x + r, and r is this party's share of the mask;
- a *lifted opening*: the same over the integers, for a wider ring (see ``two_party.lift``);
- a *delivery*: the tensor x - r at the server and r at the client, who alone knows r;
- *public*: an int64 tensor that both parties know;
- *bits*: packed planes, this party's XOR share; and a *bit opening* ``Opening(c, beta)``, the same with XOR.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from protocols import bits, fields, ring
from protocols.kernels import Array
from protocols.wire import Wire, store_difference

SERVER, CLIENT = 0, 1
PARTY_NAMES = ("server", "client")

Shape = fields.Shape
T = TypeVar("T")


class Exchange(NamedTuple):
    """One round: the tensors to send with their forms, and the forms of those to receive; either may be empty."""

    send: tuple[tuple[Tensor, Wire], ...] = ()
    receive: tuple[Wire, ...] = ()


Step = Generator[Exchange, tuple[Tensor, ...], T]


class Opening(NamedTuple):
    """A masked value, which both parties know, and this party's share of its mask."""

    value: Tensor
    mask: Tensor


class Rows(NamedTuple):
    """A derived total of few different rows, which is never held as a whole: its i-th row is table[row[i]].

    table: (rows, elements of one row); row: (n,) int64.
    """

    table: Tensor
    row: Tensor


class WeightUse(NamedTuple):
    """A weight that a protocol reads, and the ring in which it reads it.

    multiplied: True if the weight is multiplied; then its shape is public, and a party may hold it masked. If it is
    added, its shape stays with the server: parties that know only the Program see the shape it is broadcast to.
    """

    name: str
    ring: int
    multiplied: bool


@dataclass(frozen=True)
class Draw:
    """One tensor of correlated randomness.

    Its holders draw a *mask* from their own streams, and the dealer knows the sum (or XOR). A *derived* draw is a
    function of masks that only the dealer can compute: the client's share comes from its stream, and the server's share
    is a correction that the dealer sends. The client's share masks that correction, so it is uniform to the server.
    """

    name: str
    shape: Shape
    bits: int = ring.WORD
    planes: bool = False  # packed bits, shared by XOR
    octets: bool = False  # bytes, shared by addition modulo 2^8: a stream and memory spend one byte on each
    xor: bool = False  # 64-bit words shared by XOR
    derived: bool = False
    holder: int | None = None  # the one party that holds this mask; None: both hold a share

    @cached_property
    def drawn_bytes(self) -> int:
        """Bytes of a stream that a share takes."""
        return count(self.shape) * (1 if self.wire.planes else ring.WORD // 8)

    @cached_property
    def wire(self) -> Wire:
        return Wire(self.shape, 8, planes=True) if self.planes or self.octets else Wire(self.shape, self.bits)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the mask of two shares, in the memory of the first."""
        return a.bitwise_xor_(b) if self.planes or self.xor else a.add_(b)

    def remove(self, total: Array, share: Array, out: Array, at: int) -> None:
        """Write the other share of ``total`` to ``out``, as bytes on the wire.

        total, share: the elements ``at``, ``at`` + 1, ... of the tensor, ``at`` a multiple of 8. out: the bytes of all.
        """
        if self.planes or self.octets:
            (np.bitwise_xor if self.planes else np.subtract)(total, share, out=out[at : at + len(total)])
        elif self.bits == ring.WORD:
            words = total ^ share if self.xor else total - share
            out[8 * at : 8 * (at + len(total))] = words.view(np.uint8)
        else:
            store_difference(total, share, self.bits, out, count(self.shape), at)


@dataclass(frozen=True)
class CircuitCost:
    """Rounds and bytes of one run between the two parties that compute, the first (0) and the second (1).

    to_first, to_second: payload bytes of the rounds, without the channel's framing. dealt: bytes of corrections that
    the first party receives before the query. brought: bytes that the dealer sends the first party within the query.
    The deployment determines who these parties are.
    """

    rounds: int = 0
    to_first: int = 0
    to_second: int = 0
    dealt: int = 0
    brought: int = 0

    def __add__(self, other: CircuitCost) -> CircuitCost:
        """Add the costs of two runs, one after the other."""
        return CircuitCost(*(a + b for a, b in zip(self.astuple(), other.astuple(), strict=True)))

    def astuple(self) -> tuple[int, int, int, int, int]:
        return (self.rounds, self.to_first, self.to_second, self.dealt, self.brought)


Material = Mapping[str, Tensor]


class Weights(ABC):
    """One party's part of the server's weights: the integers W (server), W - B (client) or B (dealer)."""

    @abstractmethod
    def multiply(self, x: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        """Return x @ held(name), or x * held(name) if ``diagonal``, modulo 2^ring_bits."""

    def opened_product(self, value: Tensor, mask: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        """Return this party's summand of x @ W (or x * W) from an opening of x; LookupError if W is not shared."""
        raise LookupError(f"{name!r} is not shared")

    def summand(self, name: str) -> Tensor | None:
        """Return this party's summand of a weight that is added (a bias, position embeddings); None to add nothing."""
        return None


class Protocol(ABC):
    """Base class of every protocol. Subclasses are frozen dataclasses whose fields are integers, strings and tuples.

    A field is annotated with a type of ``protocols.fields``, which bounds it. ``validate`` checks fields against one
    another; only then may anything be derived from them (``out``, ``draws``, ``cost``).
    """

    kind: ClassVar[str]
    error: ClassVar[str] = "exact"
    reads: ClassVar[tuple[str, ...]] = ("share",)  # kinds of the operands; "..." repeats the one before it
    gives: ClassVar[str] = "share"
    elementwise: ClassVar[bool] = False  # True if it masks or loops over elements: operands must have its own shape
    finished_offline: ClassVar[bool] = False  # True if the client's ``offline`` is already its result
    weight_field: ClassVar[str] = ""  # the field that names the weight that it reads; "" if it reads none
    multiplies: ClassVar[bool] = True  # True: it multiplies by that weight; False: it adds it
    exchanges: ClassVar[bool] = True  # False: it sends nothing (``Silent``)
    checks: ClassVar[bool] = False  # True if it raises an error for messages that do not fit together
    in_programs: ClassVar[bool] = True  # False: only one deployment's translation of a Program makes it
    registry: ClassVar[dict[str, type[Protocol]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("out", "draws"):  # an instance is frozen, and asked in every query
            if isinstance(found := cls.__dict__.get(name), property) and found.fget is not None:
                kept = cached_property(found.fget)
                kept.__set_name__(cls, name)
                setattr(cls, name, kept)
        if "kind" in cls.__dict__:
            Protocol.registry[cls.kind] = cls

    @property
    @abstractmethod
    def out(self) -> Wire:
        """The form of the result: shape and ring, or planes of bits."""

    @property
    def draws(self) -> tuple[Draw, ...]:
        return ()

    @property
    def operand_kinds(self) -> tuple[str, ...]:
        """The kinds of the operands; a subclass overrides this if ``reads`` depends on its fields."""
        return self.reads

    @property
    def operand_ring(self) -> int:
        """The narrowest ring of the operands for which the result is right; 0 if they are bits or absent."""
        return int(getattr(self, "ring", 0))

    @property
    def weight_use(self) -> WeightUse | None:
        """The weight that it reads; None if it reads none."""
        if not self.weight_field:
            return None
        return WeightUse(getattr(self, self.weight_field), self.out.bits, self.multiplies)

    @cached_property
    def masks(self) -> tuple[Draw, ...]:
        """The draws that are no more than drawn; a party reads them from its stream before those that are derived."""
        return tuple(d for d in self.draws if not d.derived)

    @cached_property
    def derived(self) -> tuple[Draw, ...]:
        """The draws that the dealer derives from masks."""
        return tuple(d for d in self.draws if d.derived)

    @cached_property
    def held(self) -> tuple[tuple[Draw, ...], tuple[Draw, ...]]:
        """The masks of which each party holds a share, or the whole."""
        server, client = (tuple(d for d in self.masks if d.holder in (None, party)) for party in (SERVER, CLIENT))
        return server, client

    @cached_property
    def drawn(self) -> tuple[tuple[Draw, ...], tuple[Draw, ...]]:
        """The draws that each party reads from its stream, in order; the first party's derived ones are dealt to it."""
        return self.held[SERVER], (*self.held[CLIENT], *self.derived)

    @cached_property
    def drawn_bytes(self) -> tuple[int, int]:
        """Bytes that each party reads from its stream."""
        first, second = (sum(d.drawn_bytes for d in draws) for draws in self.drawn)
        return first, second

    @cached_property
    def dealt_bytes(self) -> int:
        """Bytes of the corrections that the dealer sends to the first party for one use."""
        return sum(d.wire.size for d in self.derived)

    @cached_property
    def deals(self) -> bool:
        """True if the dealer has a part: it deals something, or gives the mask of the result."""
        own = type(self)
        return bool(self.draws) or own.deal is not Protocol.deal or own.deal_together is not Protocol.deal_together

    @property
    def works_offline(self) -> bool:
        """True if it has an ``offline`` part, which the client runs before a query."""
        return type(self).offline is not Protocol.offline

    @property
    def recalls(self) -> str:
        """The name of the opening of earlier queries that it reads, whose mask the dealer has; "" if it reads none."""
        return ""

    @property
    def keeps(self) -> str:
        """The name under which its result is kept for later queries; "" if it is not."""
        return ""

    def input_of(self, party: int) -> str | None:
        """Return the name of the input that this party must have; None if this protocol is no input."""
        return None

    def validate(self) -> None:  # noqa: B027 - most protocols have nothing to check
        """Raise ValueError if the fields contradict each other; ``circuit.check`` compares sizes with the operands'."""

    def check_operands(self, operands: Sequence[Protocol]) -> None:  # noqa: B027 - kinds, rings and shapes mostly do
        """Raise ValueError if the operands do not suffice.

        ``circuit.check`` compares kinds, rings and shapes for all protocols; this is for everything beyond those.
        """

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        """Return the shape that the result has by the operands' shapes; ``circuit.check`` compares it with ``out``.

        weights: shapes by name. It takes integers alone, so that a check costs next to nothing. The base is for inputs
        and for what is ``elementwise``, whose operands have its own shape, and else keeps the first operand's. Raises
        ValueError or LookupError if the operands do not fit.
        """
        return tuple(operands[0]) if operands and not self.elementwise else self.out.shape

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        """Dealer: return the derived totals by name, and the mask of this result for its readers (None: it has none).

        A total is a tensor of its draw's shape, or ``Rows``.

        masks: the plain masks drawn for this protocol; operands: the masks of its operands.
        """
        return {}, None

    def offline(self, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        """Client, before the query: return the part of its result that needs no input; None if there is none."""
        return None

    def deal_together(
        self, masks: Sequence[Material], operands: Sequence[tuple[Any, ...]], weights: Weights
    ) -> list[tuple[dict[str, Any], Any]]:
        """Dealer: return what ``deal`` returns, for each of several queries: a subclass may take one product."""
        return [self.deal(*each, weights) for each in zip(masks, operands, strict=True)]

    def offline_together(
        self, materials: Sequence[Material], operands: Sequence[tuple[Any, ...]], weights: Weights
    ) -> list[Any]:
        """Client: return what ``offline`` returns, for each of several queries."""
        return [self.offline(*each, weights) for each in zip(materials, operands, strict=True)]

    @abstractmethod
    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        """Run one party's online part."""

    @abstractmethod
    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        """Compute the same function of plain residues: the fixed-point reference, without any security."""

    def cost(self) -> CircuitCost:
        return CircuitCost()

    def memory(self) -> int:
        """Return the bytes that its result takes in one party's memory: 8 a ring element, 1 a byte of packed bits."""
        size = count(self.out.shape) * (1 if self.out.planes else 8)
        return 2 * size if self._opens else size

    def scratch(self) -> int:
        """Return the bytes that it takes while it runs, beyond its operands, its draws and its result."""
        return 0

    def products(self, weights: Mapping[str, Shape], operands: Sequence[Shape]) -> int:
        """Count the multiply-accumulates of both parties in matrix products; elementwise products are not counted.

        weights: shapes by name; operands: shapes of the operands, in order.
        """
        return 0

    def comparisons(self) -> int:
        """Count the comparisons of a number with a threshold."""
        return 0

    def fitted(self) -> int:
        """Count the terms of floating-point sums that the dealer computes for it; 0 if it deals sums and products."""
        return 0

    def repeated(self) -> int:
        """Count the elements that it goes over again and again, beyond its operands and its result once."""
        return 0

    def stand_in(self) -> Any:
        """Return a result of the right form made of zeros, so that its readers can be timed without computing it."""
        value = torch.zeros(self.out.shape, dtype=self.out.dtype)
        return Opening(value, value) if self._opens else value

    @property
    def _opens(self) -> bool:
        return self.gives in ("opening", "bit opening")


class Silent(Protocol):
    """A protocol without messages: with what was dealt, each party computes its part alone."""

    exchanges: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "run" in cls.__dict__:
            raise TypeError(f"{cls.__name__}.run would never be called: write compute, or derive from Protocol")

    @abstractmethod
    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        """Compute one party's online part."""

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        return self.compute(party, material, operands, weights)
        yield  # makes this a generator that never yields


class Local(Silent):
    """A protocol without messages or correlations: each party applies ``apply`` to its shares."""

    @abstractmethod
    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any: ...

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.apply(party, operands, weights)

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.apply(SERVER, operands, weights)


def count(shape: Shape) -> int:
    return math.prod(shape)


def broadcast(a: Shape, b: Shape) -> Shape:
    """Return the shape of an elementwise result, as torch broadcasts; raises ValueError if there is none."""
    rank = max(len(a), len(b))
    padded = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    out = tuple(y if x == 1 else x for x, y in padded)
    if any(x not in (1, n) for shape in (a, b) for x, n in zip(reversed(shape), reversed(out), strict=False)):
        raise ValueError(f"the shapes {a} and {b} do not go together")
    return out


def expanded(shape: Shape, wanted: Shape) -> Shape:
    """Return ``wanted`` if a tensor of ``shape`` can be expanded to it, as torch does it; else raises ValueError."""
    if len(shape) > len(wanted) or broadcast(shape, wanted) != wanted:
        raise ValueError(f"the shape {shape} cannot be expanded to {wanted}")
    return wanted


def matrix_product(a: Shape, b: Shape) -> Shape:
    """Return the shape of a @ b, as torch multiplies matrices in batches; raises ValueError if there is none."""
    if not a or not b or a[-1] != b[-2 if len(b) > 1 else 0]:
        raise ValueError(f"the shapes {a} and {b} cannot be multiplied as matrices")
    return (*broadcast(a[:-2], b[:-2]), *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))


def weighted(x: Shape, name: str, weights: Mapping[str, Shape], *, diagonal: bool) -> Shape:
    """Return the shape of x @ W, or of x * W if ``diagonal``, for the weight ``name``; W is a matrix, or a vector.

    Raises ValueError if they do not fit, LookupError if the weight is unknown.
    """
    weight = weights[name]
    if diagonal:
        return broadcast(x, weight)
    if len(weight) != 2:
        raise ValueError(f"the weight {name!r} has the shape {weight}, which is no matrix")
    return matrix_product(x, weight)


def bytes_of(shape: Shape, ring_bits: int) -> int:
    """Return the bytes on the wire of a tensor of ring elements: ring_bits / 8 an element, or a little more.

    Docstrings of protocols say "ring / 8 bytes an element". Exactly, each of the ring_bits % 8 bits above the whole
    bytes takes ceil(n / 8) bytes for n elements (see ``wire``).
    """
    return Wire(shape, ring_bits).size


def plane_shape(shape: Shape, planes: int = 1) -> Shape:
    """Return the shape of the packed planes that hold ``planes`` bits of each element of a tensor."""
    return (planes, bits.plane_bytes(count(shape)))


def receive_one(wire: Wire) -> Exchange:
    return Exchange((), (wire,))


def swap(x: Tensor, wire: Wire) -> Exchange:
    """Return the exchange that sends a tensor and receives one of the same form."""
    return Exchange(((x, wire),), (wire,))


def empty_like(wire: Wire, device: str = "cpu") -> Tensor:
    return torch.empty(wire.shape, dtype=wire.dtype, device=device)
