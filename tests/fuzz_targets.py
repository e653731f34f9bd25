"""The registry of fuzzing targets: every parser of bytes that come from outside, with real files to start from.

A target's ``run`` must return, or raise one of ``refusals``; anything else that it raises is a crash, and so is a run
that takes too long. Another module adds its targets with ``@target``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import DecodeError
from safetensors.torch import save

import secure
from parties.limits.tokens import Token, new_holder, read_holder
from parties.net.frames import FrameReader
from parties.proto import unseen_pb2 as pb
from parties.served.files import pack_masked, unpack_masked, unpack_tables
from parties.store.entries import label_of
from parties.store.keys import StoreKey
from parties.store.sealed import open_sealed, seal
from parties.three_party.shared_model import MANIFEST, load_share
from parties.tls.authority import Authority
from parties.tls.certificates import read_certificates, read_revoked
from parties.tls.naming import Naming
from parties.two_party.keys import open_client_key, seal_client_key
from protocols.ckks.canonical import InvalidCiphertext
from protocols.prg import Key
from protocols.protocol import Exchange
from protocols.steps import unpack_frame
from protocols.three_party import dpf
from protocols.three_party.lookup import LookupKeys, lookup_keys
from protocols.wire import FrameError, Wire
from secure.capture.graph import Graph
from secure.ckks.program import CkksProgram
from secure.deployments.three_party import ThreeParty
from secure.errors import Error, InvalidProgram, ProtocolError, StoreError
from secure.lowering.client_inputs import tables_label
from secure.models.tokenizer_document import read_tokenizer
from secure.mpc.budget import Budget
from tests import ckks_fuzz, programs
from tests.dealer_key import KEY

SLOW = 2.0  # seconds that no input of a fuzzer's size may take, on a busy machine


@dataclass(frozen=True)
class Target:
    """A parser: real files to start from, the call, and the exceptions by which it refuses."""

    name: str
    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], Any]
    refusals: tuple[type[Exception], ...]

    def accepts(self, data: bytes) -> bool:
        """Run it once: True if it accepts the bytes, False if it refuses them; a crash raises."""
        try:
            self.run(data)
        except self.refusals:
            return False
        return True


TARGETS: dict[str, Target] = {}


def target(
    name: str, seeds: Callable[[], list[bytes]], *refusals: type[Exception]
) -> Callable[[Callable[[bytes], Any]], Callable[[bytes], Any]]:
    """Register the decorated function as a target."""

    def register(run: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        TARGETS[name] = Target(name, seeds, run, refusals)
        return run

    return register


# Programs and graphs


@target("program", lambda: [programs.every_protocol(), programs.small()], InvalidProgram)
def _(data: bytes) -> None:
    program = Budget().decode(data)
    assert program.cost.rounds >= 0
    assert program.weight_rings is not None


@target("graph", lambda: [programs.client_graph(), programs.every_operation()], InvalidProgram)
def _(data: bytes) -> None:
    Graph.from_json(data, client=True)


@target("client-part", lambda: [programs.client_graph(), programs.every_operation()], InvalidProgram)
def _(data: bytes) -> None:
    """A graph that was accepted is also evaluated, on values at the ends of their types."""
    graph = Graph.from_json(data, client=True)
    programs.evaluate_on_extremes(graph)


@target("ckks-program", lambda: [programs.small_ckks()], InvalidProgram)
def _(data: bytes) -> None:
    CkksProgram.from_bytes(data)


# frames and messages

_FORMS = (Wire((3,), 20), Wire((9,), 7), Wire((2, 2), planes=True), Wire((1,), 64))


@target("frame", lambda: [bytes(range(sum(form.size for form in _FORMS)))], FrameError)
def _(data: bytes) -> None:
    unpack_frame(data, Exchange((), _FORMS))


@target("frame-parts", lambda: [pb.Frame(data=b"x" * 21, last=True).SerializeToString()], DecodeError, FrameError)
def _(data: bytes) -> None:
    FrameReader(21).add(pb.Frame.FromString(data))


_MESSAGES: dict[str, Any] = {
    "client-message": pb.ClientMessage(hello=pb.Hello(version=2, deployment="two-party", session=bytes(16))),
    "server-message": pb.ServerMessage(failure=pb.Failure(code="query", message="no")),
    "description": pb.Description(version=2, role="server", files=[pb.File(name="a", size=3)]),
    "register": pb.RegisterRequest(program=b"{}", sealed=bytes(48)),
    "stock": pb.StockRequest(program_digest="d", weights_digest="w", sealed=bytes(48), proof=bytes(32)),
    "stock-part": pb.StockPart(start=pb.StockStart(entry=bytes(16), proof=bytes(32))),
    "assign": pb.AssignRequest(session=bytes(16), query=3, entry=bytes(16), proof=bytes(32), entry_proof=bytes(32)),
    "assigned": pb.Assigned(query=3, entry=bytes(16), sealed=bytes(32)),
}


_STORE_KEY, _LABEL = StoreKey(bytes(range(32))), label_of("fuzz")


@target(
    "store-entry",
    lambda: [b"".join(map(bytes, seal(_STORE_KEY, _LABEL, bytes(16), b"h", 9, [b"123456789"])))],
    StoreError,
)
def _(data: bytes) -> None:
    taken = open_sealed(_STORE_KEY, _LABEL, bytes(16), len(data), lambda start, size: data[start : start + size])
    assert (taken.head, bytes(taken.read(0, taken.size))) == (b"h", b"123456789")


@target("sealed-client-key", lambda: [seal_client_key(Key(bytes(16)), Key(b"k" * 16), "s", 1)], ProtocolError)
def _(data: bytes) -> None:
    assert open_client_key(Key(bytes(16)), data, "s", 1).value == b"k" * 16


def _message(kind: str, made: Any) -> None:
    @target(kind, lambda: [made.SerializeToString()], DecodeError)
    def _(data: bytes) -> None:
        type(made).FromString(data)


for _kind, _made in _MESSAGES.items():
    _message(_kind, _made)


# files

_RINGS, _SHAPES = {"w": 20, "v": 64}, {"w": (2, 3), "v": (4,)}


@target(
    "masked-weights",
    lambda: [pack_masked([(n, torch.ones(_SHAPES[n], dtype=torch.int64)) for n in _RINGS], _RINGS)],
    Error,
)
def _(data: bytes) -> None:
    unpack_masked(data, _RINGS, _SHAPES)


@target("token-table", lambda: [save({"t": torch.ones(4, 3)})], Error)
def _(data: bytes) -> None:
    unpack_tables(data, {"t": (4, 3)}, tables_label({"t": torch.ones(4, 3)}))


@target("tokenizer", lambda: [programs.tokenizer()], Error)
def _(data: bytes) -> None:
    read_tokenizer(data)


@cache
def _share() -> Path:
    """The directory of party 2 of a small shared model."""
    model, x = torch.nn.Linear(4, 2).eval(), {"input": torch.ones(1, 4)}
    return secure.share_model(secure.compile(model, x, deployment=ThreeParty()), tempfile.mkdtemp())[2]


@cache
def _manifest() -> bytes:
    return (_share() / MANIFEST).read_bytes()


@target("manifest", lambda: [_manifest()], Error)
def _(data: bytes) -> None:
    _manifest()
    (_share() / MANIFEST).write_bytes(data)
    load_share(_share())


# look-up keys

_POINTS, _DOMAIN = 2, 300


@target("lookup-keys", lambda: [lookup_keys([1, 299], _DOMAIN)[0].to_bytes()], FrameError)
def _(data: bytes) -> None:
    keys = LookupKeys.from_bytes(data, _POINTS, _DOMAIN)
    for key in (keys.low, keys.high):
        dpf.evaluate(key, 0)


def document(data: bytes) -> Any:
    """The JSON document in these bytes; None if there is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


