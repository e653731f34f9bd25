"""Compiled models, as the commands make, keep and find them, and what they say of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from parties.cli.console import say, stages
from parties.cli.options import DEFAULTS, dashed
from parties.limits.memory import memory_said
from parties.served.compiled_files import CompiledCache, load_compiled
from secure.cost.demand import PROCESS
from secure.cost.traffic import OFFLINE, ONLINE, in_words
from secure.deployments.compilation import Compilation
from secure.deployments.compiled import Compiled
from secure.deployments.deployment import CompileOptions, Deployment
from secure.errors import CompiledError, Error, InvalidInput
from secure.lowering.client_inputs import GENERATE, MOST_ROWS
from secure.models.checkpoints import large_bytes
from secure.models.decoder import DRAFT_LENGTH, TEMPERATURE
from secure.models.settings import settings_of
from secure.tasks.embed import Embed
from secure.units import in_units

CONFIG = "config.json"  # of a model's directory
FIXED = (
    *("length", "capacity", TEMPERATURE, DRAFT_LENGTH, "batch", "dimensions", "embedding", "gelu", "approximations"),
    *("fraction_bits", "network", "answer_bits", "checked", "calibration"),
    *("task", "reveal", "index", "top", "clusters"),
)
"""Options of the command line that are fixed when a model is compiled."""

KeepOption = Annotated[bool, typer.Option(help="Keep the compiled model for the next start, in the cache.")]


def fixed_of(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values of FIXED among a command's options; None for those that are not given."""
    return {name: given[name] if given[name] is False else given[name] or None for name in FIXED}


def made(verb: str, compilation: Compilation, *, keep: bool) -> Compiled:
    """Return a compiled model: one that was kept, else it is compiled, and kept if ``keep``. All of it is said."""
    cache, model = CompiledCache(), compilation.model
    key = compilation.key() if keep else ""
    if keep and (found := _found(verb, cache, key)) is not None:
        compiled = replace(found, deployment=compilation.deployment)
        say(f"unseen {verb}: {model}, compiled on {compiled.made}, from {cache.directory}")
    else:
        say(f"unseen {verb}: compiling {model} for {compilation.deployment.name} ...")
        own, mapped = large_bytes(Path(model)) if (Path(model) / CONFIG).is_file() else (0, 0)
        if mapped:
            say(f"unseen {verb}: {memory_said(PROCESS + own, mapped, 'compiling', 'a machine with more memory')}")
        with stages(verb) as told:
            compiled = compilation.run(told)
            changed = keep and compilation.key() != key
            if keep and not changed:
                told(0, 0, "keeping the compiled model")
                _keep(verb, cache, key, compiled)
        if changed:
            say(f"unseen {verb}: not kept: files of {model} changed while it was compiled")
    tell(verb, model, compiled)
    return compiled


def _found(verb: str, cache: CompiledCache, key: str) -> Compiled | None:
    try:
        return cache.find(key)
    except CompiledError as error:
        say(f"unseen {verb}: a kept model is not used: {_first(error, key)}")
        cache.forget(key)
    except (InvalidInput, OSError) as error:
        say(f"unseen {verb}: kept models are not used: {_first(error, key)}")
    return None


def _keep(verb: str, cache: CompiledCache, key: str, compiled: Compiled) -> None:
    """Keep a model, and say where; a server starts without that too."""
    try:
        size = cache.keep(key, compiled)
    except (Error, OSError) as error:
        say(f"unseen {verb}: not kept: {_first(error, key)}")
        return
    if size is not None:
        most = in_units(cache.most)
        say(f"unseen {verb}: kept in {cache.directory}, {in_units(size)}; all models there take {most} at most")


def _first(error: BaseException, key: str) -> str:
    """Return an error and its hint in one line, without the key of the model, which would confirm a guess of it."""
    return "; ".join(str(error).splitlines()).replace(key, "...")


