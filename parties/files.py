"""Once-per-model files: how they are written, announced, fetched, checked and cached.

Both are safetensors (no code in them, unlike pickle). *masked-weights* holds D = W - B, each weight packed to its ring's bytes; it
is uniform without B, so a cache need not be secret, but without it there is no query. *token-table* is what the owner lets clients hold.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from parties.errors import DownloadError
from proto.unseen_pb2 import File
from protocols import wire
from protocols.wire import Wire

MASKED_WEIGHTS, TOKEN_TABLE = "masked-weights", "token-table"


def pack_masked(masked: Mapping[str, Tensor], rings: Mapping[str, int]) -> bytes:
    """D as a file; ``rings``: bits of each weight."""
    packed = {}
    for name in sorted(masked):
        raw = wire.encode(masked[name], Wire(tuple(masked[name].shape), rings[name]))
        packed[name] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return save(packed)


def unpack_masked(payload: bytes, rings: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The inverse; raises DownloadError where names or sizes are not the Program's."""
    packed = load(payload)
    if set(packed) != set(rings):
        raise DownloadError("the masked weights are not those that the Program reads", "restart the server")
    out = {}
    for name, raw in packed.items():
        form = Wire(tuple(shapes[name]), rings[name])
        if raw.numel() != form.size:
            raise DownloadError(f"the masked weight {name!r} has {raw.numel()} bytes, the Program prescribes {form.size}")
        out[name] = wire.decode(raw.numpy().tobytes(), form)
    return out


def describe(name: str, payload: bytes) -> File:
    return File(name=name, sha256=hashlib.sha256(payload).hexdigest(), size=len(payload))


def cache_directory() -> Path:
    """``$XDG_CACHE_HOME/unseen`` or ``~/.cache/unseen``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unseen"


def fetch(file: File, download: Callable[[], Iterable[bytes]], cache: Path | None) -> bytes:
    """The file by its digest: from the cache if it is whole there, else downloaded, checked and stored. ``cache`` None: not kept."""
    path = cache / f"{file.sha256}.safetensors" if cache else None
    if path is not None and path.is_file():
        payload = path.read_bytes()
        if hmac.compare_digest(hashlib.sha256(payload).hexdigest(), file.sha256):
            return payload
    received = bytearray()
    for part in download():
        received += part
        if len(received) > file.size:
            break
    payload = bytes(received)
    if len(payload) != file.size or not hmac.compare_digest(hashlib.sha256(payload).hexdigest(), file.sha256):
        raise DownloadError(f"{file.name}: what arrived is not the announced file ({len(payload)} of {file.size} bytes)")
    if path is not None:
        _store(path, payload)
    return payload


def _store(path: Path, payload: bytes) -> None:
    """Write beside, then rename: a kill leaves either nothing or the whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as part:
        part.write(payload)
    Path(part.name).replace(path)
