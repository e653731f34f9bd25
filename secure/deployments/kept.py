"""A compiled model as files, and back. ``parties.served.compiled_files`` writes and reads them.

    compiled.json          the manifest: versions, and size and SHA-256 of every other file
    model.json             deployment and options, how clients pad, words for people, facts of each compiled size
    program.json           the Program; program-1.json and so on for other lengths and batches
    weights.safetensors    the weights as integers (secret sharing) or as plain vectors (ciphertexts), each once
    tables.safetensors     the token tables that clients may hold, if there are any
    tokenizer.json         if the model takes text

All but Program, tables and tokenizer are as secret as the model. Nothing in them runs: no pickle, no code. Weights are
written one after another, and mapped where they are read, so that a model may be larger than memory.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import IO, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from protocols.fields import Name
from protocols.fixedpoint import FixedPoint
from secure.capture.documents import read_tensors, what_is_wrong
from secure.capture.tensor_files import map_tensors, write_tensors
from secure.deployments.compiled import MAXIMUM_SIZES, Compiled
from secure.deployments.deployment import CompileOptions, find
from secure.errors import CompiledError, Error, InvalidInput, printable
from secure.lowering.made import alike
from secure.models.tokenizer_document import TOKENIZER as LABEL
from secure.models.tokenizer_document import read_tokenizer, tokenizer_digest
from secure.models.tokens import TextTokenizer
from secure.mpc.arithmetic import tied
from secure.version import __version__

FORMAT = 2
MANIFEST = "compiled.json"
FACTS, PROGRAM, WEIGHTS, TABLES, TOKENIZER = (
    *("model.json", "program.json", "weights.safetensors"),
    *("tables.safetensors", "tokenizer.json"),
)
PROGRAMS = (PROGRAM, *(f"program-{n}.json" for n in range(1, MAXIMUM_SIZES)))
NEEDED, KNOWN = {FACTS, PROGRAM, WEIGHTS}, {FACTS, *PROGRAMS, WEIGHTS, TABLES, TOKENIZER}
MAXIMUM_MANIFEST = 1 << 14  # bytes
MAXIMUM_HEADER = 1 << 22  # bytes of the header of a file of tensors
MAXIMUM_FILE = 1 << 38  # bytes of one file
AGAIN = "compile it again: unseen compile MODEL DIRECTORY"

TRANSPOSE = "^T"  # behind the name of a tensor in the file: the transposed one, of a tied table and head
Writing = Callable[[IO[bytes]], None]
"""A function that writes a file."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class KeptFile(BaseModel):
    """The size in bytes and the SHA-256 of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    size: Annotated[int, Field(ge=0, le=MAXIMUM_FILE)]
    sha256: Digest


class CompiledManifest(BaseModel):
    """The manifest: whatever is changed in it, or in a file that it names, is found."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: int
    unseen: str
    files: dict[str, KeptFile]

    @property
    def size(self) -> int:
        """The bytes of all files together."""
        return sum(file.size for file in self.files.values())


class _Size(BaseModel):
    """One compiled size. own: the facts of the deployment's compiled form. tensors: names of tensors in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    own: dict[str, Any]
    tensors: dict[str, str]


class _Facts(BaseModel):
    """The content of ``model.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    deployment: Name
    compiled_as: dict[str, str]
    embedding: str | None
    gelu: str | None
    approximations: str | None
    network: str | None
    answer_bits: int | None = None
    checked: bool | None = None
    fixed_point: dict[str, int] | None
    about: str
    made: str
    pad_id: int
    lowercase: bool
    sizes: Annotated[list[_Size], Field(max_length=MAXIMUM_SIZES)]


def to_files(compiled: Compiled) -> dict[str, bytes | Writing]:
    """Return the files of a compiled model by name, but for the manifest: their content, or what writes it.

    What its sizes have in common is there once. Raises InvalidInput if models of its deployment cannot be kept.
    """
    deployment, tokenizer = compiled.deployment, compiled.tokenizer
    sizes, stored = list[_Size](), dict[str, tuple[Mapping[str, Tensor], str]]()
    for number, size in enumerate(compiled.sizes):
        parts = deployment.keep(size.model)
        if parts is None:
            raise InvalidInput(f"{deployment.name} keeps no compiled models", "compile the model where it is served")
        own, tensors = parts
        names, turned = dict[str, str](), tied(getattr(size.program, "weight_shapes", {}))
        for name in sorted(tensors, key=turned.__contains__):
            if (other := turned.get(name, "")) in names:
                names[name] = names[other] + TRANSPOSE
                continue
            place = name
            while place in stored and (stored[place][1] != name or not alike(stored[place][0], tensors, name)):
                place = f"{number}:{place}"
            names[name] = place
            stored.setdefault(place, (tensors, name))
        sizes.append(_Size.model_construct(own=own, tensors=names))

    def write(file: IO[bytes]) -> None:
        write_tensors(file, stored, ((place, held[name]) for place, (held, name) in stored.items()))

    facts = _Facts(
        deployment=deployment.name,
        compiled_as=deployment.compiled_as(),
        **asdict(compiled.options),
        about=compiled.about,
        made=compiled.made,
        pad_id=tokenizer.pad_id if tokenizer else 0,
        lowercase=tokenizer.lowercase if tokenizer else False,
        sizes=[],
    )
    said = facts.model_dump() | {"sizes": [{"own": size.own, "tensors": size.tensors} for size in sizes]}
    files: dict[str, bytes | Writing] = {FACTS: json.dumps(said, allow_nan=False).encode(), WEIGHTS: write}
    files |= {name: bytes(size.program.encoded) for name, size in zip(PROGRAMS, compiled.sizes, strict=False)}
    if compiled.client_tables:
        files[TABLES] = save({name: table.contiguous() for name, table in compiled.client_tables.items()})
    if compiled.tokenizer_json:
        files[TOKENIZER] = compiled.tokenizer_json
    return files


