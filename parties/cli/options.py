"""Options that several commands take, and those that are made from the fields of deployments.

An option that only some deployments have is None unless it was given, and is refused where it means nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from approximations import APPROXIMATIONS
from approximations.activations import GELU_FORMS
from parties.cluster.joined import import_ray
from parties.deployments import hosted
from parties.services.hosting import STORE_GB
from parties.telemetry.logs import FORMS as LOG_FORMS
from parties.telemetry.logs import TEXT
from protocols.fixedpoint import FixedPoint
from secure.deployments.compiled import ANSWER_BITS
from secure.deployments.deployment import CompileOptions, Deployment, deployments, find, used_by
from secure.deployments.generator import CAPACITY, PROMPT
from secure.errors import InvalidInput
from secure.lowering.client_inputs import EMBEDDINGS, MAXIMUM_BATCH
from secure.models.decoder import MOST_DRAFTED
from secure.models.heads import REVEALED
from secure.models.settings import REVEALS
from secure.models.text import PACKAGED
from secure.models.tokens import LONG, REFUSE, SPLIT, TRUNCATE
from secure.mpc.budget import GB, Budget
from secure.mpc.network import LOOPBACK, NETWORKS
from secure.session.session import PACE
from secure.tasks.closeness import Cosine, ScoreError
from secure.tasks.embed import LENGTH
from secure.tasks.search import MOST_TOP, TOP

# Enums for typer's choices; their members come from the library.
Embedding = StrEnum("Embedding", {e: e for e in EMBEDDINGS})  # type: ignore[misc]
Gelu = StrEnum("Gelu", {g: g for g in GELU_FORMS})  # type: ignore[misc]
Approximations = StrEnum("Approximations", {a: a for a in APPROXIMATIONS})  # type: ignore[misc]
TaskName = StrEnum("TaskName", {task: task for task in ("embed", *REVEALED)})  # type: ignore[misc]
Reveal = StrEnum("Reveal", {form: form for form in REVEALS})  # type: ignore[misc]
LogFormat = StrEnum("LogFormat", {form: form for form in LOG_FORMS})  # type: ignore[misc]
Long = StrEnum("Long", {how: how for how in LONG})  # type: ignore[misc]

MODEL = f"A model directory, or {PACKAGED!r}"

ModelArgument = Annotated[str, typer.Argument(help=f"{MODEL}; or digits, digits-2, ..., which is trained first.")]
TextModelArgument = Annotated[str, typer.Argument(help=f"{MODEL}.")]
LengthOption = Annotated[
    int | None, typer.Option(min=3, help=f"Padded length of texts in tokens; public. {LENGTH} by default.")
]
BatchOption = Annotated[
    int | None,
    typer.Option(min=1, max=MAXIMUM_BATCH, help="Inputs that a query carries, for the rounds of one; 1 by default."),
]
LengthsOption = Annotated[
    list[int] | None,
    typer.Option(
        "--length",
        min=3,
        help=f"Padded length of texts in tokens; public. {LENGTH} by default. Given several times, a text takes the "
        "shortest that holds it, which the parties see.",
    ),
]
CapacityOption = Annotated[
    int | None,
    typer.Option(
        "--capacity",
        min=2,
        help="Of a model that writes text: the most tokens of the padded prompt and what is written; public. "
        f"{CAPACITY} by default, or twice the longest prompt. --length is that of prompts then, {PROMPT} by default.",
    ),
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        help="Of a model that writes text: the greatest temperature that clients may choose, each in secret, so that "
        "tokens are samples; by default they are the most likely ones.",
    ),
]
DraftLengthOption = Annotated[
    int | None,
    typer.Option(
        "--draft-length",
        min=2,
        max=MOST_DRAFTED,
        help="Of a model that writes text: the tokens that one pass checks, the last one and guesses of a client's "
        "draft, as a Program more; none by default.",
    ),
]
BatchesOption = Annotated[
    list[int] | None,
    typer.Option(
        "--batch",
        min=1,
        max=MAXIMUM_BATCH,
        help="Inputs that a query carries, for the rounds of one; 1 by default. Given several times, clients choose.",
    ),
]
EmbeddingOption = Annotated[
    Embedding | None, typer.Option("--embedding", help=f"How tokens are looked up; {EMBEDDINGS[0]} by default.")
]
GeluOption = Annotated[
    Gelu | None, typer.Option("--gelu", help=f"The approximation of GeLU; {GELU_FORMS[0]} by default.")
]
ApproximationsOption = Annotated[
    Approximations | None, typer.Option("--approximations", help="Ours by default, or PUMA's, its GeLU among them.")
]
FractionBitsOption = Annotated[
    int | None, typer.Option(help=f"Fraction bits of activations; {FixedPoint().fraction_bits} by default.")
]
AnswerBitsOption = Annotated[
    int | None,
    typer.Option(
        "--answer-bits",
        min=1,
        help="Round answers to so many fraction bits before anybody sees them. Embeddings of length 1 have "
        f"{ANSWER_BITS[0]} to {ANSWER_BITS[1]} by default, by their width; other answers {FixedPoint().fraction_bits}, "
        "which is all.",
    ),
]
CheckedOption = Annotated[
    bool | None,
    typer.Option(
        "--checked/--unchecked",
        help="Notice values that leave their calibrated ranges, and answer with an error; checked by default.",
    ),
]
NetworkOption = Annotated[
    str | None,
    typer.Option(
        "--network",
        help=f"Where rounds and bytes shall be cheap: {LOOPBACK}, {', '.join(n.key for n in NETWORKS)} or "
        f"MBPS,ROUND_TRIP_MS; {LOOPBACK} by default.",
    ),
]
CalibrationOption = Annotated[
    Path | None, typer.Option(help="A text file, one sentence a line, that widens the ranges.")
]
TaskOption = Annotated[
    TaskName | None,
    typer.Option("--task", help="The task that the model is served for; by default what its config.json says."),
]
RevealOption = Annotated[
    Reveal | None,
    typer.Option(
        "--reveal",
        help="What clients learn of a model with a head: the label (of an answerer, the span) alone, the least and the "
        "default; probabilities; or the model's logits. A model that writes text reveals its tokens. Of a search: the "
        "ids of the passages that are found, the default; the passages; or either with scores.",
    ),
]
DimensionsOption = Annotated[
    int | None,
    typer.Option(min=1, help="The first numbers of an embedding that are its answer (Matryoshka); all by default."),
]
IndexOption = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="DIRECTORY",
        help="Serve a private search of this index, which `unseen index` made with the model: the server learns "
        "neither questions nor what is found. What clients learn: --reveal.",
    ),
]
TopOption = Annotated[
    int | None,
    typer.Option(
        "--top", min=1, max=MOST_TOP, help=f"Passages of --index that an answer finds; public. {TOP} by default."
    ),
]
ClustersOption = Annotated[
    int | None,
    typer.Option(
        "--clusters",
        min=1,
        max=MOST_TOP,
        help="Clusters of --index that a query looks into, those nearest to the question; public. What lies elsewhere "
        "is not found. All passages are looked at by default.",
    ),
]
AcceptCosineOption = Annotated[
    float | None,
    typer.Option(
        "--accept-cosine",
        min=0.0,
        max=1.0,
        help="The lowest cosine of a compiled model's embeddings to the original's at which it is accepted, on public "
        f"texts; {Cosine.default:g} by default.",
    ),
]
AcceptErrorOption = Annotated[
    float | None,
    typer.Option(
        "--accept-error",
        min=0.0,
        max=1.0,
        help="Of a model with a head, the largest error of its scores at which it is accepted, in parts of the spread "
        f"of the original model's, on public inputs; {ScoreError.default:g} by default.",
    ),
]
PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        metavar="NAME",
        help="Which of the model's prompts goes before each text; its default one if not given, none if empty.",
    ),
]
ThreadsOption = Annotated[int, typer.Option(min=0, help="Threads of local arithmetic; 0: one a processor.")]
TraceOption = Annotated[
    Path | None,
    typer.Option("--trace", metavar="DIRECTORY", help="Write what each query did when to a trace file there."),
]
DeadlineOption = Annotated[
    float | None, typer.Option(min=1, help="Seconds to wait for any one message of a peer; 60 by default.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Processes that compute queries, which share weights. By default there is one process, or as many as "
        "--threads says where all of them stand behind one.",
    ),
]
DrainOption = Annotated[
    float, typer.Option("--drain", min=0, metavar="SECONDS", help="Seconds that work may take after SIGTERM.")
]
BudgetMemoryOption = Annotated[
    float | None,
    typer.Option(metavar="GB", help=f"The most memory that one Program may take; {Budget().memory / GB:g} by default."),
]
MemoryOption = Annotated[
    float | None,
    typer.Option(
        "--memory",
        min=0.001,
        metavar="GB",
        help="The most memory of queries that are prepared for clients; half of what is free by default.",
    ),
]
BudgetSecondsOption = Annotated[
    float | None,
    typer.Option(
        metavar="S", help=f"The most seconds of arithmetic a query of it may take; {Budget().seconds:g} by default."
    ),
]
PaceOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help=f"Seconds from reading a text to the first message, whatever it holds; {PACE} by default, 0: at once.",
    ),
]
LongOption = Annotated[
    Long,
    typer.Option(
        "--long",
        help=f"What becomes of texts with more tokens than the served length: {REFUSE} them; {TRUNCATE}, as "
        f"sentence-transformers does; or {SPLIT} them into pieces and average, weighted by tokens. Then the number of "
        "queries shows the server how many pieces all texts have.",
    ),
]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="Allow unencrypted channels that leave this machine.")]
TlsOption = Annotated[
    Path | None,
    typer.Option(
        "--tls",
        metavar="DIRECTORY",
        help="Certificates, from `unseen certs`; UNSEEN_TLS or ~/.config/unseen/tls/ROLE by default, if it is there.",
    ),
]
AnnounceOption = Annotated[
    bool, typer.Option("--announce", help="Print the address as a JSON line once listening.", hidden=True)
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="More log lines.")]
TEXT_LINES = LogFormat(TEXT)
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", help="How log lines are written: for people, or a JSON object each.")
]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        metavar="HOST:PORT",
        help="Where Prometheus reads the numbers of this role, at /metrics, and probes its health, at /healthz, by "
        "HTTP without identity; a port alone is one of this machine's own address. Nowhere by default.",
    ),
]
OtlpOption = Annotated[
    str | None,
    typer.Option(
        "--otlp",
        metavar="URL",
        help="Send spans of every query to this collector of OpenTelemetry, such as http://127.0.0.1:4318/v1/traces.",
    ),
]
TokensOption = Annotated[
    Path | None, typer.Option("--tokens", metavar="FILE", help="Ask every client for a token of this file.")
]
SameOwnerOption = Annotated[
    bool,
    typer.Option(
        "--same-owner", help="Allow peers that this user runs on this machine, which protects nothing: to try it out."
    ),
]
StoreOption = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIRECTORY", help="Where correlations are kept ready, encrypted."),
]
StoreBytesOption = Annotated[
    float | None,
    typer.Option("--store-bytes", metavar="GB", help=f"The most that the store takes; {STORE_GB:g} by default."),
]
StoreKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--store-key-file",
        metavar="FILE",
        help="The store's key, 64 hexadecimal digits (openssl rand -hex 32); by default UNSEEN_STORE_KEY holds it.",
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Work on a Ray cluster: host:port of its head, or local for one on this machine alone. Whoever runs the "
        "cluster learns all that this process knows.",
    ),
]
RayWorkersOption = Annotated[
    int | None,
    typer.Option("--ray-workers", min=1, help="Workers of --ray; one a processor by default."),
]
RayInsecureOption = Annotated[
    bool,
    typer.Option("--ray-insecure", help="Accept a cluster that answers strangers, or whose channels are unencrypted."),
]
ListenOption = Annotated[str, typer.Option(help="host:port")]


def dashed(name: str) -> str:
    """A parameter as it is written on the command line."""
    return "--" + name.replace("_", "-")


def refused(name: str, deployment: Deployment | type[Deployment], takes: Sequence[str], who: str = "") -> InvalidInput:
    """The error for an option that means nothing. ``takes``: what does. ``who``: of which role, where not of all."""
    known = ", ".join(map(dashed, takes)) or "none of this kind"
    where = f"to the {who} of" if who else "under"
    hint = f"it takes {known}; --show-config says where it was set"
    return InvalidInput(f"{dashed(name)} means nothing {where} {deployment.name}", hint)


# what is compiled, and how it is hosted

_COMPILED_BY = {
    "embedding": "embedding",
    "gelu": "gelu",
    "approximations": "approximations",
    "fraction_bits": "fixed_point",
    "network": "network",
    "answer_bits": "answer_bits",
    "checked": "checked",
}
"""Command-line parameters by the names of CompileOptions."""

_HOSTED_BY = {
    "state": "state",
    "trace": "traces",
    "deadline": "deadline",
    "ahead": "ahead",
    "rotate_mask": "rotate_mask",
    "memory": "memory",
    "workers": "workers",
    "store": "store",
    "store_bytes": "store_gb",
    "store_key_file": "store_key",
}
"""The same for HostOptions."""


def compile_options(
    deployment: Deployment,
    *,
    embedding: str | None = None,
    gelu: str | None = None,
    approximations: str | None = None,
    fraction_bits: int | None = None,
    network: str | None = None,
    answer_bits: int | None = None,
    checked: bool | None = None,
) -> CompileOptions:
    """Read the options about compiling; InvalidInput for one that means nothing in this deployment."""
    given = {
        "embedding": embedding,
        "gelu": gelu,
        "approximations": approximations,
        "fraction_bits": fraction_bits,
        "network": network,
        "answer_bits": answer_bits,
        "checked": checked,
    }
    for name, value in given.items():
        if value is not None and _COMPILED_BY[name] not in deployment.takes:
            raise refused(name, deployment, [n for n, field in _COMPILED_BY.items() if field in deployment.takes])
    fixed = None if fraction_bits is None else FixedPoint(fraction_bits=fraction_bits)
    others = ("fraction_bits", "answer_bits", "checked")
    plain = {name: str(value) for name, value in given.items() if value is not None and name not in others}
    return CompileOptions(**plain, fixed_point=fixed, answer_bits=answer_bits, checked=checked)


DEFAULTS: Mapping[str, Any] = {
    "embedding": EMBEDDINGS[0],
    "gelu": GELU_FORMS[0],
    "approximations": APPROXIMATIONS[0],
    "fraction_bits": FixedPoint().fraction_bits,
    "network": LOOPBACK,
    "answer_bits": FixedPoint().fraction_bits,
    "checked": True,
}
"""The values of options about compiling that were not given."""


def chosen(
    task: str | None,
    reveal: str | None,
    index: Path | None = None,
    top: int | None = None,
    clusters: int | None = None,
) -> dict[str, Any]:
    """Read the options about a model's task, as ``Compilation`` and ``task_of`` take them."""
    named = {"task": str(task or ""), "reveal": str(reveal or ""), "index": str(index or "")}
    return {**named, "top": top or 0, "clusters": clusters or 0}


