"""Each party's part of the server's weights: the server holds the integers W, the dealer a mask B, the client W - B.

B is expanded from a seed that the server and the dealer share: uniform 64-bit words, one stream for each weight. In a
narrower ring only its low bits are used. D = W - B is made once per model and given to clients only. It holds as many
bits an element as the widest product that the model's Program takes.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator, Mapping

from torch import Tensor

from protocols import ring
from protocols.flow import Circuit
from protocols.matmul import Matrix
from protocols.narrow import widened
from protocols.prg import Key
from protocols.protocol import Weights, count


class _Held(Weights):
    """Integer tensors by name, each packed for matrix products once per ring.

    tensors: a mapping that gives the same ones whenever it is asked, such as one of a mapped file. Narrow ones are kept
    so (``protocols.narrow``).
    """

    signed = False

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._packed: dict[tuple[str, int], Matrix] = {}  # of all Programs that share these weights

    def multiply(self, x: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        return x * widened(self._tensors[name]) if diagonal else self.packed(name, ring_bits).times(x)

    def packed(self, name: str, ring_bits: int) -> Matrix:
        """Return a tensor in the form for products in a ring."""
        key = (name, ring_bits)
        if (found := self._packed.get(key)) is None:
            found = Matrix(self._tensors[name], ring_bits, signed=self.signed)
            if found.own:  # others are no more than what they are made of
                self._packed[key] = found
        return found

    def get_ready(self, circuit: Circuit) -> None:
        """Make weights ready for a circuit's products, so that no query does, and processes that fork share them."""
        for instruction in circuit:
            use, shape = instruction.protocol.weight_use, instruction.protocol.out.shape
            if use is not None and use.multiplied:
                self._pack(use.name, use.ring, count(shape[:-1]))

    def _pack(self, name: str, ring_bits: int, rows: int) -> None:
        """Make a weight ready for products of so many rows; no diagonal is packed."""
        if self._tensors[name].dim() > 1:
            self.packed(name, ring_bits).pack(rows)


class ServerWeights(_Held):
    """The server's weights: the integers W themselves, so that products use their true signed widths."""

    signed = True

    def summand(self, name: str) -> Tensor | None:
        return widened(self._tensors[name])

    def beside(self, tensors: Mapping[str, Tensor]) -> ServerWeights:
        """Return the weights of another Program, which multiplies by the same ones: packed matrices are shared."""
        other = ServerWeights(tensors)
        other._packed = self._packed
        return other

    def masked(self, mask: DealerWeights, rings: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, D = W - B) for every weight in ``rings``, reduced to its bits there; clients get these."""
        for name, bits in rings.items():
            yield name, ring.reduce(widened(self._tensors[name]) - mask.mask(name), bits)


class ClientWeights(_Held):
    """The client's masked weights D = W - B. Without B they are uniform, so they say nothing about W."""


class DealerWeights(_Held):
    """The dealer's mask B, expanded on first use from the seed's key and the weights' shapes."""

    def __init__(self, key: Key, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._expanded: dict[str, Tensor] = {}
        self._expanding = threading.Lock()
        super().__init__(self._expanded)
        self._key, self._shapes = key, dict(shapes)

    def beside(self, shapes: Mapping[str, tuple[int, ...]]) -> DealerWeights:
        """Return the mask of another Program of the same weights; what is expanded and packed is shared.

        Raises ValueError if a weight has another shape there: then it is another, and would get the same mask.
        """
        if wrong := sorted(name for name, shape in shapes.items() if self._shapes.get(name, shape) != shape):
            raise ValueError(f"the weight {wrong[0]!r} has the shape {shapes[wrong[0]]}, not {self._shapes[wrong[0]]}")
        other = DealerWeights(self._key, shapes)
        other._tensors = other._expanded = self._expanded
        other._expanding = self._expanding
        other._packed = self._packed
        return other

    def mask(self, name: str) -> Tensor:
        """Return the mask B of one weight: uniform 64-bit words.

        The name determines the stream's number, so that several Programs of one model can share B.
        """
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return self._key.stream(number).words(self._shapes[name])

    def multiply(self, x: Tensor, name: str, ring_bits: int, *, diagonal: bool) -> Tensor:
        self._expand(name)
        return super().multiply(x, name, ring_bits, diagonal=diagonal)

    def expand_next(self, room: int) -> bool:
        """Expand the next mask of those that are not expanded; False if there is none, or if it takes more bytes."""
        name = next((name for name in self._shapes if name not in self._expanded), None)
        if name is None or 8 * math.prod(self._shapes[name]) > room:
            return False
        self._expand(name)
        return True

    def _expand(self, name: str) -> None:
        """Expand the mask of a weight, unless it is; a second thread waits for one that is being expanded."""
        if name not in self._expanded:
            with self._expanding:
                if name not in self._expanded:
                    self._expanded[name] = self.mask(name)
