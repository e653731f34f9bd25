"""Records of operations. Everything that the package asks about an operation is said where the operation is defined.

``secure.operations`` fills the table, with one file for each family:

    @operation("softplus", compares=True)
    def softplus(x: Tensor, /, *, beta: float) -> Tensor:  # its meaning in the clear
        return F.softplus(x, beta)

    @softplus.aten("softplus.default")  # how torch writes it
    def _(b: Builder, x: Value, beta: float = 1.0) -> Value:
        return b.shared("softplus", x, beta=beta)

    @softplus.lower  # its approximation
    def _(to: Lowering, node: Node) -> Symbol: ...

Shapes, types and the float interpreter follow from the meaning: operands stand before the slash, attributes after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(eq=False)
class Operation:
    """One operation on shared values; the decorators below complete it.

    compares: its approximation compares values. A model without such operations, but with one in polynomial form,
    compares nothing: its inverse roots become polynomials as well.
    polynomial: models in polynomial form consist of such operations.
    takes_integers: its operands need not be floats (token ids).
    moves: it moves entries and computes nothing, so that shared integers (of an arg-max) stay integers.
    takes_masks: a large negative number in its operand marks an absent entry.
    takes_affine: it takes the server's weight and bias of a preceding normalization into its own weight and bias.
    """

    name: str
    meaning: Callable[..., Tensor]
    compares: bool = False
    polynomial: bool = False
    takes_integers: bool = False
    moves: bool = False
    takes_masks: bool = False
    takes_affine: bool = False
    lowering: Callable[..., Any] | None = None
    measure: Callable[..., Tensor] | None = None
    assumption: Callable[..., tuple[float, float]] | None = None
    recognition: Callable[..., Any] | None = None

    def aten(self, *names: str, namespace: str = "aten", structural: bool = False) -> Callable[[Function], Function]:
        """Register the rule that turns these operations of torch into a node; see `rule`."""
        return rule(*names, namespace=namespace, structural=structural, operation=self)

    def lower(self, function: Function) -> Function:
        """Register ``function(to, node)``, which returns the symbol of a node; ``to`` is a `Lowering`."""
        self._once("lowering", function)
        return function

    def observes(self, function: Function) -> Function:
        """Register ``function(x, **attributes)``, which calibration calls on the first operand's value.

        The lowering gets the smallest and the largest entry of the tensor that it returns.
        """
        self._once("measure", function)
        return function

    def assumes(self, function: Function) -> Function:
        """Register ``function(operand, reach, **attributes)``, which assumes that range where nothing is calibrated.

        ``operand`` is the first operand's node, ``reach`` the largest magnitude that its values are assumed to have.
        """
        self._once("assumption", function)
        return function

    def recognizes(self, function: Function) -> Function:
        """Register ``function(b, x, y)``, which recognizes this operation where models write it by hand.

        It is called for every product of two private values, in both orders. It returns the node if the product
        completes this operation, else None.
        """
        self._once("recognition", function)
        return function

    def _once(self, part: str, function: Callable[..., Any]) -> None:
        if getattr(self, part) is not None:
            raise TypeError(f"the {part} of operation {self.name!r} is defined twice")
        setattr(self, part, function)


@dataclass(frozen=True)
class Rule:
    """The translation of an operation of torch. ``function`` takes a `Builder` and the operation's own arguments."""

    function: Callable[..., Any]
    structural: bool  # applies to operands of any visibility; other rules apply only if an operand is private
    operation: Operation | None  # None: the rule composes other operations


OPERATIONS: dict[str, Operation] = {}
"""The operations on shared values by name."""

RULES: dict[str, Rule] = {}
"""The rules by the name of the operation of torch, as ``torch.export`` prints it."""


def operation(
    name: str,
    *,
    compares: bool = False,
    polynomial: bool = False,
    takes_integers: bool = False,
    moves: bool = False,
    takes_masks: bool = False,
    takes_affine: bool = False,
) -> Callable[[Callable[..., Tensor]], Operation]:
    """Register the decorated function as the meaning of a new operation; the options are fields of `Operation`."""
    if name in OPERATIONS:
        raise TypeError(f"operation {name!r} is defined twice")

    def register(meaning: Callable[..., Tensor]) -> Operation:
        OPERATIONS[name] = Operation(
            name,
            meaning,
            compares=compares,
            polynomial=polynomial,
            takes_integers=takes_integers,
            moves=moves,
            takes_masks=takes_masks,
            takes_affine=takes_affine,
        )
        return OPERATIONS[name]

    return register


def rule(
    *names: str, namespace: str = "aten", structural: bool = False, operation: Operation | None = None
) -> Callable[[Function], Function]:
    """Register the decorated function as the translation of operations of torch.

    A rule composes the builder's methods. They choose by the visibilities of their operands, so that whatever one party
    can compute on its own stays in the clear. A rule refuses what it cannot translate by ``b.unsupported``.
    """

    def register(function: Function) -> Function:
        for name in names:
            target = f"{namespace}.{name}"
            if target in RULES:
                raise TypeError(f"the rule of {target} is defined twice")
            RULES[target] = Rule(function, structural, operation)
        return function

    return register