def along_with_ray(ray: str | None, workers: int | None, *, insecure: bool) -> None:
    """Raise InvalidInput for options of --ray without it, and MissingPackage for --ray without Ray."""
    for name, given in {"--ray-workers": workers is not None, "--ray-insecure": insecure}.items():
        if given and ray is None:
            raise InvalidInput(f"{name} means nothing without --ray", "leave it out")
    if ray is not None:
        import_ray()


def budget_of(memory: float | None, seconds: float | None) -> Budget:
    """Read the options about budgets; InvalidInput for numbers that are not positive. memory: in GB."""
    given = {"memory": None if memory is None else memory * GB, "seconds": seconds}
    return Budget(**{name: value for name, value in given.items() if value is not None})


def host_options(deployment: Deployment, role: str, **given: Any) -> dict[str, Any]:
    """Read the options about hosting a role, for ``serve``; InvalidInput for one that means nothing to it."""
    takes = hosted(deployment).takes.get(role, frozenset())
    out = {_HOSTED_BY[name]: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if value is not None and _HOSTED_BY[name] not in takes:
            raise refused(name, deployment, [n for n, field in _HOSTED_BY.items() if field in takes], role)
    return out


def keeps_traces(deployment: Deployment) -> bool:
    """Tell whether the parties of a deployment write timelines."""
    return "traces" in hosted(deployment).takes.get(deployment.serves, frozenset())


def require_traces(deployment: Deployment) -> None:
    """Raise InvalidInput where --trace means nothing."""
    if not keeps_traces(deployment):
        known = [d.name for d in deployments() if keeps_traces(d())]
        raise InvalidInput(
            f"--trace means nothing under {deployment.name}", f"it is for {', '.join(known)}; see `unseen profile` too"
        )


# options from the fields of deployments


@dataclass(frozen=True)
class OwnOption:
    """An option that some deployments have: its name, the type of its value there, and who takes it."""

    name: str
    kind: Any
    takers: tuple[type[Deployment], ...]

    @property
    def help(self) -> str:
        """The deployments that take it, what it says there, and their defaults."""
        said: dict[str, list[str]] = {}
        for deployment in self.takers:
            option, field = deployment.options()[self.name]
            shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
            default = "" if field.default in (None, False) else f" {shown} by default."
            said.setdefault(option.help + default, []).append(deployment.name)
        return " ".join(f"{', '.join(names)}: {text}" for text, names in said.items())

    @property
    def parameter(self) -> inspect.Parameter:
        """As typer reads it; None unless it is given."""
        kind: Any = str if self.kind == tuple[str, ...] else self.kind
        annotation: Any = Annotated[kind | None, typer.Option(dashed(self.name), help=self.help)]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    def value(self, given: Any) -> Any:
        """A value of the command line as the field has it."""
        return tuple(given.split(",")) if self.kind == tuple[str, ...] else given


def own_options(verbs: Sequence[str], chosen: Sequence[type[Deployment]]) -> dict[str, OwnOption]:
    """The options of these deployments that any of the verbs uses."""
    out = {}
    for name, found in used_by(verbs).items():
        takers = tuple(d for d in found if d in chosen)
        kinds = {get_type_hints(d)[name] for d in takers}
        if len(kinds) > 1:
            raise TypeError(f"the option {name!r} has several types: {kinds}")
        if takers:
            out[name] = OwnOption(name, kinds.pop(), takers)
    return out


def deployment_of(chosen: type[Deployment], verbs: Sequence[str], given: Mapping[str, Any]) -> Deployment:
    """A deployment with what was given on the command line; InvalidInput for options of another."""
    known = own_options(verbs, [chosen])
    said = {name: value for name, value in given.items() if value is not None}
    for name in said:
        if name not in known:
            raise refused(name, chosen, list(known))
    return chosen(**{name: known[name].value(value) for name, value in said.items()})


def arguments(deployment: Deployment, verbs: Sequence[str]) -> list[str]:
    """The command line that ``deployment_of`` reads as this deployment."""
    out = ["--deployment", deployment.name]
    for name in own_options(verbs, [type(deployment)]):
        value, field = getattr(deployment, name), deployment.options()[name][1]
        if value == field.default:
            continue
        written = ",".join(value) if isinstance(value, tuple) else str(value)
        out += [dashed(name)] if value is True else [dashed(name), written]
    return out


def for_deployments(command: Callable[..., None], *verbs: str, only: type[Deployment] | None = None) -> Any:
    """A command whose first parameter is a Deployment, as typer takes it.

    --deployment chooses among all that are registered now, and the options of those that any of ``verbs`` uses are
    added. ``only``: a command of one deployment, which has nothing to choose. typer reads ``__signature__``.
    """
    chosen = (only,) if only else deployments()
    own = own_options(verbs, chosen)
    hints = get_type_hints(command, include_extras=True)
    _, *rest = inspect.signature(command).parameters.values()
    if clash := {p.name for p in rest} & {*own, "deployment"}:
        raise TypeError(f"{command.__name__} has a parameter and a deployment an option of the name {clash}")
    plain = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in rest]
    added = [] if only else [_choice(chosen)]
    parameters = [*plain, *added, *(option.parameter for option in own.values())]

    def asked(**given: Any) -> None:
        named = only or find(str(given.pop("deployment")))
        mine = {name: given.pop(name) for name in own}
        command(deployment_of(named, verbs, mine), **given)

    asked.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    asked.__annotations__ = {p.name: p.annotation for p in parameters}
    asked.__doc__, asked.__name__ = command.__doc__, command.__name__
    return asked


