"""``secure.compile``, which compiles a model for any deployment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from protocols.fixedpoint import FixedPoint
from secure.cost.projection import Transport
from secure.cost.report import ProfileReport
from secure.cost.traffic import Cost
from secure.deployments.deployment import CompileOptions, Deployment, ProfileOptions
from secure.deployments.two_party import TwoParty
from secure.errors import InvalidInput
from secure.frontend import Size
from secure.lowering.client_inputs import GENERATE, check_inputs
from secure.models.heads import SEARCH, task_named
from secure.models.settings import EXACT
from secure.models.tokenizer_document import TOKENIZER, tokenizer_digest
from secure.models.tokens import TextTokenizer
from secure.mpc.network import find_network
from secure.progress import Told, silent
from secure.session.link import MAXIMUM_LENGTHS, Link, Offer, digest_of_all
from secure.session.session import Session
from secure.tasks.answer import Answering
from secure.tasks.classify import Classify
from secure.tasks.digits import Digits
from secure.tasks.embed import Embed
from secure.tasks.generate import Generate
from secure.tasks.rerank import Rerank
from secure.tasks.search import Search
from secure.tasks.tag import Tag
from secure.tasks.task import Loaded, Loader

Sample = Mapping[str, Tensor]

ANSWER_BITS = (8, 12)
"""The fewest and the most fraction bits to which embeddings of length 1 are rounded by default."""

ANSWER_COSINE = 0.99995
"""The cosine to the vector before it is rounded that these bits keep: 10 of them for 315 to 1,258 numbers."""

MAXIMUM_BATCHES = 4
MAXIMUM_SIZES = MAXIMUM_LENGTHS * MAXIMUM_BATCHES
"""Pairs of a length and a batch for which one model is compiled."""


@dataclass(frozen=True, eq=False, repr=False)
class Compiled:
    """A model compiled for one deployment: a public Program, and the weights, which its owner keeps secret.

    model: the Program and the weights in the form with which the deployment computes; secret.
    tokenizer, tokenizer_json: for clients, if the model takes text. options: those with which it was compiled. about: a
    line for the model's owner, or "". made: the time (UTC) at which it was compiled. others: the same model for other
    lengths and batches, with the same weights.
    """

    deployment: Deployment
    model: Any
    tokenizer: TextTokenizer | None = None
    tokenizer_json: bytes = b""
    options: CompileOptions = field(default_factory=CompileOptions)
    about: str = ""
    made: str = ""
    others: tuple[Compiled, ...] = ()

    @property
    def sizes(self) -> tuple[Compiled, ...]:
        """This model and ``others``: one for each pair of a length and a batch."""
        return self, *self.others

    @property
    def program(self) -> Any:
        """The Program, on which all parties agree before they compute. It is public and holds no weights."""
        return self.model.program

    @property
    def programs_digest(self) -> str:
        """One digest of the Programs of all sizes, which clients can pin."""
        return digest_of_all(size.program.digest for size in self.sizes)

    @property
    def client_tables(self) -> Mapping[str, Tensor]:
        """The token tables that the owner lets clients hold."""
        tables: Mapping[str, Tensor] = self.model.client_tables
        return tables

    @cached_property
    def cost(self) -> Cost:
        """The rounds of one query, and its bytes by link."""
        return self.deployment.cost(self.model)


def compile(  # the verb that torch uses; always written secure.compile
    model: nn.Module,
    example_inputs: Sample,
    *,
    calibration: Sequence[Sample] = (),
    deployment: Deployment | None = None,
    embedding: str | None = None,
    gelu: str | None = None,
    approximations: str | None = None,
    fixed_point: FixedPoint | None = None,
    network: str | None = None,
    answer_bits: int | None = None,
    checked: bool | None = None,
    labels: Mapping[str, str] | None = None,
) -> Compiled:
    """Capture a module, calibrate its ranges, and lower it for one deployment (by default ``TwoParty()``).

    example_inputs: the module's keyword arguments, which fix all shapes; every one of them is the client's secret.
    calibration: more such inputs, whose values set the ranges; the example counts as one.
    embedding: "one-hot" (nothing revealed) or "client-table" (the owner lets clients hold the token table, and the
    look-up costs nothing). gelu: the form of GeLU, see ``approximations.gelu``. approximations: "default" for ours, or
    "puma" for the published ones of that paper, its GeLU among them. fixed_point: scales and margins.
    network: where rounds and bytes shall be cheap: "lan", "wan", "slow-wan", or "MBPS,ROUND_TRIP_MS"; by default, and
    for "loopback", where the parties are near. The Program's label "network" names it.
    answer_bits: the fraction bits to which answers are rounded, exactly, before anybody sees them, which takes a round.
    By default embeddings of text models whose length is 1 have 8 to 12 by their width (``answer_bits_for``), and other
    answers those of activations, 16, which turn it off.
    checked: notice values that leave their ranges, by default; an answer is then the error OutOfRange. ``unseen
    profile`` says what it costs.
    Raises UnsupportedOperation (naming module and operation), DoesNotFit (a value that no ring or modulus holds) and
    InvalidInput (an option that means nothing in this deployment).
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"the model is a {type(model).__name__}, not a torch.nn.Module", "wrap it in a module")
    samples = [example_inputs, *calibration]
    for sample in samples:
        check_inputs(sample)
    options = CompileOptions(embedding, gelu, approximations, fixed_point, network, answer_bits, checked)
    return build(Loaded("", model, samples), deployment or TwoParty(), options, labels or {})


