"""What every protocol is: a frozen object of sizes whose verbs are local steps; nothing here moves a byte.

A protocol says

- which correlated randomness it needs (``draws``) and how the dealer completes it (``deal``),
- what the parties do online (``run``, a generator that yields what it must exchange and is resumed with
  what came back),
- what it means on plain residues (``clear``), and what it costs (``cost``, as formulas that tests measure).

Values at run time are torch tensors or small tuples of them:

- a *share*: int64 tensor, this party's summand of x modulo 2^ring;
- an *opening*: ``Opening(z, r)``: z = x + r is known to both parties, r is this party's share of the mask;
- a *delivery*: ``Delivery(x - r)`` at the server, whose client alone knows r;
- *bits*: packed planes, this party's XOR share; and a *bit opening* ``Opening(c, beta)``, the same with XOR.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from protocols import bits, ring
from protocols.wire import Wire

SERVER, CLIENT = 0, 1
PARTY_NAMES = ("server", "client")

Shape = tuple[int, ...]
T = TypeVar("T")


class Exchange(NamedTuple):
    """One round: the tensors to send, and the forms of those to receive (either may be empty)."""

    send: tuple[tuple[Tensor, Wire], ...] = ()
    receive: tuple[Wire, ...] = ()


Step = Generator[Exchange, tuple[Tensor, ...], T]


class Opening(NamedTuple):
    """A masked value that both parties know, and this party's share of the mask."""

    value: Tensor
    mask: Tensor


class WeightUse(NamedTuple):
    """A weight that a protocol reads, and the ring it is read in.

    ``multiplied``: its shape is public then, and a party may hold it masked. Where it is added, its shape is the
    server's affair: the parties that know only the Program see what it is broadcast to.
    """

    name: str
    ring: int
    multiplied: bool


@dataclass(frozen=True)
class Draw:
    """One tensor of correlated randomness.

    A *mask* is drawn by its holders from their own streams, and the dealer knows the sum (or XOR). A *derived* draw is
    a function of masks that only the dealer can compute: the client's share comes from its stream, the server's is a
    correction that the dealer sends; being masked by the client's share, it is uniform to the server.
    """

    name: str
    shape: Shape
    bits: int = ring.WORD
    planes: bool = False  # packed bits, shared by XOR
    xor: bool = False  # 64-bit words shared by XOR
    derived: bool = False
    holder: int | None = None  # a mask that one party alone holds; None: both hold a share

    @property
    def wire(self) -> Wire:
        return Wire(self.shape, self.bits, self.planes)

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        return a ^ b if self.planes or self.xor else a + b

    def remove(self, total: Tensor, share: Tensor) -> Tensor:
        """The other share."""
        return total ^ share if self.planes or self.xor else ring.reduce(total - share, self.bits)


@dataclass(frozen=True)
class CircuitCost:
    """Rounds and bytes of one run between the two parties that compute: the first (0) and the second (1).

    to_first, to_second: payload bytes of the rounds; framing is the channel's. dealt: bytes of corrections that the
    first party gets ahead. Who these parties are is the deployment's to say.
    """

    rounds: int = 0
    to_first: int = 0
    to_second: int = 0
    dealt: int = 0

    def __add__(self, other: CircuitCost) -> CircuitCost:
        """Costs in sequence."""
        return CircuitCost(*(a + b for a, b in zip(self.astuple(), other.astuple(), strict=True)))

    def astuple(self) -> tuple[int, int, int, int]:
        return (self.rounds, self.to_first, self.to_second, self.dealt)


Material = Mapping[str, Tensor]


