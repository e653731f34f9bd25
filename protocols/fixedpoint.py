"""The fixed-point encoding of real numbers: its parameters, checked when they are set."""

from dataclasses import asdict, dataclass

from protocols.errors import FixedPointError

LEAST_FRACTION = 8
"""The fewest fraction bits of activations."""


@dataclass(frozen=True)
class FixedPoint:
    """Fraction bits of activations and weights, and the safety margin on calibrated ranges.

    fraction_bits: an activation x is rescaled to round(x * 2^fraction_bits); one unit is 2^-fraction_bits.
    weight_fraction_bits: the same for the server's weights.
    margin_bits: a value that calibration saw up to v may grow to v * 2^margin_bits before the ring overflows.
    Raises FixedPointError if a parameter is no integer or out of its range.
    """

    fraction_bits: int = 16
    weight_fraction_bits: int = 14
    margin_bits: int = 1

    def __post_init__(self) -> None:
        for name, low, high in (
            ("fraction_bits", LEAST_FRACTION, 20),
            ("weight_fraction_bits", 6, 20),
            ("margin_bits", 0, 6),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise FixedPointError(f"fixed point: {name} is an integer from {low} to {high}, got {value!r}")

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
