"""What each party holds of the server's weights: the server the integers W, the dealer a mask B, the client D = W - B.

B is expanded from a seed that the server and the dealer share, one stream a weight, as uniform 64-bit words; modulo a
narrower ring its low bits are used. D is public to the client only, made once per model, and holds ``ring`` bits an
element: enough for the widest product that a Program of that model takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from protocols import ring
from protocols.matmul import Matrix
from protocols.prg import Key
from protocols.protocol import Weights


class _Held(Weights):
    """Integer tensors by name, packed for matrix products once per ring."""

    signed = False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._packed: dict[tuple[str, int], Matrix] = {}

    def multiply(self, x: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        if diagonal:
            return x * self._tensors[name]
        key = (name, ring_bits)
        if key not in self._packed:
            self._packed[key] = Matrix(self._tensors[name], ring_bits, signed=self.signed)
        return self._packed[key].times(x)


class ServerWeights(_Held):
    """The integers themselves; products use true signed widths."""

    signed = True

    def summand(self, name: str) -> Tensor | None:
        return self._tensors[name]

    def masked(self, mask: DealerWeights, rings: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
        """D = W - B, one by one, for the weights that products use, reduced to ``rings`` bits: what the client gets."""
        for name, bits in rings.items():
            yield name, ring.reduce(self._tensors[name] - mask.mask(name), bits)


class ClientWeights(_Held):
    """D = W - B. Being uniform without B, it says nothing of W."""


class DealerWeights(_Held):
    """B, from the seed's key and the weights' shapes; expanded on first use."""

    def __init__(self, key: Key, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__({})
        self._key, self._shapes = key, dict(shapes)

    def mask(self, name: str) -> Tensor:
        """B of one weight: uniform 64-bit words.

        The stream's number comes from the name, so that Programs may share B.
        """
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return self._key.stream(number).words(self._shapes[name])

    def multiply(self, x: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = self.mask(name)
        return super().multiply(x, name, ring_bits, diagonal=diagonal)