def compile_text_model(
    model: str,
    length: int | Sequence[int] | None = None,
    *,
    deployment: Deployment | None = None,
    calibration: Sequence[str] = (),
    embedding: str | None = None,
    gelu: str | None = None,
    approximations: str | None = None,
    fixed_point: FixedPoint | None = None,
    network: str | None = None,
    answer_bits: int | None = None,
    checked: bool | None = None,
    batch: int | Sequence[int] = 1,
    task: str = "",
    reveal: str = "",
    index: str = "",
    top: int = 0,
    clusters: int = 0,
) -> Compiled:
    """Load a text model with its tokenizer, and compile it for texts of up to ``length`` tokens; or one of images.

    length: 128 by default, or all that the model takes if that is less; none of a model of images.
    model: a directory as sentence-transformers or transformers saves it, or "all-MiniLM-L6-v2" from its package. task:
    "embed", "classify", "tag", "answer" or "rerank"; by default what the class of the model says. reveal: what clients
    get of a model with a head, see ``secure.models.heads``; the least by default. index: the directory of an index of
    documents, which makes a search of the model; top: the passages that it finds, 10 by default; clusters: how many of
    the index a query looks into, all by default.
    calibration: sentences of your own that widen the ranges. batch: the texts of one query, which take the rounds of
    one; a session fills up what a list leaves empty. Of several lengths and batches, every pair is compiled: one server
    offers them all, and a text takes the shortest that holds it. Other arguments and exceptions are those of
    ``secure.compile``. Raises ModelNotFound too.
    """
    options = CompileOptions(embedding, gelu, approximations, fixed_point, network, answer_bits, checked)
    deployment = deployment or TwoParty()
    _require(deployment)
    deployment.check(options, tokens=True)  # before the model is loaded
    lengths, batches = () if length is None else _several(length), _several(batch)
    check_sizes(deployment, lengths, batches)
    loader = task_of(model, task, reveal, index=index, top=top, clusters=clusters)
    if loader.name == GENERATE:
        raise InvalidInput(f"{model} generates text", "secure.compile_generator compiles it; task='embed' embeds by it")
    found = loader.load(model, max(lengths, default=0), calibration)
    return build(found, deployment, options, {}, lengths, batches)


