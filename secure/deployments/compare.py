"""Comparing variants of one model: their costs, their accuracy, and the cheapest that is accurate enough.

Costs are exact (``secure.cost.count``). Accuracy is the lowest cosine, over held-out inputs, between the Program in
plain fixed-point arithmetic and the float64 model; under the protocol a truncation may differ from that by one unit. It
is measured for every variant, even for those that differ in the embedding alone, because a client's table is rounded to
other bits than one-hot rows times the server's table.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from approximations import APPROXIMATIONS, choose
from approximations.activations import GELU_FORMS
from protocols.fixedpoint import FixedPoint
from secure.cost.count import Profile, profile
from secure.cost.kernel_times import Timings, measure
from secure.cost.projection import Transport, project
from secure.cost.runnable import Runnable
from secure.cost.traffic import OFFLINE, ONLINE, Cost
from secure.deployments import three_party, two_party  # noqa: F401  (registered before they are counted)
from secure.deployments.circuits import CircuitDeployment
from secure.deployments.deployment import variants as deployment_variants
from secure.deployments.in_process import plain_reference
from secure.errors import InvalidInput
from secure.lowering.client_inputs import EMBEDDINGS
from secure.lowering.lower import Sample
from secure.mpc.compile import MpcModel, compile
from secure.mpc.network import NETWORKS, NetworkSpeed
from secure.mpc.prices import Prices


def comparable() -> dict[str, CircuitDeployment]:
    """Return the deployments that can be compared, the default first: those by secret sharing, by name."""
    return deployment_variants(CircuitDeployment)


FIRST_DEPLOYMENT = next(iter(comparable()))
FORMS = ("exact", "polynomial")  # the model as it is, or its polynomial form from training
FRACTION_BITS = FixedPoint().fraction_bits

Seconds = Callable[[Runnable, Profile], Mapping[str, float]]
"""A function that returns the seconds of a query, by network."""


@dataclass(frozen=True)
class Variant:
    """One way to serve a model. ``length``: its padded length, or any number by which its samples are chosen."""

    length: int
    embedding: str = EMBEDDINGS[0]
    gelu: str = GELU_FORMS[0]
    fraction_bits: int = FRACTION_BITS
    deployment: str = FIRST_DEPLOYMENT
    form: str = FORMS[0]
    approximations: str = APPROXIMATIONS[0]

    def __post_init__(self) -> None:
        known_of = {
            "embedding": EMBEDDINGS,
            "gelu": GELU_FORMS,
            "deployment": comparable(),
            "form": FORMS,
            "approximations": APPROXIMATIONS,
        }
        for what, known in known_of.items():
            if (value := getattr(self, what)) not in known:
                raise InvalidInput(f"unknown {what} {value!r}\nhint: one of {', '.join(known)}")

    @property
    def name(self) -> str:
        return ", ".join(self.words.values())

    @property
    def words(self) -> dict[str, str]:
        """All settings in words; deployment, form and approximations only if they differ from the default."""
        words = {
            "length": f"{self.length} tokens",
            "embedding": self.embedding,
            "gelu": self.gelu,
            "fraction_bits": f"{self.fraction_bits} bits",
        }
        if self.form != FORMS[0]:  # it has no GeLU
            words["gelu"] = self.form
        elif self.approximations != APPROXIMATIONS[0]:  # GeLU is one of them
            words["gelu"] = f"all {self.approximations}"
        said = {f.name: str(getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default}
        return {**words, **{name: word for name, word in said.items() if name in ("deployment",)}}

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self)


def variants(
    lengths: Iterable[int],
    embeddings: Iterable[str] = EMBEDDINGS[:1],
    gelus: Iterable[str] = GELU_FORMS,
    fraction_bits: Iterable[int] = (FRACTION_BITS,),
    deployments: Iterable[str] = (FIRST_DEPLOYMENT,),
    forms: Iterable[str] = FORMS[:1],
    approximations: Iterable[str] = APPROXIMATIONS[:1],
) -> list[Variant]:
    """List every combination once. The polynomial form and PUMA's approximations do not vary with the form of GeLU."""
    combined = itertools.product(lengths, embeddings, gelus, fraction_bits, deployments, forms, approximations)
    return list(dict.fromkeys(_plain(Variant(*settings)) for settings in combined))


def _plain(variant: Variant) -> Variant:
    if variant.form != FORMS[0]:
        return replace(variant, gelu=GELU_FORMS[0], approximations=APPROXIMATIONS[0])
    return replace(variant, gelu=choose(variant.approximations, variant.gelu).gelu_form)


@dataclass(frozen=True)
class Samples:
    """A model's inputs at one length.

    calibration: sets the ranges; its first fixes the shapes. held_out: other inputs, on which answers are compared.
    """

    calibration: Sequence[Sample]
    held_out: Sequence[Sample]


@dataclass(frozen=True)
class Outcome:
    """The result for a variant. If it has a ``problem`` it cannot be used; results from before the problem are kept."""

    variant: Variant
    cost: Cost | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    lowest_cosine: float | None = None
    problem: str | None = None

    def meets(self, accuracy: float) -> bool:
        return self.problem is None and self.lowest_cosine is not None and self.lowest_cosine >= accuracy


