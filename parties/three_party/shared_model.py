"""A model shared among three parties: its owner writes three directories once, one for each party.

    manifest.json           public facts, and the digests of the files beside it
    program.json            the Program; program-1.json and so on for its other sizes, which read the same weights
    weights.safetensors     W_1 = W - W_0 - W_2, packed to its rings (parties 0 and 1), or W itself if it is public:
                            one file of narrow integers, which both map, so that a machine holds it once
    salt                    32 random bytes that keep the model's name from telling weights (parties 0 and 1)
    seeds                   those of this party's two pairs, 32 bytes each; only the file's owner may read it
    tokenizer.json, token-table.safetensors    if the model has them

W_0 and W_2 are expanded from the seeds of pairs (2, 0) and (1, 2), so party 2 stores no weights at all.

A model's name has two halves of 64 hexadecimal digits. The first is SHA-256 over everything public: the Programs (whose
labels name the tokenizer by its digest), the token table, options. Clients and all parties compute it from what they
hold, so no party can give a client another tokenizer, or another table, than the others hold. The second is
HMAC-SHA-256 of the file of weights under the salt. Nobody can compute it without the salt, so the name confirms no
guess of the weights, even where all parties know them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import mmap
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import save
from torch import Tensor

from parties.limits.memory import memory_said
from parties.net.secret_files import map_secret, read_secret
from parties.served.files import (
    TOKEN_TABLE,
    packed_masked,
    packed_name,
    received_tokenizer,
    store,
    unpack_masked,
)
from parties.three_party.pair_keys import PairSeed
from protocols.fields import Name, Ring, Shape
from protocols.narrow import NARROW
from protocols.prg import SEED_BYTES, fresh_seed
from protocols.three_party import Translated
from protocols.three_party.sharing import HOLDERS, PARTIES, PARTY_2
from protocols.three_party.weights import Party2Weights, PublicWeights, SharedWeights, masked
from secure.capture.documents import header_size
from secure.capture.tensor_files import map_tensors, write_tensors
from secure.cost.demand import KEPT as NARROWEST
from secure.cost.demand import PROCESS
from secure.deployments.compiled import Compiled
from secure.deployments.three_party import PARTIES as ROLES
from secure.deployments.three_party import ThreeParty
from secure.errors import HandshakeError, InvalidInput, InvalidProgram, ShareError
from secure.lowering.made import alike
from secure.models.tokens import TextTokenizer
from secure.mpc.arithmetic import tied
from secure.mpc.budget import WORD, load_of
from secure.mpc.program import Program
from secure.session.link import MAXIMUM_LENGTHS
from secure.version import WIRE_VERSION

MANIFEST, PROGRAM, WEIGHTS, SEEDS = "manifest.json", "program.json", "weights.safetensors", "seeds"
SALT, TOKENIZER, TABLE = "salt", "tokenizer.json", "token-table.safetensors"
SALT_BYTES = 32
SUMMANDS = 3  # of shared weights at parties 0 and 1: W_1, and two stacked for products
PROGRAMS = (PROGRAM, *(f"program-{number}.json" for number in range(1, MAXIMUM_LENGTHS)))
FILES = {*PROGRAMS, WEIGHTS, SALT, TOKENIZER, TABLE}  # those that a manifest may name
PAIRS = HOLDERS  # (2, 0), (0, 1), (1, 2): pair j holds summand j


AnyWeights = SharedWeights | Party2Weights | PublicWeights


class Manifest(BaseModel):
    """The public facts of one share.

    model: names the shared model (see above); it is equal in all three. compiled_as: the deployment's own options with
    which the model was compiled. files: SHA-256 of the files beside the manifest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: int
    party: Literal[0, 1, 2]
    model: str
    compiled_as: dict[str, str]
    rings: dict[Name, Ring]
    shapes: dict[Name, Shape]
    files: dict[str, str]
    pad_id: int
    lowercase: bool


@dataclass(frozen=True, eq=False, repr=False)
class SharedProgram:
    """A Program of a shared model, and its circuit for three servers."""

    program: Program
    circuit: Translated


