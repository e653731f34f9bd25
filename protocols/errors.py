"""The one family of errors, and those of its members that protocols raise; ``secure.errors`` has the rest."""

from __future__ import annotations


class Error(Exception):
    """Base of everything that can go wrong and that a person can do something about.

    The message names the place, the value and the bound; ``hint`` says what to do. Messages never hold shares, seeds,
    keys or inputs. ``code`` names the kind of error to the other side of a connection.
    """

    code = "error"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(f"{message}\nhint: {hint}" if hint else message)


class DoesNotFit(Error, ValueError):
    """A value cannot be held: no ring or modulus is wide enough for its range, scale and precision."""

    code = "does-not-fit"


class FixedPointError(Error, ValueError):
    """A fixed-point parameter is out of its range."""

    code = "fixed-point"
