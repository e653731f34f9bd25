"""The commands ``unseen serve`` and ``unseen dealer``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from parties import deployments
from parties.cli.compiled import KeepOption, fixed_of, made, opened, tell
from parties.cli.config import is_said
from parties.cli.console import announce, get_ready, say, say_as, stages
from parties.cli.core_log import CoreLog
from parties.cli.options import (
    TEXT_LINES,
    AcceptCosineOption,
    AcceptErrorOption,
    AnnounceOption,
    AnswerBitsOption,
    ApproximationsOption,
    BatchesOption,
    BudgetMemoryOption,
    BudgetSecondsOption,
    CalibrationOption,
    CapacityOption,
    CheckedOption,
    ClustersOption,
    DeadlineOption,
    DimensionsOption,
    DraftLengthOption,
    DrainOption,
    EmbeddingOption,
    FractionBitsOption,
    GeluOption,
    IndexOption,
    InsecureOption,
    LengthsOption,
    ListenOption,
    LogFormatOption,
    MemoryOption,
    MetricsOption,
    ModelArgument,
    NetworkOption,
    OtlpOption,
    RayInsecureOption,
    RayOption,
    RayWorkersOption,
    RevealOption,
    SameOwnerOption,
    StoreBytesOption,
    StoreKeyOption,
    StoreOption,
    TaskOption,
    TemperatureOption,
    ThreadsOption,
    TlsOption,
    TokensOption,
    TopOption,
    TraceOption,
    VerboseOption,
    WorkersOption,
    along_with_ray,
    budget_of,
    chosen,
    compile_options,
    host_options,
    read_texts,
    refused,
)
from parties.cluster.dealing import RayDealing
from parties.cluster.joined import Cluster
from parties.limits.memory import GB
from parties.limits.quotas import NO_LIMITS, Limits
from parties.limits.tokens import Tokens
from parties.net.endpoints import Endpoint
from parties.net.network import Network
from parties.served.compiled_files import is_compiled
from parties.services import hosting
from parties.services.draining import DRAIN
from parties.services.hosting import HostOptions, Service
from parties.services.ready import tell_ready
from parties.services.workers import apart
from parties.store.keys import read_store_key
from parties.telemetry import logs
from parties.telemetry.telemetry import check_telemetry
from parties.tls.choice import network_of
from parties.tls.tls import Tls
from parties.traces.trace_file import TraceDirectory
from secure.deployments.compilation import Compilation
from secure.deployments.compiled import Compiled, task_of
from secure.deployments.deployment import Deployment
from secure.deployments.self_test import Accept
from secure.deployments.two_party import DEALER, TwoParty
from secure.errors import InvalidInput
from secure.models.index import check_index
from secure.models.text import PACKAGED, model_directory

AlsoOption = Annotated[
    list[str] | None,
    typer.Option(metavar="MODEL", help="Another model to serve; clients say which they mean: --model NAME."),
]


def serve(
    deployment: Deployment,
    context: typer.Context,
    model: ModelArgument = PACKAGED,
    listen: ListenOption = "127.0.0.1:50051",
    also: AlsoOption = None,
    length: LengthsOption = None,
    capacity: CapacityOption = None,
    temperature: TemperatureOption = None,
    draft_length: DraftLengthOption = None,
    batch: BatchesOption = None,
    dimensions: DimensionsOption = None,
    embedding: EmbeddingOption = None,
    gelu: GeluOption = None,
    approximations: ApproximationsOption = None,
    fraction_bits: FractionBitsOption = None,
    network: NetworkOption = None,
    answer_bits: AnswerBitsOption = None,
    checked: CheckedOption = None,
    calibration: CalibrationOption = None,
    task: TaskOption = None,
    reveal: RevealOption = None,
    index: IndexOption = None,
    top: TopOption = None,
    clusters: ClustersOption = None,
    accept_cosine: AcceptCosineOption = None,
    accept_error: AcceptErrorOption = None,
    keep: KeepOption = True,
    state: Annotated[
        Path | None, typer.Option(help="Where secrets that outlive the process are kept: mask seeds, clients' keys.")
    ] = None,
    rotate_mask: Annotated[
        int | None, typer.Option(min=1, metavar="DAYS", help="Renew a mask of weights that is older; 90 by default.")
    ] = None,
    wait: Annotated[
        float | None, typer.Option(min=0, help="Seconds to wait for the dealer to start; 0 by default.")
    ] = None,
    memory: MemoryOption = None,
    store: StoreOption = None,
    store_bytes: StoreBytesOption = None,
    store_key_file: StoreKeyOption = None,
    trace: TraceOption = None,
    deadline: DeadlineOption = None,
    threads: ThreadsOption = 1,
    workers: WorkersOption = None,
    drain: DrainOption = DRAIN,
    tls: TlsOption = None,
    insecure: InsecureOption = False,
    same_owner: SameOwnerOption = False,
    tokens: TokensOption = None,
    quotas: Limits = NO_LIMITS,
    metrics: MetricsOption = None,
    otlp: OtlpOption = None,
    log_format: LogFormatOption = TEXT_LINES,
    announce: AnnounceOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Serve models that nobody gets to see: to compile, or directories that `unseen compile` wrote."""
    say_as(log_format)
    models, kept = [model, *(also or ())], dict[str, Compiled]()
    fixed = fixed_of(context.params)
    for each in filter(is_compiled, models):
        kept[each] = opened("serve", Path(each), deployment, named=is_said(context, "deployment"), fixed=fixed)
    if model in kept:
        deployment = kept[model].deployment
    role = deployment.serves
    if not role:
        raise InvalidInput(f"nobody serves a whole model under {deployment.name}", deployment.how_to_serve)
    options = compile_options(
        deployment,
        embedding=embedding,
        gelu=gelu,
        approximations=approximations,
        fraction_bits=fraction_bits,
        network=network,
        answer_bits=answer_bits,
        checked=checked,
    )
    if index is not None and also:
        raise InvalidInput("--index and --also exclude each other", "an index is of one model; serve it by itself")
    only_compiling = {"--no-keep": not keep, "--accept-cosine": accept_cosine is not None}
    for name, said in {**only_compiling, "--accept-error": accept_error is not None}.items():
        if kept.keys() == set(models) and said:
            raise InvalidInput(f"{name} means nothing for models that are compiled", "leave it out")
    given = host_options(
        deployment,
        role,
        state=state,
        trace=trace,
        deadline=deadline,
        rotate_mask=rotate_mask,
        memory=None if memory is None else memory * GB,
        store=store,
        store_bytes=store_bytes,
        store_key_file=store_key_file,
    )
    hosted = deployments.hosted(deployment)
    together = workers is not None and role in hosted.forked
    if together and threads != 1:
        raise InvalidInput(f"--threads {threads} with --workers: each of them has one", "leave --threads out")
    if workers is not None and not together:
        given |= host_options(deployment, role, workers=workers)
    if "workers" in hosted.takes[role]:
        given["workers"], threads = workers or threads or os.cpu_count() or 1, 1  # they compute, not this process
    get_ready(threads)
    at = Endpoint.parse(listen, what="--listen")
    channels = network_of(role, directory=tls, insecure=insecure)
    logs.log_to_stderr(verbose, log_format) if together else log_of(channels, verbose, log_format)
    check_telemetry(metrics, otlp)
    found = {r.name: r for r in deployment.roles()}[role]
    peers = {name: deployment.addresses()[name] for name in found.peers}
    if wait is not None and not peers:
        raise refused("wait", deployment, [], role)
    endpoints = {name: Endpoint.parse(address, what=f"--{name.replace(' ', '-')}") for name, address in peers.items()}
    HostOptions(channels, **given)  # a mistake in them shows before anything is compiled
    deployments.check_state(deployment, role, state, counts=bool(quotas))
    channels.check(at, what=f"the {role}")
    for name, endpoint in endpoints.items():
        channels.check(endpoint, what=f"the {name}")
    sentences = read_texts(calibration, "--calibration", "sentence") if calibration else []
    if twice := next((each for each in models if models.count(each) > 1), None):
        raise InvalidInput(f"the model {twice} is given twice", "give --length and --batch several times instead")
    for each in models:
        if each not in kept and task_of(each, **chosen(task, reveal, index, top, clusters)).stored:
            model_directory(each)  # a mistake that can be seen before anything is loaded
            if index is not None:
                check_index(index, each)

    def check() -> None:
        hosting.check(at, endpoints, channels, what=f"the {role}", wait=wait or 0.0, shared=together)
        if not same_owner:
            hosting.check_owners(endpoints, channels)

    apart(check) if together else check()
    if trace is not None:
        TraceDirectory(trace)
    if tokens is not None:
        Tokens(tokens)  # likewise
    if store is not None:
        read_store_key(store_key_file)  # likewise
    held = list[Compiled]()
    for each in models:
        if each in kept:
            tell("serve", each, kept[each])
            held.append(kept[each])
        else:
            lengths, batches = tuple(length or ()), tuple(batch or (1,))
            compilation = Compilation(
                each,
                deployment,
                lengths,
                tuple(sentences),
                options,
                batches,
                dimensions=dimensions or 0,
                capacity=capacity or 0,
                temperature=temperature,
                draft_length=draft_length or 0,
                accept=Accept(accept_cosine, accept_error),
                **chosen(task, reveal, index, top, clusters),
            )
            held.append(made("serve", compilation, keep=keep))
    if workers is not None and together:
        deployments.serve_together(
            held,
            workers=workers,
            role=role,
            listen=str(at),
            peers=peers,
            network=channels,
            quotas=quotas,
            tokens=tokens,
            announce=lambda address, about: tell_address("serve", address, about, announced=announce),
            begin=lambda: log_of(channels, verbose, log_format),
            metrics=metrics,
            otlp=otlp,
            drain=drain,
            **given,
        )
        return
    with stages("serve") as told:
        service = deployments.serve(
            held,
            role=role,
            listen=str(at),
            peers=peers,
            network=channels,
            quotas=quotas,
            tokens=tokens,
            told=told,
            metrics=metrics,
            otlp=otlp,
            **given,
        )
    run(service, "serve", announced=announce, drain=drain)


