"""The client's part of a Program: its graph in the clear, and the encoding of its values as inputs of a circuit."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import AfterValidator, ConfigDict, Field, with_config
from torch import Tensor

from protocols.fields import MAXIMUM_ELEMENTS, Name, Shape, Text, Whole
from secure.capture.documents import read_tensors, what_is_wrong
from secure.capture.graph import POSITIONS, Graph, check_given, run
from secure.errors import InvalidInput, InvalidProgram

EMBEDDINGS = ("one-hot", "client-table")
MAXIMUM_LENGTH = 1 << 20  # tokens of a text
MAXIMUM_BATCH = 1 << 14  # inputs of a query: the slots of the largest ring
MAXIMUM_INPUTS = 1 << 8  # of a circuit
MAXIMUM_LABEL = 512  # characters of a label
TABLES = "token-tables"  # the label of a Program that holds the digest of the token tables that clients hold

MAXIMUM_WORK = 1 << 26
"""The most elements that all nodes of a client's graph have together: tenths of a second of a client's time."""

TASK, SETTINGS = "task", "settings"  # labels of a Program: the task that it was made for, and what that needs
GENERATE = "generate"  # the task of Programs that write text, whose queries read what earlier ones kept
MOST_ROWS = "capacity"  # a label of such Programs: the most rows that a conversation keeps
MAXIMUM_SETTINGS = 1 << 20  # characters of the label SETTINGS; every other label has as many as a name


def _short(labels: dict[str, str]) -> dict[str, str]:
    long = next((name for name, text in labels.items() if name != SETTINGS and len(text) > MAXIMUM_LABEL), None)
    if long is not None:
        raise InvalidInput(f"the label {long} has more than {MAXIMUM_LABEL} characters")
    return labels


Labels = Annotated[dict[Name, Text], Field(max_length=64), AfterValidator(_short)]
"""The texts of a Program that are for people and for its task, by name."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class ClientInput:
    """One input of the circuit, which the client makes from output ``output`` of its own graph, plain or encoded."""

    name: Name
    output: Whole
    encoding: Name  # one of ENCODINGS
    size: Whole  # rows of the token table (one-hot, client-table), else 0
    shape: Shape  # of the encoded input
    table: Name = ""  # the weight that the client holds (client-table)


ENCODINGS = ("plain", "one-hot", "client-table", "public")

_AS_IT_IS = ("plain", "public")


def clear_value(spec: ClientInput, value: Tensor) -> Tensor:
    """Return an output of the client's graph as ``encode_input`` takes it: float64, or integers that are looked up."""
    # subnormal float32 would be slower to encode
    return value.to(torch.float64) if spec.encoding in _AS_IT_IS else value


