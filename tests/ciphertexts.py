"""Small CKKS parameters, inputs, and a query between a server and its client in this process."""

from __future__ import annotations

import numpy as np

from protocols.ckks import canonical, refresh
from protocols.ckks.circuit import Vector
from protocols.ckks.evaluate import EncodedWeights, evaluate
from protocols.ckks.parameters import Parameters
from protocols.ckks.schedule import Schedule
from protocols.ckks.seal import Client, EvaluationKeys

P = Parameters(8192, 4, 30, 38)
INPUTS = {name: np.random.default_rng(k).uniform(-1, 1, P.slots) for k, name in enumerate("xy")}
TOP = refresh.reserve(P.degree, P.scale_bits, P.base_bits)


def residues(form: canonical.WireForm, data: bytes) -> bytes:
    """The residues of an object, in words of 64 bits."""
    return form.unpack(data, "it")[0].tobytes()


def returned(client: Client, data: bytes, level: int) -> bytes:
    """A fresh ciphertext as a server sends one that it computed."""
    context = client.context
    return context.packed(context.ciphertext(data, canonical.fresh(context.parameters, level)))


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
