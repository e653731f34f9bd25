"""A compiled model with masked weights: the server keeps the weights, and clients hold them masked."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from parties.served.files import MASKED_WEIGHTS, TOKEN_TABLE, pack_masked, store
from parties.two_party.keys import mask_key
from protocols.prg import SEED_BYTES, derive_seed, fresh_seed
from protocols.weights import DealerWeights, ServerWeights
from secure.errors import Error
from secure.mpc.compile import MpcModel
from secure.mpc.program import Program


@dataclass(frozen=True, eq=False, repr=False)
class MaskedModel:
    """A model as its server holds it. weights, mask_seed: secret to the server. files: those for clients, by name.

    weights_digest: a public name for the weights, their digest under a key that only the server knows.
    """

    program: Program
    weights: ServerWeights
    weights_digest: str
    mask_seed: bytes
    files: Mapping[str, bytes]


def mask_model(compiled: MpcModel, state: Path) -> MaskedModel:
    """Make the masked weights D = W - B and the other files that clients fetch once. state: the seed's directory."""
    root = load_root_seed(state, compiled.weights_digest)
    # the dealer gets the mask seed; everyone, the dealer included, sees the weights' digest only under a key of the
    # server's own, because a plain digest would let them confirm a guess of the weights
    seed = derive_seed(root, "mask")
    digest = hmac.digest(derive_seed(root, "digest"), compiled.weights_digest.encode(), "sha256").hex()
    weights, rings = compiled.server_weights, compiled.program.weight_rings
    masked = weights.masked(DealerWeights(mask_key(seed, digest), compiled.program.weight_shapes), rings)
    payloads = {MASKED_WEIGHTS: pack_masked(masked, rings)}
    if compiled.client_tables:
        payloads[TOKEN_TABLE] = save(dict(compiled.client_tables))
    return MaskedModel(compiled.program, weights, digest, seed, payloads)


def load_root_seed(state: Path, weights_digest: str) -> bytes:
    """Load, or make once, the seed from which B and the public digest of these weights are derived.

    It is kept in a file that only its owner may read, so that clients' copies of D stay valid after a restart. It
    belongs to the weights' digest: other weights, or the same weights at other scales, get another B, because two D
    under one B would show their difference. Raises Error if the file is damaged.
    """
    path = state / f"weight-mask-{weights_digest}.seed"
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileExistsError):  # another server may make it at the same moment
        if not path.exists():
            store(path, fresh_seed(), replace=False)
    seed = path.read_bytes()
    if len(seed) != SEED_BYTES:
        raise Error(f"{path} is damaged", "delete it: clients will fetch the masked weights again")
    return seed
