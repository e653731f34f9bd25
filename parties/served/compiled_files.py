"""Compiled models on disk: a directory of secret files for each, and a cache of such directories.

``secure.deployments.kept`` says what the files are. A directory is written beside its place, file by file, and renamed
when all of it is on the disk: whoever reads it finds all or nothing, whenever the writer is killed.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from parties.net.secret_files import check_private, map_secret, read_secret
from parties.served.files import cache_directory, store
from secure.deployments.compiled import Compiled
from secure.deployments.kept import (
    MANIFEST,
    MAXIMUM_MANIFEST,
    WEIGHTS,
    KeptFile,
    Writing,
    at_least,
    from_files,
    manifest_of,
    read_manifest,
    to_files,
)
from secure.errors import CompiledError, InvalidInput

MAXIMUM_KEPT = 4 << 30  # bytes of all compiled models in a cache
_ENTRY = re.compile(r"[0-9a-f]{64}|\.part-.*")  # nothing else in the directory is touched


def is_compiled(directory: str | Path) -> bool:
    """Tell whether a directory is one of a compiled model, by the name of its manifest."""
    return os.path.lexists(Path(directory) / MANIFEST)


def save_compiled(compiled: Compiled, directory: str | Path) -> None:
    """Write a compiled model to a new directory, whole or not at all.

    It holds the owner's secret weights: the directory has the mode 0700, and its files 0600. Raises InvalidInput if
    there is something at its place other than an empty directory, or if models of the deployment cannot be kept.
    """
    directory, files = Path(directory), to_files(compiled)
    check_new(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _written(files, directory.parent) as (part, _):
        _place(part, directory)


@contextmanager
def _written(files: Mapping[str, bytes | Writing], parent: Path) -> Iterator[tuple[Path, int]]:
    """Write files and their manifest to a directory beside their place; yield it, and the bytes of all of them."""
    part, named = Path(tempfile.mkdtemp(dir=parent, prefix=".part-")), dict[str, KeptFile]()
    try:
        for name, payload in files.items():
            store(part / name, payload)
            with (part / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                named[name] = KeptFile(size=file.tell(), sha256=digest)
        store(part / MANIFEST, manifest_of(named))
        yield part, sum(file.stat().st_size for file in part.iterdir())
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _place(part: Path, directory: Path) -> None:
    _flush(part)
    part.rename(directory)
    _flush(directory.parent)


def check_new(directory: Path) -> None:
    """Raise InvalidInput if there is something at a directory's place but an empty one, or if none can be made."""
    if os.path.lexists(directory) and (directory.is_symlink() or not directory.is_dir() or any(directory.iterdir())):
        raise InvalidInput(f"{directory} is already there", "give a new directory, or remove it")
    there = next(path for path in directory.absolute().parents if os.path.lexists(path))
    try:
        Path(tempfile.mkdtemp(dir=there, prefix=".part-")).rmdir()
    except OSError as error:
        raise InvalidInput(f"{directory} cannot be made: {there}: {error.strerror}", "give another directory") from None


def _flush(directory: Path) -> None:
    """Write a directory's entries to the disk, where a system can."""
    with suppress(OSError):
        at = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(at)
        finally:
            os.close(at)


def load_compiled(directory: str | Path) -> Compiled:
    """Read and check a compiled model.

    The directory and its files must be this user's own and closed to others, as ``ssh`` asks of its keys, and no links.
    The weights are mapped: while they are used, their file must stay as it is. No more is read than the manifest says,
    which is compared with the size of each file first. ``from_files`` says what is checked then. Raises InvalidInput
    for files that others may have read or put there, CompiledError for a directory that is damaged, mixed up or of
    another version.
    """
    directory = Path(directory)
    files = dict[str, bytes]()
    weights: bytes | mmap.mmap = b""
    try:
        check_private(directory)
        manifest = read_manifest(read_secret(directory / MANIFEST, most=MAXIMUM_MANIFEST))
        for name, known in manifest.files.items():
            path = directory / name
            if (size := path.lstat().st_size) != known.size:
                raise CompiledError(
                    f"{name} is damaged: it has {size} bytes, {MANIFEST} says {known.size}", "compile the model again"
                )
            if name == WEIGHTS:
                weights = map_secret(path)
            else:
                files[name] = read_secret(path, most=known.size)
        return from_files(manifest, files, weights)
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise CompiledError(f"{directory}: {missing} is missing", "compile the model again") from None
    except CompiledError as error:
        raise CompiledError(f"{directory}: {error}") from None


@dataclass(frozen=True)
class CompiledCache:
    """A cache of compiled models by the key of their ``Compilation``; secret, as the weights are in it.

    directory: it must be this user's own, and closed to others. most: the bytes of all of it; those models that were
    used longest ago make room for others.
    """

    directory: Path = field(default_factory=lambda: cache_directory() / "compiled")
    most: int = MAXIMUM_KEPT

    def place(self, key: str) -> Path:
        """Return the directory of the model with this key."""
        return self.directory / key

    def find(self, key: str) -> Compiled | None:
        """Return the model with this key; None if it is not there.

        Raises like ``load_compiled``. Then nothing of it was used.
        """
        if not self.place(key).exists():
            return None
        check_private(self.directory)
        try:
            compiled = load_compiled(self.place(key))
        except InvalidInput as error:  # of this entry alone, so that it makes room for another
            raise CompiledError(str(error)) from None
        with suppress(OSError):  # a cache that cannot be written is still good to read
            os.utime(self.place(key))
        return compiled

    def keep(self, key: str, compiled: Compiled) -> int | None:
        """Write a model, and return its bytes; None if models of its deployment cannot be kept, or none so large.

        Raises InvalidInput if others may read or replace files of the cache, OSError if it cannot be written.
        """
        try:
            files = to_files(compiled)
        except InvalidInput:
            return None
        if at_least(compiled) > self.most:
            return None
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self.directory.mkdir(exist_ok=True, mode=0o700)
        check_private(self.directory)
        with _written(files, self.directory) as (part, size):
            if not self._make_room(size, part):
                return None
            try:
                _place(part, self.place(key))
            except OSError:
                if not self.place(key).is_dir():  # else another server wrote the same at the same moment
                    raise
        return size

    def forget(self, key: str) -> None:
        """Remove the model with this key, if it is there."""
        _remove(self.place(key))

    def _make_room(self, size: int, new: Path) -> bool:
        """Remove models until the ``new`` one of ``size`` bytes fits; False if none so large ever fits.

        What a killed process left unfinished counts like others.
        """
        if size > self.most:
            return False
        found = list[tuple[Path, int, int]]()
        for path in self.directory.iterdir():
            with suppress(FileNotFoundError):  # another server made room at the same moment
                if path != new and _ENTRY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                    total = sum(file.lstat().st_size for file in path.iterdir())
                    found.append((path, path.stat().st_mtime_ns, total))
        used = sum(total for *_, total in found)
        for path, _, total in sorted(found, key=lambda each: each[1]):
            if used + size <= self.most:
                break
            _remove(path)
            used -= total
        return True


def _remove(directory: Path) -> None:
    """Remove a directory. It is renamed first, so that nobody finds half of it."""
    gone = directory.with_name(f".part-{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        directory.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
