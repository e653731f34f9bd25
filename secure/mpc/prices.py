"""Prices by which the compiler chooses between rounds, online bytes and dealt bytes, and their choice for a network.

Every choice is local: a layer is widened if the wider messages cost less than the round that they spare. Whether a
round counts depends on the rest of the circuit, because rounds of independent instructions are one. So for a network
that is named, the circuit is emitted at several prices, and that of the least projected time is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from protocols.circuit import total_cost
from protocols.flow import Circuit
from protocols.protocol import CircuitCost
from secure.mpc.network import NetworkSpeed

DEALT_FOR_ONLINE = 16
"""The dealt bytes, sent before the query while nobody waits, that are worth one online byte."""


@dataclass(frozen=True)
class Prices:
    """The worth of a round, by which ``Plan`` and ``Emitter`` choose. The defaults are those of both parties near.

    round_bytes: the online bytes that are worth a round. coefficients: the most coefficients of a dealt table that is
    one value's alone and spares the rounds that choose among smaller ones; each takes 8 dealt bytes at most.
    table_bytes: the dealt bytes of tables, of all values of an operation together, for which they may spare a round:
    near parties take as long to make them as for one, and so operations of few values, as in a decoder's step, have
    wider tables. dealt_for_online: the dealt bytes that are worth one online byte: 1 where they are sent within the
    query too. late_bytes: the online bytes, both ways, for which layers spare the round before them, see
    ``Lowering.normalized``. Parties that are near have short rounds, and open numbers in the time of one; 0: never, as
    where all parties know the weights, and a layer takes no round. The largest query decides for all that are compiled
    together, so that a smaller one alone may take a round less.
    """

    round_bytes: int = 400_000
    coefficients: int = 512
    table_bytes: int = 400_000
    dealt_for_online: int = DEALT_FOR_ONLINE
    late_bytes: int = 32_000

    @property
    def words(self) -> str:
        """The worth of dealt bytes, for people."""
        worth = "1 dealt byte is" if self.dealt_for_online == 1 else f"{self.dealt_for_online} dealt bytes are"
        return f"compiled where {worth} worth an online byte"

    def of(self, cost: CircuitCost) -> float:
        """Return the price of one protocol, in online bytes."""
        return cost.rounds * self.round_bytes + cost.to_first + cost.to_second + cost.dealt / self.dealt_for_online


DEFAULT = Prices()

TRIED: Mapping[str, tuple[int, ...]] = {
    "round_bytes": (0, 100_000, 4_000_000),
    "coefficients": (0, 4096),
    "table_bytes": (0,),
}
"""The prices that ``choose`` tries, by their names, beside the default ones."""


@dataclass(frozen=True)
class Choice:
    """The prices that were chosen for a network, and the cost of a query at them and at the deployment's own."""

    network: NetworkSpeed
    prices: Prices
    cost: CircuitCost
    default: CircuitCost

    @property
    def words(self) -> str:
        """The choice and its price, for people."""
        said = f"for {self.network.name}: {_words(self.network, self.cost)}"
        if self.cost == self.default:
            return f"{said}; nothing else is cheaper there than the default choice"
        return f"{said}; the default choice: {_words(self.network, self.default)}"


def _words(network: NetworkSpeed, cost: CircuitCost) -> str:
    online = (cost.to_first + cost.to_second) / 1e6
    waiting = network.seconds(cost)
    return f"{cost.rounds} rounds, {online:.1f} MB online, {cost.dealt / 1e6:.1f} MB dealt, {waiting:.3g} s of waiting"


def projected(network: NetworkSpeed, cost: CircuitCost, dealt_for_online: int = DEALT_FOR_ONLINE) -> float:
    """Return the seconds by which circuits are compared: of waiting online, and of dealing for its part."""
    return network.seconds(cost) + cost.dealt / dealt_for_online / network.bandwidth


class HasCircuit(Protocol):
    """An object with a circuit."""

    @property
    def circuit(self) -> Circuit: ...


Found = TypeVar("Found", bound=HasCircuit)


def choose(
    network: NetworkSpeed, emit: Callable[[Prices], Found], default_prices: Prices = DEFAULT
) -> tuple[Found, Choice]:
    """Return what ``emit`` returns at the prices of the least projected time; of equal ones, at the deployment's.

    One price after the other is chosen, while those before it stay: they spare different rounds. The worth of a dealt
    byte is the deployment's, and stays.
    """
    prices, found = default_prices, emit(default_prices)
    default = cost = total_cost(found.circuit)
    dealt = prices.dealt_for_online
    for name, values in TRIED.items():
        for tried in [replace(prices, **{name: value}) for value in values]:
            other = emit(tried)
            price = total_cost(other.circuit)
            if projected(network, price, dealt) < projected(network, cost, dealt):
                prices, found, cost = tried, other, price
    return found, Choice(network, prices, cost, default)
