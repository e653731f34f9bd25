"""The base of deployments. A deployment says which roles take part in a query, and what each computes and learns.

It has a name, roles and what each of them learns, options of its own, a compiler, the cost of a query, and an
in-process form. The commands make their options and help from it, README and SECURITY.md have their tables from it, and
a name that is not registered here is refused. ``parties.deployments`` hosts its roles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from protocols.fixedpoint import FixedPoint
from secure.cost.demand import QueryDemand, RoleDemand
from secure.cost.projection import Transport
from secure.cost.report import ProfileReport
from secure.cost.traffic import Cost
from secure.errors import InvalidInput
from secure.frontend import Size
from secure.lowering.client_inputs import MAXIMUM_BATCH
from secure.models.tokens import TextTokenizer
from secure.mpc.network import NetworkSpeed, find_network
from secure.progress import Told, silent
from secure.session.link import Link

COMPILE, CONNECT, SERVE = "compile", "connect", "serve"

TEXTS, WEIGHTS, ANSWERS = "inputs: texts, tokens, true lengths", "weights", "answers"
SHAPE, TIMES = "architecture, padded length, ranges", "when and how many queries"
ROWS = (TEXTS, WEIGHTS, ANSWERS, SHAPE, TIMES)
"""The rows of the table "who learns what"."""

OWN, NOTHING, ALL = "its own", "nothing", "all"


@dataclass(frozen=True)
class Role:
    """A role of a deployment. ``learns``: how much it learns of each of ROWS. ``peers``: the roles it connects to."""

    name: str
    learns: Mapping[str, str]
    peers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """The help of a deployment's field on the command line, and the verbs that use it (COMPILE, CONNECT, SERVE)."""

    help: str
    used: tuple[str, ...]


def option(default: Any, help: str, *used: str) -> Any:
    """Declare a field of a deployment that is one of its options."""
    return field(default=default, metadata={"option": Option(help, used)})


