"""A compiled model with masked weights: the server keeps the weights, and clients hold them masked."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from safetensors.torch import save

from parties.net.secret_files import read_secret
from parties.served.files import MASKED_WEIGHTS, TOKEN_TABLE, pack_masked, store
from parties.two_party.keys import mask_key, model_name
from protocols.prg import SEED_BYTES, derive_seed, fresh_seed
from protocols.weights import DealerWeights, ServerWeights
from secure.errors import Error, InvalidInput
from secure.lowering.made import alike
from secure.lowering.parts import part_of
from secure.mpc.compile import MpcModel
from secure.mpc.program import Program

DAY = 86400.0
MOST_REMEMBERED = 1 << 24  # bytes of what is remembered of parts: some hundred thousand of them


@dataclass(frozen=True, eq=False, repr=False)
class MaskedModel:
    """A Program and its weights as the server holds them, one of several of the same model at most.

    weights, mask_seed: secret to the server. files: those for clients, by name.

    weights_digest: a public name for the masked weights, derived from the mask seed; it tells nothing about them.
    """

    program: Program
    weights: ServerWeights
    weights_digest: str
    mask_seed: bytes
    files: Mapping[str, bytes]


def mask_model(compiled: MpcModel, state: Path, rotate: float | None = None) -> MaskedModel:
    """Make the masked weights D = W - B of one Program, and its other files; see ``mask_models``."""
    (masked,) = mask_models([compiled], state, rotate)
    return masked


def mask_models(compiled: Sequence[MpcModel], state: Path, rotate: float | None = None) -> list[MaskedModel]:
    """Make the masked weights D = W - B and the other files that clients fetch once.

    Parts of a model (``part_of``), such as the segments of an index, have a file each, and keep their D while others
    change. Programs in whose products the same weights stand, integer by integer, share W, B, D and the name of D.
    Others get their own: one mask never covers two different weights. state: the directory of the seeds. rotate: days
    after which a seed is renewed, and B and D with it; None: never.
    """
    groups = list[list[MpcModel]]()
    for model in compiled:
        same = (group for group in groups if _same_weights(group[0], model))
        if (group := next(same, None)) is None:
            groups.append(group := [])
        group.append(model)
    made = {id(model): each for group in groups for model, each in _masked(group, state, rotate)}
    return [made[id(model)] for model in compiled]


def _same_weights(ours: MpcModel, theirs: MpcModel) -> bool:
    """Tell whether two Programs multiply by the same weights, and clients look tokens up in the same tables."""
    shapes, tables = ours.program.weight_shapes, ours.client_tables
    return (
        shapes == theirs.program.weight_shapes
        and all(alike(ours.integers, theirs.integers, name) for name in shapes)
        and tables.keys() == theirs.client_tables.keys()
        and all(table.equal(theirs.client_tables[name]) for name, table in tables.items())
    )


def _masked(group: Sequence[MpcModel], state: Path, rotate: float | None) -> Iterator[tuple[MpcModel, MaskedModel]]:
    """Mask the weights of Programs that share them."""
    first, shapes = group[0], group[0].program.weight_shapes
    digests = sorted(model.digest_of(name for name in model.integers if not part_of(name)) for model in group)
    digest = digests[0] if len(group) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    apart = {name: first.digest_of([name]) for name in shapes if part_of(name)}
    root = guarded_root_seed(state, digest, apart, rotate) if apart else load_root_seed(state, digest, rotate)
    # the weights' digest is among the names, so that a seed file that was copied never masks two sets of weights alike;
    # the dealer and the public name get it under the root alone: a plain digest would confirm a guess of the weights
    seed = derive_seed(root, "mask", digest)
    name = model_name(seed)
    rings = {weight: max(model.program.weight_rings[weight] for model in group) for weight in shapes}
    shared, mask = ServerWeights(first.integers), DealerWeights(mask_key(seed, name), shapes)
    payloads = {file: pack_masked(shared.masked(mask, part), part) for file, part in by_file(rings).items()}
    if first.client_tables:
        payloads[TOKEN_TABLE] = save(dict(first.client_tables))
    held = {weight: first.integers[weight] for weight in shapes}
    for model in group:
        yield model, MaskedModel(model.program, shared.beside({**model.integers, **held}), name, seed, payloads)


def by_file(rings: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Return the bits of the rings of weights by the file of masked weights in which each stands, then by name."""
    files: dict[str, dict[str, int]] = {MASKED_WEIGHTS: {}}
    for weight, bits in rings.items():
        part = part_of(weight)
        files.setdefault(f"{MASKED_WEIGHTS}-{part}" if part else MASKED_WEIGHTS, {})[weight] = bits
    return files