def hosting_network(role: str, tls: Path | None, insecure: bool, verbose: bool, log_format: str) -> Network:
    """The network of a service, and its log on the error output, with gRPC's refused handshakes in it."""
    network = network_of(role, directory=tls, insecure=insecure)
    log_of(network, verbose, log_format)
    return network


def log_of(network: Network, verbose: bool, log_format: str) -> None:
    """Log to the error output, with gRPC's refused handshakes in it, which a thread of its own reads."""
    if isinstance(network, Tls):
        CoreLog()
    logs.log_to_stderr(verbose, log_format)


def run(service: Service, verb: str, *, announced: bool, drain: float) -> None:
    """Say where a service listens, and wait until it is stopped."""
    service.wait_announced(lambda: tell_address(verb, service.address, service.about, announced=announced), drain)


def tell_address(verb: str, address: str, about: Sequence[str], *, announced: bool) -> None:
    """Say where a service listens, and what is to be known about it."""
    for line in about:
        say(f"unseen {verb}: {line}")
    say(f"unseen {verb}: listening on {address} (semi-honest: it is assumed to follow the protocol)")
    if announced:
        announce(address)
    tell_ready()


def dealer(
    listen: ListenOption = "127.0.0.1:50052",
    state: Annotated[Path | None, typer.Option(help="Where the dealer's key is kept, and its dealer.pub.")] = None,
    store: StoreOption = None,
    store_key_file: StoreKeyOption = None,
    threads: ThreadsOption = 1,
    budget_memory: BudgetMemoryOption = None,
    budget_seconds: BudgetSecondsOption = None,
    drain: DrainOption = DRAIN,
    ray: RayOption = None,
    ray_workers: RayWorkersOption = None,
    ray_insecure: RayInsecureOption = False,
    tls: TlsOption = None,
    insecure: InsecureOption = False,
    tokens: TokensOption = None,
    quotas: Limits = NO_LIMITS,
    metrics: MetricsOption = None,
    otlp: OtlpOption = None,
    log_format: LogFormatOption = TEXT_LINES,
    announce: AnnounceOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Hand out correlated randomness; sees no input, no weight, no share. Must not collude with either party."""
    say_as(log_format)
    along_with_ray(ray, ray_workers, insecure=ray_insecure)
    get_ready(threads)
    network, at = hosting_network(DEALER, tls, insecure, verbose, log_format), Endpoint.parse(listen, what="--listen")
    kept = host_options(TwoParty(), DEALER, state=state, store=store, store_key_file=store_key_file)
    given = kept | {"budget": budget_of(budget_memory, budget_seconds)}
    if ray is not None:
        network.check(at, what="the dealer")  # a mistake in it shows before a cluster starts
        with stages("dealer") as told:
            told(0, 0, "starting the workers of the cluster")
            given["dealing"] = RayDealing(Cluster(ray, insecure=ray_insecure), ray_workers)
    service = deployments.serve(
        role=DEALER,
        listen=str(at),
        deployment=TwoParty(),
        network=network,
        quotas=quotas,
        tokens=tokens,
        metrics=metrics,
        otlp=otlp,
        **given,
    )
    run(service, "dealer", announced=announce, drain=drain)
