"""The base class of all errors, and the errors that protocols raise; ``secure.errors`` has the others."""

from __future__ import annotations


class Error(Exception):
    """Base class of every error that a person can do something about.

    The message names the place, the value and the bound; ``hint`` says what to do. Messages never hold shares, seeds,
    keys or inputs. ``code`` tells the other side of a connection which kind of error this is.
    """

    code = "error"

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(f"{message}\nhint: {hint}" if hint else message)


class DoesNotFit(Error, ValueError):
    """No ring or modulus is wide enough for the range, scale and precision of a value."""

    code = "does-not-fit"


class FixedPointError(Error, ValueError):
    """A fixed-point parameter is out of its range."""

    code = "fixed-point"


class ClientDeviates(Error):
    """A client sent something that no honest client sends: malformed look-up keys, an input beyond its range."""

    code = "client-deviates"
