"""Files that hold secrets, or keys that are trusted: they are read only where nobody else can have read or put them.

The rules are those of ``ssh``. A file is an ordinary file of this user, no link, and closed to others. Nobody else may
write to a directory above it, because who can may replace the file. On Windows, which has no such modes, nothing is
checked.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from secure.errors import InvalidInput

MOST = 1 << 20  # bytes of a file that holds a key or a seed


def read_secret(path: Path, *, most: int = MOST) -> bytes:
    """Read a file that only this user may read or write.

    Raises InvalidInput if others may read or write it, replace it through a directory above it, if it is a link or no
    ordinary file, if it belongs to another user, or if it has more than ``most`` bytes; FileNotFoundError if it is not
    there.
    """
    return _read(path, 0o077, most)


def map_secret(path: Path) -> mmap.mmap | bytes:
    """Map a file that only this user may read or write. Raises like ``read_secret``, but for its size."""
    from secure.capture.tensor_files import map_file  # not above: it needs torch, and ``unseen token`` does not

    with _opened(path, 0o077) as file:
        return map_file(file)


def read_trusted(path: Path, *, most: int = MOST) -> bytes:
    """Read a file that others may read, but only this user may write. Raises like ``read_secret``."""
    return _read(path, 0o022, most)


def read_public(path: Path, *, most: int = MOST) -> bytes:
    """Read a file that others may read, but only this user or root may write; it may be reached by links.

    So an authority's certificate may be the system's own. Raises InvalidInput if others may write to it or replace it,
    or if it has more than ``most`` bytes; OSError if it cannot be read.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise InvalidInput(f"{path} is no ordinary file", "give an ordinary file")
        if hasattr(os, "geteuid"):
            if found.st_uid not in (0, os.geteuid()):
                raise InvalidInput(f"{path} belongs to another user (id {found.st_uid})", "use a file of your own")
            open_to = 0o002 if _is_private_group(found) else 0o022
            if found.st_mode & open_to:
                mode = stat.S_IMODE(found.st_mode)
                raise InvalidInput(f"others may write {path} (mode {mode:04o})", f"chmod go-w {path}")
        check_directory(path.parent)
        check_directory(path.resolve().parent)
        content = file.read(most + 1)
    if len(content) > most:
        raise InvalidInput(f"{path} has more than {most} bytes", "give another file")
    return content


def check_directory(directory: Path) -> None:
    """Raise InvalidInput if others may replace files in a directory; also if they may replace a directory above it."""
    if not hasattr(os, "geteuid"):
        return
    for above in _above(directory):
        found = above.lstat()
        if stat.S_ISLNK(found.st_mode):  # what it points to is checked on the other way up
            continue
        if found.st_uid not in (0, os.geteuid()):
            raise InvalidInput(f"{above} belongs to another user (id {found.st_uid})", "use a directory of your own")
        open_to = 0o002 if _is_private_group(found) else 0o022
        if found.st_mode & open_to and not found.st_mode & stat.S_ISVTX:  # in a sticky one, others replace nothing
            mode = stat.S_IMODE(found.st_mode)
            raise InvalidInput(f"others may write to {above} (mode {mode:04o})", f"chmod go-w {above}")


def check_private(directory: Path) -> None:
    """Raise InvalidInput unless a directory is this user's own and closed to others, and nobody else may replace it.

    Raises FileNotFoundError if it is not there.
    """
    found = directory.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise InvalidInput(f"{directory} is no directory", "give a directory of your own")
    if not hasattr(os, "geteuid"):
        return
    if found.st_uid != os.geteuid():
        raise InvalidInput(f"{directory} belongs to another user (id {found.st_uid})", "use a directory of your own")
    if (mode := stat.S_IMODE(found.st_mode)) & 0o077:
        raise InvalidInput(f"others may enter {directory} (mode {mode:04o})", f"chmod 700 {directory}")
    check_directory(directory)


def _read(path: Path, closed: int, most: int) -> bytes:
    with _opened(path, closed) as file:
        content: bytes = file.read(most + 1)
    if len(content) > most:
        raise InvalidInput(f"{path} has more than {most} bytes", "give another file")
    return content


@contextmanager
def _opened(path: Path, closed: int) -> Iterator[IO[bytes]]:
    try:
        file = open(path, "rb", opener=_open)  # noqa: SIM115 (closed below)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise
        why = "is a link" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        raise InvalidInput(f"{path} {why}", "give an ordinary file of your own") from None
    with file:
        found = os.fstat(file.fileno())  # of what was opened, so that nothing can be put in its place in between
        if not stat.S_ISREG(found.st_mode):
            raise InvalidInput(f"{path} is no ordinary file", "give an ordinary file of your own")
        if hasattr(os, "geteuid"):
            if found.st_uid != os.geteuid():
                raise InvalidInput(f"{path} belongs to another user (id {found.st_uid})", "use a file of your own")
            mode = stat.S_IMODE(found.st_mode)
            if mode & closed:
                done = "read or write" if closed & 0o044 else "write"
                raise InvalidInput(f"others may {done} {path} (mode {mode:04o})", f"chmod {mode & ~closed:o} {path}")
        check_directory(path.parent)
        yield file


def _open(path: str, flags: int) -> int:
    """Open no link, and wait for no writer of a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _above(directory: Path) -> Iterator[Path]:
    """Yield a directory and all above it, as written and as links resolve."""
    seen = set[Path]()
    for way in (directory.absolute(), directory.resolve()):
        for each in (way, *way.parents):
            if each not in seen:
                seen.add(each)
                yield each


def _is_private_group(found: os.stat_result) -> bool:
    """Tell whether a directory's group is this user's own, with nobody else in it, as many systems make one a user."""
    with suppress(ImportError, KeyError):
        import grp
        import pwd

        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(found.st_gid)
        return (group.gr_gid, group.gr_name) == (user.pw_gid, user.pw_name) and set(group.gr_mem) <= {user.pw_name}
    return False
