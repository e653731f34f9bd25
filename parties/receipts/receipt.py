"""The record of what left in a session, as a JSON document that a reviewer can check against the Programs.

It has the kinds and sizes of all messages, in order, the services to which they went, and digests of Programs. It holds
no content, no share, no seed, and nothing that was made from an input.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from parties.net.endpoints import CLIENT_LIMIT
from parties.net.recorded import MAXIMUM_MESSAGES, OPEN, Record, Sent
from parties.served.described import MAXIMUM_NAME, MAXIMUM_NAMES, MAXIMUM_OFFERS
from parties.served.files import store
from secure.capture.documents import read_document, what_is_wrong
from secure.errors import InvalidInput, InvalidProgram
from secure.session.link import digest_of_all
from secure.session.session import Session
from secure.version import WIRE_VERSION, __version__

FORMAT: Final = 1
LARGEST = 16 << 20
"""The most bytes of a receipt's file: MAXIMUM_MESSAGES frames take eleven million."""

_QUERIES = ("Session/hello", "Session/prepare", "Ask/start", "Upload/header", "Query/start")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Name = Annotated[str, Field(max_length=MAXIMUM_NAME)]
_Number = Annotated[int, Field(ge=0, lt=1 << 63)]


@with_config(_STRICT)
@dataclass(frozen=True)
class OfferedProgram:
    """A Program that was offered. length: in tokens, 0 if it takes none; batch: the inputs of a query."""

    digest: _Digest
    length: _Number
    batch: _Number


@with_config(_STRICT)
@dataclass(frozen=True)
class SentMessage:
    """A message that left. kind, said: see ``parties.net.recorded.Sent``. bytes: those of it before gRPC frames it."""

    kind: Annotated[str, Field(max_length=64, pattern="^[A-Za-z]+(/[a-z]+)?$")]
    bytes: Annotated[int, Field(ge=0, le=CLIENT_LIMIT)]
    said: Annotated[dict[str, _Name | _Number], Field(max_length=4)]

    @classmethod
    def of(cls, sent: Sent) -> Self:
        return cls(sent.kind, sent.size, dict(sent.said))


@with_config(_STRICT)
@dataclass(frozen=True)
class Channel:
    """A channel to a service and what left by it. certificates: SHA-256 of those by which the service proved its role,
    where ``proven``.
    """

    role: _Name
    address: _Name
    proven: bool
    certificates: list[_Digest]
    sent: list[SentMessage]

    def __str__(self) -> str:
        return f"{self.role} at {self.address}"


