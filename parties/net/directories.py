"""The user's directories for settings, state and caches, and whether one can be written before anything takes long."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from secure.errors import InvalidInput

SPARE = 1 << 20  # bytes that a directory must take when a service starts


def user_directory(variable: str, *usual: str) -> Path:
    """Return the directory that a variable of the XDG standard names, or its usual place below the home directory.

    Raises InvalidInput where there is neither, as in containers whose user has no entry and no HOME.
    """
    if named := os.environ.get(variable):
        return Path(named)
    try:
        return Path.home().joinpath(*usual)
    except RuntimeError:
        raise InvalidInput("this user has no home directory", f"set HOME, or {variable} for this directory") from None


def check_writable(directory: Path, what: str, hint: str) -> None:
    """Make a directory, for its owner alone, and see that it takes SPARE bytes. Raises InvalidInput, named ``what``.

    One that is read-only and holds files was filled before, such as a secret that is mounted: it may have all that is
    needed.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(SPARE))
            file.flush()
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES) and directory.is_dir() and any(directory.iterdir()):
            return
        raise InvalidInput(f"{what} {directory} cannot be written: {error.strerror}", hint) from None
