"""Linear layers whose weights the server holds in the clear: y = x W, without any message from the server.

Once per model: dealer and server expand a mask B for W from a seed; the server gives the client D = W - B.
Before each query: the client draws r; the dealer gives the server u = r B + s, and the client keeps c = r D - s.
1. (``Deliver``) The client sends x_C - r; the server then knows x - r. One delivery serves every layer that reads x.
2. (``Linear``) The server's share is (x - r) W + u, the client's is c: they sum to (x - r) W + r B + r D = x W.
The client knows its share beforehand and computes nothing online. (Source: Delphi, whose encryption a dealer replaces
here; the weight mask is reused as in CrypTen's caching and ABY2.0.)
Seen by the server: x_C - r and u, masked by r and s, which it never learns. Seen by the client: D, masked by B, once.
B belongs to one set of weights: under two sets, D_1 - D_2 would show their difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from protocols.fields import Flag, Name, Ring, Shape
from protocols.local import Windowed
from protocols.protocol import (
    CLIENT,
    CircuitCost,
    Draw,
    Exchange,
    Material,
    Protocol,
    Silent,
    Step,
    Weights,
    bytes_of,
    count,
    receive_one,
    weighted,
)
from protocols.wire import Wire


@dataclass(frozen=True)
class Deliver(Protocol):
    """Deliver x - r to the server, under a mask r that the client alone draws.

    Rounds 1; ring / 8 bytes an element to the server; nothing to the client, nothing offline. Exact.
    """

    kind: ClassVar[str] = "deliver"
    elementwise: ClassVar[bool] = True
    gives: ClassVar[str] = "delivery"
    shape: Shape
    ring: Ring

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("r", self.shape, self.ring, holder=CLIENT),)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {}, masks["r"]

    def offline(self, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        return material["r"]

    def run(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Step[Any]:
        (x,) = operands
        if party == CLIENT:
            yield Exchange(((x - material["r"], self.out),))
            return material["r"]
        (masked,) = yield receive_one(self.out)
        return x + masked

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return operands[0]

    def cost(self) -> CircuitCost:
        return CircuitCost(1, to_first=bytes_of(self.shape, self.ring))


@dataclass(frozen=True)
class DeliveredPatches(Windowed, Silent):
    """The delivery of the patches of x, from a delivery of x: a convolution is the linear map of every patch.

    Each party copies entries of what it holds. Rounds 0; nothing is sent, nothing dealt. Exact.
    Seen by the server: nothing new. An entry of r masks the same entry of x in every patch, and nothing else.
    """

    kind: ClassVar[str] = "delivered_patches"
    reads: ClassVar[tuple[str, ...]] = ("delivery",)
    gives: ClassVar[str] = "delivery"

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {}, self.window.patches(operands[0])

    def offline(self, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.window.patches(operands[0])

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.window.patches(operands[0])

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self.window.patches(operands[0])


@dataclass(frozen=True)
class Linear(Silent):
    """[x W] modulo 2^ring from a delivery of x; ``diagonal``: the elementwise product with a vector.

    Rounds 0; offline ring / 8 bytes an output element to the server. Exact modulo 2^ring.
    """

    kind: ClassVar[str] = "linear"
    weight_field: ClassVar[str] = "weight"
    reads: ClassVar[tuple[str, ...]] = ("delivery",)
    finished_offline: ClassVar[bool] = True
    shape: Shape  # of the result
    ring: Ring
    weight: Name
    diagonal: Flag = False

    @property
    def out(self) -> Wire:
        return Wire(self.shape, self.ring)

    @property
    def draws(self) -> tuple[Draw, ...]:
        return (Draw("u", self.shape, self.ring, derived=True),)

    def _product(self, x: Any, weights: Weights) -> Any:
        return weights.multiply(x, self.weight, self.ring, diagonal=self.diagonal)

    def deal(self, masks: Material, operands: tuple[Any, ...], weights: Weights) -> tuple[dict[str, Any], Any]:
        return {"u": self._product(operands[0], weights)}, None

    def deal_together(
        self, masks: Sequence[Material], operands: Sequence[tuple[Any, ...]], weights: Weights
    ) -> list[tuple[dict[str, Any], Any]]:
        return [({"u": product}, None) for product in self._products(operands, weights)]

    def offline(self, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self._product(operands[0], weights) + material["u"]

    def offline_together(
        self, materials: Sequence[Material], operands: Sequence[tuple[Any, ...]], weights: Weights
    ) -> list[Any]:
        products = self._products(operands, weights)
        return [product + material["u"] for product, material in zip(products, materials, strict=True)]

    def _products(self, operands: Sequence[tuple[Any, ...]], weights: Weights) -> Sequence[Any]:
        """Return the products of several queries: one of all their rows, which reads the matrix once."""
        if self.diagonal or len(operands) == 1:
            return [self._product(x, weights) for (x,) in operands]
        return torch.unbind(self._product(torch.stack([x for (x,) in operands]), weights))

    def compute(self, party: int, material: Material, operands: tuple[Any, ...], weights: Weights) -> Any:
        # the client runs this only if nothing was prepared; its operand is r then, and the result is r D - s as well
        return self._product(operands[0], weights) + material["u"]

    def clear(self, operands: tuple[Any, ...], weights: Weights) -> Any:
        return self._product(operands[0], weights)

    def cost(self) -> CircuitCost:
        return CircuitCost(dealt=bytes_of(self.shape, self.ring))

    def shape_of(self, operands: Sequence[Shape], weights: Mapping[str, Shape]) -> Shape:
        return weighted(operands[0], self.weight, weights, diagonal=self.diagonal)

    def products(self, weights: Mapping[str, Shape], operands: Sequence[Shape]) -> int:
        """Count the server's products only: the client computes its own before the query."""
        return 0 if self.diagonal else count(self.shape) * weights[self.weight][0]
