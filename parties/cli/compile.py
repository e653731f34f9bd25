"""The command ``unseen compile``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from parties.cli.compiled import tell
from parties.cli.console import say, stages, use_threads
from parties.cli.options import (
    AcceptCosineOption,
    AcceptErrorOption,
    AnswerBitsOption,
    ApproximationsOption,
    BatchesOption,
    CalibrationOption,
    CapacityOption,
    CheckedOption,
    ClustersOption,
    DimensionsOption,
    DraftLengthOption,
    EmbeddingOption,
    FractionBitsOption,
    GeluOption,
    IndexOption,
    LengthsOption,
    ModelArgument,
    NetworkOption,
    RevealOption,
    TaskOption,
    TemperatureOption,
    ThreadsOption,
    TopOption,
    chosen,
    compile_options,
    read_texts,
)
from parties.served.compiled_files import check_new, save_compiled
from secure.deployments.compilation import Compilation
from secure.deployments.deployment import Deployment
from secure.deployments.self_test import Accept
from secure.errors import InvalidInput
from secure.units import in_units


def compile_model(
    deployment: Deployment,
    model: ModelArgument,
    directory: Annotated[Path, typer.Argument(help="A new directory, which will hold the secret weights.")],
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
    threads: ThreadsOption = 0,
) -> None:
    """Compile a model once, into a directory that `unseen serve DIRECTORY` serves within seconds."""
    if not deployment.serves:
        raise InvalidInput(f"nobody serves a whole model under {deployment.name}", deployment.how_to_serve)
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
    check_new(directory)
    say(f"unseen compile: compiling {model} for {deployment.name} ...")
    with stages("compile") as told:
        lengths, batches = tuple(length or ()), tuple(batch or (1,))
        compilation = Compilation(
            model,
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
        compiled = compilation.run(told)
        told(0, 0, "writing files")
        save_compiled(compiled, directory)
    tell("compile", model, compiled)
    size = sum(file.stat().st_size for file in directory.iterdir())
    say(f"unseen compile: {directory} ({in_units(size)}) holds secret weights; serve it with: unseen serve {directory}")