def waiting(networks: Iterable[NetworkSpeed] = NETWORKS) -> Seconds:
    """Count only the seconds of waiting for the network."""
    chosen = tuple(networks)
    return lambda program, profile: {n.key: n.seconds(profile.total) for n in chosen}


def projected(
    networks: Mapping[str, NetworkSpeed | None], transport: Transport, timings: Callable[[Runnable], Timings] = measure
) -> Seconds:
    """Predict the seconds of a query with its computation, from timed kernels.

    networks: by name; None stands for both parties on this machine.
    """

    def seconds(program: Runnable, profile: Profile) -> dict[str, float]:
        timed = timings(program)
        return {name: project(profile, timed, transport, n).seconds for name, n in networks.items()}

    return seconds


def compare(
    model: nn.Module,
    chosen: Iterable[Variant],
    samples: Callable[[int], Samples],
    seconds: Seconds | None = None,
    *,
    network: str | None = None,
    labels: Mapping[str, str] | None = None,
    polynomial: nn.Module | None = None,
) -> Iterator[Outcome]:
    """Compile, count and measure one variant after the other; a variant that fails does not stop the others.

    samples: returns the model's inputs at a length; it is called once per length.
    seconds: by default the seconds of waiting for the usual networks.
    network: the one for which every variant is compiled, see ``secure.compile``.
    polynomial: the model in polynomial form; its answers are compared with those of ``model`` too.
    """
    prepared: dict[int, _Prepared] = {}
    exact: list[nn.Module] = []  # the float64 model, made when it is first needed
    for variant in chosen:
        outcome = Outcome(variant)
        try:
            if variant.length not in prepared:
                exact = exact or [copy.deepcopy(model).double().eval()]
                prepared[variant.length] = _prepare(exact[0], samples(variant.length))
            ready = prepared[variant.length]
            if variant.form != FORMS[0] and polynomial is None:
                raise InvalidInput("no model in polynomial form was given")
            used = model if variant.form == FORMS[0] or polynomial is None else polynomial
            deployment = comparable()[variant.deployment]
            compiled = _compile(used, variant, deployment.prices, ready.samples, network, labels or {})
            running = deployment.deployed(compiled.program)
            found = profile(running)
            taken = (seconds or waiting())(running, found)
            outcome = replace(outcome, cost=deployment.price(compiled.program), seconds=dict(taken))
            outcome = replace(outcome, lowest_cosine=_lowest_cosine(compiled, ready))
        except ValueError as error:  # DoesNotFit, UnsupportedOperation, a length that the model does not take, ...
            outcome = replace(outcome, problem=str(error) or type(error).__name__)
        yield outcome


def cheapest(outcomes: Iterable[Outcome], accuracy: float, network: str) -> Outcome | None:
    """Return the fastest outcome on ``network`` whose lowest cosine is at least ``accuracy``, or None.

    Of equally fast ones the one with the fewest bytes is taken. Raises InvalidInput for an unknown network.
    """

    def price(outcome: Outcome) -> tuple[float, int, int]:
        if network not in outcome.seconds:
            known = ", ".join(outcome.seconds) or "none"
            raise InvalidInput(f"no seconds on the network {network!r}\nhint: there are those on {known}")
        cost = outcome.cost or Cost(0, ())
        return outcome.seconds[network], cost.bytes(phase=ONLINE), cost.bytes(phase=OFFLINE)

    return min((o for o in outcomes if o.meets(accuracy)), key=price, default=None)


@dataclass(frozen=True, eq=False)
class _Prepared:
    samples: Samples
    expected: tuple[Tensor, ...]  # the float64 model's answers on the held-out inputs


def _prepare(exact: nn.Module, samples: Samples) -> _Prepared:
    if not samples.calibration or not samples.held_out:
        raise InvalidInput("a comparison needs inputs to calibrate on, and others to compare answers on")
    with torch.no_grad():
        answers = (exact(**{k: _double(v) for k, v in inputs.items()}) for inputs in samples.held_out)
        return _Prepared(samples, tuple(answer.double().flatten() for answer in answers))


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _compile(
    model: nn.Module,
    variant: Variant,
    prices: Prices,
    samples: Samples,
    network: str | None,
    labels: Mapping[str, str],
) -> MpcModel:
    example, *more = samples.calibration
    return compile(
        model,
        example,
        calibration=more,
        embedding=variant.embedding,
        gelu=variant.gelu,
        approximations=variant.approximations,
        fixed_point=FixedPoint(fraction_bits=variant.fraction_bits),
        network=network,
        labels={"length": str(variant.length), **labels},
        prices=prices,
    )


def _lowest_cosine(compiled: MpcModel, ready: _Prepared) -> float:
    cosines = []
    for inputs, expected in zip(ready.samples.held_out, ready.expected, strict=True):
        answer = plain_reference(compiled, inputs).flatten()
        cosines.append(float(torch.nn.functional.cosine_similarity(answer, expected, dim=0)))
    if not all(map(math.isfinite, cosines)):
        raise InvalidInput("the model's answer on a held-out input is not finite")
    return min(cosines)
