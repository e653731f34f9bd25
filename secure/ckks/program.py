"""Programs for CKKS: the public description on which client and server agree. It holds no weights and no inputs."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
import torch
from pydantic import ConfigDict, FailFast, Field, Strict, TypeAdapter, with_config
from torch import Tensor

from protocols.ckks.circuit import Vector
from protocols.ckks.parameters import Parameters
from protocols.ckks.refresh import hiding, reserve
from protocols.fields import Bits, Name, Real, Shape, Whole
from secure.capture.documents import read_document, what_is_wrong
from secure.capture.graph import Graph
from secure.ckks.layout import EMPTY, Content, at
from secure.ckks.linear_maps import Array
from secure.errors import InvalidInput, InvalidProgram, program_of_version
from secure.lowering.client_inputs import (
    MAXIMUM_INPUTS,
    ClientInput,
    Labels,
    check_client_part,
    check_query,
    clear_values,
    dummy_values,
    encode_input,
)

VERSION = 1
_MALFORMED = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, RuntimeError),
    zlib.error,
)
MAXIMUM_KEYS = 8 << 30  # bytes of keys that a client makes and uploads for a Program
MAXIMUM_CIPHERTEXTS = 1 << 14  # of inputs, of refreshes, and of the output
Tally = Annotated[int, Strict(), Field(ge=0, lt=1 << 62)]  # of operations, for people
MAXIMUM_SLOTS = 1 << 25  # of inputs and output together: 256 MB when they are unpacked
HEADROOM = 2.0  # room over calibrated magnitudes before a value is refused


@dataclass(frozen=True, eq=False)
class CkksProgram:
    """Parameters, rotations and layouts on which client and server agree; public, and without weights.

    steps: the rotations for which the client makes keys. ranges: allowed values of each input.
    views: for each ciphertext that the client sends, the input it is made from, its level, and the element that each
    slot holds. refreshes: for each stage, the level of every ciphertext that the client sends back.
    reserve: the level at which masked ciphertexts are sent to the client; its modulus hides the message.
    rows: those of earlier queries that a query reads, of a model that keeps rows; the conversation may have one more.
    """

    parameters: Parameters
    steps: tuple[int, ...]
    client_graph: Graph
    client_inputs: tuple[ClientInput, ...]
    ranges: Mapping[str, tuple[float, float]]
    views: Mapping[str, tuple[str, int, Content]]  # (input, level, content)
    refreshes: tuple[tuple[int, ...], ...]
    reserve: int
    output_shape: tuple[int, ...]
    output: Content
    output_unit: float
    grain: float  # answers are rounded to multiples of it; further digits are noise, which depends on keys and weights
    counts: Mapping[str, int]
    labels: Mapping[str, str]
    rows: int = 0

    def __post_init__(self) -> None:
        """Put the views in the order of their names, which is that of the encoding, as ciphertexts travel in it."""
        object.__setattr__(self, "views", dict(sorted(self.views.items())))

    @cached_property
    def encoded(self) -> bytes:
        """The canonical encoding."""
        document = {
            "version": VERSION,
            "parameters": dataclasses.asdict(self.parameters),
            "steps": self.steps,
            "client_graph": self.client_graph.to_json(),
            "client_inputs": [dataclasses.asdict(c) for c in self.client_inputs],
            "ranges": {k: list(v) for k, v in self.ranges.items()},
            "views": {k: [name, level, _packed(c)] for k, (name, level, c) in self.views.items()},
            "refreshes": self.refreshes,
            "reserve": self.reserve,
            "output_shape": self.output_shape,
            "output": [_packed(row) for row in self.output],
            "output_unit": self.output_unit,
            "grain": self.grain,
            "counts": dict(self.counts),
            "labels": dict(self.labels),
        }
        if self.rows:
            document["rows"] = self.rows
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical encoding, as hexadecimal digits."""
        return hashlib.sha256(self.encoded).hexdigest()

    @classmethod
    def from_bytes(cls, encoded: bytes) -> CkksProgram:
        """Decode and check a Program that may come from anyone. Raises InvalidProgram."""
        try:
            d = read_document(encoded)
            if d["version"] != VERSION:
                raise program_of_version(d["version"], VERSION)
            _DOCUMENT.validate_python(d)  # bounds of every field, before anything follows from them
            parameters, described = Parameters(**d["parameters"]), len(d["views"]) + len(d["output"])
            if described * parameters.slots > MAXIMUM_SLOTS:  # they are packed: memory takes far more
                raise InvalidProgram(f"{len(d['views'])} inputs, {len(d['output'])} results: too many ciphertexts")
            program = cls(
                parameters=parameters,
                steps=tuple(int(s) for s in d["steps"]),
                client_graph=Graph.from_json(d["client_graph"], client=True),
                client_inputs=tuple(TypeAdapter(ClientInput).validate_python(c) for c in d["client_inputs"]),
                ranges={str(k): (float(a), float(b)) for k, (a, b) in d["ranges"].items()},
                views={
                    str(k): (str(name), int(level), _unpacked(c, parameters.slots))
                    for k, (name, level, c) in d["views"].items()
                },
                refreshes=tuple(tuple(int(v) for v in stage) for stage in d["refreshes"]),
                reserve=int(d["reserve"]),
                output_shape=tuple(int(n) for n in d["output_shape"]),
                output=np.stack([_unpacked(c, parameters.slots) for c in d["output"]]),
                output_unit=float(d["output_unit"]),
                grain=float(d["grain"]),
                counts={str(k): int(v) for k, v in d["counts"].items()},
                labels={str(k): str(v) for k, v in d["labels"].items()},
                rows=int(d.get("rows", 0)),
            )
            program.check()
            _ = program.digest  # encodes, which fails for numbers that JSON cannot write
        except InvalidProgram:
            raise
        except _MALFORMED as error:
            raise InvalidProgram(f"not a valid Program: {what_is_wrong(error)}") from None
        return program

    def check(self) -> None:
        """Check all that a client relies on before it makes keys for another's Program. Raises InvalidProgram."""
        check_client_part(self.client_graph, self.client_inputs, self.labels)
        levels = [*(level for _, level, _ in self.views.values()), *(v for stage in self.refreshes for v in stage)]
        # a client makes masks of so many rows before it compares shapes
        if self.rows and all(node.shape[-1:] != (self.rows + 1,) for node in self.client_graph.inputs.values()):
            raise InvalidProgram(f"the Program reads {self.rows} rows, none of its inputs masks so many")
        names = {c.name for c in self.client_inputs}
        sizes = {c.name: math.prod(c.shape) for c in self.client_inputs}
        known = all(
            name in names and name in self.ranges and content.max() < sizes[name]
            for name, _, content in self.views.values()
        )
        if not known or not all(0 <= level <= self.parameters.levels for level in levels):
            raise InvalidProgram("levels or inputs of the Program do not hold together")
        for name, level, _ in self.views.values():
            if 2.0 * self.reach(name) > self.parameters.largest(level):
                raise InvalidProgram(
                    f"input {name!r} may reach {self.reach(name):.4g}, which level {level} cannot hold: encoding it "
                    "would fail for some values"
                )
        if not all(math.isfinite(v) and v > 0 for v in (self.output_unit, self.grain)):
            raise InvalidProgram(f"an output in units of {self.output_unit}, rounded to {self.grain}")
        p, refreshed = self.parameters, sum(map(len, self.refreshes))
        if (
            min(self.output_shape, default=1) < 1
            or list(self.steps) != sorted(set(self.steps))
            or len(p.primes) != p.levels + 2
        ):
            raise InvalidProgram("parameters, rotations or sizes of the Program are none")
        keys = self.key_bytes
        if keys > MAXIMUM_KEYS or max(len(self.views), refreshed, len(self.output)) > MAXIMUM_CIPHERTEXTS:
            raise InvalidProgram(
                f"the Program asks for {keys / 1e9:.1f} GB of keys, {len(self.views)} inputs, {refreshed} refreshes; "
                f"clients give {MAXIMUM_KEYS / 1e9:.1f} GB and {MAXIMUM_CIPHERTEXTS} ciphertexts"
            )
        sound = 0 <= self.reserve <= self.parameters.levels
        size = math.prod(self.output_shape)
        if not sound or not all(0 < s < self.parameters.slots for s in self.steps) or size > self.output.size:
            raise InvalidProgram("levels, rotations or inputs of the Program do not hold together")
        if self.refreshes and self.reserve < reserve(p.degree, p.scale_bits, p.base_bits):
            raise InvalidProgram("the masks of its refreshes do not fit the modulus\nhint: do not trust this server")
        if sorted(self.output[self.output >= 0]) != list(range(size)):
            raise InvalidProgram("elements of the output are missing or stand twice")

    # the cost of a query, exactly

    @property
    def rounds(self) -> int:
        """The messages that wait for one another: the query, and one for each refresh."""
        return 1 + len(self.refreshes)

    @property
    def input_levels(self) -> list[int]:
        """The levels of the ciphertexts of a query's inputs, in their order."""
        return [level for _, level, _ in self.views.values()]

    @property
    def publishes(self) -> bool:
        """False: the positions of tokens are encrypted, as all inputs are."""
        return False

    @property
    def key_bytes(self) -> int:
        """The bytes of evaluation keys, which are uploaded once."""
        p = self.parameters
        return p.public_key_bytes + p.key_bytes * (len(self.steps) + 1)

    @property
    def to_server(self) -> int:
        """The bytes to the server in one query: inputs and re-encrypted ciphertexts."""
        sent = [*(level for _, level, _ in self.views.values()), *(v for stage in self.refreshes for v in stage)]
        return sum(map(self.parameters.fresh_bytes, sent))

    @property
    def to_client(self) -> int:
        """The bytes to the client in one query: outputs and masked ciphertexts to re-encrypt."""
        p, refreshed = self.parameters, sum(map(len, self.refreshes))
        return p.ciphertext_bytes(0) * len(self.output) + p.ciphertext_bytes(self.reserve) * refreshed

    @property
    def hiding(self) -> float | None:
        """Bits by which the masks hide all refreshed ciphertexts of a query together; Q queries have log2 Q fewer."""
        refreshed = sum(map(len, self.refreshes))
        return hiding(self.parameters, self.reserve, refreshed) if refreshed else None

    # the client's side

    def reach(self, name: str) -> float:
        """Return the largest number that may stand in an input, negative or not; more than 0."""
        return max(*map(abs, self.ranges[name]), 1e-6)

    def check_inputs(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise InvalidInput unless names, types and shapes are those of the model's inputs, and none holds NaN."""
        check_query(self.client_graph, inputs)

    def clear_values(self, inputs: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the client's graph in the clear: all that depends on values, and every error.

        Raises InvalidInput, also outside an input's range.
        """
        values = clear_values(self.client_graph, self.client_inputs, inputs)
        for name, value in self._flat(values, tables).items():
            low, high = self.ranges[name]
            if not (np.isfinite(value).all() and low <= value.min() and value.max() <= high):
                raise InvalidInput(
                    f"input {name!r} has values in [{value.min():.4g}, {value.max():.4g}], the Program was made "
                    f"for [{low:.4g}, {high:.4g}]\nhint: scale the input as the model's calibration inputs are"
                )
        return values

    def dummy_values(self) -> dict[str, Tensor]:
        """Return zeros in place of ``clear_values``."""
        return dummy_values(self.client_graph, self.client_inputs)

    def encode(self, values: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Vector]:
        """Return the slots of every ciphertext that the client sends; the work follows from shapes alone."""
        flat = self._flat(values, tables)
        return {k: at(flat[name], content) for k, (name, _, content) in self.views.items()}

    def _flat(self, values: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Array]:
        return {
            spec.name: encode_input(spec, values[spec.name], tables).to(torch.float64).numpy().reshape(-1)
            for spec in self.client_inputs
        }

    def client_values(self, inputs: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Vector]:
        """Return the slots of every ciphertext that the client sends. Raises InvalidInput outside an input's range."""
        return self.encode(self.clear_values(inputs, tables), tables)

    @property
    def output_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of the model's output, by its name."""
        return {"output": self.output_shape}

    def decode(self, slots: Sequence[Vector]) -> dict[str, Tensor]:
        """Read the output (float64), by name, from the decrypted slots of its ciphertexts, and round it to the grain.

        Raises InvalidInput if the values are too large to be an answer.
        """
        out = np.zeros(math.prod(self.output_shape))
        for row, values in zip(self.output, slots, strict=True):
            used = row >= 0
            out[row[used]] = values[used]
        if not np.isfinite(out).all() or np.abs(out).max() > HEADROOM:
            raise InvalidInput(
                f"the result decrypts to {np.abs(out).max() * self.output_unit:.4g}, calibrated outputs end at "
                f"{self.output_unit:.4g}: it is not an answer\n"
                "hint: inputs far from the calibration inputs leave the ranges of the model's polynomials"
            )
        rounded = torch.from_numpy(np.round(out * self.output_unit / self.grain) * self.grain)
        return {"output": rounded.reshape(self.output_shape)}

    def check_results(self, slots: Sequence[Vector]) -> None:
        """Nothing but the size of the values tells whether they are an answer, which ``decode`` looks at."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class _CkksForm:
    """The form of an encoded Program, with the bounds of its fields."""

    version: int
    parameters: dict[str, Whole]
    steps: Annotated[list[Whole], FailFast(), Field(max_length=MAXIMUM_CIPHERTEXTS)]
    client_graph: str
    client_inputs: Annotated[list[ClientInput], FailFast(), Field(max_length=MAXIMUM_INPUTS)]
    ranges: Annotated[dict[Name, tuple[Real, Real]], Field(max_length=MAXIMUM_INPUTS)]
    views: Annotated[dict[Name, tuple[Name, Bits, str]], Field(max_length=MAXIMUM_CIPHERTEXTS)]
    refreshes: Annotated[
        list[Annotated[list[Bits], FailFast(), Field(max_length=MAXIMUM_CIPHERTEXTS)]],
        FailFast(),
        Field(max_length=MAXIMUM_CIPHERTEXTS),
    ]
    reserve: Bits
    output_shape: Shape
    output: Annotated[list[str], FailFast(), Field(max_length=MAXIMUM_CIPHERTEXTS)]
    output_unit: Real
    grain: Real
    counts: Annotated[dict[Name, Tally], Field(max_length=MAXIMUM_INPUTS)]
    labels: Labels
    rows: Whole = 0


_DOCUMENT = TypeAdapter(_CkksForm)


def _packed(content: Content) -> str:
    return base64.b64encode(zlib.compress(content.astype("<i4").tobytes(), 9)).decode()


def _unpacked(text: str, slots: int) -> Content:
    size = 4 * slots
    decoder = zlib.decompressobj()
    raw = decoder.decompress(base64.b64decode(text, validate=True), size + 1)
    if len(raw) != size:
        raise InvalidProgram(f"a content of {len(raw) // 4} slots, ciphertexts have {slots}")
    content = np.frombuffer(raw, "<i4").astype(np.int64)
    if content.min() < EMPTY:
        raise InvalidProgram("a content of negative elements")
    return content
