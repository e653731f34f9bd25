"""A compiled model with masked weights: the server keeps the weights, and clients hold them masked."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from parties.net.secret_files import read_secret
from parties.served.files import MASKED_WEIGHTS, TOKEN_TABLE, pack_masked, store
from parties.two_party.keys import mask_key, model_name
from protocols.prg import SEED_BYTES, derive_seed, fresh_seed
from protocols.weights import DealerWeights, ServerWeights
from secure.errors import Error
from secure.lowering.made import alike
from secure.mpc.compile import MpcModel
from secure.mpc.program import Program

DAY = 86400.0


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

    Programs in whose products the same weights stand, integer by integer, share W, B, D and the name of D. Others get
    their own: one mask never covers two different weights. state: the directory of the seeds. rotate: days after which
    a seed is renewed, and B and D with it; None: never.
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
    first = group[0]
    digest = first.weights_digest
    if len(group) > 1:
        digest = hashlib.sha256("".join(sorted(model.weights_digest for model in group)).encode()).hexdigest()
    root = load_root_seed(state, digest, rotate)
    # the weights' digest is among the names, so that a seed file that was copied never masks two sets of weights alike;
    # the dealer and the public name get it under the root alone: a plain digest would confirm a guess of the weights
    seed = derive_seed(root, "mask", digest)
    name, shapes = model_name(seed), first.program.weight_shapes
    rings = {weight: max(model.program.weight_rings[weight] for model in group) for weight in shapes}
    shared = ServerWeights(first.integers)
    masked = shared.masked(DealerWeights(mask_key(seed, name), shapes), rings)
    payloads = {MASKED_WEIGHTS: pack_masked(masked, rings)}
    if first.client_tables:
        payloads[TOKEN_TABLE] = save(dict(first.client_tables))
    held = {weight: first.integers[weight] for weight in shapes}
    for model in group:
        yield model, MaskedModel(model.program, shared.beside({**model.integers, **held}), name, seed, payloads)


def load_root_seed(state: Path, weights_digest: str, rotate: float | None = None) -> bytes:
    """Load, or make once, the seed from which B and the public name of these weights are derived.

    It is kept in a file that only its owner may read, so that clients' copies of D stay valid after a restart. It
    belongs to the weights' digest: other weights, or the same weights at other scales, get another B, because two D
    under one B would show their difference. rotate: days after which a new seed replaces that of the file, by the
    file's time of modification; clients then fetch D once more. Raises Error if the file is damaged, InvalidInput if
    others may read or replace it.
    """
    path = state / f"weight-mask-{weights_digest}.seed"
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileExistsError):  # another server may make it at the same moment
        if not path.exists():
            store(path, fresh_seed(), replace=False)
    seed = read_secret(path)
    if len(seed) != SEED_BYTES:
        raise Error(f"{path} is damaged", "delete it: clients will fetch the masked weights again")
    if rotate is not None and time.time() - path.stat().st_mtime > rotate * DAY:
        store(path, seed := fresh_seed())
    return seed
