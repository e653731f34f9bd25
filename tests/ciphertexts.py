"""Small CKKS parameters, inputs, and a query between a server and its client in this process."""

from __future__ import annotations

import numpy as np
import zstandard

from protocols.ckks import refresh, seal
from protocols.ckks.circuit import Vector
from protocols.ckks.evaluate import EncodedWeights, evaluate
from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import Schedule
from protocols.ckks.seal import Client, EvaluationKeys

P = Parameters(8192, 4, 30, 38)
INPUTS = {name: np.random.default_rng(k).uniform(-1, 1, P.slots) for k, name in enumerate("xy")}
TOP = refresh.reserve(P.degree, P.scale_bits, P.base_bits)


def unpacked(data: bytes) -> bytes:
    """The body of one of SEAL's files."""
    if data[5] == seal.PLAIN:
        return data[seal.HEADER :]
    return zstandard.ZstdDecompressor().decompressobj().decompress(data[seal.HEADER :])


def run(client: Client, server: EvaluationKeys, s: Schedule) -> list[Vector]:
    """The outputs, by the server and a client that refreshes."""
    encrypted = {name: client.encrypt(INPUTS[name], level) for name, level in s.inputs().items()}
    refresher, computing = refresh.Refresher(client), evaluate(EncodedWeights(client.context, s), server, encrypted)
    stage, answers = 0, None
    while True:
        try:
            masked = computing.send(answers) if answers is not None else next(computing)
        except StopIteration as ended:
            return [client.decrypt(data, s.levels[x]) for data, x in zip(ended.value, s.circuit.outputs, strict=True)]
        stage += 1
        levels = [s.levels[i] for i in s.refreshes(stage)]
        answers = [refresher.refresh(m, s.reserve, level) for m, level in zip(masked, levels, strict=True)]
