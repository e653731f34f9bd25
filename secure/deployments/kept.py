"""A compiled model as files, and back. ``parties.served.compiled_files`` writes and reads them.

    compiled.json          the manifest: versions, and size and SHA-256 of every other file
    model.json             deployment and options, how clients pad, words for people, facts of each compiled size
    program.json           the Program; program-1.json and so on for other lengths and batches
    weights.safetensors    the weights as integers (secret sharing) or as plain vectors (ciphertexts), each once
    tables.safetensors     the token tables that clients may hold, if there are any
    tokenizer.json         if the model takes text

All but Program, tables and tokenizer are as secret as the model. Nothing in them runs: no pickle, no code.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save
from torch import Tensor

from protocols.fields import Name
from protocols.fixedpoint import FixedPoint
from secure.capture.documents import read_tensors, what_is_wrong
from secure.deployments.compiled import MAXIMUM_SIZES, Compiled
from secure.deployments.deployment import CompileOptions, find
from secure.errors import CompiledError, Error, InvalidInput, printable
from secure.models.tokenizer_document import TOKENIZER as LABEL
from secure.models.tokenizer_document import read_tokenizer, tokenizer_digest
from secure.models.tokens import TextTokenizer
from secure.version import __version__

FORMAT = 2
MANIFEST = "compiled.json"
FACTS, PROGRAM, WEIGHTS, TABLES, TOKENIZER = (
    *("model.json", "program.json", "weights.safetensors"),
    *("tables.safetensors", "tokenizer.json"),
)
PROGRAMS = (PROGRAM, *(f"program-{n}.json" for n in range(1, MAXIMUM_SIZES)))
NEEDED, KNOWN = {FACTS, PROGRAM, WEIGHTS}, {FACTS, *PROGRAMS, WEIGHTS, TABLES, TOKENIZER}
NARROW = (torch.int8, torch.int16, torch.int32)  # types in which integers are written that they hold
MAXIMUM_MANIFEST = 1 << 14  # bytes
MAXIMUM_HEADER = 1 << 22  # bytes of the header of a file of tensors
MAXIMUM_FILE = 1 << 34  # bytes of one file
AGAIN = "compile it again: unseen compile MODEL DIRECTORY"

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

    model_config = ConfigDict(extra="forbid", frozen=True)

    own: dict[str, Any]
    tensors: dict[str, str]


class _Facts(BaseModel):
    """The content of ``model.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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


def to_files(compiled: Compiled) -> dict[str, bytes]:
    """Return the files of a compiled model by name, the manifest last. What its sizes have in common is there once.

    Raises InvalidInput if models of its deployment cannot be kept.
    """
    deployment, tokenizer = compiled.deployment, compiled.tokenizer
    sizes, written, stored = list[_Size](), dict[str, Tensor](), dict[str, Tensor]()
    for number, size in enumerate(compiled.sizes):
        parts = deployment.keep(size.model)
        if parts is None:
            raise InvalidInput(f"{deployment.name} keeps no compiled models", "compile the model where it is served")
        own, tensors = parts
        names = {}
        for name, value in tensors.items():
            place = name
            while place in stored and not stored[place].equal(value):
                place = f"{number}:{place}"
            names[name] = place
            if place not in stored:
                stored[place], written[place] = value, _narrow(value).contiguous()
        sizes.append(_Size.model_construct(own=own, tensors=names))
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
    files = {FACTS: json.dumps(said, allow_nan=False).encode(), WEIGHTS: save(written)}
    files |= {name: bytes(size.program.encoded) for name, size in zip(PROGRAMS, compiled.sizes, strict=False)}
    if compiled.client_tables:
        files[TABLES] = save({name: table.contiguous() for name, table in compiled.client_tables.items()})
    if compiled.tokenizer_json:
        files[TOKENIZER] = compiled.tokenizer_json
    named = {name: KeptFile(size=len(payload), sha256=_sha256(payload)) for name, payload in files.items()}
    manifest = CompiledManifest(format=FORMAT, unseen=__version__, files=named)
    return {**files, MANIFEST: manifest.model_dump_json(indent=1).encode()}


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


def from_files(manifest: CompiledManifest, files: Mapping[str, bytes]) -> Compiled:
    """Return the compiled model of the files that a manifest names.

    Size and SHA-256 of each are compared with the manifest before it is read. Then the Program is decoded and checked
    as one that may come from anyone; the weights must have the names, types and shapes that it reads; the token tables
    and the tokenizer must be those that its labels name by their digests. Raises CompiledError.
    """
    for name, known in manifest.files.items():
        if len(files[name]) != known.size or not hmac.compare_digest(_sha256(files[name]), known.sha256):
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
        tensors = {name: _wide(value) for name, value in read_tensors(files[WEIGHTS], most=MAXIMUM_HEADER).items()}
        if (
            not facts.sizes
            or {*PROGRAMS[: len(facts.sizes)]} != {*PROGRAMS} & {*files}
            or {*tensors} != {name for size in facts.sizes for name in size.tensors.values()}
        ):
            raise InvalidInput("a size has no Program or no weights, or they have no size")
        tables = read_tensors(files[TABLES], most=MAXIMUM_HEADER) if TABLES in files else {}
        models = list[Any]()
        for program, size in zip(PROGRAMS, facts.sizes, strict=False):
            held = {name: tensors[stored] for name, stored in size.tensors.items()}
            models.append(deployment.restore(files[program], tables, size.own, held))
        tokenizer = _tokenizer(files.get(TOKENIZER, b""), facts, models)
    except (Error, ValidationError, ValueError, LookupError, TypeError) as error:
        said = str(error).partition("\n")[0] if isinstance(error, Error) else what_is_wrong(error)
        raise CompiledError(f"it does not hold together: {printable(said)}", AGAIN) from None
    about = tokenizer, files.get(TOKENIZER, b""), options, printable(facts.about), printable(facts.made)
    first, *others = [Compiled(deployment, model, *about) for model in models]
    return replace(first, others=tuple(others))


def _narrow(value: Tensor) -> Tensor:
    """Return integers in the narrowest type that holds them; other numbers as they are."""
    for kind in NARROW if value.dtype == torch.int64 else ():
        known = torch.iinfo(kind)
        if not value.numel() or known.min <= int(value.min()) <= int(value.max()) <= known.max:
            return value.to(kind)
    return value


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.int64) if value.dtype in NARROW else value


def _tokenizer(text: bytes, facts: _Facts, models: Sequence[Any]) -> TextTokenizer | None:
    found = tokenizer_digest(text, facts.pad_id, facts.lowercase) if text else ""
    for model in models:
        if not hmac.compare_digest(found.encode(), model.program.labels.get(LABEL, "").encode()):
            raise InvalidInput("the tokenizer is not the one of the Program")
    return TextTokenizer(read_tokenizer(text)[0], facts.pad_id, facts.lowercase) if text else None


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
