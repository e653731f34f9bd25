"""numba's cache of compiled kernels, in files that are read only where no other user can write or replace them.

The files are pickle, so whoever writes one runs code in the processes that read it. So each time before one is read,
it, its directory and all that leads there are looked at: others could have made them since the last time. By default
numba keeps them beside the package's own files, or in the user's cache. Where NUMBA_CACHE_DIR is set, they are looked
for there and nowhere else, in a directory that may be read-only. What it has is used; what it has not, or has where
others may write, is compiled and not kept. So a service can run kernels that its user cannot replace: root makes them
once, by ``python -m protocols.warm``.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Any

from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile

_Given: Any = CompileResultCacheImpl._locator_classes[0]
"""numba's place under NUMBA_CACHE_DIR."""


class _ReadOnly(_Given):  # type: ignore[misc]
    """The same without a look whether it can be written; ``save_overload`` finds out."""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        return cls(py_func, py_file)


class _InGivenPlace(CompileResultCacheImpl):
    _locator_classes = [_ReadOnly]  # noqa: RUF012 (as numba declares it)


class _OwnFiles(IndexDataCacheFile):
    """The files of one function, each checked before it is read; numba reads the first before it writes, too."""

    def _load_index(self) -> Any:
        self._check(self._index_path)
        return super()._load_index()  # type: ignore[no-untyped-call]

    def _load_data(self, name: str) -> Any:
        self._check(self._data_path(name))  # type: ignore[no-untyped-call]
        return super()._load_data(name)  # type: ignore[no-untyped-call]

    def _check(self, path: str) -> None:
        check_directory(self._cache_path)
        with suppress(FileNotFoundError):  # nobody else can put it there after this
            _check_kind(path, found := os.lstat(path), stat.S_ISREG(found.st_mode))


class KeptKernels(FunctionCache):
    """The cache of one function. Raises RuntimeError if there is no place for it."""

    def __init__(self, function: Any) -> None:
        if getattr(config, "CACHE_DIR", ""):
            self._impl_class = _InGivenPlace
        super().__init__(function)  # type: ignore[no-untyped-call]
        self._cache_file = _OwnFiles(  # type: ignore[no-untyped-call]
            self._cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp()
        )

    def load_overload(self, *of: Any) -> Any:
        """Return what is kept, or None; what cannot be read, or what others may write, is not kept."""
        with suppress(OSError):
            return super().load_overload(*of)  # type: ignore[no-untyped-call]
        return None

    def save_overload(self, *of: Any) -> None:
        """Keep what was compiled, if this process may write there and others may not."""
        with suppress(OSError):
            super().save_overload(*of)  # type: ignore[no-untyped-call]


def check_directory(directory: str) -> None:
    """Raise PermissionError if others may write to a directory, or replace it or what leads there; OSError.

    It belongs to this user or root, as all above it and all links on the way do. Others may write to none of them, but
    to one above with the sticky bit, in which they replace nothing. The user's own group may, if nobody else is in it.
    """
    os.stat(directory)  # raises for links that lead in a circle
    _check_way(os.path.join(os.getcwd(), directory), above=False)


def _check_way(path: str, above: bool) -> None:
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        _check_kind(path, found, True, writable=True)  # who may write to a link, its mode does not say
        _check_way(os.path.join(os.path.dirname(path), os.readlink(path)), above)
    else:
        sticky = above and bool(found.st_mode & stat.S_ISVTX)
        _check_kind(path, found, stat.S_ISDIR(found.st_mode), writable=sticky)
    if (parent := os.path.dirname(path)) != path:
        _check_way(parent, above=True)


def _check_kind(path: str, found: os.stat_result, kind: bool, writable: bool = False) -> None:
    """Raise PermissionError unless a path is of the right kind and owner, and others may not write to it."""
    if not hasattr(os, "geteuid"):
        return
    open_to = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    shut = writable or not open_to or (open_to == stat.S_IWGRP and _is_private(found.st_gid))
    if not (kind and shut and found.st_uid in (0, os.geteuid())):
        raise PermissionError(f"others may write {path}")


def _is_private(group: int) -> bool:
    """Tell whether a group is this user's own, with nobody else in it: many systems make one for each user."""
    with suppress(ImportError, KeyError):
        import grp
        import pwd

        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
        return (found.gr_gid, found.gr_name) == (user.pw_gid, user.pw_name) and set(found.gr_mem) <= {user.pw_name}
    return False
