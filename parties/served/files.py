"""Once-per-model files: write, announce, fetch, check and cache them.

Both are safetensors (they hold no code, unlike pickle). *masked-weights* holds D = W - B, each weight packed to its
ring's bits; it is uniform without B, so a cache need not be secret, but a client needs it for every query.
*token-table* holds the token tables that the owner lets clients hold.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save
from torch import Tensor

from parties.net.directories import user_directory
from parties.proto.unseen_pb2 import File
from protocols import ring, wire
from protocols.wire import Wire
from secure.capture.documents import header_size, read_tensors
from secure.errors import DownloadError, HandshakeError, InvalidInput, printable
from secure.lowering.client_inputs import find_tables
from secure.models.tokenizer_document import TOKENIZER, read_tokenizer, tokenizer_digest
from secure.models.tokens import TextTokenizer

MASKED_WEIGHTS, TOKEN_TABLE = "masked-weights", "token-table"
MAXIMUM_FILE = 1 << 34  # bytes; more is refused, whatever the Program says
MAXIMUM_CACHE = 1 << 34  # bytes of all files in a cache
_CACHED = re.compile(r"[0-9a-f]{64}\.safetensors|\.part-.*")  # no other file in the directory is touched


def pack_masked(masked: Iterable[tuple[str, Tensor]], rings: Mapping[str, int]) -> bytes:
    """Encode masked weights D as a file. rings: bits of each weight, which stand behind its name there."""
    return save(dict(packed_masked(masked, rings)))


def packed_masked(masked: Iterable[tuple[str, Tensor]], rings: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of such a file as they are made, with their names in it."""
    for name, value in masked:
        raw = wire.encode(value, Wire(tuple(value.shape), rings[name]))
        yield packed_name(name, rings), torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def packed_name(name: str, rings: Mapping[str, int]) -> str:
    """Return the name of a weight in such a file."""
    return f"{name}/{rings[name]}"


