"""Private inference of torch models: compile, serve, connect.

``compile`` turns a torch module into a Program for one deployment, ``serve`` hosts a role of that deployment, and
``connect`` opens a client's session with those who serve.

The wings of this package, in dependency order; each imports only those above it in this list:

errors       the one family of errors
version      the versions of the package and of the wire format
progress     reports of progress
units        numbers with units, for people
capture/     from a torch module to a graph of operations
lowering/    from a graph to a trace of primitives
polynomial/  models in polynomial form
operations/  every operation: meaning, how torch writes it, lowering
frontend     from a torch module and samples to a trace
mpc/         the compiler for secret sharing
ckks/        the compiler for ciphertexts
models/      loading models and tokenizers, and calibrating on text
cost/        rounds, bytes, memory and time of a Program, predicted before anything runs
tasks/       tasks that a model serves, such as embedding texts
session/     the one client: its links, its queries
deployments/ the roles of each deployment, and what each of them learns
training/    training a model into polynomial form
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from secure.errors import (
    Busy,
    ChangedOnTheWay,
    ClientDeviates,
    CompiledError,
    DealerError,
    Diverged,
    DoesNotFit,
    DoesNotPack,
    DownloadError,
    EmptyInput,
    EndpointError,
    Error,
    FixedPointError,
    GoingAway,
    HandshakeError,
    InputTooLong,
    InvalidInput,
    InvalidProgram,
    MissingPackage,
    ModelNotFound,
    NotDealt,
    OtherVersion,
    OutOfRange,
    PartiesDisagree,
    PeerLost,
    ProtocolError,
    QueryError,
    QuotaError,
    RangeLost,
    ReceiptError,
    ShareError,
    StoreError,
    TlsError,
    TokenError,
    UnsupportedOperation,
)
from secure.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from parties.net.network import Network, Plaintext
    from parties.services.hosting import Service
    from parties.shapes.pipelines import Pipeline
    from parties.shapes.sentence_transformer import SentenceTransformer
    from parties.tls.tls import Tls
    from protocols.fixedpoint import FixedPoint
    from secure.cost.plan import CapacityPlan, PriceList, Workload
    from secure.cost.report import ProfileReport
    from secure.cost.traffic import Cost, Traffic
    from secure.deployments.ckks import Ckks
    from secure.deployments.compare import compare
    from secure.deployments.compiled import Compiled, compile, compile_text_model, insecure_in_process, plain_reference
    from secure.deployments.deployment import Deployment
    from secure.deployments.generator import compile_generator
    from secure.deployments.three_party import ThreeParty
    from secure.deployments.two_party import TwoParty
    from secure.mpc.budget import Budget
    from secure.mpc.program import Program
    from secure.operations.sampling import sample
    from secure.polynomial.recipe import Recipe
    from secure.polynomial.swap import polynomialize
    from secure.session.generation import Generation
    from secure.session.link import Report
    from secure.session.session import Session

__unseen__ = True  # the mark that unseen_start looks for

__all__ = [
    "Budget",
    "Busy",
    "CapacityPlan",
    "ChangedOnTheWay",
    "Ckks",
    "ClientDeviates",
    "Compiled",
    "CompiledError",
    "Cost",
    "DealerError",
    "Deployment",
    "Diverged",
    "DoesNotFit",
    "DoesNotPack",
    "DownloadError",
    "EmptyInput",
    "EndpointError",
    "Error",
    "FixedPoint",
    "FixedPointError",
    "Generation",
    "GoingAway",
    "HandshakeError",
    "InputTooLong",
    "InvalidInput",
    "InvalidProgram",
    "MissingPackage",
    "ModelNotFound",
    "Network",
    "NotDealt",
    "OtherVersion",
    "OutOfRange",
    "PartiesDisagree",
    "PeerLost",
    "Pipeline",
    "Plaintext",
    "PriceList",
    "ProfileReport",
    "Program",
    "ProtocolError",
    "QueryError",
    "QuotaError",
    "RangeLost",
    "ReceiptError",
    "Recipe",
    "Report",
    "SentenceTransformer",
    "Service",
    "Session",
    "ShareError",
    "StoreError",
    "ThreeParty",
    "Tls",
    "TlsError",
    "TokenError",
    "Traffic",
    "TwoParty",
    "UnsupportedOperation",
    "Workload",
    "__version__",
    "compare",
    "compile",
    "compile_generator",
    "compile_text_model",
    "connect",
    "insecure_in_process",
    "load_compiled",
    "pipeline",
    "plain_reference",
    "plan",
    "polynomialize",
    "profile",
    "sample",
    "save_compiled",
    "serve",
    "share_model",
]


def connect(deployment: Deployment, **options: Any) -> Session:
    """Connect to the servers of a model and return a Session.

    The options are those of ``parties.deployments.connect``.
    """
    from parties.deployments import connect

    return connect(deployment, **options)


def pipeline(task: str, deployment: Deployment | Session, **options: Any) -> Pipeline:
    """Connect to the servers of a model, which is then called like ``transformers.pipeline(task)``.

    See ``parties.shapes.pipelines.pipeline``; the options are those of ``connect``.
    """
    from parties.shapes.pipelines import pipeline

    return pipeline(task, deployment, **options)


def serve(held: Any = None, **options: Any) -> Service:
    """Host one role of a deployment and return its Service.

    The options are those of ``parties.deployments.serve``.
    """
    from parties.deployments import serve

    return serve(held, **options)


def profile(
    compiled: Compiled, *, networks: Iterable[str] | None = None, depth: int | None = None, time: bool = False
) -> ProfileReport:
    """Report the cost of one query before anything runs: exact rounds, bytes and memory, and projected seconds.

    networks: those for which seconds are wanted: "loopback", "lan", "wan", "slow-wan", or "MBPS,ROUND_TRIP_MS"; by
    default the four named ones. depth: the parts of a module path that the report tells apart, 3 by default. time:
    measure this machine's kernels and messages, which takes up to a minute; else only waiting for the network counts.
    Raises InvalidInput for an option that does not apply in the deployment.
    """
    from parties.services.measure import measure_transport
    from secure.deployments.compiled import profile

    return profile(compiled, networks=networks, depth=depth, transport=measure_transport if time else None)


def plan(
    compiled: Compiled, workload: Workload, *, network: str = "lan", prices: PriceList | None = None
) -> CapacityPlan:
    """Plan the machines of each role for a workload: cores, memory, disk, bandwidth, latency, and cost at given prices.

    network: the one between all roles: "lan", "wan", "slow-wan", or "MBPS,ROUND_TRIP_MS". Kernels and messages are
    timed on this machine, which takes up to a minute. Raises InvalidInput if no number of machines answers the
    workload, see ``secure.cost.plan.plan``.
    """
    from parties.services.measure import measure_transport
    from secure.cost.plan import plan
    from secure.mpc.network import find_apart

    return plan(compiled.deployment.demand(compiled.model, find_apart(network), measure_transport), workload, prices)


def save_compiled(compiled: Compiled, directory: str | Path) -> None:
    """Write a compiled model to a new directory, from which ``load_compiled`` and ``unseen serve`` take it.

    It holds the owner's secret weights. See ``parties.served.compiled_files.save_compiled``.
    """
    from parties.served.compiled_files import save_compiled

    save_compiled(compiled, directory)


def load_compiled(directory: str | Path) -> Compiled:
    """Read and check a compiled model that ``save_compiled`` or ``unseen compile`` wrote.

    See ``parties.served.compiled_files.load_compiled``.
    """
    from parties.served.compiled_files import load_compiled

    return load_compiled(directory)


def share_model(compiled: Compiled, directory: str | Path) -> list[Path]:
    """Split a model's weights into shares for three parties and write them as files; return the files.

    See ``parties.three_party.shared_model.share_model``.
    """
    from parties.three_party.shared_model import share_model

    return share_model(compiled, directory)


_PLACES = {
    "parties.net.network": "Network Plaintext",
    "parties.services.hosting": "Service",
    "parties.shapes.pipelines": "Pipeline",
    "parties.shapes.sentence_transformer": "SentenceTransformer",
    "parties.tls.tls": "Tls",
    "protocols.fixedpoint": "FixedPoint",
    "secure.cost.plan": "CapacityPlan PriceList Workload",
    "secure.cost.report": "ProfileReport",
    "secure.cost.traffic": "Cost Traffic",
    "secure.deployments.ckks": "Ckks",
    "secure.deployments.compare": "compare",
    "secure.deployments.compiled": "Compiled compile compile_text_model insecure_in_process plain_reference",
    "secure.deployments.deployment": "Deployment",
    "secure.deployments.generator": "compile_generator",
    "secure.deployments.three_party": "ThreeParty",
    "secure.deployments.two_party": "TwoParty",
    "secure.mpc.budget": "Budget",
    "secure.mpc.program": "Program",
    "secure.operations.sampling": "sample",
    "secure.polynomial.recipe": "Recipe",
    "secure.polynomial.swap": "polynomialize",
    "secure.session.generation": "Generation",
    "secure.session.link": "Report",
    "secure.session.session": "Session",
}
"""The modules that are imported when one of these names of theirs is first used: they need torch or gRPC."""

_MODULES = {name: module for module, names in _PLACES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a name of this interface when it is first used, so that what needs no torch starts without it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'secure' has no attribute {name!r}")
    found = getattr(import_module(_MODULES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """List the names that are not imported yet as well."""
    return sorted({*globals(), *__all__})
