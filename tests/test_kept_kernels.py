"""Kernels that root compiled once, and that a service reads but cannot replace."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numba.core import config
from numba.core.caching import NullCache

from protocols import kept_kernels, kernels
from protocols.kept_kernels import check_directory

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
import numpy as np
from protocols import kernels

def added(x):
    return x + 1

added.__code__ = added.__code__.replace(co_filename=sys.argv[1])
kernel = kernels.compiled(added)
for kind in sys.argv[2:]:
    assert kernel(np.ones(3, kind)).tolist() == [2, 2, 2]
print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def ran(cache: Path, source: Path, *kinds: str, without_rights: bool = False) -> tuple[int, int]:
    """(kernels that were read, kernels that were compiled) by a process. without_rights: as an ordinary user."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(source), *kinds]
    if without_rights and os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and setpriv is not installed")
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", *command]
    found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=60)
    read, made = found.stdout.split()
    return int(read), int(made)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The file that a kernel's cache belongs to."""
    path = tmp_path / "kernel.py"
    path.write_text("x\n")
    return path


def called(made: Any) -> tuple[int, int]:
    """(kernels that were read, kernels that were compiled) when a kernel is called."""
    assert made(1) == 2
    return sum(made.stats.cache_hits.values()), sum(made.stats.cache_misses.values())


def compiled(source: Path) -> Any:
    """A kernel that is kept in numba's directory, as a new process makes it."""

    def added(x: int) -> int:
        return x + 1

    added.__code__ = added.__code__.replace(co_filename=str(source))
    return kernels.compiled(added)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that was given to numba."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_what_cannot_be_written_is_read(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "kept"
    assert ran(cache, source, "int64") == (0, 1)
    (inner,) = cache.iterdir()
    before = sorted(inner.iterdir())
    assert before
    check_directory(str(inner))
    for path in (inner, cache):
        path.chmod(0o555)
    assert ran(cache, source, "int64", "int32", without_rights=True) == (1, 1)
    assert sorted(inner.iterdir()) == before  # the second one was compiled, and not kept
    inner.chmod(0o755)
    for path in before:
        path.chmod(0)
    assert ran(cache, source, "int64", without_rights=True) == (0, 1)  # what cannot be read is no mistake


def of_another(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 65534, -1, follow_symlinks=False)


def behind_a_link(path: Path) -> None:
    """A file that is a link to one with the same content."""
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


UNSAFE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "directory that others may write to": (".", lambda path: path.chmod(0o757)),
    "directory that others may write to, sticky": (".", lambda path: path.chmod(0o1777)),
    "directory of another": (".", of_another),
    "directory above that others may write to": ("..", lambda path: path.chmod(0o777)),
    "directory above of another": ("..", of_another),
    "index that others may write": ("*.nbi", lambda path: path.chmod(0o646)),
    "index of another": ("*.nbi", of_another),
    "index that is a link": ("*.nbi", behind_a_link),
    "code that others may write": ("*.nbc", lambda path: path.chmod(0o646)),
    "code of another": ("*.nbc", of_another),
}


@pytest.mark.parametrize("how", UNSAFE)
def test_what_others_may_write_is_not_read(how: str, source: Path, cache: Path) -> None:
    assert called(compiled(source)) == (0, 1)
    assert called(compiled(source)) == (1, 0)
    (inner,) = cache.iterdir()
    what, spoil = UNSAFE[how]
    (path,) = inner.glob(what) if "*" in what else [inner / what]
    spoil(path)
    before = sorted(each.name for each in inner.iterdir())
    assert called(compiled(source)) == (0, 1)
    assert sorted(each.name for each in inner.iterdir()) == before


def test_what_is_made_between_the_import_and_the_first_call(source: Path, cache: Path) -> None:
    """A directory that is not there is safe only until somebody else makes it."""
    assert called(compiled(source)) == (0, 1)
    (inner,) = cache.iterdir()
    inner.rename(cache / "aside")
    made = compiled(source)
    (cache / "aside").rename(inner)
    inner.chmod(0o777)
    assert called(made) == (0, 1)


def test_a_sticky_directory_above_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, link = tmp_path / "above" / "inner", tmp_path / "links" / "link"
    inner.mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(inner)
    for mode in (0o755, 0o1777):
        inner.parent.chmod(mode)
        check_directory(str(inner))
    monkeypatch.chdir(inner.parent)
    check_directory("inner")
    check_directory(str(link))
    link.parent.chmod(0o777)
    with pytest.raises(PermissionError, match=f"others may write {link.parent}$"):
        check_directory(str(link))
    second = tmp_path / "second"  # by a link to a link, whose directory others may write to
    second.symlink_to(link)
    with pytest.raises(PermissionError, match=f"others may write {link.parent}$"):
        check_directory(str(second))
    second.unlink()
    second.symlink_to(second)
    with pytest.raises(OSError, match="symbolic links"):
        check_directory(str(second))
    with pytest.raises(FileNotFoundError):
        check_directory(str(tmp_path / "none"))
    if os.geteuid() == 0:
        link.parent.chmod(0o755)
        os.chown(link, 65534, -1, follow_symlinks=False)
        with pytest.raises(PermissionError, match=f"others may write {link}$"):
            check_directory(str(link))


def test_a_group_may_write_if_nobody_else_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o775)
    own = pwd.getpwuid(os.geteuid())
    group = grp.struct_group((own.pw_name, "x", own.pw_gid, []))
    monkeypatch.setattr(grp, "getgrgid", lambda _: group)
    check_directory(str(tmp_path))
    for other in ((own.pw_name, "x", own.pw_gid, ["mallory"]), ("users", "x", own.pw_gid, [])):
        group = grp.struct_group(other)
        with pytest.raises(PermissionError):
            check_directory(str(tmp_path))


def test_nothing_else_is_tried_where_a_directory_is_given(source: Path, tmp_path: Path) -> None:
    """numba itself goes on to the user's cache if it may not write to the directory that it was given."""
    assert ran(tmp_path / "no" / "such", source, "int64", without_rights=True) == (0, 1)
    assert ran(Path("/proc/nowhere"), source, "int64") == (0, 1)


def test_kernels_without_a_directory_to_keep_them_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service's user may have no home, and no right to write to the package."""

    def one_more(x: int) -> int:
        return x + 1

    monkeypatch.setattr(config, "CACHE_DIR", "/x")
    monkeypatch.setattr(kept_kernels._InGivenPlace, "_locator_classes", [])
    made = kernels.compiled(one_more)
    assert made(1) == 2
    assert isinstance(made._cache, NullCache)  # type: ignore[attr-defined]