def unpack_masked(
    payload: bytes | None, rings: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Decode a file of ``pack_masked``; raises DownloadError if names or sizes are not the Program's.

    rings: the least bits of each weight. A file may have more, for other Programs of the same weights.
    """
    packed = _load(MASKED_WEIGHTS, payload, (f"{name}/{ring.WORD}" for name in rings))
    known = {f"{name}/{bits}": (name, bits) for name, least in rings.items() for bits in range(least, ring.WORD + 1)}
    if not packed.keys() <= known.keys() or sorted(known[key][0] for key in packed) != sorted(rings):
        raise DownloadError("the masked weights are not those that the Program reads", "restart the server")
    out = {}
    for key, raw in packed.items():
        name, bits = known[key]
        form = Wire(tuple(shapes[name]), bits)
        if raw.dtype != torch.uint8 or raw.numel() != form.size:
            raise DownloadError(
                f"the masked weight {name!r} has {raw.numel()} bytes, the Program prescribes {form.size}"
            )
        out[name] = wire.decode(raw.numpy().tobytes(), form)
    return out


def masked_size(rings: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the most bytes of a file of ``pack_masked``: the Program fixes all but its header and the rings' bits."""
    return _most({f"{name}/{ring.WORD}": Wire(tuple(shapes[name]), ring.WORD).size for name in rings})


def unpack_tables(
    payload: bytes | None, shapes: Mapping[str, tuple[int, int]], labels: Mapping[str, str]
) -> dict[str, Tensor]:
    """Decode the token tables by name; raises DownloadError if one is missing or has another size, type or digest.

    shapes: (rows, width) of each table in which the Program's client looks tokens up; all are float32. labels: those of
    the Program, which hold the tables' digest. Subnormal numbers become 0: no encoding resolves them, and processors
    take longer for them.
    """
    try:
        wanted = find_tables(payload, shapes, labels)
    except ValueError as error:
        raise DownloadError(str(error), "restart the server") from None
    least = torch.finfo(torch.float32).smallest_normal
    return {name: torch.where(table.abs() < least, 0.0, table) for name, table in wanted.items()}


def tables_size(shapes: Mapping[str, tuple[int, int]]) -> int:
    """Return the most bytes of a file of token tables."""
    return _most({name: 4 * math.prod(shape) for name, shape in shapes.items()})


def _most(sizes: Mapping[str, int]) -> int:
    """Return the most bytes of a safetensors file of tensors of these sizes, by name."""
    return header_size(sizes) + sum(sizes.values())


def _load(name: str, payload: bytes | None, names: Iterable[str]) -> dict[str, Tensor]:
    """Read a safetensors file as ``read_tensors`` does; raises DownloadError."""
    if payload is None:
        raise DownloadError(f"the server offers no {name}", "restart the server")
    try:
        return read_tensors(payload, names)
    except ValueError as error:
        raise DownloadError(f"{name}: {error}", "restart the server") from None


def describe(name: str, payload: bytes) -> File:
    return File(name=name, sha256=hashlib.sha256(payload).hexdigest(), size=len(payload))


def received_tokenizer(text: bytes, pad_id: int, lowercase: bool, labels: Mapping[str, str]) -> TextTokenizer | None:
    """Check and load the tokenizer that a server describes; None if its model takes no text.

    labels: those of the Program, whose digest so covers the tokenizer too. Raises HandshakeError if the label
    "tokenizer" is not its digest, or if it has parts that clients do not run.
    """
    found, told = tokenizer_digest(text, pad_id, lowercase) if text else "", labels.get(TOKENIZER, "")
    if not hmac.compare_digest(found.encode(), told.encode()):
        raise HandshakeError(
            f"tokenizer: {f'one of the digest {found}' if found else 'none'} came, "
            f"the Program was made with {printable(told)[:64] or 'none'}",
            "use the same version of unseen on both sides, or ask the server's owner",
        )
    if not text:
        return None
    try:
        tokenizer, _ = read_tokenizer(text)
    except InvalidInput as error:
        raise HandshakeError(f"the server's tokenizer: {error}") from None
    return TextTokenizer(tokenizer, pad_id, lowercase)


def cache_directory() -> Path:
    """Return ``$XDG_CACHE_HOME/unseen`` or ``~/.cache/unseen``."""
    return user_directory("XDG_CACHE_HOME", ".cache") / "unseen"


def state_directory() -> Path:
    """Return ``$XDG_STATE_HOME/unseen`` or ``~/.local/state/unseen``."""
    return user_directory("XDG_STATE_HOME", ".local", "state") / "unseen"


def fetch(file: File, download: Callable[[str], Iterable[bytes]], cache: Path | None, most: int) -> bytes:
    """Return a file's bytes by its digest: from the cache if it is whole there, else download, check and store it.

    download: returns the parts of the file with a digest. cache: None keeps no file; a directory keeps MAXIMUM_CACHE
    bytes, and those files of it that were used longest ago make room for others. most: the most bytes that the file can
    have; if more are announced, nothing is downloaded. Raises DownloadError.
    """
    most = min(most, MAXIMUM_FILE)
    if not re.fullmatch("[0-9a-f]{64}", file.sha256):
        raise DownloadError(f"{file.name}: the announced digest is impossible")
    if file.size > most:
        raise DownloadError(
            f"{file.name}: the announced size of {file.size} bytes is impossible, the Program needs {most} at most"
        )
    path = cache / f"{file.sha256}.safetensors" if cache else None
    if path is not None and path.is_file() and path.stat().st_size == file.size:
        payload = path.read_bytes()
        if hmac.compare_digest(hashlib.sha256(payload).hexdigest(), file.sha256):
            with suppress(OSError):  # a cache that cannot be written is still good to read
                os.utime(path)
            return payload
    received = bytearray()
    for part in download(file.sha256):
        received += part
        if len(received) > file.size:
            break
    payload = bytes(received)
    if len(payload) != file.size or not hmac.compare_digest(hashlib.sha256(payload).hexdigest(), file.sha256):
        raise DownloadError(
            f"{file.name}: what arrived is not the announced file ({len(payload)} of {file.size} bytes)", "try again"
        )
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if _make_room(path.parent, len(payload)):
                store(path, payload)
        except OSError as error:
            raise DownloadError(
                f"the cache {path.parent} cannot be written: {error.strerror}",
                "set XDG_CACHE_HOME to another directory, or keep none: --no-cache (cache=False)",
            ) from None
    return payload


def _make_room(cache: Path, size: int) -> bool:
    """Remove files from a cache until a new one of ``size`` bytes fits; False if none so large ever fits.

    Those that were used longest ago go first. Files that a killed process left unfinished count like others.
    """
    if size > MAXIMUM_CACHE:
        return False
    found = list[tuple[Path, os.stat_result]]()
    for path in cache.iterdir():
        with suppress(FileNotFoundError):  # another client made room at the same moment
            if _CACHED.fullmatch(path.name) and path.is_file():
                found.append((path, path.stat()))
    total = sum(state.st_size for _, state in found)
    for path, state in sorted(found, key=lambda each: each[1].st_mtime_ns):
        if total + size <= MAXIMUM_CACHE:
            break
        path.unlink(missing_ok=True)
        total -= state.st_size
    return True


def store(path: Path, payload: bytes | Callable[[IO[bytes]], None], *, replace: bool = True) -> None:
    """Write a file that only its owner may read, whole or not at all: it is written beside ``path``, then renamed.

    payload: its content, or what writes it.
    With ``replace`` False, raises FileExistsError if the file exists. Anything that is no ordinary file (a device, a
    link) is never replaced: raises OSError.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise FileExistsError(errno.EEXIST, "it is no ordinary file")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as part:
        try:
            if callable(payload):
                payload(part.file)
            else:
                part.write(payload)
            part.flush()
            os.fsync(part.fileno())
            if replace:
                os.replace(part.name, path)
            else:
                os.link(part.name, path)
        finally:
            Path(part.name).unlink(missing_ok=True)