def spread(command: Callable[..., None], group: type[Any]) -> Callable[..., None]:
    """A command of single options, for one with a parameter of a dataclass that holds them: ``group``.

    The fields' annotations are those of options.
    """
    hints, own = get_type_hints(command, include_extras=True), get_type_hints(group, include_extras=True)
    parameters = list(inspect.signature(command).parameters.values())
    (place,) = (i for i, p in enumerate(parameters) if hints[p.name] is group)
    kept = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    name = kept.pop(place).name
    kept += [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=own[f.name])
        for f in fields(group)
    ]

    def single(deployment: Deployment, **given: Any) -> None:
        command(deployment, **{name: group(**{f.name: given.pop(f.name) for f in fields(group)})}, **given)

    single.__signature__ = inspect.Signature(kept)  # type: ignore[attr-defined]
    single.__annotations__ = {p.name: p.annotation for p in kept}
    single.__doc__, single.__name__ = command.__doc__, command.__name__
    return single


def _choice(chosen: Sequence[type[Deployment]]) -> inspect.Parameter:
    names = StrEnum("DeploymentName", {d.name: d.name for d in chosen})  # type: ignore[misc]
    said = "; ".join(f"{d.name}: {d.summary}" for d in chosen)
    annotation = Annotated[names, typer.Option("--deployment", help=f"Who computes on what. {said}.")]
    default = names(chosen[0].name)
    return inspect.Parameter("deployment", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


# files that are given


def read_texts(path: Path, option: str, what: str) -> list[str]:
    """The lines of a file that are not blank; ``what`` they are called. InvalidInput names the option."""
    hint = f"a text file, one {what} a line"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidInput(f"{option}: {path} cannot be read: {reason}", hint) from None
    if not lines:
        raise InvalidInput(f"{option}: {path} has no {what}s", hint)
    return lines
