"""Private inference of torch models: compile, run, connect.

``compile`` a module, ``connect`` to a server, or run everything in one process (which protects nothing, and says so by
its name).

In dependency order, one line a module:

tokens       text to token ids
clear        operations that one party evaluates in the clear
graph        a model as a flat list of typed operations
operations   what torch.export keeps whole, for models in polynomial form
shapes, rules, polynomial_rules, builder, capture    from torch.export to a graph
recipe       how a model is put into polynomial form
polynomial   modules in the place of softmax, activations and norms
swap         those modules swapped into Hugging Face models
models       sentence encoders in sentence-transformers' format
checkpoints  of a training run, in one file
training, distillation    of a model into that form, in stages that a killed run resumes
digits       a small vision transformer in polynomial form
calibration  public sentences that set ranges, and others to try a model out on
trace        symbolic values that record primitives
values, ranges    ranges of values, and how many bits they take
normalizations, lower    from a graph to a trace, through the approximations
functions, emit    from a trace to a circuit
program      Programs: circuit, digest, canonical encoding
compiler     all of it in one call
affine, chains    what is linear in a trace as matrices; polynomials of one value as one
batched      many inputs at once, one ciphertext an element
packing, packer    elements in slots, and a trace as a circuit of ciphertexts
encrypted    Programs for ciphertexts: what client and server agree on
encrypting   from a module to such a Program: parameters derived, errors predicted
deployments  a Program as one deployment runs it
inprocess    all parties in one process: insecure, by name
fidelity     how close a polynomial model is to its original, and its Program to itself
timeline     when a party did what in one query, measured or predicted
profile      what a Program costs, before anything runs
outline      a Program of a model without its weights, for its costs
timing       what this machine takes for each step of a Program
projection   how long a query takes on a network
whatif       variants of a model side by side, and the cheapest that will do
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from protocols.fixedpoint import FixedPoint
from secure.ckks.compile import Encrypted, encrypt
from secure.ckks.program import EncryptedProgram
from secure.cost.count import Network, Profile, profile
from secure.cost.runnable import Deployed
from secure.deployments.in_process import InsecureInProcess, InsecureThreeParties, plain_reference
from secure.deployments.three_party import deployed
from secure.errors import DoesNotFit, FixedPointError, InvalidProgram, UnsupportedOperation
from secure.mpc.compile import Compiled, compile
from secure.mpc.program import Program
from secure.polynomial.recipe import Recipe
from secure.polynomial.swap import polynomialize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parties.three_party.client import ThreePartyConnection
    from parties.two_party.client import Connection

__version__ = "0.1.0"

__all__ = [
    "Compiled",
    "Deployed",
    "DoesNotFit",
    "Encrypted",
    "EncryptedProgram",
    "FixedPoint",
    "FixedPointError",
    "InsecureInProcess",
    "InsecureThreeParties",
    "InvalidProgram",
    "Network",
    "Profile",
    "Program",
    "Recipe",
    "UnsupportedOperation",
    "compile",
    "connect",
    "connect_parties",
    "deployed",
    "encrypt",
    "plain_reference",
    "polynomialize",
    "profile",
]


def connect_parties(parties: Sequence[str], **options: Any) -> ThreePartyConnection:
    """Connect to parties 0 and 1 of three; see ``parties.three_party.client.connect_three``."""
    from parties.three_party.client import connect_three

    return connect_three(parties, **options)


def connect(server: str, dealer: str, **options: Any) -> Connection:
    """Connect to a server and a dealer; see ``parties.two_party.client.connect``.

    The one place where ``secure`` reaches up to ``parties``: users find everything under one name.
    """
    from parties.two_party.client import connect as connect_parties

    return connect_parties(server, dealer, **options)
