"""The encoding of a client's values as the inputs of a circuit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secure.errors import InvalidInput

EMBEDDINGS = ("one-hot", "client-table")


@dataclass(frozen=True)
class ClientInput:
    """One input of the circuit, which the client makes from output ``output`` of its own graph, plain or encoded."""

    name: str
    output: int
    encoding: str  # "plain", "one-hot" or "client-table"
    size: int  # rows of the token table (one-hot, client-table), else 0
    shape: tuple[int, ...]
    table: str = ""  # the weight that the client holds (client-table)


ENCODINGS = ("plain", "one-hot", "client-table")


def encode_input(spec: ClientInput, value: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
    """Encode one client input as real numbers: as it is, as one-hot rows, or as rows of a table that the client holds.

    Raises InvalidInput for a token id outside the table.
    """
    if spec.encoding == "plain":
        return value
    if value.numel() and not 0 <= int(value.min()) <= int(value.max()) < spec.size:
        raise InvalidInput(f"a token id is outside 0..{spec.size - 1}", "use the tokenizer that belongs to the model")
    if spec.encoding == "one-hot":
        return torch.nn.functional.one_hot(value, spec.size).to(torch.float64)
    return tables[spec.table][value]