class Weights(ABC):
    """What a party holds of the server's weights: the integers (server), W - B (client) or B (dealer)."""

    @abstractmethod
    def multiply(self, x: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        """x @ held(name) (or x * held(name)) modulo 2^ring_bits."""

    def opened_product(self, value: Tensor, mask: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        """This party's summand of x @ W (or x * W) from an opening of x, where the weights are shared."""
        raise LookupError(f"{name!r} is not shared")

    def summand(self, name: str) -> Tensor | None:
        """This party's summand of a weight that is added (a bias, position embeddings); None: it adds nothing."""
        return None


class Protocol(ABC):
    """Base of every protocol; subclasses are frozen dataclasses whose fields are integers, strings and tuples."""

    kind: ClassVar[str]
    error: ClassVar[str] = "exact"
    reads: ClassVar[tuple[str, ...]] = ("share",)  # kinds of the operands; "..." repeats the one before it
    gives: ClassVar[str] = "share"
    elementwise: ClassVar[bool] = False  # masks or loops over its operands' elements, so their shape must be its own
    finished_offline: ClassVar[bool] = False  # whether the client's ``offline`` is already its result
    weight_field: ClassVar[str] = ""  # the field that names the weight that it reads, where it reads one
    multiplies: ClassVar[bool] = True  # by that weight; False: it adds it
    in_programs: ClassVar[bool] = True  # False: of one deployment, which makes it from what a Program names
    registry: ClassVar[dict[str, type[Protocol]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            Protocol.registry[cls.kind] = cls

    @property
    @abstractmethod
    def out(self) -> Wire:
        """Shape and ring of the result (planes for bits)."""

    @property
    def draws(self) -> tuple[Draw, ...]:
        return ()

    @property
    def operand_kinds(self) -> tuple[str, ...]:
        """``reads``, where it depends on the fields."""
        return self.reads

    @property
    def operand_ring(self) -> int:
        """The ring that operands must at least have for the result to be right; 0 where they are bits or absent."""
        return int(getattr(self, "ring", 0))

    @property
    def weight_use(self) -> WeightUse | None:
        """The weight that it reads; None where it reads none."""
        if not self.weight_field:
            return None
        return WeightUse(getattr(self, self.weight_field), self.out.bits, self.multiplies)

    @property
    def dealt_bytes(self) -> int:
        """Bytes of its corrections: what the dealer sends the first party for one use."""
        return sum(d.wire.size for d in self.draws if d.derived)

    @property
    def works_offline(self) -> bool:
        """Whether ``offline`` gives something, so that the client runs it before a query."""
        return type(self).offline is not Protocol.offline

    def input_of(self, party: int) -> str | None:
        """The input that this party must have, where this is one."""
        return None

    def validate(self) -> None:  # noqa: B027 - most protocols have nothing to check
        """ValueError where the fields make no sense by themselves; sizes against operands are ``circuit.check``'s."""

    def check_operands(self, operands: Sequence[Protocol]) -> None:  # noqa: B027 - kinds, rings and shapes mostly do
        """ValueError where what it reads does not suffice, beyond the kinds, rings and shapes that all protocols have
        and ``circuit.check`` compares.
        """

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Tensor], Any]:
        """Dealer: from the plain masks drawn here and those of the operands,
        the derived totals and this result's mask.
        """
        return {}, None

    def offline(self, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        """Client, before the query: what of the result is known without any input (None: nothing)."""
        return None

    @abstractmethod
    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        """One party's online part."""

    @abstractmethod
    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        """The same function of plain residues: the fixed-point reference (no security)."""

    def cost(self) -> CircuitCost:
        return CircuitCost()

    def memory(self) -> int:
        """Bytes of its result in one party's memory: 8 a ring element, packed bits as they are."""
        size = count(self.out.shape) * (1 if self.out.planes else 8)
        return 2 * size if self._opens else size

    def products(self, weights: Mapping[str, Shape], operands: Sequence[Shape]) -> int:
        """Multiply-accumulates of both parties in matrix products; elementwise products count as nothing.

        ``weights``: shapes by name; ``operands``: shapes of what it reads, in order.
        """
        return 0

    def comparisons(self) -> int:
        """How many numbers it compares with a threshold."""
        return 0

    def stand_in(self) -> Any:
        """A result of the right form, made of zeros: what reads it can be timed without it."""
        value = torch.zeros(self.out.shape, dtype=self.out.dtype)
        return Opening(value, value) if self._opens else value

    @property
    def _opens(self) -> bool:
        return self.gives in ("opening", "bit opening")


class Local(Protocol):
    """A protocol without messages or correlations: each party applies ``apply`` to its shares."""

    @abstractmethod
    def apply(self, party: int, operands: tuple[Any, ...], weights: Weights) -> Any: ...

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        return self.apply(party, operands, weights)
        yield  # makes this a generator that never yields

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.apply(SERVER, operands, weights)


def count(shape: Shape) -> int:
    return math.prod(shape)


def bytes_of(shape: Shape, ring_bits: int) -> int:
    """Wire bytes of a tensor of ring elements."""
    return count(shape) * -(-ring_bits // 8)


def plane_shape(shape: Shape, planes: int = 1) -> Shape:
    """The packed form of ``planes`` bits of each element of a tensor."""
    return (planes, bits.plane_bytes(count(shape)))


def receive_one(wire: Wire) -> Exchange:
    return Exchange((), (wire,))


def swap(x: Tensor, wire: Wire) -> Exchange:
    """Send a tensor and receive one of the same form."""
    return Exchange(((x, wire),), (wire,))


def empty_like(wire: Wire, device: str = "cpu") -> Tensor:
    return torch.empty(wire.shape, dtype=wire.dtype, device=device)