def tell(verb: str, model: str, compiled: Compiled) -> None:
    """Say what a query of a compiled model takes, and what its owner should know."""
    for line in filter(None, compiled.about.split("; ")):
        say(f"unseen {verb}: {line}")
    task, settings = settings_of(compiled.program.labels)
    if task:
        said = f"{len(settings.labels)} labels, which clients see; " if settings.labels else ""
        say(f"unseen {verb}: {model} is for the task {task}: {said}each answer reveals the {settings.reveal}")
    writes = task == GENERATE
    for size in compiled.sizes:
        length = size.program.labels.get("length")
        tokens = f", {length} tokens" if length else ""
        if writes and length == "1":
            tokens = ", each token after the prompt"
        elif writes and length == size.program.labels.get(DRAFT_LENGTH):
            tokens = f", a pass over {length} tokens and drafts"
        cost = size.cost
        tokens += f", {batch} a query" if (batch := size.program.labels.get("batch")) else ""
        offline = in_words(cost.traffic, OFFLINE)
        say(
            f"unseen {verb}: {model}{tokens}: {cost.rounds} rounds, {in_words(cost.traffic, ONLINE)}; "
            f"{f'offline {offline}; ' if offline else ''}Program {size.program.digest}"
        )
    if len(compiled.sizes) > 1:
        say(f"unseen {verb}: {model}, all {len(compiled.sizes)} Programs together: {compiled.programs_digest}")
    deployment = compiled.deployment
    for line in (*deployment.choices(compiled.model), *deployment.remarks(compiled.program)):
        say(f"unseen {verb}: {line}")


def opened(
    verb: str,
    directory: Path,
    deployment: Deployment,
    *,
    named: bool,
    fixed: Mapping[str, Any],
) -> Compiled:
    """Return the compiled model of a directory, for a deployment as it was given on the command line.

    named: the deployment was named there; else that of the directory is taken. fixed: the options that were fixed when
    the model was compiled, by their names on the command line; None for those that are not given.
    Raises InvalidInput for one that is given and differs, and like ``load_compiled``.
    """
    compiled = load_compiled(directory)
    where = f"{directory} holds a compiled model"
    try:
        if not named and deployment.untouched:
            chosen = compiled.deployment
        else:
            chosen = deployment.compiled_for(compiled.deployment)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from None
    require_fixed(compiled, directory, fixed)
    compiled = replace(compiled, deployment=chosen)
    say(f"unseen {verb}: {directory}, compiled on {compiled.made}")
    return compiled


def require_fixed(compiled: Compiled, directory: Path | str, fixed: Mapping[str, Any]) -> None:
    """Raise InvalidInput for an option of FIXED that is given, and differs from that of a compiled model."""
    for name, value in fixed.items():
        known = _known(compiled, name)
        given = sorted(set(value)) if isinstance(value, list) else value
        if given is not None and given != known:
            parts = {"calibration": "whose ranges are fixed", "index": "which has its own index, or none"}
            said = parts.get(name) or f"which was compiled with {_words(known)}"
            hint = f"leave {dashed(name)} out, or compile it again"
            raise InvalidInput(f"{dashed(name)} {_words(given)}: {directory} holds a compiled model, {said}", hint)


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _known(compiled: Compiled, name: str) -> Any:
    """Return the value of an option of the command line with which a model was compiled."""
    options: CompileOptions = compiled.options
    if name in ("task", "reveal"):
        task, settings = settings_of(compiled.program.labels)
        return task or Embed.name if name == "task" else settings.reveal if task else None
    if name == "top":
        return settings_of(compiled.program.labels)[1].top or None
    if name == "clusters":
        return next(iter(settings_of(compiled.program.labels)[1].clusters), None)
    if name in ("length", "batch"):
        least = {"batch": 1}.get(name, 0)
        steps = {1, _known(compiled, DRAFT_LENGTH)} if name == "length" else set[int]()  # of a model that writes text
        return sorted({int(size.program.labels.get(name, least)) for size in compiled.sizes} - {0} - steps)
    if name == TEMPERATURE:
        return float(compiled.program.labels.get(name, 0)) or None
    if name in ("dimensions", MOST_ROWS, DRAFT_LENGTH):
        return int(compiled.program.labels.get(name, 0)) or None
    if name == "fraction_bits":
        return options.fixed_point.fraction_bits if options.fixed_point else DEFAULTS[name]
    given = getattr(options, name, None)
    return DEFAULTS.get(name) if given is None else given
