"""A Program as one deployment runs it: the circuit between two computing parties, and who they are called.

Two parties run a Program's circuit as it is; of three, parties 0 and 1 run its translation, and party 2 deals.
"""

from __future__ import annotations

from protocols.protocol import PARTY_NAMES
from protocols.three_party import Translated, translate
from secure.cost.runnable import Deployed
from secure.mpc.program import Program

TWO_PARTY, THREE_PARTY, THREE_PARTY_PUBLIC = "two-party", "three-party", "three-party-public-weights"
DEPLOYMENTS = (TWO_PARTY, THREE_PARTY, THREE_PARTY_PUBLIC)


def three_party(program: Program, *, public: bool = False) -> Translated:
    """A Program's circuit for three servers; ``public``: whether they all know the weights."""
    one_hot = {spec.name for spec in program.client_inputs if spec.encoding == "one-hot"}
    return translate(program.circuit, program.output, public=public, one_hot=one_hot)


def deployed(program: Program, deployment: str = TWO_PARTY) -> Deployed:
    """``program`` under one of DEPLOYMENTS."""
    if deployment not in DEPLOYMENTS:
        raise ValueError(f"unknown deployment {deployment!r}\nhint: one of {', '.join(DEPLOYMENTS)}")
    if deployment == TWO_PARTY:
        return Deployed(program.circuit, program.output, program.paths, program.weight_shapes, PARTY_NAMES)
    found = three_party(program, public=deployment == THREE_PARTY_PUBLIC)
    paths = tuple(program.paths[i] for i in found.origin)
    return Deployed(found.circuit, found.output, paths, program.weight_shapes, ("party 0", "party 1"))