def encode_input(spec: ClientInput, value: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
    """Encode a ``clear_value`` as real numbers: as it is, as one-hot rows, or as rows of a table that the client holds.

    Nothing here depends on values but the result: the work follows from shapes, and nothing is raised. An id outside
    the table gives a row of zeros (one-hot), or the table's first or last row.
    """
    if spec.encoding in _AS_IT_IS:
        return value
    if spec.encoding == "one-hot":
        return (value.unsqueeze(-1) == torch.arange(spec.size, device=value.device)).to(torch.float64)
    return tables[spec.table][value.clamp(0, spec.size - 1)]


def check_ids(graph: Graph, specs: Sequence[ClientInput], values: Mapping[str, Tensor]) -> None:
    """Raise InvalidInput for a token id outside its table that the client itself gave, not its graph.

    What a graph from somebody else makes of the client's values does not decide whether the client has an error.
    """
    for spec in specs:
        value, given = values[spec.name], graph.nodes[graph.outputs[spec.output]].op == "input"
        if spec.encoding in _AS_IT_IS or not given or not value.numel():
            continue
        if not 0 <= int(value.min()) <= int(value.max()) < spec.size:
            raise InvalidInput(
                f"a token id is outside 0..{spec.size - 1}", "use the tokenizer that belongs to the model"
            )


def table_shapes(inputs: Sequence[ClientInput]) -> dict[str, tuple[int, int]]:
    """Return the shapes (rows, width) of the token tables that the client holds, by name."""
    return {c.table: (c.size, c.shape[-1]) for c in inputs if c.encoding == "client-table"}


def tables_label(tables: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the label that binds token tables (float32) to a Program: SHA-256 over them by name; {} for no table."""
    total = hashlib.sha256()
    for name in sorted(tables):
        total.update(f"{len(name)}:{name}:{tuple(tables[name].shape)}:".encode())  # lengths keep fields apart
        total.update(tables[name].contiguous().numpy().tobytes())
    return {TABLES: total.hexdigest()} if tables else {}


def find_tables(
    payload: bytes | None, shapes: Mapping[str, tuple[int, int]], labels: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return the token tables of a safetensors file by name; raises InvalidInput unless they are the Program's.

    shapes, labels: see ``check_tables``.
    """
    if shapes and payload is None:
        raise InvalidInput("there is no file of token tables")
    return check_tables(read_tensors(payload, shapes) if shapes and payload is not None else {}, shapes, labels)


def check_tables(
    tables: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], labels: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return those token tables that a Program needs; raises InvalidInput unless they are the Program's.

    shapes: (rows, width) of each table in which the Program's client looks tokens up; all are float32. labels: those of
    the Program, which hold the tables' digest.
    """
    for name, shape in shapes.items():
        if name not in tables or tuple(tables[name].shape) != shape or tables[name].dtype != torch.float32:
            raise InvalidInput(f"the token table {name!r} of {shape[0]} rows of {shape[1]} numbers did not come")
    wanted = {name: tables[name] for name in shapes}
    if not hmac.compare_digest(tables_label(wanted).get(TABLES, "").encode(), labels.get(TABLES, "").encode()):
        raise InvalidInput("the token table is not the one of the Program")
    return wanted


def check_client_part(graph: Graph, inputs: Sequence[ClientInput], labels: Mapping[str, str]) -> None:
    """Check all of another's Program that a client evaluates in the clear, before any of it takes memory.

    Every input is made from an output of the graph in a known way, and has the shape that results. The graph's nodes
    have MAXIMUM_WORK elements together, each input and each token table MAXIMUM_ELEMENTS at most. A label "batch" names
    the first size of all of the graph's inputs, MAXIMUM_BATCH at most. A label "length" names at most MAXIMUM_LENGTH
    tokens, as many as the graph's inputs of shape (batch, n) have; without a batch it is 1. Raises InvalidProgram.
    """
    total = sum(math.prod(node.shape) for node in graph.nodes)
    if total > MAXIMUM_WORK:
        raise InvalidProgram(f"the client's graph has {total} elements, clients compute {MAXIMUM_WORK} at most")
    if len({c.name for c in inputs}) != len(inputs):
        raise InvalidProgram("two inputs have the same name")
    for c in inputs:
        if not 0 <= c.output < len(graph.outputs) or c.encoding not in ENCODINGS:
            raise InvalidProgram("an input is not made from an output of the client's graph in a known way")
        looked_up, node = c.encoding not in _AS_IT_IS, graph.nodes[graph.outputs[c.output]]
        if c.size < 0 or (c.size > 0) != looked_up or (c.encoding == "client-table") != bool(c.table):
            raise InvalidProgram(f"the input {c.name!r} looks up {c.size} rows of the table {c.table!r}")
        width = c.size if c.encoding == "one-hot" else c.shape[-1] if c.shape else 0
        if c.shape != ((*node.shape, width) if looked_up else node.shape) or min((*c.shape, 1)) < 0:
            raise InvalidProgram(f"the input {c.name!r} has the shape {c.shape}, it is made from {node.shape}")
        if c.encoding == "public" and graph.outputs[c.output] not in graph.of_positions:
            raise InvalidProgram(f"the input {c.name!r} would make more public than {POSITIONS}")
        held = c.size * width if c.table else 0  # elements of the table that the client holds; one-hot rows need none
        if max(math.prod(c.shape), held) > MAXIMUM_ELEMENTS or (looked_up and node.dtype != "int"):
            raise InvalidProgram(
                f"the input {c.name!r} has the impossible size {c.shape}, or is not made from integers"
            )
    tables = table_shapes(inputs)
    if any(tables[c.table] != (c.size, c.shape[-1]) for c in inputs if c.encoding == "client-table"):
        raise InvalidProgram("two inputs look up one table of two sizes")
    batch = _number(labels, "batch", "inputs", MAXIMUM_BATCH)
    for name, node in graph.inputs.items():
        if batch is not None and (not node.shape or node.shape[0] != batch):
            raise InvalidProgram(f"the label batch is {batch}, the client's input {name!r} has the shape {node.shape}")
    if (length := _number(labels, "length", "tokens", MAXIMUM_LENGTH)) is None:
        return
    for name, node in graph.inputs.items():
        if len(node.shape) == 2 and node.shape[0] == (batch or 1) and node.shape[1] != length:
            raise InvalidProgram(
                f"the label length is {length}, the client's input {name!r} has {node.shape[1]} tokens"
            )


def _number(labels: Mapping[str, str], name: str, noun: str, most: int) -> int | None:
    """Read a label that is a number; None if there is none. Raises InvalidProgram."""
    if (found := labels.get(name)) is None:
        return None
    if not re.fullmatch("[1-9][0-9]{0,6}", found) or int(found) > most:
        raise InvalidProgram(f"the label {name} is {found[:40]!r}, no number of {noun} from 1 to {most}")
    return int(found)


def clear_values(graph: Graph, specs: Sequence[ClientInput], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run the client's graph on a model's inputs; return the ``clear_value`` of each of the circuit's inputs, by name.

    All that depends on values is here, and so is every error. Raises InvalidInput.
    """
    check_query(graph, inputs)
    try:
        values = run(graph, inputs, {})
    except (RuntimeError, TypeError, ValueError, LookupError) as error:  # of the graph's types, whatever the values are
        raise InvalidProgram(f"the client's graph cannot be computed: {what_is_wrong(error)}") from None
    out = {spec.name: clear_value(spec, values[spec.output]) for spec in specs}
    check_ids(graph, specs, out)
    return out


def dummy_values(graph: Graph, specs: Sequence[ClientInput]) -> dict[str, Tensor]:
    """Return zeros in place of ``clear_values``, for a query whose own values cannot be computed."""
    out = {}
    for spec in specs:
        kind = torch.float64 if spec.encoding in _AS_IT_IS else torch.int64
        out[spec.name] = torch.zeros(graph.nodes[graph.outputs[spec.output]].shape, dtype=kind)
    return out


def check_query(graph: Graph, inputs: object) -> None:
    """Raise InvalidInput unless these are a model's inputs by their names, types and shapes, and hold no NaN.

    A server learns that nothing was asked. So the only value of an input that counts here is NaN, which nobody sends
    on purpose; all else depends on the caller's code and on a public Program.
    """
    check_inputs(inputs)
    assert isinstance(inputs, Mapping)
    if unknown := sorted(set(inputs) - set(graph.inputs)):
        raise InvalidInput(f"the model has no input {unknown[0]!r}", f"its inputs are {', '.join(graph.inputs)}")
    check_given(graph, inputs)


def check_inputs(inputs: object) -> None:
    """Raise InvalidInput unless these are tensors by the names of a model's parameters, and hold no NaN."""
    if not isinstance(inputs, Mapping):
        raise InvalidInput(
            f"a model's inputs are a {type(inputs).__name__}, not a mapping from parameter names to tensors",
            'for example {"x": torch.randn(1, 8)}, by the names of the arguments of forward',
        )
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise InvalidInput(f"the input {name!r} is a {type(value).__name__}, not a tensor", "use torch.tensor")
        if value.is_floating_point() and bool(value.isnan().any()):
            raise InvalidInput(f"the input {name!r} holds values that are no number (NaN)", "look where they come from")