def at_least(compiled: Compiled) -> int:
    """Return a number of bytes that the files of a compiled model have at least: one for each weight of a product."""
    return sum(math.prod(shape) for shape in getattr(compiled.program, "weight_shapes", {}).values())


def manifest_of(files: Mapping[str, KeptFile]) -> bytes:
    """Return the manifest of files that are written."""
    return CompiledManifest(format=FORMAT, unseen=__version__, files=dict(files)).model_dump_json(indent=1).encode()


def read_manifest(payload: bytes) -> CompiledManifest:
    """Decode a manifest. Raises CompiledError if it is none, of another version, or names other files."""
    try:
        document = json.loads(payload)
        versions = document.get("format"), document.get("unseen")
        if versions != (FORMAT, __version__):
            said = printable(f"{versions[1]!r:.40} (format {versions[0]!r:.40})")
            raise CompiledError(f"it was compiled by unseen {said}, this is {__version__!r} (format {FORMAT})", AGAIN)
        manifest = CompiledManifest.model_validate(document)
    except (ValidationError, ValueError, AttributeError, RecursionError) as error:
        raise CompiledError(f"{MANIFEST} is damaged: {what_is_wrong(error)}", AGAIN) from None
    if wrong := sorted((set(manifest.files) - KNOWN) | (NEEDED - set(manifest.files))):
        done = "does not name" if wrong[0] in NEEDED else "may not name"
        raise CompiledError(f"{MANIFEST} {done} {printable(wrong[0])!r:.80}", AGAIN)
    return manifest


def from_files(manifest: CompiledManifest, files: Mapping[str, bytes], weights: bytes | mmap.mmap) -> Compiled:
    """Return the compiled model of the files that a manifest names. weights: the content of WEIGHTS, mapped perhaps.

    Size and SHA-256 of each are compared with the manifest before it is read. Then the Program is decoded and checked
    as one that may come from anyone; the weights must have the names, types and shapes that it reads; the token tables
    and the tokenizer must be those that its labels name by their digests. Raises CompiledError.
    """
    for name, known in manifest.files.items():
        content = weights if name == WEIGHTS else files[name]
        if len(content) != known.size or not hmac.compare_digest(hashlib.sha256(content).hexdigest(), known.sha256):
            raise CompiledError(f"{name} is damaged: it is not the file that {MANIFEST} names", AGAIN)
    try:
        facts = _Facts.model_validate_json(files[FACTS])
        deployment = find(facts.deployment).served(facts.compiled_as)
        fixed = None if facts.fixed_point is None else FixedPoint(**facts.fixed_point)
        options = CompileOptions(
            facts.embedding,
            facts.gelu,
            facts.approximations,
            fixed,
            facts.network,
            facts.answer_bits,
            facts.checked,
        )
        tensors = map_tensors(weights, most=MAXIMUM_HEADER)
        if (
            not facts.sizes
            or {*PROGRAMS[: len(facts.sizes)]} != {*PROGRAMS} & {*manifest.files}
            or {*tensors} != {name.removesuffix(TRANSPOSE) for size in facts.sizes for name in size.tensors.values()}
        ):
            raise InvalidInput("a size has no Program or no weights, or they have no size")
        tables = read_tensors(files[TABLES], most=MAXIMUM_HEADER) if TABLES in files else {}
        models = list[Any]()
        for program, size in zip(PROGRAMS, facts.sizes, strict=False):
            held = {name: _held(tensors, stored) for name, stored in size.tensors.items()}
            models.append(deployment.restore(files[program], tables, size.own, held))
        tokenizer = _tokenizer(files.get(TOKENIZER, b""), facts, models)
    except (Error, ValidationError, ValueError, LookupError, TypeError) as error:
        said = str(error).partition("\n")[0] if isinstance(error, Error) else what_is_wrong(error)
        raise CompiledError(f"it does not hold together: {printable(said)}", AGAIN) from None
    about = tokenizer, files.get(TOKENIZER, b""), options, printable(facts.about), printable(facts.made)
    first, *others = [Compiled(deployment, model, *about) for model in models]
    return replace(first, others=tuple(others))


def _held(tensors: Mapping[str, Tensor], stored: str) -> Tensor:
    value = tensors[stored.removesuffix(TRANSPOSE)]
    return value.T if stored.endswith(TRANSPOSE) else value


def _tokenizer(text: bytes, facts: _Facts, models: Sequence[Any]) -> TextTokenizer | None:
    found = tokenizer_digest(text, facts.pad_id, facts.lowercase) if text else ""
    for model in models:
        if not hmac.compare_digest(found.encode(), model.program.labels.get(LABEL, "").encode()):
            raise InvalidInput("the tokenizer is not the one of the Program")
    return TextTokenizer(read_tokenizer(text)[0], facts.pad_id, facts.lowercase) if text else None