@dataclass(frozen=True, eq=False, repr=False)
class PartyShare:
    """One party's share of a model. pair_seeds: by the other party of the pair. files: those for clients, by name.

    sizes: its Programs, all of which read the same weights; most models have one.
    """

    manifest: Manifest
    deployment: ThreeParty
    sizes: Sequence[SharedProgram]
    weights: AnyWeights
    pair_seeds: Mapping[int, PairSeed]
    tokenizer: TextTokenizer | None
    tokenizer_json: bytes
    files: Mapping[str, bytes]

    @property
    def program(self) -> Program:
        """The first Program."""
        return self.sizes[0].program

    @property
    def circuit(self) -> Translated:
        """The circuit of the first Program."""
        return self.sizes[0].circuit

    @property
    def party(self) -> int:
        return self.manifest.party

    @property
    def memory(self) -> tuple[int, int]:
        """About the most bytes that this party takes: of its own for one query, and of weights that it maps."""
        return _memory(self.manifest, self.sizes, public=self.deployment.public_weights)

    @property
    def role(self) -> str:
        return ROLES[self.party]


def public_name(programs: Sequence[str], files: Mapping[str, str], compiled_as: Mapping[str, str]) -> str:
    """Return the first half of a model's name: SHA-256 over all that clients are given, in hexadecimal digits.

    programs: the Programs' digests, which cover the tokenizer. files: SHA-256 of the files for clients.
    """
    facts = ["unseen shared model", ",".join(programs), dict(files), dict(compiled_as)]
    return _sha256(json.dumps(facts, sort_keys=True).encode())


def _secret_name(salt: bytes, weights: str) -> str:
    """Return the second half of a model's name. weights: SHA-256 of their file."""
    return hmac.digest(salt, b"weights/" + bytes.fromhex(weights), "sha256").hex()


def share_model(compiled: Compiled, directory: str | Path) -> list[Path]:
    """Write party-0, party-1 and party-2 under ``directory``, with fresh seeds: two runs never share a mask.

    compiled: a model compiled with ``deployment=secure.ThreeParty()``; raises InvalidInput for another deployment, and
    for a model of several sizes that do not read the same weights. Returns the three directories, each for its party
    alone.
    """
    deployment = compiled.deployment
    if not isinstance(deployment, ThreeParty):
        raise InvalidInput(
            f"this model was compiled for {deployment.name}, which shares none among parties",
            "compile it with deployment=secure.ThreeParty()",
        )
    programs, integers = [size.program for size in compiled.sizes], compiled.model.integers
    if len(programs) > len(PROGRAMS):
        raise InvalidInput(f"a model of {len(programs)} sizes", f"{len(PROGRAMS)} are shared at most")
    rings = _rings([deployment.translated(program) for program in programs])
    _require_same_weights(compiled, rings)
    seeds = [fresh_seed() for _ in PAIRS]
    keys = [PairSeed(seed, pair) for seed, pair in zip(seeds, PAIRS, strict=True)]
    shapes, turned = dict[str, tuple[int, ...]](), tied(compiled.program.weight_shapes)
    written = [name for name in rings if turned.get(name) not in rings]
    held = _noted(((name, integers[name]) for name in written), shapes)
    if not deployment.public_weights:
        written = [packed_name(name, rings) for name in rings]
        held = _noted(masked(integers, keys[0].weights_key(), keys[2].weights_key(), rings), shapes)
        held = packed_masked(held, rings)
    places = [Path(directory) / f"party-{party}" for party in range(PARTIES)]
    for where in places:
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
    first = places[0] / WEIGHTS
    store(first, lambda file: write_tensors(file, written, held))
    (_link if deployment.public_weights else _copy)(first, places[1] / WEIGHTS)
    with first.open("rb") as content:
        weights = hashlib.file_digest(content, "sha256").hexdigest()
    shapes |= {name: shapes[turned[name]][::-1] for name in rings if name not in shapes}
    common = {file: program.encoded for file, program in zip(PROGRAMS, programs, strict=False)}
    if compiled.tokenizer_json:
        common[TOKENIZER] = compiled.tokenizer_json
    if compiled.client_tables:
        common[TABLE] = save(dict(compiled.client_tables))
    tokenizer, salt = compiled.tokenizer, secrets.token_bytes(SALT_BYTES)
    pad_id, lowercase = (tokenizer.pad_id, tokenizer.lowercase) if tokenizer else (0, False)
    table = {TOKEN_TABLE: _sha256(common[TABLE])} if TABLE in common else {}
    digests = [program.digest for program in programs]
    name = public_name(digests, table, deployment.compiled_as()) + _secret_name(salt, weights)
    out = []
    for party, where in enumerate(places):
        parts = dict(common)
        if party != PARTY_2:
            parts[SALT] = salt
        digested = {n: _sha256(payload) for n, payload in parts.items()}
        manifest = Manifest(
            version=WIRE_VERSION,
            party=party,  # type: ignore[arg-type]
            model=name,
            compiled_as=deployment.compiled_as(),
            rings=dict(rings),
            shapes=shapes,
            files=digested if party == PARTY_2 else digested | {WEIGHTS: weights},
            pad_id=pad_id,
            lowercase=lowercase,
        )
        # a party holds the seeds of its two pairs; only their owner can read files that ``store`` writes
        parts[SEEDS] = b"".join(seed for seed, pair in zip(seeds, PAIRS, strict=True) if party in pair)
        for file, payload in parts.items():
            store(where / file, payload)
        store(where / MANIFEST, manifest.model_dump_json(indent=2).encode())
        out.append(where)
    return out