# what CKKS clients and servers send

for _name in ckks_fuzz.NAMES:
    target(f"ckks-{_name}", partial(lambda name: [ckks_fuzz.seed(name)], _name), InvalidCiphertext)(
        partial(ckks_fuzz.take, _name)
    )


# identities: what a dealer is sent, and files that another organisation may have written


@target("sealed", lambda: [KEY.public.seal(bytes(32), "fuzz")], Error)
def _(data: bytes) -> None:
    KEY.open(data, "fuzz")


@target("token-line", lambda: [new_holder(Token.fresh(), "ann", 7).line().encode()], Error)
def _(data: bytes) -> None:
    read_holder(data.decode(errors="replace"))


@target("roles", lambda: [b'[roles]\n"spiffe://acme/ns/prod/*" = "client"\n[names]\nserver = "a.example"\n'], Error)
def _(data: bytes) -> None:
    Naming.read(data.decode(errors="replace"), "tls.toml")


@cache
def _authority() -> tuple[bytes, bytes, bytes]:
    """The files of an authority that issued and revoked a certificate: ca.pem, cert.pem, revoked.pem."""
    with tempfile.TemporaryDirectory() as directory:
        made = Authority.make(Path(directory))
        where = made.issue("client", "ann")
        made.revoke(str(where / "cert.pem"))
        return tuple((where / name).read_bytes() for name in ("ca.pem", "cert.pem", "revoked.pem"))  # type: ignore[return-value]


@target("certificates", lambda: [_authority()[1]], Error)
def _(data: bytes) -> None:
    for each in read_certificates(data, "ca.pem"):
        each.require_valid("x", "")
        Naming.read("", "tls.toml").identity(each)


@target("revoked", lambda: [_authority()[2]], Error)
def _(data: bytes) -> None:
    read_revoked(data, read_certificates(_authority()[0], "ca.pem"), "revoked.pem")
