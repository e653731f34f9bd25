"""The registry of fuzzing targets: every parser of bytes that come from outside, with real files to start from.

A target's ``run`` must return, or raise one of ``refusals``; anything else that it raises is a crash, and so is a run
that takes too long. Another module adds its targets with ``@target``.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from google.protobuf.message import DecodeError
from safetensors.torch import save

from parties.net.frames import FrameReader
from parties.served.files import pack_masked, unpack_masked, unpack_tables
from parties.three_party.shared_model import MANIFEST, PROGRAM, SEEDS, Manifest, load_share
from proto import unseen_pb2 as pb
from protocols.protocol import Exchange
from protocols.steps import unpack_frame
from protocols.three_party import dpf
from protocols.three_party.lookup import LookupKeys, lookup_keys
from protocols.wire import FrameError, Wire
from secure.capture.graph import Graph
from secure.ckks.program import CkksProgram
from secure.errors import Error, InvalidProgram
from secure.lowering.client_inputs import tables_label
from secure.models.tokenizer_document import read_tokenizer
from secure.mpc.budget import Budget
from secure.version import WIRE_VERSION
from tests import programs

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

_FORMS = (Wire((3,), 20), Wire((2, 2), planes=True), Wire((1,), 64))


@target("frame", lambda: [bytes(range(9 + 4 + 8))], FrameError)
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
}


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
    """A directory with the public file that a manifest names."""
    directory = Path(tempfile.mkdtemp(prefix="fuzz-share-"))
    (directory / PROGRAM).write_bytes(programs.small())
    (directory / SEEDS).write_bytes(bytes(64))
    return directory


def _manifest() -> bytes:
    made = Manifest(
        version=WIRE_VERSION,
        party=2,
        model="m",
        compiled_as={"public_weights": "False"},
        rings={},
        shapes={},
        files={PROGRAM: hashlib.sha256(programs.small()).hexdigest()},
        pad_id=0,
        lowercase=False,
    )
    return made.model_dump_json(indent=2).encode()


@target("manifest", lambda: [_manifest()], Error)
def _(data: bytes) -> None:
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