def check_sizes(deployment: Deployment, lengths: Sequence[int], batches: Sequence[int]) -> None:
    """Raise InvalidInput if a deployment cannot serve so many lengths and batches, or one of the batches."""
    for batch in batches:
        deployment.check_batch(batch)
    many, together = max(1, len(set(lengths))), len(set(batches))
    if many * together > 1 and not deployment.takes_sizes:
        raise InvalidInput(f"one length and one batch are served under {deployment.name}", "give one of each")
    if many > MAXIMUM_LENGTHS or together > MAXIMUM_BATCHES:
        raise InvalidInput(
            f"a model for {many} lengths and {together} batches",
            f"--length {MAXIMUM_LENGTHS} times and --batch {MAXIMUM_BATCHES} times at most",
        )


def build(
    loaded: Loaded,
    deployment: Deployment,
    options: CompileOptions,
    labels: Mapping[str, str],
    lengths: Sequence[int] = (),
    batches: Sequence[int] = (1,),
    told: Told = silent,
) -> Compiled:
    """Compile a model that a task has loaded, for every pair of a length and a batch; ``told`` hears of progress.

    lengths: none stands for the one for which it was loaded. What is returned has the greatest length and the smallest
    batch; ``others`` follow in that order.
    """
    _require(deployment)
    deployment.check(options, tokens=loaded.tokenizer is not None)
    check_sizes(deployment, lengths, batches)
    chosen = [(n, batch) for n in sorted({*lengths} or {loaded.length}, reverse=True) for batch in sorted({*batches})]
    if loaded.exact:
        _check_exact(options)
    options = _rounding(options, loaded, deployment)
    named = {"model": loaded.name} if loaded.name else {}
    named |= {"normalized": "yes"} if loaded.normalized else {}
    named |= loaded.labels
    if (found := loaded.tokenizer) is not None:
        named |= {TOKENIZER: tokenizer_digest(loaded.tokenizer_json, found.pad_id, found.lowercase)}

    def size(length: int, batch: int) -> tuple[Size, Mapping[str, str]]:
        fitted = loaded.at(length).batched(batch)
        own = {"length": str(length)} if length else {}
        own |= {"batch": str(batch)} if batch > 1 else {}
        samples = fitted.samples if batch == min(batches) else []  # of the same inputs, a greater batch shows no more
        return Size(fitted.samples[0], samples), {**named, **own, **labels}

    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    made = deployment.build_sizes(loaded.module, [size(*each) for each in chosen], options, told)
    about = loaded.tokenizer, loaded.tokenizer_json, options, loaded.about, now
    first, *others = [Compiled(deployment, each, *about) for each in made]
    return replace(first, others=tuple(others))


def _rounding(options: CompileOptions, loaded: Loaded, deployment: Deployment) -> CompileOptions:
    """Return the options with answer bits for vectors of length 1, unless the user chose."""
    if options.answer_bits is not None or not loaded.normalized or "answer_bits" not in deployment.takes:
        return options
    with torch.no_grad():
        vectors = loaded.module(**loaded.samples[0])
    bits = answer_bits_for(vectors.shape[-1])
    every = (options.fixed_point or FixedPoint()).fraction_bits
    return replace(options, answer_bits=bits) if bits < every else options


def _check_exact(options: CompileOptions) -> None:
    """Raise InvalidInput for options that would round what must be exact."""
    fixed = options.fixed_point or FixedPoint()
    if options.answer_bits is not None:
        raise InvalidInput(f"answers of {options.answer_bits} bits: those of this task are exact", "leave it out")
    if min(fixed.fraction_bits, fixed.weight_fraction_bits) < EXACT:
        raise InvalidInput(
            f"{fixed.fraction_bits} fraction bits, {fixed.weight_fraction_bits} of weights: the answers are exact",
            f"{EXACT} or more (--fraction-bits)",
        )


def answer_bits_for(width: int) -> int:
    """Return the default fraction bits of vectors of ``width`` numbers and length 1.

    Rounding to 2^-N moves each number by 2^-N / sqrt(12) (root mean square), and turns the vector by sqrt(width) times
    that. The bits are the fewest that keep ``ANSWER_COSINE``, within ``ANSWER_BITS``.
    """
    angle = math.sqrt(2 * (1 - ANSWER_COSINE))
    least, most = ANSWER_BITS
    return min(most, max(least, math.ceil(math.log2(math.sqrt(width / 12) / angle))))