def _noted(tensors: Iterable[tuple[str, Tensor]], shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as they are made, and note their shapes."""
    for name, value in tensors:
        shapes[name] = tuple(value.shape)
        yield name, value


def _link(file: Path, place: Path) -> None:
    """Give a file another name, so that a machine that has both holds its content once, or copy it."""
    place.unlink(missing_ok=True)
    try:
        os.link(file, place)
    except OSError:  # a file system without links
        _copy(file, place)


def _copy(file: Path, place: Path) -> None:
    with file.open("rb") as content:
        store(place, lambda copy: shutil.copyfileobj(content, copy))


def _rings(circuits: Iterable[Translated]) -> dict[str, int]:
    """Return the widest ring in which any of a model's circuits reads each weight, by the weight's name."""
    rings = dict[str, int]()
    for name, bits in (item for circuit in circuits for item in circuit.weight_rings.items()):
        rings[name] = max(bits, rings.get(name, 0))
    return rings


def _require_same_weights(compiled: Compiled, rings: Mapping[str, int]) -> None:
    """Raise InvalidInput unless all sizes have the same integers: one mask never covers two different weights."""
    first, tables = compiled.model.integers, compiled.client_tables
    for size in compiled.others:
        here, theirs = size.model.integers, size.client_tables
        if (
            any(name not in here or name not in first or not alike(first, here, name) for name in rings)
            or tables.keys() != theirs.keys()
            or any(not table.equal(theirs[name]) for name, table in tables.items())
        ):
            raise InvalidInput(
                "the sizes of this model have different weights, and are not shared together",
                "compile and share each on its own",
            )


def load_share(directory: str | Path) -> PartyShare:
    """Read and check one party's share; raises ShareError."""
    directory = Path(directory)
    try:
        manifest = Manifest.model_validate_json((directory / MANIFEST).read_bytes())
        _check_names(manifest, directory)
        deployment = ThreeParty.served(manifest.compiled_as)
        mapped_files = {WEIGHTS} if deployment.public_weights else set[str]()  # others are read once, then checked
        parts: dict[str, Any] = {
            name: map_secret(directory / name) if name in mapped_files else (directory / name).read_bytes()
            for name in manifest.files
        }
        parts[SEEDS] = read_secret(directory / SEEDS)
    except InvalidInput as error:
        raise ShareError(str(error)) from None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its manifest cannot be read"
        raise ShareError(f"no share of a model in {directory}: {reason}", "write it with: unseen share-model") from None
    if manifest.version != WIRE_VERSION:
        raise ShareError(f"{directory}: version {manifest.version}, this is {WIRE_VERSION}", "share the model anew")
    digests = {name: _sha256(parts[name]) for name in manifest.files}
    for name, digest in manifest.files.items():
        if not hmac.compare_digest(digests[name].encode(), digest.encode()):
            raise ShareError(f"{directory / name} is damaged: its digest is not the manifest's", "share the model anew")
    pairs = [pair for pair in PAIRS if manifest.party in pair]
    if len(parts[SEEDS]) != len(pairs) * SEED_BYTES:
        raise ShareError(f"{directory / SEEDS} is damaged", "share the model anew")
    seeds = (parts[SEEDS][i * SEED_BYTES : (i + 1) * SEED_BYTES] for i in range(len(pairs)))
    keys = {sum(pair) - manifest.party: PairSeed(seed, pair) for seed, pair in zip(seeds, pairs, strict=True)}
    try:
        programs = [Program.from_bytes(parts[name]) for name in PROGRAMS if name in parts]
        sizes = [SharedProgram(program, deployment.translated(program)) for program in programs]
    except (InvalidInput, InvalidProgram) as error:
        raise ShareError(f"{directory}: {error}", "share the model anew") from None
    if _rings(size.circuit for size in sizes) != manifest.rings or not _fit(manifest.shapes, manifest.rings, programs):
        raise ShareError(f"{directory}: its weights are not those that its Programs read", "share the model anew")
    own, mapped = _memory(manifest, sizes, public=deployment.public_weights)
    memory_said(
        own, mapped, ROLES[manifest.party], "fewer tokens (--length, --capacity), or a machine with more memory"
    )
    text = parts.get(TOKENIZER, b"")
    files = {TOKEN_TABLE: parts[TABLE]} if TABLE in parts else {}
    _check_model(manifest, programs, files, parts.get(SALT, b""), digests.get(WEIGHTS, ""), directory)
    try:
        tokenizer = received_tokenizer(text, manifest.pad_id, manifest.lowercase, programs[0].labels)
    except HandshakeError as error:
        raise ShareError(f"{directory}: {error}", "share the model anew") from None
    return PartyShare(
        manifest,
        deployment,
        sizes,
        _weights(manifest, parts.get(WEIGHTS), keys, public=deployment.public_weights),
        keys,
        tokenizer,
        text,
        files,
    )


def _fit(shapes: Mapping[str, Shape], rings: Mapping[str, Ring], programs: Iterable[Program]) -> bool:
    """Tell whether the shapes of weights are those that Programs multiply by; a Program has none of what it adds."""
    return shapes.keys() == rings.keys() and all(
        shapes.get(name, shape) == shape for program in programs for name, shape in program.weight_shapes.items()
    )


def _memory(manifest: Manifest, sizes: Sequence[SharedProgram], *, public: bool) -> tuple[int, int]:
    """Return the bytes of ``PartyShare.memory``: corrections and values, and shared weights in words."""
    elements = sum(math.prod(shape) for shape in manifest.shapes.values())
    queries = [
        load_of(size.circuit.circuit, size.program.weight_shapes, weights=False).memory + size.circuit.cost.dealt
        for size in sizes
    ]
    copies = 0 if public else 1 if manifest.party == PARTY_2 else SUMMANDS
    mapped = NARROWEST * elements if public and manifest.party != PARTY_2 else 0
    return PROCESS + max(queries) + WORD * copies * elements, mapped


def _check_names(manifest: Manifest, directory: Path) -> None:
    """Raise ShareError unless the manifest names the files of a share and no others; names become paths."""
    needed = {PROGRAM} if manifest.party == PARTY_2 else {PROGRAM, WEIGHTS, SALT}
    if wrong := sorted((set(manifest.files) - FILES) | (needed - set(manifest.files))):
        raise ShareError(
            f"{directory / MANIFEST} {'does not name' if wrong[0] in needed else 'may not name'} {wrong[0]!r}",
            "share the model anew",
        )


def _check_model(
    manifest: Manifest,
    programs: Sequence[Program],
    files: Mapping[str, bytes],
    salt: bytes,
    weights: str,
    directory: Path,
) -> None:
    """Raise ShareError unless the model's name is that of this share's files; party 2 cannot check its second half.

    weights: SHA-256 of their file.
    """
    digests = {name: _sha256(payload) for name, payload in files.items()}
    name = public_name([program.digest for program in programs], digests, manifest.compiled_as)
    if manifest.party == PARTY_2:
        name += manifest.model[len(name) :]
    else:
        name += _secret_name(salt, weights)
    if not hmac.compare_digest(name.encode(), manifest.model.encode()):
        raise ShareError(f"{directory}: the model's name is not that of its files", "share the model anew")


def _weights(manifest: Manifest, payload: Any, keys: Mapping[int, PairSeed], *, public: bool) -> AnyWeights:
    party = manifest.party
    if party == PARTY_2:
        return Party2Weights(keys[0].weights_key(), keys[1].weights_key(), manifest.shapes)
    if not public:
        held = unpack_masked(payload, manifest.rings, manifest.shapes)
        return SharedWeights(party, keys[PARTY_2].weights_key(), held)
    try:
        found = map_tensors(payload, most=header_size(manifest.rings))
    except InvalidInput as error:
        raise ShareError(f"{WEIGHTS}: {error}", "share the model anew") from None
    for name, other in tied(manifest.shapes).items():
        if name not in found and other in found:
            found[name] = found[other].T
    integers = {*NARROW, torch.int64}
    if found.keys() != manifest.rings.keys() or any(
        value.dtype not in integers or tuple(value.shape) != manifest.shapes[name] for name, value in found.items()
    ):
        raise ShareError(f"{WEIGHTS}: its weights are not those that its Programs read", "share the model anew")
    return PublicWeights(party, found)


def _sha256(payload: bytes | mmap.mmap) -> str:
    return hashlib.sha256(payload).hexdigest()
