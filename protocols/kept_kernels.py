"""numba's cache of compiled kernels, in files that are read only where no other user could have written them.

The files are pickle, so whoever writes one runs code in the processes that read it. By default numba keeps them beside
the package's own files, or in the user's cache. Where NUMBA_CACHE_DIR is set, they are looked for there and nowhere
else, in a directory that may be read-only: what it has is used, and what it has not is compiled and not kept. So a
service can run kernels that its user cannot replace: root makes them once, by ``python -m protocols.warm``.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Any

from numba.core import config
from numba.core.caching import CompileResultCacheImpl, FunctionCache

_WRITERS = stat.S_IWGRP | stat.S_IWOTH
_Given: Any = CompileResultCacheImpl._locator_classes[0]
"""numba's place under NUMBA_CACHE_DIR."""


class _ReadOnly(_Given):  # type: ignore[misc]
    """The same without a look whether it can be written; ``save_overload`` finds out."""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        return cls(py_func, py_file)


class _InGivenPlace(CompileResultCacheImpl):
    _locator_classes = [_ReadOnly]  # noqa: RUF012 (as numba declares it)


class KeptKernels(FunctionCache):
    """The cache of one function. Raises RuntimeError if there is no place for it, or if others may write to it."""

    def __init__(self, function: Any) -> None:
        if getattr(config, "CACHE_DIR", ""):
            self._impl_class = _InGivenPlace
        super().__init__(function)  # type: ignore[no-untyped-call]
        if not is_own(self.cache_path):
            raise RuntimeError(f"others may write to {self.cache_path}")

    def load_overload(self, *of: Any) -> Any:
        """Return what is kept, or None; what cannot be read is not kept."""
        with suppress(OSError):
            return super().load_overload(*of)  # type: ignore[no-untyped-call]
        return None

    def save_overload(self, *of: Any) -> None:
        """Keep what was compiled, if this process may write there."""
        with suppress(OSError):
            super().save_overload(*of)  # type: ignore[no-untyped-call]


def is_own(directory: str) -> bool:
    """Tell whether only this user and root can write to a directory; one that is not there cannot be written.

    The user's own group may: many systems make one for each user alone.
    """
    try:
        found = os.stat(directory)
    except OSError:
        return True
    if not hasattr(os, "geteuid"):
        return True
    group = stat.S_IWGRP if found.st_gid in (0, os.getegid()) else 0
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & _WRITERS & ~group
