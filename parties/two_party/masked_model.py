"""What a server serves: a compiled model, its once-per-model files, and its tokenizer."""

from __future__ import annotations

import hmac
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from parties.served.files import MASKED_WEIGHTS, TOKEN_TABLE, describe, pack_masked, store
from parties.two_party.keys import mask_key
from proto.unseen_pb2 import File
from protocols.prg import SEED_BYTES, derive_seed, fresh_seed
from protocols.weights import DealerWeights, ServerWeights
from secure.errors import Error
from secure.models.tokens import TextTokenizer
from secure.mpc.compile import Compiled


@dataclass(frozen=True, eq=False, repr=False)
class ServedModel:
    """A compiled model with everything that a server needs beside it. ``mask_seed`` is secret."""

    compiled: Compiled
    weights: ServerWeights
    weights_digest: str
    mask_seed: bytes
    files: Mapping[str, bytes]  # by SHA-256
    descriptions: Sequence[File]
    tokenizer_json: bytes
    pad_id: int
    lowercase: bool


def serve_ready(compiled: Compiled, tokenizer: TextTokenizer | None, tokenizer_json: bytes, state: Path) -> ServedModel:
    """Make the masked weights and everything else that clients ask for; without a tokenizer, not of texts."""
    root = load_root_seed(state, compiled.weights_digest)
    # the dealer gets the mask seed; others, it included, see the weights' digest under a key of the server's own,
    # as a plain one would let them confirm a guess of the weights
    seed = derive_seed(root, "mask")
    digest = hmac.digest(derive_seed(root, "digest"), compiled.weights_digest.encode(), "sha256").hex()
    weights, rings = compiled.server_weights, compiled.program.weight_rings
    masked = weights.masked(DealerWeights(mask_key(seed, digest), compiled.program.weight_shapes), rings)
    payloads = {MASKED_WEIGHTS: pack_masked(masked, rings)}
    if compiled.client_tables:
        payloads[TOKEN_TABLE] = save(dict(compiled.client_tables))
    descriptions = [describe(name, payload) for name, payload in payloads.items()]
    return ServedModel(
        compiled,
        weights,
        digest,
        seed,
        {d.sha256: payloads[d.name] for d in descriptions},
        descriptions,
        tokenizer_json,
        tokenizer.pad_id if tokenizer else 0,
        tokenizer.lowercase if tokenizer else False,
    )


def load_root_seed(state: Path, weights_digest: str) -> bytes:
    """The seed behind B and the public digest of these weights: made once, kept in a file that only its owner may read.

    Kept, so that clients' copies of D stay valid over restarts. It belongs to the weights' digest: other weights, or
    the same at other scales, get another B, because two D under one B would show their difference.
    """
    path = state / f"weight-mask-{weights_digest}.seed"
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with suppress(FileExistsError):  # made before, or by another server this moment
        if not path.exists():
            store(path, fresh_seed(), replace=False)
    seed = path.read_bytes()
    if len(seed) != SEED_BYTES:
        raise Error(f"{path} is damaged", "delete it: clients will fetch the masked weights again")
    return seed


def state_directory() -> Path:
    """``$XDG_STATE_HOME/unseen`` or ``~/.local/state/unseen``."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "unseen"