@with_config(_STRICT)
@dataclass(frozen=True)
class Receipt:
    """The record of what left this machine in a session, up to a point between two of its queries.

    unseen, wire: the versions of the package and of its messages. model: the name of the weights. compiled_as: the
    deployment's options of the model. offers: the Programs at which it is served. answered: the queries that were
    answered. token: each call showed a token besides, in its header.
    """

    receipt: Literal[1]
    unseen: _Name
    wire: _Number
    deployment: _Name
    model: _Name
    compiled_as: Annotated[dict[_Name, _Name], Field(max_length=MAXIMUM_NAMES)]
    offers: Annotated[list[OfferedProgram], Field(min_length=1, max_length=MAXIMUM_OFFERS)]
    answered: _Number
    token: bool
    connections: list[Channel]

    @classmethod
    def of(cls, session: Session, record: Record, *, token: bool) -> Self:
        """Make the receipt of a session whose channels write into ``record``. Raises InvalidInput if that is full."""
        record.complete()
        link = session.link
        offers = {offer.program_digest: offer for offer in (*link.offers, *session.sizes)}
        return cls(
            receipt=FORMAT,
            unseen=__version__,
            wire=WIRE_VERSION,
            deployment=session.deployment,
            model=link.model,
            compiled_as=dict(link.compiled_as),
            offers=[OfferedProgram(digest, offer.length, offer.batch) for digest, offer in offers.items()],
            answered=session.answered,
            token=token,
            connections=[
                Channel(c.role, c.address, c.proven, c.certificates, [SentMessage.of(sent) for sent in c.sent])
                for c in record.connections
            ],
        )

    @cached_property
    def digests(self) -> frozenset[str]:
        """The digests of the Programs that were offered."""
        return frozenset(offer.digest for offer in self.offers)

    @cached_property
    def described(self) -> frozenset[str]:
        """The digests by which a client may ask for a description: of a Program, of all of them, or none."""
        return self.digests | {"", digest_of_all(self.digests)}

    @property
    def used(self) -> frozenset[str]:
        """The digests of the Programs that queries were to compute, as messages name them."""
        names = ("program_digest", "place.program_digest", "wanted.program_digest")
        said = [message.said for each in self.connections for message in each.sent if message.kind in _QUERIES]
        return frozenset(str(each[name]) for each in said for name in names if name in each)

    @property
    def messages(self) -> int:
        """The number of messages that left."""
        return sum(len(each.sent) for each in self.connections)

    @property
    def size(self) -> int:
        """The bytes of all messages that left."""
        return sum(message.bytes for each in self.connections for message in each.sent)

    def as_dict(self) -> dict[str, Any]:
        """Return the receipt as JSON values."""
        return {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "offers": [vars(offer) for offer in self.offers],
            "connections": [{**vars(each), "sent": [_row(m) for m in each.sent]} for each in self.connections],
        }

    def write(self, file: str | Path) -> None:
        """Write the receipt to a new file. Raises InvalidInput if there is one already, or if it cannot be written."""
        path = Path(file)
        try:
            store(path, "".join(_lines(self.as_dict())).encode(), replace=False)
        except OSError as error:
            raise InvalidInput(f"the receipt {path} cannot be written: {error.strerror}", "give a new file") from None

    @classmethod
    def read(cls, file: str | Path) -> Self:
        """Read a file of ``write``, which may come from anyone. Raises InvalidInput if it is none."""
        path, hint = Path(file), "give a file that --receipt wrote"
        try:
            with path.open("rb") as opened:
                raw = opened.read(LARGEST + 1)
        except OSError as error:
            raise InvalidInput(f"the receipt {path} cannot be read: {error.strerror}", hint) from None
        try:
            return cls.from_json(raw)
        except InvalidInput as error:
            raise InvalidInput(f"{path} is no receipt: {str(error).partition(chr(10))[0]}", hint) from None

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Decode a receipt that may come from anyone. Raises InvalidInput if it is none, or of another version."""
        try:
            document = read_document(raw, most=LARGEST, repeated=False)
            if isinstance(document, dict) and document.get("receipt") != FORMAT:
                raise InvalidInput(f"its version is not {FORMAT}")
            for each in document["connections"]:
                for row in each["sent"]:
                    row["said"] = {name: row.pop(name) for name in list(row) if name not in ("kind", "bytes")}
            found: Self = TypeAdapter(cls).validate_json(json.dumps(document))
        except (InvalidProgram, ValidationError, LookupError, TypeError, AttributeError) as error:
            raise InvalidInput(what_is_wrong(error)) from None
        found._check()
        return found

    def _check(self) -> None:
        """Raise InvalidInput for more messages than there can be, unknown fields, and names that cannot be printed."""
        if self.messages + len(self.connections) > MAXIMUM_MESSAGES:
            raise InvalidInput(f"more than {MAXIMUM_MESSAGES} messages")
        for each in self.connections:
            if not str(each).isprintable():
                raise InvalidInput("a connection whose name cannot be printed")
            if (each.proven and each.sent and not each.certificates) or (each.certificates and not each.proven):
                raise InvalidInput("a service is proven without a certificate, or has one and is not proven")
            for message in each.sent:
                if unknown := set(message.said) - set(OPEN.get(message.kind, ())):
                    raise InvalidInput(f"a message {message.kind} does not say {min(unknown)}")


def check_new_file(path: Path) -> None:
    """Raise InvalidInput if a receipt could not be written to a file: it is there, or cannot be made."""
    try:
        if path.exists() or path.is_symlink():
            raise InvalidInput(f"the receipt {path} is there already", "give a new file")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InvalidInput(f"the receipt {path} cannot be written: {error.strerror}", "give a new file") from None


def _row(message: SentMessage) -> dict[str, Any]:
    return {"kind": message.kind, "bytes": message.bytes, **message.said}


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    """Write a receipt for people: a message a line."""
    connections = document["connections"]
    head = {name: value for name, value in document.items() if name != "connections"}
    yield "{\n"
    for name, value in head.items():
        yield f"  {json.dumps(name)}: {json.dumps(value)},\n"
    yield '  "connections": [\n'
    for number, each in enumerate(connections, 1):
        about = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in each.items() if k != "sent")
        yield f'    {{{about}, "sent": [\n'
        yield ",\n".join(f"      {json.dumps(row)}" for row in each["sent"])
        yield f"\n    ]}}{',' if number < len(connections) else ''}\n"
    yield "  ]\n}\n"
