"""Parts of a model that change while the rest stays, such as the segments of an index, told by the names of weights."""

from __future__ import annotations

import re

_APART = re.compile(r"(?:^|\.)apart_([0-9a-f]{32})(?=[.@]|$)")


def part_of(weight: str) -> str:
    """Return the part of a model to which a weight belongs, by its name; "" for the model itself.

    A part is masked and fetched as a file of its own, so that who holds it keeps it while other parts change. Its
    weights have a component "apart_" and 32 hexadecimal digits in their names, which no other content ever has: they
    are made of the content under a secret.
    """
    found = _APART.search(weight)
    return found[1] if found else ""
