"""The commands ``unseen share-model`` and ``unseen party``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parties import deployments
from parties.cli.compiled import made
from parties.cli.console import get_ready, say, say_as, stages, use_threads
from parties.cli.options import (
    TEXT_LINES,
    AcceptCosineOption,
    AcceptErrorOption,
    AnnounceOption,
    AnswerBitsOption,
    ApproximationsOption,
    BatchOption,
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
    LengthOption,
    LogFormatOption,
    MetricsOption,
    ModelArgument,
    NetworkOption,
    OtlpOption,
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
    VerboseOption,
    chosen,
    compile_options,
    host_options,
    read_texts,
    refused,
)
from parties.cli.serve import hosting_network, run
from parties.limits.quotas import NO_LIMITS, Limits
from parties.net.endpoints import Endpoint
from parties.served.compiled_files import check_new
from parties.services import hosting
from parties.services.draining import DRAIN
from parties.telemetry.telemetry import check_telemetry
from parties.three_party.shared_model import share_model as write_shares
from secure.deployments.compilation import Compilation
from secure.deployments.deployment import Deployment
from secure.deployments.self_test import Accept
from secure.deployments.three_party import ADDRESSES, PARTIES, ThreeParty
from secure.models.text import PACKAGED
from secure.units import in_units


def share_model(
    deployment: Deployment,
    model: ModelArgument = PACKAGED,
    output: Annotated[Path, typer.Option(help="Where party-0, party-1 and party-2 are written.")] = Path("shares"),
    length: LengthOption = None,
    capacity: CapacityOption = None,
    temperature: TemperatureOption = None,
    draft_length: DraftLengthOption = None,
    batch: BatchOption = None,
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
    threads: ThreadsOption = 0,
) -> None:
    """Share a model among three parties: one directory for each, to be given to it and to nobody else."""
    for name in PARTIES:  # shares of two runs do not belong together
        check_new(output / name.replace(" ", "-"))
    use_threads(threads)
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
    sentences = read_texts(calibration, "--calibration", "sentence") if calibration else []
    lengths = (length,) if length else ()
    compilation = Compilation(
        model,
        deployment,
        lengths,
        tuple(sentences),
        options,
        (batch or 1,),
        dimensions=dimensions or 0,
        capacity=capacity or 0,
        temperature=temperature,
        draft_length=draft_length or 0,
        accept=Accept(accept_cosine, accept_error),
        **chosen(task, reveal, index, top, clusters),
    )
    compiled = made("share-model", compilation, keep=False)
    with stages("share-model") as told:
        told(0, 0, "writing shares")
        written = write_shares(compiled, output)
    for where in written:
        size = sum(file.stat().st_size for file in where.iterdir())
        say(f"unseen share-model: {where} ({in_units(size)}): for {where.name} alone, it holds secrets")


def addresses_of(
    number: int, listen: str | None, party_0: str | None, party_2: str | None
) -> tuple[str, dict[str, str]]:
    """Return where a party listens, and its peers' addresses by role. Raises InvalidInput for one that is no peer."""
    deployment, role = ThreeParty(), PARTIES[number]
    wanted = {r.name: r for r in deployment.roles()}[role].peers
    addresses = {PARTIES[0]: party_0, PARTIES[2]: party_2}
    for name, address in addresses.items():
        if address is not None and name not in wanted:
            raise refused(name.replace(" ", "_"), deployment, [p.replace(" ", "_") for p in wanted], role)
    return listen or ADDRESSES[number], {n: addresses[n] or ADDRESSES[PARTIES.index(n)] for n in wanted}


def party(
    share: Annotated[Path, typer.Option(help="This party's directory, from share-model.")],
    number: Annotated[int, typer.Option("--id", min=0, max=2, help="Which party this is.")],
    listen: Annotated[str | None, typer.Option(help="host:port; 127.0.0.1:50060 + id by default.")] = None,
    party_0: Annotated[str | None, typer.Option("--party-0", help="Party 1: where party 0 listens.")] = None,
    party_2: Annotated[str | None, typer.Option("--party-2", help="Parties 0, 1: where party 2 listens.")] = None,
    ahead: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=hosting.MAXIMUM_AHEAD,
            help="Party 0: queries whose corrections are kept ready in memory; 1 by default.",
        ),
    ] = None,
    store: StoreOption = None,
    store_bytes: StoreBytesOption = None,
    store_key_file: StoreKeyOption = None,
    deadline: DeadlineOption = None,
    threads: ThreadsOption = 1,
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
    """Be one of three parties that compute on shares; must not collude with another. Start party 2 first."""
    say_as(log_format)
    deployment, role = ThreeParty(), PARTIES[number]
    listen, peers = addresses_of(number, listen, party_0, party_2)
    kept = {"store": store, "store_bytes": store_bytes, "store_key_file": store_key_file}
    given = host_options(deployment, role, ahead=ahead, deadline=deadline, **kept)
    get_ready(threads)
    at = Endpoint.parse(listen, what="--listen")
    network = hosting_network(role, tls, insecure, verbose, log_format)
    check_telemetry(metrics, otlp)
    if not same_owner:
        hosting.check_owners({name: Endpoint.parse(at, what=f"the {name}") for name, at in peers.items()}, network)
    with stages(f"party {number}") as told:
        told(0, 0, "loading the share")
        service = deployments.serve(
            share,
            role=role,
            listen=str(at),
            peers=peers,
            deployment=deployment,
            network=network,
            quotas=quotas,
            tokens=tokens,
            told=told,
            metrics=metrics,
            otlp=otlp,
            **given,
        )
    run(service, f"party {number}", announced=announce, drain=drain)
