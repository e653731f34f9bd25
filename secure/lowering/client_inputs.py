"""The client's part of a Program: its graph in the clear, and the encoding of its values as inputs of a circuit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import ConfigDict, Field, with_config
from torch import Tensor

from protocols.fields import MAXIMUM_ELEMENTS, Name, Shape, Whole
from secure.capture.documents import what_is_wrong
from secure.capture.graph import Graph, run
from secure.errors import InvalidInput, InvalidProgram

EMBEDDINGS = ("one-hot", "client-table")
MAXIMUM_LENGTH = 1 << 20  # tokens of a text
MAXIMUM_INPUTS = 1 << 8  # of a circuit

MAXIMUM_WORK = 1 << 26
"""The most elements that all nodes of a client's graph have together: tenths of a second of a client's time."""

Labels = Annotated[dict[Name, Name], Field(max_length=64)]
"""The texts of a Program that are for people, by name."""


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class ClientInput:
    """One input of the circuit, which the client makes from output ``output`` of its own graph, plain or encoded."""

    name: Name
    output: Whole
    encoding: Name  # "plain", "one-hot" or "client-table"
    size: Whole  # rows of the token table (one-hot, client-table), else 0
    shape: Shape  # of the encoded input
    table: Name = ""  # the weight that the client holds (client-table)


ENCODINGS = ("plain", "one-hot", "client-table")


def encode_input(spec: ClientInput, value: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
    """Encode one client input as real numbers: as it is, as one-hot rows, or as rows of a table that the client holds.

    It is total, and does the same work for all values: an id outside the table gives a row of zeros (one-hot), or the
    table's first or last row.
    """
    if spec.encoding == "plain":
        return value
    if spec.encoding == "one-hot":
        return (value.unsqueeze(-1) == torch.arange(spec.size, device=value.device)).to(torch.float64)
    return tables[spec.table][value.clamp(0, spec.size - 1)]


def check_ids(graph: Graph, inputs: Sequence[ClientInput], values: Sequence[Tensor]) -> None:
    """Raise InvalidInput for a token id outside its table that the client itself gave, not its graph.

    What a graph from somebody else makes of the client's values must not decide whether the client goes on.
    """
    for spec in inputs:
        value, given = values[spec.output], graph.nodes[graph.outputs[spec.output]].op == "input"
        if spec.encoding == "plain" or not given or not value.numel():
            continue
        if not 0 <= int(value.min()) <= int(value.max()) < spec.size:
            raise InvalidInput(
                f"a token id is outside 0..{spec.size - 1}", "use the tokenizer that belongs to the model"
            )


def client_values(
    graph: Graph, specs: Sequence[ClientInput], inputs: Mapping[str, Tensor], tables: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the circuit's inputs by name as real numbers: the graph in the clear, then the encoding of each input.

    All of it is computed before an id that the client gave can raise InvalidInput.
    """
    values = client_outputs(graph, inputs)
    encoded = {spec.name: encode_input(spec, values[spec.output], tables) for spec in specs}
    check_ids(graph, specs, values)
    return encoded


def table_shapes(inputs: Sequence[ClientInput]) -> dict[str, tuple[int, int]]:
    """Return the shapes (rows, width) of the token tables that the client holds, by name."""
    return {c.table: (c.size, c.shape[-1]) for c in inputs if c.encoding == "client-table"}


def check_client_part(graph: Graph, inputs: Sequence[ClientInput], labels: Mapping[str, str]) -> None:
    """Check all of another's Program that a client evaluates in the clear, before any of it takes memory.

    Every input is made from an output of the graph in a known way, and has the shape that results. The graph's nodes
    have MAXIMUM_WORK elements together, each input and each token table MAXIMUM_ELEMENTS at most. A label "length"
    names at most MAXIMUM_LENGTH tokens, as many as the graph's inputs of shape (1, n). Raises InvalidProgram.
    """
    total = sum(math.prod(node.shape) for node in graph.nodes)
    if total > MAXIMUM_WORK:
        raise InvalidProgram(f"the client's graph has {total} elements, clients compute {MAXIMUM_WORK} at most")
    if len({c.name for c in inputs}) != len(inputs):
        raise InvalidProgram("two inputs have the same name")
    for c in inputs:
        if not 0 <= c.output < len(graph.outputs) or c.encoding not in ENCODINGS:
            raise InvalidProgram("an input is not made from an output of the client's graph in a known way")
        looked_up, node = c.encoding != "plain", graph.nodes[graph.outputs[c.output]]
        if c.size < 0 or (c.size > 0) != looked_up or (c.encoding == "client-table") != bool(c.table):
            raise InvalidProgram(f"the input {c.name!r} looks up {c.size} rows of the table {c.table!r}")
        width = c.size if c.encoding == "one-hot" else c.shape[-1] if c.shape else 0
        if c.shape != ((*node.shape, width) if looked_up else node.shape) or min((*c.shape, 1)) < 0:
            raise InvalidProgram(f"the input {c.name!r} has the shape {c.shape}, it is made from {node.shape}")
        if max(math.prod(c.shape), c.size * width) > MAXIMUM_ELEMENTS or (looked_up and node.dtype != "int"):
            raise InvalidProgram(
                f"the input {c.name!r} has the impossible size {c.shape}, or is not made from integers"
            )
    tables = table_shapes(inputs)
    if any(tables[c.table] != (c.size, c.shape[-1]) for c in inputs if c.encoding == "client-table"):
        raise InvalidProgram("two inputs look up one table of two sizes")
    if (length := labels.get("length")) is None:
        return
    if not re.fullmatch("[1-9][0-9]{0,6}", length) or int(length) > MAXIMUM_LENGTH:
        raise InvalidProgram(f"the label length is {length[:40]!r}, no number of tokens from 1 to {MAXIMUM_LENGTH}")
    for name, node in graph.inputs.items():
        if len(node.shape) == 2 and node.shape[0] == 1 and node.shape[1] != int(length):
            raise InvalidProgram(
                f"the label length is {length}, the client's input {name!r} has {node.shape[1]} tokens"
            )


def client_outputs(graph: Graph, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Run the client's own graph on a model's inputs; raises InvalidInput for inputs that the model does not take."""
    check_inputs(inputs)
    if unknown := sorted(set(inputs) - set(graph.inputs)):
        raise InvalidInput(f"the model has no input {unknown[0]!r}", f"its inputs are {', '.join(graph.inputs)}")
    try:
        return run(graph, inputs, {})
    except InvalidInput:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError) as error:  # of the graph's types, whatever the values are
        raise InvalidProgram(f"the client's graph cannot be computed: {what_is_wrong(error)}") from None


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
