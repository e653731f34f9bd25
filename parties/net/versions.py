"""Peers of another version: each side says which versions meet, and who is to be updated.

Nothing of a peer's is used before its version is known. Whoever greets says its version first. Before version 4,
messages had no sums (``parties.net.summed``), so an older peer is known by its first message. Before version 3,
services had other names, so an older caller, or one of a package to come, is known by what it calls.
"""

from __future__ import annotations

import re

from parties.proto import unseen_pb2 as pb
from secure.errors import OtherVersion
from secure.version import WIRE_VERSION

_PACKAGE = pb.DESCRIPTOR.package
_OURS = re.compile(r"/unseen(?:\.v(\d{1,9}))?\.\w+/")


_SAME = "all sides need the same version of unseen"


def other_version(whose: str, theirs: int, here: str) -> OtherVersion:
    """Return the error for messages of ``whose``, of version ``theirs``. here: this side.

    Both sides are named by their roles, such as "the client".
    """
    older = here if theirs > WIRE_VERSION else whose
    return OtherVersion(
        f"version: {whose} speaks version {theirs} of unseen's messages, {here} version {WIRE_VERSION}",
        f"update {older}: {_SAME}",
    )


def check_version(whose: str, theirs: int, here: str) -> None:
    """Raise OtherVersion unless ``theirs``, the version of ``whose`` messages, is ours."""
    if theirs != WIRE_VERSION:
        raise other_version(whose, theirs, here)


def without_sum(whose: str) -> OtherVersion:
    """Return the error for a message that has no sum."""
    return OtherVersion(
        f"version: {whose} speaks an older version of unseen's messages than version {WIRE_VERSION}, without sums",
        f"update {whose}: {_SAME}; if they are the same, the message changed on the way: ask again",
    )


def of_other_package(method: str) -> OtherVersion | None:
    """Return the error for a call to a service of unseen's under another version's name; None for any other."""
    found = _OURS.match(method)
    if found is None or method.startswith(f"/{_PACKAGE}."):
        return None
    package = int(found[1] or 1)
    newer = package > int(_PACKAGE.rpartition("v")[2])
    return other_version("the caller", max(package, WIRE_VERSION + 1) if newer else package, "this service")