def _several(given: int | Sequence[int]) -> Sequence[int]:
    """Return what was given as numbers. Raises InvalidInput if there is none."""
    found = [given] if isinstance(given, int) else list(given)
    if not found:
        raise InvalidInput("no length or no batch", "give at least one")
    return found


def _require(deployment: object) -> None:
    if not isinstance(deployment, Deployment):
        raise InvalidInput(f"the deployment is {deployment!r}", "give a value such as secure.TwoParty()")


def task_of(
    model: str,
    task: str = "",
    reveal: str = "",
    *,
    dimensions: int = 0,
    index: str = "",
    top: int = 0,
    clusters: int = 0,
) -> Loader:
    """Return what loads a model of this name or directory.

    task: its name; "" stands for what the model itself says, and with an index for a search. reveal: what it shall
    reveal, of a model with a head and of a search; "" stands for the task's default. dimensions: see ``Embed``. index,
    top, clusters: the directory of an index, how many passages are found in it, and how many clusters of it are looked
    into; see ``Search``. Raises InvalidInput for a
    task that there is not, and for what means nothing to it.
    """
    if index:
        if task not in ("", SEARCH) or dimensions:
            raise InvalidInput("an index is for the task search, of whole embeddings", "leave --task, --dimensions out")
        return Search(index=index, found=top, reveal=reveal, clusters=clusters)
    if task == SEARCH or top or clusters:
        raise InvalidInput("a search without an index", "--index DIRECTORY, which unseen index makes")
    plain: tuple[Loader, ...] = (Digits(), Embed(dimensions=dimensions))
    heads: dict[str, Callable[..., Loader]] = {kind.name: kind for kind in (Classify, Tag, Answering, Rerank, Generate)}
    named = task or next((each.name for each in plain if each.knows(model)), "") or task_named(model) or Embed.name
    if dimensions and named != Embed.name:
        raise InvalidInput(f"--dimensions {dimensions}: {model} gives no vectors", "leave it out")
    if named in heads:
        return heads[named](reveal=reveal)
    found = next((each for each in plain if each.name == named), None)
    if found is None:
        known = ", ".join([*(each.name for each in plain), *heads])
        raise InvalidInput(f"there is no task {named!r}", f"one of {known}")
    if reveal:
        raise InvalidInput(
            f"{reveal!r} is revealed of models with a head alone, not by the task {named}", "leave it out"
        )
    return found


def profile(
    compiled: Compiled,
    *,
    networks: Iterable[str] | None = None,
    depth: int | None = None,
    transport: Callable[[], Transport] | None = None,
) -> ProfileReport:
    """Report the cost of one query in detail; see ``secure.profile``.

    transport: measures messages between processes on this machine; without it nothing is timed.
    """
    chosen = {name: find_network(name) for name in networks} if networks is not None else None
    options = ProfileOptions(chosen, depth, transport)
    compiled.deployment.check_profile(options)
    return compiled.deployment.profile(compiled.model, options)


def plain_reference(compiled: Compiled, inputs: Sample) -> Any:
    """INSECURE: run a compiled model in its deployment's plain arithmetic, without sharing or encryption, to compare.

    Raises InvalidInput if the deployment has no such arithmetic.
    """
    return compiled.deployment.reference(compiled.model, inputs)


def insecure_in_process(compiled: Compiled, *, threads: int = 1, pace: float = 0.0) -> Session:
    """INSECURE: open a session whose parties all run in this process. It protects NOTHING.

    It is for trials, tests and measurements of accuracy. threads: torch's threads while the session computes. pace: see
    ``Session``; here nobody looks at the clock, so nothing waits by default.
    """
    sizes = {size.program.digest: size for size in compiled.sizes}

    def open(digest: str) -> Link:
        return sizes[digest].deployment.insecure(sizes[digest].model, sizes[digest].tokenizer)

    offers = [Offer.of(size.program) for size in compiled.sizes]
    return Session(open(compiled.program.digest), threads=threads, pace=pace, open=open, offers=offers)