@dataclass(frozen=True)
class CompileOptions:
    """The options of compiling. None stands for the deployment's default. See ``secure.compile``."""

    embedding: str | None = None
    gelu: str | None = None
    approximations: str | None = None
    fixed_point: FixedPoint | None = None
    network: str | None = None
    answer_bits: int | None = None
    checked: bool | None = None

    def __post_init__(self) -> None:
        """Raise InvalidInput for an unknown network, or for answers of no bits."""
        if self.network is not None:
            find_network(self.network)
        if self.answer_bits is not None and self.answer_bits < 1:
            raise InvalidInput(f"answers of {self.answer_bits} fraction bits", "give at least 1")

    @property
    def given(self) -> dict[str, Any]:
        """The options that were given, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class ProfileOptions:
    """The options of a profile. None stands for the deployment's default.

    networks: by name, those for which a query's seconds are wanted; a network that is None stands for both parties on
    one machine. depth: the parts of a module path that the profile tells apart. transport: measures messages between
    two processes on this machine; without it nothing is timed.
    """

    networks: Mapping[str, NetworkSpeed | None] | None = None
    depth: int | None = None
    transport: Callable[[], Transport] | None = None


@dataclass(frozen=True)
class Deployment(ABC):
    """The base of all deployments.

    Subclasses are frozen dataclasses; their fields, made by ``option``, are their own options.

    name: on the command line, on the wire, in reports. summary: one line of help. trust: the assumptions on who is
    honest. takes: the names of CompileOptions that apply here; others are refused. profiled_by: the options of a
    profile that apply here (networks, depth, polynomial for shapes, html). serves: the role that holds a whole compiled
    model; "" if the model is split into shares first, in which case how_to_serve names the commands. runs_packaged: the
    packaged sentence encoder can be compiled as it is. takes_sizes: one service offers a model for several lengths and
    batches. stepwise: texts are written by the Program of a step alone, which reads prompts token by token, and tells
    the client scores. default: it is the deployment if none is named.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    trust: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset(f.name for f in fields(CompileOptions))
    profiled_by: ClassVar[frozenset[str]] = frozenset({"networks", "depth", "polynomial", "html"})
    serves: ClassVar[str] = "server"
    how_to_serve: ClassVar[str] = ""
    default: ClassVar[bool] = False
    takes_sizes: ClassVar[bool] = False
    runs_packaged: ClassVar[bool] = True
    stepwise: ClassVar[bool] = False

    @abstractmethod
    def roles(self, *, token_table: bool = False) -> tuple[Role, ...]:
        """Return all roles, the client first. ``token_table``: clients hold the token table."""

    @abstractmethod
    def build(
        self,
        model: nn.Module,
        samples: Sequence[Mapping[str, Tensor]],
        options: CompileOptions,
        labels: Mapping[str, str],
        told: Told = silent,
    ) -> Any:
        """Compile a module into a Program and its weights. Call ``secure.compile``, which checks the options.

        told: hears of progress.
        """

    def build_sizes(
        self,
        model: nn.Module,
        sizes: Sequence[tuple[Size, Mapping[str, str]]],
        options: CompileOptions,
        told: Told = silent,
    ) -> Sequence[Any]:
        """Compile a module for several sizes, each with labels of its own; here only for one, by ``build``."""
        ((size, labels),) = sizes
        return [self.build(model, size.samples, options, labels, told)]

    def keep(self, model: Any) -> tuple[dict[str, Any], Mapping[str, Tensor]] | None:
        """Return a model from ``build`` as JSON values and tensors, for files; all of it but Program and token tables.

        Both are secret. None, as here: its models cannot be kept.
        """
        return None

    def restore(
        self, program: bytes, tables: Mapping[str, Tensor], facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Any:
        """Return the model of ``keep`` from its encoded Program, the token tables, and its tensors.

        Narrow integers came back as int64. Raises InvalidProgram or InvalidInput unless all of it fits the Program.
        """
        raise InvalidInput(f"{self.name} keeps no compiled models", "compile the model anew")

    @abstractmethod
    def cost(self, model: Any) -> Cost:
        """Return the cost of one query of a model from ``build``."""

    @abstractmethod
    def insecure(self, model: Any, tokenizer: TextTokenizer | None) -> Link:
        """Run all parties in one memory, which protects nothing."""

    def reference(self, model: Any, inputs: Mapping[str, Tensor]) -> Any:
        """Run the same arithmetic in the clear, for comparison. Raises InvalidInput if there is none."""
        raise InvalidInput(f"{self.name} has no plain reference", "compare with the model itself")

    def outline(
        self, model: str, length: int, options: CompileOptions, *, polynomial: bool = False, batch: int = 1
    ) -> Any | None:
        """Make a model for ``cost``, ``profile`` and ``demand`` alone if the name is that of a shape; else None.

        polynomial: put the shape into polynomial form. batch: the inputs of one query.
        """
        return None

    def profile(self, model: Any, options: ProfileOptions) -> ProfileReport:
        """Report the cost of one query of a model from ``build`` or ``outline`` in detail; here only ``cost``."""
        cost = self.cost(model)
        return ProfileReport(cost, {"deployment": self.name, **cost.as_dict()})

    def demand(self, model: Any, network: NetworkSpeed, transport: Callable[[], Transport]) -> QueryDemand:
        """Measure what one query of a model from ``build`` or ``outline`` takes of each role; here only its bytes.

        network: the one between all roles. transport: measures messages between two processes on this machine.
        """
        cost, roles = self.cost(model), tuple(RoleDemand(role.name) for role in self.roles())
        remarks = ("the processor time of a query is not known here, so that no cores and machines are planned",)
        return QueryDemand(cost, roles, batch_of(model), network, remarks=remarks)

    def choices(self, model: Any) -> tuple[str, ...]:
        """Return lines for people about the choices that compiling a model from ``build`` made for its network."""
        return ()

    def remarks(self, program: Any) -> tuple[str, ...]:
        """Return lines for people about the queries of a Program."""
        return ()

    def located(self, addresses: Mapping[str, str]) -> Self:
        """Return the deployment with these addresses, by role; by default they go to the fields of the roles' names."""
        return replace(self, **{name: at for name, at in addresses.items() if name in self.options()})

    def addresses(self) -> dict[str, str]:
        """Return the addresses that it holds, by role: the inverse of ``located``."""
        named = {role.name: role.name.replace(" ", "_") for role in self.roles()}
        return {role: str(getattr(self, name)) for role, name in named.items() if name in self.options()}

    # options

    @classmethod
    def options(cls) -> dict[str, tuple[Option, Field[Any]]]:
        """Return the deployment's own options by the names of their fields."""
        return {f.name: (f.metadata["option"], f) for f in fields(cls) if "option" in f.metadata}

    @property
    def untouched(self) -> bool:
        """True if every option has its default."""
        return self == type(self)()

    def compiled_as(self) -> dict[str, str]:
        """Return its COMPILE options as text. Servers publish them, and clients that set one compare them."""
        return {name: str(getattr(self, name)) for name, (known, _) in self.options().items() if COMPILE in known.used}

    @classmethod
    def served(cls, compiled_as: Mapping[str, str]) -> Self:
        """Return the deployment for which a model was compiled: the inverse of ``compiled_as``.

        Raises InvalidInput for other options.
        """
        try:
            found = cls(**{name: _value(cls.options()[name][1].default, text) for name, text in compiled_as.items()})
        except (LookupError, TypeError, ValueError):
            found = None
        if found is None or found.compiled_as() != dict(compiled_as):
            raise InvalidInput(f"{cls.name} knows no model compiled as {dict(compiled_as)}")
        return found

    def compiled_for(self, other: Deployment) -> Self:
        """Return this deployment with the COMPILE options of the one that a model was compiled for.

        Raises InvalidInput if that is of another kind, or if a COMPILE option is set here and differs there.
        """
        if type(other) is not type(self):
            raise InvalidInput(f"the model was compiled for {other.name}, not for {self.name}", "compile it again")
        if (name := self.differs(other.compiled_as())) is not None:
            shown = f"{name.replace('_', '-')} {getattr(other, name)}"
            raise InvalidInput(f"the model was compiled with {shown}, not {getattr(self, name)}", "compile it again")
        return replace(self, **{name: getattr(other, name) for name in self.compiled_as()})

    def differs(self, compiled_as: Mapping[str, str]) -> str | None:
        """Return the first COMPILE option that is set here and differs in the served model, or None."""
        default = type(self)().compiled_as()
        ours = self.compiled_as()
        return next((n for n in ours if ours[n] != default[n] and ours[n] != compiled_as.get(n)), None)

    def check(self, options: CompileOptions, *, tokens: bool = False) -> None:
        """Raise InvalidInput for compile options that do not apply in this deployment, before anything takes long.

        tokens: the model is known to look tokens up. A deployment overrides this method if it restricts that.
        """
        for name in options.given:
            if name not in self.takes:
                known = ", ".join(sorted(self.takes)) or "none of them"
                raise InvalidInput(f"{name} means nothing under {self.name}", f"it takes {known}")

    def check_writing(self) -> None:
        """Raise InvalidInput if it generates no text."""
        raise InvalidInput(f"{self.name} does not generate text", "deploy by secret sharing: TwoParty()")

    def price(self, program: Any) -> Cost:
        """Return the cost of one query of a Program; no weights are needed."""
        raise NotImplementedError

    def build_step(
        self,
        model: nn.Module,
        example: Mapping[str, Tensor],
        whole: Sequence[Mapping[str, Tensor]],
        texts: Sequence[Sequence[Mapping[str, Tensor]]],
        options: CompileOptions,
        labels: Mapping[str, str],
        told: Told = silent,
    ) -> Any:
        """Compile a step of a decoder, by which prompts are read too, if the deployment is ``stepwise``.

        model: returns scores. example: the inputs of a step. whole: texts at once, which set the ranges that
        approximations ask for. texts: the inputs of the steps of each text, which set all others.
        """
        raise NotImplementedError

    def check_batch(self, batch: int) -> None:
        """Raise InvalidInput if no query carries so many inputs in this deployment."""
        if not 1 <= batch <= MAXIMUM_BATCH:
            raise InvalidInput(f"a batch of {batch} inputs", f"1 to {MAXIMUM_BATCH}")

    def check_profile(self, options: ProfileOptions) -> None:
        """Raise InvalidInput for options of a profile that do not apply in this deployment."""
        for name in ("networks", "depth"):
            if getattr(options, name) is not None and name not in self.profiled_by:
                raise InvalidInput(f"{name} means nothing in a profile under {self.name}", "leave it out")


def batch_of(model: Any) -> int:
    """Return the inputs that one query of a model carries."""
    return int(model.program.labels.get("batch", 1))


def _value(default: Any, text: str) -> Any:
    """Return the value of an option with this default that has this text."""
    kind: Any = type(default)
    return text == str(True) if kind is bool else kind(text)


_REGISTERED: dict[str, type[Deployment]] = {}


def register(deployment: type[Deployment]) -> type[Deployment]:
    """Make a deployment known by its name; usable as a decorator. Raises InvalidInput for a name that is taken."""
    known = _REGISTERED.setdefault(deployment.name, deployment)
    if known is not deployment:
        raise InvalidInput(f"two deployments of the name {deployment.name!r}", "give each a name of its own")
    return deployment


def unregister(deployment: type[Deployment]) -> None:
    """Forget a deployment."""
    _REGISTERED.pop(deployment.name, None)


def deployments() -> tuple[type[Deployment], ...]:
    """Return all registered deployments, the default first."""
    return tuple(sorted(_REGISTERED.values(), key=lambda deployment: not deployment.default))


def find(name: str) -> type[Deployment]:
    """Return the deployment of this name. Raises InvalidInput if there is none."""
    if name not in _REGISTERED:
        raise InvalidInput(f"unknown deployment {name!r}", f"one of {', '.join(_REGISTERED)}")
    return _REGISTERED[name]


def variants(base: type[Any]) -> dict[str, Any]:
    """Return every registered deployment of a kind, and one more for each of its COMPILE switches, by name."""
    out: dict[str, Any] = {}
    for deployment in deployments():
        if issubclass(deployment, base):
            out[deployment.name] = deployment()
            for name, (known, f) in deployment.options().items():
                if COMPILE in known.used and f.default is False:
                    out[f"{deployment.name}-{name.replace('_', '-')}"] = deployment(**{name: True})
    return out


def used_by(verbs: Iterable[str]) -> dict[str, list[type[Deployment]]]:
    """Return the names of all own options that any of the verbs uses, each with the deployments that have it."""
    out: dict[str, list[type[Deployment]]] = {}
    for deployment in deployments():
        for name, (known, _) in deployment.options().items():
            if set(known.used) & set(verbs):
                out.setdefault(name, []).append(deployment)
    return out