def guarded_root_seed(state: Path, digest: str, apart: Mapping[str, str], rotate: float | None = None) -> bytes:
    """Load the root seed of a model with parts that change; see ``load_root_seed`` and ``part_of``.

    The seed, and so the mask of a weight of some name, stays when parts come and go. The state directory remembers the
    digest of every weight of a part that was ever masked under it. If a name has come with other integers, or that file
    is new, lost or damaged, the seed is renewed, so that one mask never covers two. apart: the digests of such weights,
    by name. Raises like ``load_root_seed``.
    """
    seed = load_root_seed(state, digest, rotate)
    path = state / f"weight-mask-{digest}.apart.json"
    with suppress(FileExistsError), _written(path):  # which read_secret checks
        if not path.exists():
            store(path, b"", replace=False)  # which tells nothing of what was masked
    with _opened(path) as file:
        # another server may start at the same moment; who only reads can lock no more on some file systems
        fcntl.flock(file, fcntl.LOCK_EX if file.writable() else fcntl.LOCK_SH)
        seed = load_root_seed(state, digest)
        known = _known_parts(path)
        if known is None or any(known.get(name, found) != found for name, found in apart.items()):
            with _written(root := state / f"weight-mask-{digest}.seed"):
                store(root, seed := fresh_seed())
            known = {}
        if apart.keys() - known.keys():
            content = json.dumps({**known, **apart}, sort_keys=True).encode()
            with _written(path):
                file.seek(0)
                file.truncate()
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    return seed


def _opened(path: Path) -> IO[bytes]:
    """Open a file to read and write, or to read where that is all that is allowed."""
    try:
        return path.open("r+b")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return path.open("rb")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Raise InvalidInput if a file of the state cannot be written, but FileExistsError as it is."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be written: {error.strerror or 'it may only be read'}",
            "give a --state that this user may write, or one that has all that this model needs",
        ) from None


def _known_parts(path: Path) -> dict[str, str] | None:
    """Return the digests of weights that were masked; None if the file is damaged, or has grown too long."""
    payload = read_secret(path, most=MOST_REMEMBERED)
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and all(isinstance(each, str) for each in found.values())
    return found if whole and len(payload) < MOST_REMEMBERED // 2 else None


def load_root_seed(state: Path, weights_digest: str, rotate: float | None = None) -> bytes:
    """Load, or make once, the seed from which B and the public name of these weights are derived.

    It is kept in a file that only its owner may read, so that clients' copies of D stay valid after a restart. It
    belongs to the weights' digest: other weights, or the same weights at other scales, get another B, because two D
    under one B would show their difference. rotate: days after which a new seed replaces that of the file, by the
    file's time of modification; clients then fetch D once more. Raises Error if the file is damaged, InvalidInput if
    others may read or replace it, or if it has to be written and cannot be.
    """
    path = state / f"weight-mask-{weights_digest}.seed"
    with _written(state):
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileExistsError), _written(path):  # another server may make it at the same moment
        if not path.exists():
            store(path, fresh_seed(), replace=False)
    seed = read_secret(path)
    if len(seed) != SEED_BYTES:
        raise Error(f"{path} is damaged", "delete it: clients will fetch the masked weights again")
    if rotate is not None and time.time() - path.stat().st_mtime > rotate * DAY:
        with _written(path):
            store(path, seed := fresh_seed())
    return seed
