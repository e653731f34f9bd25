"""The comparison of a receipt with the Programs that it names, wherever those come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rich.table import Table

from parties.deployments import hosted
from parties.net.endpoints import Endpoint
from parties.net.network import Network
from parties.net.peer import Peer
from parties.proto import unseen_pb2 as pb
from parties.proto.unseen_pb2_grpc import ModelStub
from parties.receipts.receipt import Receipt
from parties.tls.choice import network_of
from secure.capture.documents import MAXIMUM_BYTES
from secure.deployments.deployment import find
from secure.errors import HandshakeError, InvalidInput, ReceiptError
from secure.version import WIRE_VERSION

ASKING = 60.0  # seconds that a server may take to describe a Program


def verify(receipt: Receipt, programs: Mapping[str, bytes]) -> None:
    """Compare a receipt with what a conforming client of its Programs sends.

    programs: encoded Programs by digest; those that the messages name must be there. Raises ReceiptError at the first
    message that differs in kind, order or size, and if other queries were answered than were sent; InvalidInput for a
    receipt of another version, or if a Program is missing; InvalidProgram.
    """
    if receipt.wire != WIRE_VERSION:
        raise InvalidInput(
            f"the receipt is of messages of version {receipt.wire}, this is version {WIRE_VERSION}",
            f"verify it with the version of unseen that made it: {receipt.unseen}",
        )
    for digest in sorted(receipt.used):
        if digest not in receipt.digests:
            raise ReceiptError(f"messages name the Program {digest}, which the receipt does not offer")
        if digest not in programs:
            raise InvalidInput(
                f"the Program {digest} is not among what was given", "give its file or its server: --program, --server"
            )
        if hashlib.sha256(programs[digest]).hexdigest() != digest:
            raise InvalidInput(f"a Program that is not {digest}")
    own = {digest: programs[digest] for digest in receipt.used}
    whole = hosted(find(receipt.deployment)).prescribed(receipt, own)
    if whole != receipt.answered:
        raise ReceiptError(f"the receipt says that {receipt.answered} queries were answered; {whole} were sent whole")


def found_in(places: Iterable[Path], digests: Iterable[str]) -> dict[str, bytes]:
    """Return encoded Programs by digest: files, or files of directories of ``unseen compile``. Raises InvalidInput."""
    wanted, out = set(digests), dict[str, bytes]()
    for place in places:
        try:
            files = sorted(place.glob("program*.json")) if place.is_dir() else [place]
            for file in files:
                with file.open("rb") as opened:
                    raw = opened.read(MAXIMUM_BYTES + 1)
                if (digest := hashlib.sha256(raw).hexdigest()) in wanted:
                    out[digest] = raw
        except OSError as error:
            raise InvalidInput(
                f"the Program in {place} cannot be read: {error.strerror}", "a directory of unseen compile, or a file"
            ) from None
    return out


def asked_for(receipt: Receipt, address: str, network: Network | None = None) -> Iterator[tuple[str, bytes]]:
    """Ask a service for the Programs that a receipt names. Nothing of the receipt but these digests is sent.

    Raises PeerLost, HandshakeError if it serves another one, TlsError.
    """
    role = find(receipt.deployment).serves or receipt.connections[0].role
    peer = Peer(
        f"the {role}",
        Endpoint.parse(address, what="--server"),
        network or network_of("client"),
        role=role,
        start="unseen serve",
    )
    try:
        for digest in sorted(receipt.used):
            with peer.calling("describing its Program"):
                request = pb.DescribeRequest(program_digest=digest)
                found: pb.Description = ModelStub(peer.channel).Describe(request, timeout=ASKING)
            if hashlib.sha256(found.program).hexdigest() != digest:
                raise HandshakeError(f"{peer} does not serve the Program {digest}", "give the server of the receipt")
            yield digest, found.program
    finally:
        peer.close()


def table(receipt: Receipt) -> Table:
    """Show what left, by connection, for the terminal."""
    out = Table(title=f"what left ({receipt.deployment}, model {receipt.model[:16]})", title_justify="left")
    for heading in ("to", "certificate, SHA-256", "messages", "bytes"):
        out.add_column(heading, justify="right" if heading in ("messages", "bytes") else "left", overflow="fold")
    for each in receipt.connections:
        proof = "\n".join(each.certificates) if each.proven else "none: nothing proves who answered"
        sizes = sum(message.bytes for message in each.sent)
        out.add_row(str(each), proof, f"{len(each.sent):,}", f"{sizes:,}")
    return out
